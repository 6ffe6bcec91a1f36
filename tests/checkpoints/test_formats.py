"""Layouts of checkpoints: how they are recognised, and what is known of them before weights are read."""

import json

import pytest
import torch

from avg_llava import AvgLlavaConfig
from avg_llava.checkpoints.checkpoint import ROUTER_KEYS, rename_keys
from avg_llava.checkpoints.formats import LAYOUTS, detect_layout, open_checkpoint
from avg_llava.checkpoints.weight_files import CheckpointError, list_tensors, weight_files
from tests.parity.golden import GOLDEN


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [
        ("llava_llama", "original"),
        ("llava_mistral", "original"),
        ("llava_next", "llava_next"),
        (AvgLlavaConfig.model_type, AvgLlavaConfig.model_type),
    ],
)
def test_the_model_type_says_the_layout(tmp_path, model_type, layout):
    assert detect_layout({"model_type": model_type}, tmp_path) == layout
    assert layout in LAYOUTS


def test_llava_is_a_type_of_two_libraries(tmp_path):
    assert detect_layout({"model_type": "llava", "mm_vision_tower": "x"}, tmp_path) == "original"
    assert detect_layout({"model_type": "llava", "text_config": {}, "vision_config": {}}, tmp_path) == "llava"


@pytest.mark.parametrize("model_type", ["bert", "original", None])
def test_other_model_types_are_refused(tmp_path, model_type):
    with pytest.raises(ValueError, match=rf"config\.json: model_type '{model_type}' is neither"):
        detect_layout({"model_type": model_type}, tmp_path)


@pytest.mark.parametrize(("model_type", "fresh"), [("llava_next", (ROUTER_KEYS,)), (AvgLlavaConfig.model_type, ())])
def test_folders_of_transformers_are_described_without_weights(tmp_path, model_type, fresh):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    checkpoint = open_checkpoint(tmp_path, "released")
    assert (checkpoint.folder, checkpoint.fresh) == (tmp_path, fresh)
    assert checkpoint.config.behavior == "released"


@pytest.mark.parametrize(
    ("config", "preprocessor", "message"),
    [
        ({"use_image_newline_parameter": False}, {}, "use_image_newline_parameter is false"),
        ({"vision_feature_layer": [-2, -5]}, {}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "full"}, {}, "vision_feature_select_strategy must be 'default'"),
        ({"vision_config": {"model_type": "their_tower"}}, {}, "their_tower"),
        ({}, {"image_grid_pinpoints": [[336, 336]]}, r"differ from \[\[336, 336\]\] of preprocessor_config\.json"),
        ({}, {"do_resize": False}, r"do_resize is false in preprocessor_config\.json"),
    ],
)
def test_what_transformers_computes_otherwise_is_refused(tmp_path, config, preprocessor, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_next"} | config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        open_checkpoint(tmp_path)


def test_original_folders_are_described_from_file_headers():
    """A reader that opens no tensor gives the same names as the one that loads them."""

    def read(folder):
        stored = list_tensors(weight_files(folder))
        return {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}

    checkpoint = open_checkpoint(GOLDEN / "checkpoint")
    assert (checkpoint.fresh, checkpoint.config.behavior) == ((), "released")
    described, loaded = checkpoint.tensors(read), checkpoint.tensors()
    assert {name: tensor.shape for name, tensor in described.items()} == {
        name: tensor.shape for name, tensor in loaded.items()
    }
    assert not any("mm_projector" in name for name in loaded)


def test_the_first_matching_pattern_renames_a_key():
    renaming = [(r"^a\.", None), (r"^b\.", "c."), (r"^b\.x", "never")]
    assert rename_keys({"a.x": 1, "b.x": 2, "d": 3}, renaming) == {"c.x": 2, "d": 3}
