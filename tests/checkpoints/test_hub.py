"""Downloads from a hub: a server of this machine that answers as the hub's does, asked through `HF_ENDPOINT`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file

from avg_llava.checkpoints.weight_files import read_tensors
from tests.hub import COMMITS, Hub
from tests.parity.golden import GOLDEN

CHECKPOINTS = Path(__file__).parents[1] / "data/checkpoints"


@pytest.fixture
def hub(tmp_path):
    server = Hub(tmp_path / "hub")
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def resolve(hub, tmp_path, *paths, offline=False):
    """Folders, or errors, of `paths` in a fresh process with a cache below `tmp_path`."""
    code = f"""
import json
from avg_llava.checkpoints.weight_files import resolve_folder
for path in {paths!r}:
    try:
        print(json.dumps(str(resolve_folder(path))))
    except ValueError as error:
        print(json.dumps(f"error: {{error}}"))
"""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_only_what_the_model_needs_is_downloaded(hub, tmp_path):
    """One format, the shards of its index, nothing consolidated or nested; the second time, nothing at all."""
    both = tmp_path / "hub/owner/both/main"
    shutil.copytree(CHECKPOINTS / "vicuna_bin", both)
    shutil.copytree(CHECKPOINTS / "vicuna_bin", tmp_path / "hub/owner/pickled/main")
    tensors = read_tensors(both)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, both / "model.safetensors", {"format": "pt"})
    for waste in ("consolidated.00.pth", "consolidated.safetensors", "tf_model.h5", "onnx/model.safetensors", "run.py"):
        (both / waste).parent.mkdir(exist_ok=True)
        (both / waste).write_bytes(b"waste")
    shutil.copytree(GOLDEN / "checkpoint", tmp_path / "hub/owner/both/old")

    first, pickled, old, gone, nobody = resolve(
        hub, tmp_path, "owner/both", "owner/pickled@main", "owner/both@old", "owner/both@gone", "owner/nobody"
    )
    assert Path(first).name == COMMITS["main"]
    assert Path(old).name == COMMITS["old"]
    assert gone.startswith("error: the configuration of the hub repository owner/both, revision gone, cannot be had")
    assert nobody.startswith("error: the configuration of the hub repository owner/nobody, revision main, cannot")
    downloaded = {path.relative_to(first).as_posix() for path in Path(first).rglob("*") if path.is_file()}
    assert downloaded == {
        *(path.name for path in both.glob("*.json")),
        "tokenizer.model",
        "model.safetensors",
    }
    assert {path.name for path in Path(pickled).glob("*.bin")} == {path.name for path in both.glob("*.bin")}
    for folder, expected in ((first, tensors), (pickled, tensors), (old, read_tensors(GOLDEN / "checkpoint"))):
        found = read_tensors(Path(folder))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    hub.requested.clear()
    assert resolve(hub, tmp_path, "owner/both", "owner/pickled", "owner/both@old") == [first, pickled, old]
    assert hub.requested == []

    (Path(pickled) / "pytorch_model-00002-of-00002.bin").unlink()
    cached, incomplete, unknown = resolve(hub, tmp_path, "owner/both", "owner/pickled", "owner/other@v1", offline=True)
    assert cached == first
    missing = "pytorch_model-00002-of-00002.bin of the hub repository owner/pickled, revision main, cannot be had"
    assert incomplete.startswith(f"error: {missing}")
    assert "owner/other, revision v1, cannot be had" in unknown
    assert "HF_HUB_OFFLINE" in unknown
    assert hub.requested == []
