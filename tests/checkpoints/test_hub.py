"""Downloads from a hub: a server of this machine that answers as the hub's does, asked through `HF_ENDPOINT`."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file

from avg_llava.checkpoints.weight_files import read_tensors
from tests.parity.golden import GOLDEN

CHECKPOINTS = Path(__file__).parents[1] / "data/checkpoints"
COMMITS = {"main": "a" * 40, "old": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Serves `folder`/owner/name/revision; `requested` lists the files that were asked for."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requested: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments):
        pass

    def reply(self, content: bytes, status=200, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository, action, revision = "/".join(parts[2:4]), parts[4], parts[5]
        else:
            repository, action, revision = "/".join(parts[:2]), parts[2], parts[3]
        branch = next((name for name, commit in COMMITS.items() if revision in (name, commit)), "")
        folder = self.server.folder / repository / branch
        if not branch or not folder.is_dir():
            code = "RevisionNotFound" if (self.server.folder / repository).is_dir() else "RepoNotFound"
            self.reply(b"", 404, X_Error_Code=code, X_Error_Message=f"no {repository} {revision}")
        elif action == "revision":
            self.reply(json.dumps({"id": repository, "sha": COMMITS[branch], "siblings": []}).encode())
        elif action == "tree":
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            entries = [
                {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": "c" * 40}
                for file in files
            ]
            self.reply(json.dumps(entries).encode())
        else:
            name = "/".join(parts[4:])
            content = (folder / name).read_bytes()
            if self.command == "GET":
                self.server.requested.append(name)
            self.reply(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMITS[branch])


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
