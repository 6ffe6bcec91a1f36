"""A processor with the golden tokenizer and small crops, and folders of records and images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avg_llava import AvgLlavaConfig, AvgLlavaProcessor
from tests.parity.golden import GOLDEN
from tests.tiny import language_config, tiny_config, vision_config


@pytest.fixture(scope="session")
def config() -> AvgLlavaConfig:
    """Crops of 32 pixels and 4x4 patches: levels 1, 2, 4, 8, 16."""
    return tiny_config(vision_config(patch_size=8), language_config(vocab_size=512), max_sequence_length=4096)


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
