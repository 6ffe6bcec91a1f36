"""Tests of open_clip towers, which `test_open_clip.py` runs in a process that has open_clip and torchvision."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from avg_llava.checkpoints.backbones import read_tower_config
from avg_llava.checkpoints.loading import build_from_backbones
from avg_llava.checkpoints.weight_files import CheckpointError
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.open_clip_tower import OpenClipVisionConfig
from avg_llava.model.processing import AvgLlavaProcessor
from avg_llava.training.config import LoraSettings
from avg_llava.training.lora import add_adapters
from tests.checkpoints.test_backbones import train_and_ask
from tests.tiny import tiny_config

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 4, "mlp_ratio": 2.0}
VARIANTS = {
    "clip": {},
    "quick": {"quick_gelu": True},
    "clipa": {"vision_cfg": {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}},
    "coca": {"vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2, "ls_init_value": 0.5}},
    "custom": {"vision_cfg": {"qk_norm": True, "scale_attn": True, "scale_fc": True, "patch_dropout": 0.5}},
    "positions": {"vision_cfg": {"pos_embed_type": "sin_cos_2d", "norm_kwargs": {"eps": 1e-6}}},
}
PREPROCESSING = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}


def write_model(folder: Path, variant: str = "clip", weights: str = "open_clip_model.safetensors") -> open_clip.CLIP:
    """Writes a random model as open_clip's `push_to_hf_hub` does."""
    fields = {"embed_dim": 24, "text_cfg": TEXT, **VARIANTS[variant]}
    fields["vision_cfg"] = {**VISION, **fields.get("vision_cfg", {})}
    torch.manual_seed(0)
    model = open_clip.CLIP(**fields).eval()
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": fields, "preprocess_cfg": PREPROCESSING}))
    if weights.endswith(".safetensors"):
        save_file(model.state_dict(), folder / weights)
    else:
        torch.save(model.state_dict(), folder / weights)
    return model


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_are_open_clip_s(world, tmp_path, variant, layer):
    write_model(tmp_path / "tower", variant)
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'tower'}", load_weights=True).visual.eval()
    model = build_from_backbones(tmp_path / "tower", world / "language", vision_feature_layer=layer)
    assert not [name for name in model.model.vision_tower.state_dict() if "proj" in name.split(".") or "pool" in name]
    pixels = torch.randn(3, 3, 32, 32)
    index = layer - 1 if layer > 0 else layer  # of a layer; hidden state 0 is the input of the first
    with torch.no_grad():
        found = model.config.tower.encode(model.model.vision_tower, pixels, model.config.num_vision_layers)
        expected = theirs.forward_intermediates(
            pixels, indices=[index % 3], normalize_intermediates=False, output_fmt="NLC", intermediates_only=True
        )["image_intermediates"][0]
    assert found.shape == (3, 64, 32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_towers_train_and_answer(world, tmp_path, weights):
    write_model(tmp_path / "tower", weights=weights)
    pipeline = train_and_ask(f"open_clip:{tmp_path / 'tower'}", world, tmp_path)
    config = pipeline.model.config.vision_config
    assert isinstance(config, OpenClipVisionConfig)
    processor = pipeline.processor.image_processor
    assert (processor.image_mean, processor.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (processor.resample, processor.crop_size["height"]) == (2, 32)


def test_gradient_checkpointing_changes_nothing(world, tmp_path):
    write_model(tmp_path / "tower")
    model = build_from_backbones(tmp_path / "tower", world / "language").train()
    pixels = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
            assert model.model.vision_tower.gradient_checkpointing
        model.zero_grad()
        model.model.encode_crops(pixels).square().sum().backward()
        gradients.append(model.model.vision_tower.conv1.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_adapters_of_a_tower_are_all_trained(world, tmp_path):
    """Not in the attention, which reads the weights of its linear layer without calling it."""
    write_model(tmp_path / "tower")
    model = build_from_backbones(tmp_path / "tower", world / "language", vision_feature_layer=-1)
    add_adapters(model, LoraSettings(rank=2, vision=True), seed=0)
    adapters = {
        name: weight for name, weight in model.named_parameters() if "vision_tower" in name and ".lora_B." in name
    }
    assert len(adapters) == 3 * 2, "the two matrices of the feed-forward part of each layer"
    model.model.encode_crops(torch.randn(1, 3, 32, 32)).square().sum().backward()
    for name, weight in adapters.items():
        assert weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("name", "quick", "size"),
    [("ViT-L-14-336/openai", True, (336, 14, 24)), ("ViT-B-16/laion2b_s34b_b88k", False, (224, 16, 12))],
)
def test_models_that_open_clip_knows(world, name, quick, size):
    """OpenAI's weights need QuickGELU, also under the name without it; nothing is downloaded for the configuration."""
    config = read_tower_config(f"open_clip:{name}")
    assert config.quick_gelu is quick
    assert (config.image_size, config.patch_size, config.num_hidden_layers) == size
    whole = AvgLlavaConfig(vision_config=config, text_config=tiny_config().text_config)
    processor = AvgLlavaProcessor.from_backbones(f"open_clip:{name}", world / "language", whole).image_processor
    assert processor.image_mean == open_clip.OPENAI_DATASET_MEAN
    with pytest.raises(CheckpointError, match=f"^open_clip:{name}: the weights cannot be downloaded"):
        build_from_backbones(f"open_clip:{name}", world / "language")


def test_models_on_the_hub(world, tmp_path, monkeypatch):
    """The local cache, as open_clip's download leaves it, is read without a connection."""
    repository = tmp_path / "hub" / "models--owner--name"
    model = write_model(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tower = build_from_backbones("open_clip:hf-hub:owner/name", world / "language").model.vision_tower
    assert torch.equal(tower.conv1.weight, model.visual.conv1.weight)
    with pytest.raises(CheckpointError, match=r"^open_clip:hf-hub:owner/other: Failed to download file"):
        read_tower_config("open_clip:hf-hub:owner/other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-SO400M-14-SigLIP-384/webli", "tower is vit_so400m_patch14_siglip_384, not open_clip's own"),
        ("RN50/openai", "tower is a ResNet, not open_clip's own"),
        ("ViT-L-14-336/other", "open_clip has no weights 'other' of ViT-L-14-336, only openai"),
        ("ViT-XXL/openai", "neither a folder with open_clip_config.json, nor hf-hub:owner/name, nor NAME/TAG"),
    ],
)
def test_models_that_cannot_be_used_are_refused_by_name(name, message):
    with pytest.raises(Exception, match=message):
        read_tower_config(f"open_clip:{name}")


def test_damaged_folders(world, tmp_path):
    folder = tmp_path / "tower"
    write_model(folder)
    (folder / "open_clip_model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no weights of open_clip, none of open_clip_model\.safetensors"):
        build_from_backbones(folder, world / "language")
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json has no model_cfg"):
        read_tower_config(folder)
    (folder / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 4, "vision_cfg": {"colour": 1}}}')
    with pytest.raises(CheckpointError, match=r"incomplete or unknown .*colour"):
        read_tower_config(folder)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"neither a folder with open_clip_config\.json"):
        read_tower_config(f"open_clip:{folder}")
