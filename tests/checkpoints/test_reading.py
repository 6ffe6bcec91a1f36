"""The pass over a checkpoint's weights: casts, values that are no numbers, checksums of the manifest."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from avg_llava import load_model
from avg_llava.checkpoints.checksums import MANIFEST_NAME, compute_checksums
from avg_llava.checkpoints.reading import read_weights
from avg_llava.checkpoints.weight_files import CheckpointError, stored_tensors
from tests.tiny import tiny_model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_weights_are_mapped_or_cast(tmp_path, dtype):
    torch.manual_seed(0)
    weights = {
        "half": torch.randn(70, 30).half(),
        "single": torch.randn(5, 7),
        "scalar": torch.tensor(2.5),
        "position_ids": torch.arange(9)[None],
    }
    torch.save(weights | {"transposed": weights["single"].t()}, tmp_path / "pytorch_model.bin")
    stored = stored_tensors(tmp_path)
    found = read_weights(stored, "x", dtype)
    for name, tensor in (weights | {"transposed": weights["single"].t()}).items():
        expected = tensor if dtype is None or name == "position_ids" else tensor.to(dtype)
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected), name
        is_mapped = found[name].data_ptr() == stored[name].read().data_ptr()
        assert is_mapped == (expected.dtype == tensor.dtype)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_values_that_are_no_numbers_are_counted(tmp_path, caplog, dtype):
    weights = {name: torch.randn(300, 7).bfloat16() for name in ("a", "b", "c")}
    weights["b"][3, :2] = torch.nan
    weights["c"][0, 0] = -torch.inf
    save_file(weights, tmp_path / "model.safetensors")
    read_weights(stored_tensors(tmp_path), "some/model", dtype)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    message = f"3 values of 2 weights are NaN or infinite, first in b of {tmp_path / 'model.safetensors'}"
    assert record.getMessage() == f"some/model: {message}"


def test_weights_of_other_types_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    _change(
        tmp_path / "model.safetensors", lambda weights: weights.update({"lm_head.weight": torch.zeros(64, 64).char()})
    )
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is of type torch\.int8"):
        load_model(tmp_path)


@pytest.fixture
def checked(tmp_path):
    """A checkpoint in shards whose manifest has checksums."""
    tiny_model().save_pretrained(tmp_path, max_shard_size="200KB")
    manifest = {"stage": 2, "weights": compute_checksums(tmp_path)}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    return tmp_path


def _flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


def test_a_flipped_bit_is_named(checked, monkeypatch):
    load_model(checked)
    files = sorted(checked.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        before = file.read_bytes()
        last = max(stored_tensors(checked).values(), key=lambda each: (each.file == file, each.start))
        _flip(file, -1)
        for dtype in (None, torch.bfloat16):
            with pytest.raises(CheckpointError) as error:
                load_model(checked, dtype=dtype)
            assert str(error.value).startswith(f"{file}: tensor {last.name} differs from its checksum; ")
        monkeypatch.setenv("LOCAL_RANK", "1")  # only the first process of a machine compares
        load_model(checked)
        monkeypatch.delenv("LOCAL_RANK")
        file.write_bytes(before)
    load_model(checked)


def _change(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def test_other_types_shapes_and_manifests_are_noticed(checked):
    file = sorted(checked.glob("*.safetensors"))[0]
    name = min(load_file(file))
    before = file.read_bytes()
    for change in (
        lambda weights: weights.update({name: weights[name].view(torch.int32).view(torch.float32) + 0.5}),
        lambda weights: weights.update({name: weights[name].bfloat16()}),
    ):
        _change(file, change)
        with pytest.raises(CheckpointError, match=r"differs from its checksum.*remove 'weights' from stage\.json"):
            load_model(checked)
        file.write_bytes(before)
    manifest = json.loads((checked / MANIFEST_NAME).read_text())
    for weights, error in (({}, "differs from its checksum"), ([], "must be a mapping"), ({file.name: 3}, "mapping")):
        (checked / MANIFEST_NAME).write_text(json.dumps(manifest | {"weights": weights}))
        with pytest.raises(CheckpointError, match=error):
            load_model(checked)
    (checked / MANIFEST_NAME).write_text(json.dumps({"stage": 2}))  # written by an earlier version
    _change(file, lambda weights: weights.update({name: weights[name] + 1}))
    load_model(checked)


def test_an_archive_s_own_checksums_are_compared(tmp_path):
    """PyTorch writes them and does not read them."""
    save = {"a": torch.randn(40, 30), "b": torch.randn(50)}
    file = tmp_path / "pytorch_model.bin"
    torch.save(save, file)
    _flip(file, stored_tensors(tmp_path)["a"].start + 1000)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: tensor a differs from its checksum in the archive"):
        read_weights(stored_tensors(tmp_path), "x", None)
    computes = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(save, file)
    finally:
        torch.serialization.set_crc32_options(computes)
    assert torch.equal(read_weights(stored_tensors(tmp_path), "x", None)["a"], save["a"])
