"""Hidden states of every family of vision towers against the library that the family comes from."""

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from avg_llava.model.towers import TOWERS, find_tower
from tests.tiny import tiny_config, towers


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
    inputs = {"pixel_values": pixels}
    if tower.model_type == "siglip2_vision_model":
        side = config.num_patches_per_side
        patches = [convert_image_to_patches(crop.numpy(), tower.patch_size) for crop in pixels]
        inputs = {
            "pixel_values": torch.stack([torch.from_numpy(rows) for rows in patches]),
            "pixel_attention_mask": torch.ones(3, side**2, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * 3),
        }
    with torch.no_grad():
        expected = theirs(**inputs, output_hidden_states=True).hidden_states[layer]
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
    assert len(model.granularities) == 5


@pytest.mark.parametrize("name", towers())
def test_feed_forward_sizes_are_those_of_the_layers(name):
    tower = towers()[name]
    family = find_tower(tower)
    width, matrices = family.feed_forward(tower)
    layer = family.layers(family.build(tower))[0]
    weights = [module.weight.numel() for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(weights) == 4 * tower.hidden_size**2 + matrices * width * tower.hidden_size


def test_towers_that_do_not_fit_are_refused():
    with pytest.raises(Exception, match=r"vision_config\.model_type must be one of clip_vision_model, siglip_vision_"):
        tiny_config({"model_type": "vit"})
    with pytest.raises(Exception, match=r"crops and patches must be squares, got sides \[32, 64\] and 4 px"):
        tiny_config(Dinov2Config(image_size=[32, 64], patch_size=4))
    with pytest.raises(Exception, match="'full' where it has none: with siglip_vision_model 'full', got 'default'"):
        tiny_config(towers()["siglip"], vision_feature_select_strategy="default")
    assert set(TOWERS) > {tower.model_type for tower in towers().values()}
