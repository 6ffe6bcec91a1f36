"""Layouts of checkpoints: how they are recognised, and what is known of them before weights are read."""

import json

import pytest
import torch

from avg_llava import AvgLlavaConfig
from avg_llava.checkpoints.checkpoint import ROUTER_KEYS, rename_keys
from avg_llava.checkpoints.formats import LAYOUTS, detect_layout, open_checkpoint
from avg_llava.checkpoints.weight_files import list_tensors, weight_files
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
