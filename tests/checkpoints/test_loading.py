"""Saving and loading: round trips, transformers' LLaVA-NeXT folders in both key layouts, backbones, damaged folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionModel,
    DynamicCache,
    LlamaForCausalLM,
    StaticCache,
)

from avg_llava import AvgLlavaConfig, AvgLlavaForConditionalGeneration, build_from_backbones, load_model
from avg_llava.checkpoints.weight_files import CheckpointError
from tests.parity.golden import GOLDEN
from tests.tiny import images, llava_next, prompt, tiny_config, tiny_model


def _assert_same_weights(model, other, without=()):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if not name.startswith(tuple(without)):
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(tmp_path, dtype):
    model = tiny_model(behavior="released", granularities=[4, 16, 64]).to(dtype)
    model.save_pretrained(tmp_path)
    for loaded in (
        load_model(tmp_path),
        AvgLlavaForConditionalGeneration.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path),
    ):
        assert isinstance(loaded, AvgLlavaForConditionalGeneration)
        assert loaded.dtype == dtype
        assert loaded.config.behavior == "released"
        assert loaded.config.granularities == [4, 16, 64]
        assert loaded.config.router_config.num_text_tokens == 12
        _assert_same_weights(model, loaded)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), AvgLlavaConfig)


def test_static_cache(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for asked, kind in ((False, DynamicCache), (True, StaticCache)):
        model = load_model(tmp_path, static_cache=asked)
        output = model.generate(prompt(9)[None], max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0)
        assert type(output.past_key_values) is kind


def test_original_format_saved_and_loaded_again(tmp_path):
    model = load_model(GOLDEN / "checkpoint")
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    _assert_same_weights(model, again)
    provenance = dict.fromkeys(("dtype", "_name_or_path", "architectures"))
    assert again.config.to_dict() | provenance == model.config.to_dict() | provenance


def test_sharded_files(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    _assert_same_weights(model, load_model(tmp_path))


NEWER_TO_OLDER = [  # in-memory names to those of the hub's older files
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
]


def _renamed(weights, renaming):
    renamed = {}
    for name, tensor in weights.items():
        old, new = next(pair for pair in renaming if name.startswith(pair[0]))
        renamed[name.replace(old, new, 1)] = tensor.clone()
    return renamed


@pytest.mark.parametrize("layout", ["saved", "older", "newer"])
def test_transformers_llava_next_folder(tmp_path, layout):
    """All key layouts of files on the hub; only the router is fresh."""
    reference = llava_next(tiny_model().config)
    reference.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    if layout == "older":
        save_file(_renamed(weights, NEWER_TO_OLDER), tmp_path / "model.safetensors", {"format": "pt"})
    elif layout == "newer":
        tower = [("model.vision_tower.", "model.vision_tower.vision_model."), ("", "")]
        save_file(_renamed(weights, tower), tmp_path / "model.safetensors", {"format": "pt"})
    model = load_model(tmp_path)
    for name, tensor in weights.items():
        assert torch.equal(model.get_parameter(name), tensor), name
    assert model.model.router.router[0].weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert model.config.behavior == "paper"


def test_backbones_are_joined(tmp_path):
    source = tiny_model()
    vision = CLIPVisionModel(source.config.vision_config)
    language = LlamaForCausalLM(source.config.text_config)
    vision.save_pretrained(tmp_path / "tower")
    language.save_pretrained(tmp_path / "llm")
    model = build_from_backbones(tmp_path / "tower", tmp_path / "llm", granularities=[16, 64])
    assert model.config.image_token_id == language.config.vocab_size
    for name, tensor in vision.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor), name
    for name, tensor in language.model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], tensor), name
    assert torch.equal(model.lm_head.weight, language.lm_head.weight)
    assert model.model.image_newline.std().item() == pytest.approx(64**-0.5, rel=0.3)
    with torch.no_grad():
        output = model(prompt(8, 3)[None], **images(model.config, (64, 40)))
    assert output.logits.isfinite().all()


def test_tied_embeddings(tmp_path):
    source = tiny_model()
    source.config.text_config.tie_word_embeddings = True
    language = LlamaForCausalLM(source.config.text_config)
    language.save_pretrained(tmp_path / "llm")
    CLIPVisionModel(source.config.vision_config).save_pretrained(tmp_path / "tower")
    model = build_from_backbones(tmp_path / "tower", tmp_path / "llm")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path / "joined")
    again = load_model(tmp_path / "joined")
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    _assert_same_weights(model, again)


@pytest.fixture
def original(tmp_path):
    folder = tmp_path / "anything"
    shutil.copytree(GOLDEN / "checkpoint", folder)
    return folder


def _edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_every_wrong_key_is_listed_in_one_error(original):
    def spoil(weights):
        del weights["model.norm.weight"], weights["model.router.voter"]
        weights["model.stranger"] = torch.zeros(2)
        weights["lm_head.weight"] = torch.zeros(7, 64)

    _edit(original, spoil)
    with pytest.raises(CheckpointError) as error:
        load_model(original)
    text = str(error.value)
    assert "4 keys" in text
    assert "missing    model.language_model.norm.weight" in text
    assert "missing    model.router.voter" in text
    assert "unexpected model.language_model.stranger" in text
    assert "shape      lm_head.weight: (7, 64) in the checkpoint, (320, 64) in the model" in text


def test_original_checkpoint_without_router_gets_a_fresh_one(original):
    _edit(original, lambda weights: [weights.pop(key) for key in list(weights) if ".router." in key])
    model = load_model(original)
    assert model.config.behavior == "released"  # by its vis_token_granularity
    assert model.model.router.router[0].weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)


def test_tower_missing_from_the_checkpoint_comes_from_its_own_folder(original):
    expected = load_model(original)
    _edit(original, lambda weights: [weights.pop(key) for key in list(weights) if ".vision_tower." in key])
    _assert_same_weights(expected, load_model(original))


def test_avg_llava_folder_must_be_complete(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    _edit(tmp_path, lambda weights: [weights.pop(key) for key in list(weights) if "router.voter" in key])
    with pytest.raises(CheckpointError, match=r"missing    model\.router\.voter"):
        load_model(tmp_path)


def test_folders_that_are_no_models(tmp_path, original):
    with pytest.raises(ValueError, match="no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type 'bert'"):
        load_model(tmp_path)
    weights = (original / "model.safetensors").read_bytes()
    (original / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(original)
    (original / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_model(original)


def test_unsupported_original_settings_are_named(original):
    raw = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(raw | {"mm_patch_merge_type": "spatial"}))
    with pytest.raises(ValueError, match="mm_patch_merge_type is 'spatial'"):
        load_model(original)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularities": [16, 4]}, "coarse to fine"),
        ({"granularities": [5]}, "granularity 5 is no level"),
        ({"behavior": "other"}, "behavior"),
        ({"router_config": {"num_attention_heads": 7}}, "does not divide"),
        ({"router_config": {"dropout": 1.5}}, "dropout"),
        ({"vision_feature_select_strategy": "full"}, "class token"),
    ],
)
def test_configurations_are_checked(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**fields)
