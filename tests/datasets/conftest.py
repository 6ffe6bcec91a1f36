"""A processor with the golden tokenizer and small crops, and folders of records and images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig

from avg_llava import AvgLlavaConfig, AvgLlavaProcessor

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture(scope="session")
def config() -> AvgLlavaConfig:
    """Crops of 32 pixels and 4x4 patches: levels 1, 2, 4, 8, 16."""
    vision = CLIPVisionConfig(
        image_size=32, patch_size=8, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64
    )
    text = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, vocab_size=512)
    return AvgLlavaConfig(vision_config=vision, text_config=text, image_token_index=512, max_sequence_length=4096)


@pytest.fixture(scope="session")
def processor(config) -> AvgLlavaProcessor:
    return AvgLlavaProcessor.from_backbones(None, GOLDEN / "tokenizer_tiny", config)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two readable images, one that is not an image, and one that is cut off."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "wide.png")
    Image.fromarray(pixels[:, :20]).save(tmp_path / "images" / "tall.png")
    (tmp_path / "images" / "text.png").write_text("no image")
    content = (tmp_path / "images" / "wide.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(content[: len(content) // 2])
    return tmp_path


def record(identity: Any, question: str, answer: str, *images: str) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    content = {"id": identity, "conversations": turns}
    if images:
        content["image"] = images[0] if len(images) == 1 else list(images)
    return content


def write(folder: Path, *records: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(list(records)))
    return path
