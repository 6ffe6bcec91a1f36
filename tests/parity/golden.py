"""Golden tensors of the released implementation; tests/data/golden/README.md tells what they are."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
ORIGINAL_IMAGE_TOKEN = -200

# Images of the golden data, as (width, height) in its JSON.
SIZES = {
    "sq192": (192, 192),
    "w300x200": (300, 200),
    "t200x300": (200, 300),
    "w400x120": (400, 120),
    "t110x410": (110, 410),
    "w100x60": (100, 60),
}


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and JSON of one golden file."""
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())


def golden_image(width: int, height: int, index: int) -> Image.Image:
    """The synthetic image of the golden data: integer arithmetic on columns x, rows y and the image's index."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    red = (255 * x // max(width - 1, 1) + 37 * index) % 256
    green = (255 * y // max(height - 1, 1) + 91 * index) % 256
    blue = (x * x // 16 + y * y // 9 + x * y // 25 + 13 * index) % 256
    red = np.minimum(255, red + 60 * ((x // 7 + y // 5) % 2))
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))
