"""Variants of the original code's layout: language models, vision towers, pinpoints, LLaVA-1.5, refusals by name."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from avg_llava import load, load_model
from avg_llava.checkpoints.formats import open_checkpoint
from avg_llava.checkpoints.original import KNOWN_TOWERS, known_tower
from avg_llava.checkpoints.weight_files import CheckpointError
from avg_llava.model.anyres import num_visual_tokens
from tests.parity.golden import GOLDEN
from tests.tiny import bpe_tokenizer, images, prompt, vision_config

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LANGUAGE_MODELS = {
    "llava_llama": (LlamaForCausalLM, {"num_key_value_heads": 2, "rope_theta": 5e5}),
    "llava_mistral": (MistralForCausalLM, {"num_key_value_heads": 2, "rope_theta": 1e6, "sliding_window": None}),
    "llava_qwen": (Qwen2ForCausalLM, {"num_key_value_heads": 2, "rope_theta": 1e6}),
    "llava_mixtral": (MixtralForCausalLM, {"num_key_value_heads": 2, "rope_theta": 1e6, "num_local_experts": 4}),
}
ARCHITECTURES = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_qwen": "LlavaQwenForCausalLM",
    "llava_mixtral": "LlavaMixtralForCausalLM",
}


def write_original(folder, variant="llava_llama", tower=None, tower_inside=True, vocab_size=64, **changes):
    """Writes a LLaVA-NeXT as the original code saves it, and returns its language model and its tower."""
    kind, fields = LANGUAGE_MODELS[variant]
    torch.manual_seed(0)
    language = kind(kind.config_class(**TEXT, vocab_size=vocab_size, **fields)).eval()
    tower = tower or CLIPVisionModel(vision_config(num_hidden_layers=3)).eval()
    width, vision_width = language.config.hidden_size, tower.config.hidden_size
    language.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if tower_inside:
        named = {f"vision_tower.vision_tower.vision_model.{name}": t for name, t in tower.state_dict().items()}
        weights |= {f"model.{name}": tensor.clone() for name, tensor in named.items()}
    shapes = {"0.weight": (width, vision_width), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    weights |= {f"model.mm_projector.{name}": torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    weights["model.image_newline"] = torch.randn(width)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tower.save_pretrained(folder / "tower")
    raw = json.loads((folder / "config.json").read_text()) | TEXT | fields | {"vocab_size": vocab_size}
    raw = {name: value for name, value in raw.items() if name not in ("rope_parameters", "layer_types")} | {
        "model_type": variant,
        "architectures": [ARCHITECTURES[variant]],
        "mm_vision_tower": "tower",
        "mm_hidden_size": vision_width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
        "tokenizer_model_max_length": 2048,
        "unfreeze_mm_vision_tower": True,
    }
    raw = {name: value for name, value in (raw | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(raw))
    return language, tower


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("variant", LANGUAGE_MODELS)
def test_language_models(tmp_path, variant, is_named):
    """By `architectures`; `model_type` may be `llava`. Rotary frequencies and key-value heads are the checkpoint's."""
    language, _ = write_original(tmp_path, variant, model_type=variant if is_named else "llava")
    model = load_model(tmp_path)
    ids = prompt(20)[None]
    with torch.no_grad():
        difference = (model(ids).logits - language(ids).logits).abs().max().item()
    assert difference <= 1e-5
    assert model.config.text_config.model_type == variant.removeprefix("llava_").replace("qwen", "qwen2")
    assert model.config.max_sequence_length == 2048


def test_without_architectures_the_model_type_decides(tmp_path):
    write_original(tmp_path, "llava_mistral", architectures="absent")
    assert load_model(tmp_path).config.text_config.model_type == "mistral"


