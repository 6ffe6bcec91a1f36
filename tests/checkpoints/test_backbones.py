"""Models of every family of backbones, from published files through training to a reloaded model that answers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
)

from avg_llava import Pipeline
from avg_llava.checkpoints.loading import build_from_backbones
from avg_llava.checkpoints.weight_files import CheckpointError, read_tensors
from avg_llava.common.settings import build
from avg_llava.model.processing import AvgLlavaProcessor
from avg_llava.model.templates import TEMPLATES
from avg_llava.training import run
from avg_llava.training.config import TrainConfig
from tests.tiny import bpe_tokenizer, language_models, noise_images, stage_values, towers, write_backbones, write_data


def train_and_ask(vision: str, folder: Path, root: Path) -> Pipeline:
    """Trains stage 1 on backbones, reloads the result, checks it, and asks it at every level.

    Args:
        vision: The tower, as in a stage's YAML file.
        folder: The language model in `language`, and data.
        root: Gets the run.
    """
    values = stage_values(1, root, folder)
    values["model"]["vision"] = vision
    values["optim"]["max_steps"] = 2  # the learning rate of the first is 0
    run.run_stage(build(TrainConfig, values))
    start = build_from_backbones(vision, folder / "language").state_dict()
    pipeline = Pipeline.load(root / "stage1")
    trained = pipeline.model.state_dict()
    assert trained.keys() == start.keys()
    for name, tensor in start.items():
        if name.startswith(("model.vision_tower.", "model.language_model.", "lm_head.")):
            assert torch.equal(trained[name], tensor), name
    assert trained["model.multi_modal_projector.linear_1.bias"].abs().min() > 0, "zero before the first step"
    pipeline.processor.chat_template = TEMPLATES["vicuna_v1"].jinja  # GPT-NeoX has none of its own
    image = noise_images()[0]
    for level in pipeline.model.config.granularities:
        answer = pipeline.ask(image, "What colour is it?", granularity=level, max_new_tokens=3)
        assert answer.granularity == (level,)
        assert 0 < answer.num_new_tokens <= 3
    routed = pipeline.ask(image, "What colour is it?", max_new_tokens=1)
    assert set(routed.granularity) <= set(pipeline.model.config.granularities)
    return pipeline


@pytest.mark.parametrize("name", ["siglip", "siglip2", "dinov2", "dinov2_registers"])
def test_towers_train_and_answer(world, tmp_path, name):
    AutoModel.from_config(towers()[name]).save_pretrained(tmp_path / "tower")
    pipeline = train_and_ask(str(tmp_path / "tower"), world, tmp_path)
    assert pipeline.model.config.vision_config.model_type == towers()[name].model_type


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox"])
def test_language_models_train_and_answer(tmp_path, name):
    """Sliding windows of 6 tokens, tied embeddings, soft caps and other names of layers."""
    tokenizer = bpe_tokenizer()
    write_backbones(tmp_path, language=language_models(tokenizer)[name], tokenizer=tokenizer)
    write_data(tmp_path, num_samples=4)
    pipeline = train_and_ask(str(tmp_path / "vision"), tmp_path, tmp_path)
    assert pipeline.model.config.text_config.model_type == language_models()[name].model_type


def test_towers_are_taken_from_whole_models(world, tmp_path):
    """Text model, pooling head, projections and scales are left out."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**sizes, "image_size": 32, "patch_size": 4}
    whole = {
        "clip": CLIPModel(CLIPConfig(text_config=CLIPTextConfig(**text).to_dict(), vision_config=vision)),
        "siglip": SiglipModel(SiglipConfig(text_config=SiglipTextConfig(**text).to_dict(), vision_config=vision)),
    }
    for name, model in whole.items():
        model.save_pretrained(tmp_path / name)
        tower = build_from_backbones(tmp_path / name, world / "language").model.vision_tower
        expected = model.vision_model.state_dict()
        assert not [key for key in tower.state_dict() if key.startswith("head.")]
        for key, tensor in tower.state_dict().items():
            assert torch.equal(tensor, expected[key]), key


def test_layers_without_a_head_are_refused(world, tmp_path):
    config = language_models(bpe_tokenizer())["llama"]
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no weight's name begins with 'model\.'; these are not"):
        build_from_backbones(world / "vision", tmp_path)


def test_gpt_neox_as_published(tmp_path):
    """Older files call the head `embed_out` and hold masks that are no weights."""
    write_backbones(tmp_path, language=language_models()["gpt_neox"])
    file = tmp_path / "language" / "model.safetensors"
    weights = {
        key.replace("lm_head.", "embed_out."): tensor.clone() for key, tensor in read_tensors(file.parent).items()
    }
    for layer in range(2):
        weights[f"gpt_neox.layers.{layer}.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        weights[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
        weights[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, file, {"format": "pt"})
    model = build_from_backbones(tmp_path / "vision", tmp_path / "language")
    assert torch.equal(model.lm_head.weight, weights["embed_out.weight"])


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("clip", 0.48145466, 0.26862954),
        ("siglip", 0.5, 0.5),
        ("siglip2", 0.5, 0.5),
        ("dinov2", 0.485, 0.229),
        ("dinov2_registers", 0.485, 0.229),
    ],
)
def test_pixel_statistics_are_the_folder_s_or_the_family_s(world, tmp_path, name, mean, std):
    AutoModel.from_config(towers()[name]).save_pretrained(tmp_path)
    config = build_from_backbones(tmp_path, world / "language").config
    processor = AvgLlavaProcessor.from_backbones(tmp_path, world / "language", config).image_processor
    assert (processor.image_mean[0], processor.image_std[0], processor.resample) == (mean, std, 3)
    assert processor.crop_size["height"] == config.crop_size
    assert processor.image_grid_pinpoints == config.image_grid_pinpoints
    stored = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6), "resample": 2, "size": {"height": 999}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    processor = AvgLlavaProcessor.from_backbones(tmp_path, world / "language", config).image_processor
    assert (processor.image_mean, processor.image_std, processor.resample) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 2)
    assert processor.crop_size["height"] == config.crop_size
