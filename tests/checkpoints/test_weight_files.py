"""Files of weights compared with the libraries that write them; and the model without language model."""

import json
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from avg_llava import load_model
from avg_llava.checkpoints.checkpoint import ROUTER_KEYS
from avg_llava.checkpoints.formats import open_checkpoint
from avg_llava.checkpoints.routing_model import load_routing_model
from avg_llava.checkpoints.weight_files import (
    CheckpointError,
    fingerprint,
    list_tensors,
    read_tensors,
    stored_tensors,
    weight_files,
)
from tests.parity.golden import GOLDEN
from tests.tiny import images, pad, prompt, tiny_model


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "half": torch.randn(3, 5).bfloat16(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "name with a ü": torch.randn(4),
    }


def test_split_files_are_merged_by_the_library(tensors, tmp_path):
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:2]}, tmp_path / "a.safetensors")
    save_file({name: tensors[name] for name in names[2:]}, tmp_path / "b.safetensors")
    index = {"weight_map": {name: f"{'a' if name in names[:2] else 'b'}.safetensors" for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(read_tensors(tmp_path), tmp_path / "all.safetensors")
    found = load_file(tmp_path / "all.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
    for stored in list_tensors([tmp_path / "all.safetensors"]).values():
        assert stored.start % 8 == 0 or stored.dtype != torch.float64, "aligned to its type"


def test_merging_maps_the_source_into_memory(tmp_path):
    """A copy of 96 MiB of weights takes no memory of that size."""
    save_file({name: torch.ones(2**22) for name in "abcdef"}, tmp_path / "model.safetensors")
    code = f"""
import pathlib, re
from safetensors.torch import save_file
from avg_llava.checkpoints.weight_files import read_tensors

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) // 1024

folder = pathlib.Path({str(tmp_path)!r})
before = anonymous()
tensors = read_tensors(folder)
save_file(tensors, folder / "copy.safetensors")
assert anonymous() - before < 32, (before, anonymous())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_fingerprint_is_of_the_tensors(tensors, tmp_path):
    """It depends on every bit of the tensors, and not on how they are split into files."""
    save_file(tensors, tmp_path / "one.safetensors")
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{len(name)}{name[0]}.part.safetensors")
    one = fingerprint(list_tensors([tmp_path / "one.safetensors"]))
    assert fingerprint(list_tensors(tmp_path.glob("*.part.safetensors"))) == one
    prints = {one}
    for change in (
        {"half": tensors["half"].view(torch.float16)},
        {"half": tensors["half"].reshape(5, 3)},
        {"bytes": tensors["bytes"].flip(0)},
        {"another": tensors["half"].clone()},
    ):
        save_file({**tensors, **change}, tmp_path / "changed.safetensors")
        prints.add(fingerprint(list_tensors([tmp_path / "changed.safetensors"])))
    assert len(prints) == 5


def test_damaged_files_are_named(tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    content = path.read_bytes()
    for damaged, message in [
        (content[:-1], r"not a whole safetensors file \(incomplete metadata, file not fully covered\)"),
        (content[:20], "not a whole safetensors file"),
        (b"", "empty"),
        (b"\xff" * 64, r"not a whole safetensors file \(header too large\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"model\.safetensors is {message}"):
            list_tensors([path])


class Hostile:
    def __reduce__(self):
        return exec, ("open('ran', 'w')",)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])
def test_pickled_files_hold_the_same_tensors(tensors, tmp_path, archive, monkeypatch):
    """Mapped or streamed, from an archive or a file of old, also transposed, shared and inside a training state."""
    monkeypatch.chdir(tmp_path)
    base = torch.randn(6, 8)
    tensors |= {"base": base, "transposed": base.t(), "part": base[2:4], "parameter": torch.nn.Parameter(base + 1)}
    path = tmp_path / "pytorch_model.bin"
    for content in (tensors, {"epoch": 3, "state_dict": tensors, "optimizer": [{"state": torch.ones(3)}]}):
        torch.save(content, path, _use_new_zipfile_serialization=archive)
        stored = stored_tensors(tmp_path)
        assert stored.keys() == tensors.keys()
        for name, tensor in tensors.items():
            found = stored[name]
            assert (found.dtype, found.shape) == (tensor.dtype, tuple(tensor.shape))
            assert torch.equal(found.read(), tensor), name
            streamed = b"".join(chunk.view(torch.uint8).numpy().tobytes() for chunk in found.chunks())
            assert streamed == tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, "model.safetensors")
    assert fingerprint(stored_tensors(tmp_path)) == fingerprint(stored), "safetensors come first"
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2), "code": Hostile()}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin asks for the global __builtin__\.exec"):
        stored_tensors(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save({"weight": torch.ones(1).expand(10**12)}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"tensor weight of shape .* repeats its bytes"):
        stored_tensors(tmp_path)


def test_an_archive_whose_records_differ_from_its_pickle_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(8.0), "b": torch.arange(4.0)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    key = next(name for name in records if name.endswith("/data/0"))
    for changed, compression, message in [
        ({key: bytes(16)}, zipfile.ZIP_STORED, "a storage of .* bytes is described where it holds 16"),
        ({f"{key}1": bytes(16)}, zipfile.ZIP_STORED, "describes 2 storages and holds 3"),
        ({}, zipfile.ZIP_DEFLATED, "is compressed"),
    ]:
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in (records | changed).items():
                archive.writestr(name, content)
        with pytest.raises(CheckpointError, match=message):
            list_tensors([path])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if name.endswith("/data.pkl"):
                name, content = name.upper(), pickle.dumps(Hostile())
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="asks for"):
        list_tensors([path])


def _write_index(folder, **files):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_files_of_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no weights, neither model\.safetensors, model"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    _write_index(tmp_path, a="gone.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]  # as transformers reads
    (tmp_path / "model.safetensors").unlink()
    _write_index(tmp_path, a="model-1.safetensors", b="model-2.safetensors", c="model-1.safetensors")
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors of .* missing"):
        weight_files(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="both hold the tensor a"):
        stored_tensors(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors lacks the tensor b, which"):
        stored_tensors(tmp_path)
    for name in ("../outside.safetensors", "/etc/passwd", "a/b.bin", "model.json", "", None, 3):
        _write_index(tmp_path, a=name)
        with pytest.raises(CheckpointError, match=r"tensor a is said to be in .*, which is no file name of weights"):
            weight_files(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["10GB", "100KB"])
def test_the_model_without_language_model(tmp_path, tied, shard_size):
    """It routes and is saved as the whole model, however its source is split into files."""
    whole = tiny_model()
    if tied:
        whole.config.tie_word_embeddings = whole.config.text_config.tie_word_embeddings = True
        whole.tie_weights()
    whole.save_pretrained(tmp_path / "fresh")
    load_model(tmp_path / "fresh").save_pretrained(tmp_path / "whole", max_shard_size=shard_size)
    routing = load_routing_model(tmp_path / "whole")
    held = {name for name, _ in routing.named_parameters() if "language_model" in name or "lm_head" in name}
    assert held == {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}
    ids = pad([prompt(9, 2), prompt(7, 4, seed=1)])
    mask = (ids != 0).long()
    batch = images(whole.config, (32, 40), (70, 30))
    with torch.no_grad():
        expected = whole.route(whole.encode_images(**batch), ids, mask)
        assert torch.equal(routing.route(routing.encode_images(**batch), ids, mask), expected)
        routing.model.router.voter += 1
    routing.save_pretrained(tmp_path / "saved")
    found = load_model(tmp_path / "saved")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "saved")]
    assert configs[0] == configs[1]
    prints = set()
    for name in ("whole", "saved"):  # the files use other names for some weights
        weights = open_checkpoint(tmp_path / name).stored()
        prints.add(fingerprint({key: each for key, each in weights.items() if not key.startswith(ROUTER_KEYS)}))
    assert len(prints) == 1
    for name, tensor in whole.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor + 1 if name == "model.router.voter" else tensor), name


@pytest.mark.parametrize("source", [GOLDEN / "checkpoint", GOLDEN.parent / "checkpoints" / "llava16_vicuna"])
def test_the_model_without_language_model_of_published_layouts(tmp_path, source):
    """What it saves is the whole model under this package's names; a router that the source lacks is its own."""
    whole, routing = load_model(source), load_routing_model(source)
    routing.save_pretrained(tmp_path)
    found = load_model(tmp_path).state_dict()
    has_router = source.parent == GOLDEN
    for name, tensor in whole.state_dict().items():
        if has_router or not name.startswith(ROUTER_KEYS):
            assert torch.equal(found[name], tensor), name
    for name, tensor in routing.model.router.state_dict().items():
        assert torch.equal(found[ROUTER_KEYS + name], tensor), name