class TestTower:
    def test_a_path_of_another_machine_is_matched_by_its_last_part(self):
        name = "clip-vit-large-patch14-336"
        for path in (f"/data/models/{name}", f"D:\\weights\\{name}", f"./x/{name}/"):
            assert known_tower(path) == f"openai/{name}"
        assert known_tower("/data/clip-vit-large-patch14-336-tuned") is None

    def test_weights_inside_say_the_shape_of_an_unknown_tower(self, tmp_path):
        tower = CLIPVisionModel(vision_config(48, 8, hidden_size=128, num_attention_heads=2, num_hidden_layers=4))
        pinpoints = [[48, 96], [96, 48]]
        write_original(tmp_path, tower=tower, mm_vision_tower="/home/them/our-vit", image_grid_pinpoints=pinpoints)
        shutil.rmtree(tmp_path / "tower")
        checkpoint = open_checkpoint(tmp_path)
        found = checkpoint.config.vision_config.to_dict()
        expected = tower.config.to_dict()
        sizes = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
        )
        for name in sizes:
            assert found[name] == expected[name], name
        assert "'/home/them/our-vit' is read from its weights" in checkpoint.notes[0]
        model = load_model(tmp_path)
        pixels = torch.randn(1, 3, 48, 48)
        with torch.no_grad():
            hidden = model.config.tower.encode(model.model.vision_tower, pixels, model.config.num_vision_layers)
            assert (
                hidden - tower.eval()(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            ).abs().max() < 1e-5

    def test_weights_inside_win_over_a_known_name(self, tmp_path):
        tower = CLIPVisionModel(vision_config(num_hidden_layers=2, hidden_size=128, num_attention_heads=2))
        write_original(tmp_path, tower=tower, mm_vision_tower="/models/clip-vit-large-patch14-336")
        config = open_checkpoint(tmp_path).config.vision_config
        assert (config.hidden_size, config.num_hidden_layers, config.image_size) == (128, 2, 32)

    def test_heads_that_cannot_be_known_are_asked_for(self, tmp_path):
        write_original(tmp_path, mm_vision_tower="/home/them/our-vit")
        with pytest.raises(CheckpointError, match=r"number of attention heads is not known; put a folder"):
            load_model(tmp_path)

    def test_neither_inside_nor_known(self, tmp_path):
        write_original(tmp_path, tower_inside=False, mm_vision_tower="/home/them/our-vit")
        with pytest.raises(CheckpointError, match=r"mm_vision_tower is '/home/them/our-vit'.*neither a folder here"):
            load_model(tmp_path)
        write_original(tmp_path, mm_vision_tower=None)
        with pytest.raises(CheckpointError, match=r"config\.json: mm_vision_tower is None"):
            load_model(tmp_path)

    def test_a_tower_in_a_folder_of_its_own(self, tmp_path):
        _, tower = write_original(tmp_path, tower_inside=False)
        model = load_model(tmp_path)
        for name, tensor in tower.state_dict().items():
            assert torch.equal(model.model.vision_tower.state_dict()[name], tensor), name

    @pytest.mark.parametrize("inside", [True, False])
    def test_siglip(self, tmp_path, inside):
        """The original code cuts the last layer off, whatever `mm_vision_select_layer` says."""
        fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        whole = SiglipVisionModel(SiglipVisionConfig(**fields, image_size=32, patch_size=4)).eval()
        pixels = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            expected = whole(pixels, output_hidden_states=True).hidden_states[-2]
        write_original(tmp_path, tower=whole, tower_inside=inside)
        if inside:  # without the last layer and the head
            weights = load_file(tmp_path / "model.safetensors")
            cut = (".encoder.layers.2.", ".vision_model.head.")
            kept = {name: tensor for name, tensor in weights.items() if not any(part in name for part in cut)}
            save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        model = load_model(tmp_path)
        with torch.no_grad():
            hidden = model.config.tower.encode(model.model.vision_tower, pixels, model.config.num_vision_layers)
        assert (hidden - expected).abs().max() < 1e-5

    def test_known_towers_are_configurations(self):
        assert {each["model_type"] for each in KNOWN_TOWERS.values()} == {"clip_vision_model", "siglip_vision_model"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([[32, 64], [64, 64]], [[64, 32], [64, 64]]),
        ("[[32, 64], [64, 64]]", [[64, 32], [64, 64]]),
        ("[(32, 64), (64, 64)]", [[64, 32], [64, 64]]),
        ("(1x1),...,(2x3)", [[32, 32], [64, 32], [96, 32], [32, 64], [64, 64], [96, 64]]),
    ],
)
def test_pinpoints_become_height_and_width(tmp_path, value, expected):
    write_original(tmp_path, image_grid_pinpoints=value)
    assert open_checkpoint(tmp_path).config.image_grid_pinpoints == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_pinpoints": "everything"}, "image_grid_pinpoints 'everything' is no list"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints None is no list"),
        ({"image_grid_pinpoints": "1x1,2x2"}, "is no range of the form"),
        ({"image_grid_pinpoints": [[33, 64]]}, "multiples of 32"),
        ({"image_grid_pinpoints": []}, "holds no pair"),
        ({"image_grid_pinpoints": "(1x1),...,(200000x200000)"}, "is a range of more than 4096 pairs"),
        ({"image_grid_pinpoints": [[32, 32 * 10**9]]}, "has more than 4096 tiles"),
        ({"tokenizer_model_max_length": -1}, "max_sequence_length must be at least 1, got -1"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config is set"),
        ({"hidden_size": 10**9, "num_attention_heads": 8}, "does not fit|describes no model"),
        ({"image_aspect_ratio": "anyres_max_2"}, "'anyres_max_2' with up to 4 tiles"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio is 'highres'"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type is 'spatial'"),
        ({"mm_patch_merge_type": "spatial_unpad_nobase"}, "mm_patch_merge_type is 'spatial_unpad_nobase'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; only 'mlp2x_gelu'"),
        ({"mm_projector_type": "absent"}, "mm_projector_type is 'linear'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'; only 'patch'"),
        ({"mm_vision_select_layer": [-2, -5]}, r"mm_vision_select_layer is \[-2, -5\]"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type is 'perceiver'"),
        ({"mm_new_thing": 3}, "mm_new_thing is 3, which is not supported"),
        ({"s2": True}, "s2 is True"),
        ({"architectures": ["LlavaMptForCausalLM"], "model_type": "llava_mpt"}, r"llava_mpt.*is none of"),
        ({"vis_token_granularity": [1, 9, 64]}, "granularity 9 is no level"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, changes, message):
    write_original(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"image_aspect_ratio": "anyres_max_4"}, {"mm_use_im_patch_token": True}, {"mm_tunable_parts": "mm_mlp_adapter"}],
)
def test_what_has_no_effect_is_accepted(tmp_path, changes):
    write_original(tmp_path, **changes)
    assert not open_checkpoint(tmp_path).notes


