"""Golden tensors of the released implementation; tests/data/golden/README.md tells what they are."""

import json
from pathlib import Path

import torch
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
