"""Settings beside the weights of a checkpoint: each wrong value ends in one line that names its file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from avg_llava import load, load_model
from avg_llava.checkpoints.generation_config import read_generation_config
from avg_llava.checkpoints.stored_tensor import CheckpointError
from tests.tiny import make_checkpoint, tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("whole"))


def change(file, keys, value):
    """Sets the value at a path of keys in a JSON file."""
    raw = json.loads(file.read_text("utf-8"))
    *path, last = keys.split(".")
    part = raw
    for key in path:
        part = part[key]
    part[last] = value
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("config.json", "dtype", "float8_e4m3fn"),
        ("config.json", "text_config.dtype", [[1]]),
        ("config.json", "vision_config.dtype", [None]),
        ("config.json", "max_sequence_length", 0),
        ("config.json", "image_grid_pinpoints", [[32, 64]] * 5000),
        ("config.json", "quantization_config", {"quant_method": "gptq"}),
        ("config.json", "text_config.quantization_config", {"load_in_4bit": True}),
        ("tokenizer_config.json", "model_max_length", "x"),
        ("tokenizer_config.json", "model_max_length", {}),
        ("processor_config.json", "image_token_id", 5),
        ("processor_config.json", "image_token_id", {}),
        ("processor_config.json", "image_processor.image_grid_pinpoints", True),
        ("processor_config.json", "image_processor.image_grid_pinpoints", [[32, 32]]),
        ("processor_config.json", "image_processor.crop_size", {"height": 16, "width": 16}),
        ("processor_config.json", "image_processor.size", {"shortest_edge": 16}),
        ("processor_config.json", "image_processor.rescale_factor", []),
        ("processor_config.json", "image_processor.image_mean", [0.5]),
        ("processor_config.json", "image_processor.resample", "x"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(whole, tmp_path, name, keys, value):
    folder = shutil.copytree(whole, tmp_path / "model")
    change(folder / name, keys, value)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    text = str(error.value)
    assert "\n" not in text
    assert name in text or keys in text
    assert str(folder) in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": [2, None]}, r"eos_token_id is \[2, None\]; token ids are whole numbers"),
        ({"bos_token_id": {}}, "bos_token_id is {}"),
        ({"forced_eos_token_id": 99}, "forced_eos_token_id is 99; token ids are whole numbers below 99"),
        ({"num_beams": 3}, "num_beams is 3; only 1 is supported"),
        ({"output_hidden_states": "x"}, "output_hidden_states is 'x'; true and false"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"guidance_scale": 2.0}, "guidance_scale is 2.0; only null"),
        ({"to_dict": 3}, "to_dict is 3; it is no setting"),
        ({"cache_implementation": "x"}, "cache_implementation"),
        ({"early_stopping": {}}, "unhashable"),
    ],
)
def test_settings_of_generation_are_checked(tmp_path, values, message):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{message}"):
        read_generation_config(file, 99)


def test_settings_of_published_models_are_kept(tmp_path):
    values = {
        "bos_token_id": 1,
        "eos_token_id": [2, 9],
        "pad_token_id": None,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "do_sample": True,
        "max_length": 4096,
        "cache_implementation": "hybrid",
        "_from_model_config": True,
        "transformers_version": "4.45.0",
    }
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(values | {"chat_format": "chatml"}))
    read = read_generation_config(file, 99)
    assert {key: getattr(read, key) for key in values} | {"transformers_version": "4.45.0"} == values


def test_the_data_type_is_that_of_the_first_weight(tmp_path, caplog):
    """As by transformers, where the configuration names none; a warning says that other weights are cast."""
    tiny_model().save_pretrained(tmp_path)
    change(tmp_path / "config.json", "dtype", None)
    weights = load_file(tmp_path / "model.safetensors")
    half = {name: t.bfloat16() if "embed_tokens" in name else t for name, t in weights.items()}
    save_file(half, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_model(tmp_path).dtype == torch.float32
    assert "the weights are of torch.float32 and torch.bfloat16" in caplog.text
    save_file({name: t.bfloat16() for name, t in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_model(tmp_path).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is one of float16, bfloat16"):
        load_model(tmp_path, dtype="float8_e4m3fn")