class TestLlava15:
    """A single padded crop: a start for training, and said so."""

    @pytest.mark.parametrize("changes", [{"image_aspect_ratio": "pad"}, {"image_aspect_ratio": "absent"}])
    def test_it_loads_and_says_what_changes(self, tmp_path, caplog, changes):
        absent = {"mm_patch_merge_type": "absent", "image_grid_pinpoints": None}
        write_original(tmp_path, max_position_embeddings=4096, **absent, **changes)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.image_newline"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with caplog.at_level(logging.WARNING):
            model = load_model(tmp_path)
        assert "images are tiled (anyres) and every row of tokens ends with a new image_newline" in caplog.text
        assert model.config.max_sequence_length == 4096
        assert model.model.image_newline.std().item() == pytest.approx(64**-0.5, rel=0.3)
        assert torch.equal(model.model.multi_modal_projector.linear_1.weight, weights["model.mm_projector.0.weight"])
        with torch.no_grad():
            assert model(prompt(8, 3)[None], **images(model.config, (64, 40)), granularity=16).logits.isfinite().all()


def test_levels_without_a_router_are_released_behaviour(tmp_path):
    """AVG-LLaVA-Stage3; 480x640 (height x width) loses tokens at 288, as in its training."""
    shutil.copytree(GOLDEN / "checkpoint", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: t for name, t in weights.items() if ".router." not in name}, tmp_path / "model.safetensors")
    config = open_checkpoint(tmp_path).config
    assert config.behavior == "released"
    config.image_grid_pinpoints = [[336, 672], [672, 336], [672, 672], [336, 1008], [1008, 336]]
    config.vision_config.image_size, config.vision_config.patch_size = 336, 14
    assert num_visual_tokens((480, 640), 288, config) == 738
    config.behavior = "paper"
    assert num_visual_tokens((480, 640), 288, config) == 1188
    assert open_checkpoint(tmp_path, "paper").config.behavior == "paper"


def test_generation_config_and_tokenizer_are_the_folders(tmp_path):
    """Several ends of sequence, as Llama-3 has; a tokenizer without tokenizer.json is that of the language model."""
    tokenizer = bpe_tokenizer()
    write_original(tmp_path, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9], "pad_token_id": 0}')
    model, processor = load(tmp_path)
    assert model.generation_config.eos_token_id == [2, 9]
    assert processor.image_token_id == model.config.image_token_id == len(tokenizer)


def test_a_repository_with_code_ends_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "their_llava", "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(ValueError, match="model_type 'their_llava' is neither"):
        load_model(tmp_path)
    tower = {"model_type": "their_vit", "auto_map": {"AutoConfig": "x.Y"}}
    write_original(tmp_path / "model", tower_inside=False)
    (tmp_path / "model" / "tower" / "config.json").write_text(json.dumps(tower))
    with pytest.raises(CheckpointError, match=r"config\.json: .*model_type 'their_vit' is unknown"):
        load_model(tmp_path / "model")
