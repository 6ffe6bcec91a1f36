"""Hidden states of every family of vision towers against the library that the family comes from."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedModel,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from avg_llava import load_model
from avg_llava.checkpoints.loading import build_from_backbones
from avg_llava.model.towers import TOWERS, find_tower
from tests.tiny import tiny_config, towers, write_backbones

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"


def library_states(tower: PreTrainedModel, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """Hidden states of crops after a layer by transformers' own forward pass, class token and registers included."""
    inputs = {"pixel_values": pixels}
    if tower.config.model_type == "siglip2_vision_model":
        size = tower.config.patch_size
        patches = torch.stack([torch.from_numpy(convert_image_to_patches(crop.numpy(), size)) for crop in pixels])
        count, side = len(pixels), pixels.shape[-1] // size
        inputs = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(count, side**2, dtype=torch.long),
            "spatial_shapes": torch.full((count, 2), side),
        }
    with torch.no_grad():
        return tower(**inputs, output_hidden_states=True).hidden_states[layer]


@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
@pytest.mark.parametrize("name", towers())
def test_hidden_states_are_the_library_s(name, layer):
    tower = towers()[name]
    config = tiny_config(tower, vision_feature_layer=layer)
    torch.manual_seed(0)
    theirs = AutoModel.from_config(tower).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    pixels = torch.randn(3, 3, config.crop_size, config.crop_size)
    expected = library_states(theirs, pixels, layer)
    with torch.no_grad():
        found = config.tower.encode(theirs, pixels, config.num_vision_layers)
    assert found.shape == (3, config.num_patches_per_side**2, tower.hidden_size)
    torch.testing.assert_close(found, expected[:, expected.shape[1] - found.shape[1] :], atol=1e-5, rtol=1e-5)


def test_crops_and_prefixes():
    prefixes = {"clip": 1, "siglip": 0, "siglip2": 0, "dinov2": 1, "dinov2_swiglu": 1, "dinov2_registers": 4}
    for name, tower in towers().items():
        config = tiny_config(tower)
        assert config.num_prefix_tokens == prefixes[name]
        assert config.vision_feature_select_strategy == ("default" if prefixes[name] else "full")
        assert config.image_grid_pinpoints[2] == [2 * config.crop_size] * 2


@pytest.mark.parametrize(
    ("config", "crop", "side"),
    [
        (CLIPVisionConfig(image_size=336, patch_size=14), 336, 24),
        (SiglipVisionConfig(image_size=384, patch_size=14), 384, 27),
        (Siglip2VisionConfig(num_patches=256, patch_size=16), 256, 16),
        (Dinov2Config(image_size=518, patch_size=14), 518, 37),
        (Dinov2WithRegistersConfig(image_size=518, patch_size=14), 518, 37),
    ],
)
def test_grids_of_published_sizes(config, crop, side):
    model = tiny_config(config)
    assert (model.crop_size, model.num_patches_per_side) == (crop, side)
    levels = ", ".join(map(str, model.granularities))
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith(f"| `{config.model_type}`")]
    assert [row.endswith(f"| {crop} | {side} x {side} | {levels} |") for row in rows] == [True]


@pytest.mark.parametrize("name", towers())
def test_feed_forward_sizes_are_those_of_the_layers(name):
    tower = towers()[name]
    family = find_tower(tower)
    width, matrices = family.feed_forward(tower)
    layer = family.layers(family.build(tower))[0]
    weights = [module.weight.numel() for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(weights) == 4 * tower.hidden_size**2 + matrices * width * tower.hidden_size


def test_the_example_of_the_documentation(tmp_path):
    """A family of one's own: from a published model with a classifier to features and answers."""
    runpy.run_path(str(Path(__file__).parents[2] / "docs" / "examples" / "extending" / "tower.py"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    try:
        theirs = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=4)).eval()
        write_backbones(tmp_path)
        theirs.save_pretrained(tmp_path / "vit")
        model = build_from_backbones(tmp_path / "vit", tmp_path / "language")
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            found = model.config.tower.encode(model.model.vision_tower, pixels, model.config.num_vision_layers)
        torch.testing.assert_close(found, library_states(theirs, pixels, -2)[:, 1:], atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path / "model")
        loaded = load_model(tmp_path / "model")
        assert torch.equal(loaded.model.encode_crops(pixels), model.model.encode_crops(pixels))
    finally:
        del TOWERS["vit"]


def test_towers_that_do_not_fit_are_refused():
    with pytest.raises(Exception, match=r"vision_config\.model_type must be one of clip_vision_model, siglip_vision_"):
        tiny_config({"model_type": "beit"})
    with pytest.raises(Exception, match=r"crops and patches must be squares, got sides \[32, 64\] and 4 px"):
        tiny_config(Dinov2Config(image_size=[32, 64], patch_size=4))
    with pytest.raises(Exception, match="'full' where it has none: with siglip_vision_model 'full', got 'default'"):
        tiny_config(towers()["siglip"], vision_feature_select_strategy="default")
    assert set(TOWERS) > {tower.model_type for tower in towers().values()}
