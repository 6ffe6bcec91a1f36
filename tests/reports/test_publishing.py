"""Uploads: which files they hold, the card, and the upload itself to a hub on this machine."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from avg_llava import cli, load, load_model
from avg_llava.checkpoints.weight_files import CheckpointError
from avg_llava.evaluation.evaluate import fingerprint_model
from avg_llava.evaluation.results import ResultError
from avg_llava.reports.publishing import plan_upload
from avg_llava.training.checkpoint import write_manifest
from tests.hub import TOKEN, Hub
from tests.model import without_package
from tests.reports.fixture_results import make_result, write
from tests.tiny import make_checkpoint, noise_images
from tests.training.test_card import CONFIG, manifest, tables

pytestmark = pytest.mark.xdist_group("publishing")

STAYS = {
    "checkpoint-9/optimizer.pt": "checkpoint-9/",
    "checkpoint-9/model.safetensors": "checkpoint-9/",
    "global_step9/bf16_zero.pt": "global_step9/",
    "adapter/adapter_model.safetensors": "adapter/",
    "tensorboard/events": "tensorboard/",
    "wandb/run": "wandb/",
    "log_history.jsonl": "log_history.jsonl",
    "train_config.yaml": "train_config.yaml",
    ".env": ".env",
    "notes.txt": "notes.txt",
    "eval/pope.json": "eval/",
}
"""Files that are not uploaded, and how they are listed."""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A stage's result, with what else may lie in its folder."""
    folder = make_checkpoint(tmp_path)
    for name in STAYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    (folder / "train_config.yaml").write_text("output: {dir: /home/ada/runs/4}")
    (folder / "eval" / "pope.json").write_text("{}")
    (folder / "LICENSE").write_text("Mine.")
    write_manifest(folder, manifest(4, {"path": "runs/stage3", "stage": 3, "created": None}, config=public_config()))
    return folder


def public_config() -> dict:
    """The configuration of `manifest` without a path of this machine."""
    return CONFIG | {"data": {"sources": [source | {"path": "data.json"} for source in CONFIG["data"]["sources"]]}}


def test_only_the_model_is_uploaded(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    plan = plan_upload(folder, "ada/shapes")
    model = {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "avg_llava_modeling.py"}
    assert model | {"LICENSE", "stage.json", "README.md", "chat_template.jinja"} <= plan.sizes.keys()
    assert plan.sizes["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert plan.skipped.keys() == set(STAYS.values())
    assert plan.skipped["train_config.yaml"] == "names a path of this machine, /home/ada/runs/4"
    assert "optimizer" in plan.skipped["checkpoint-9/"]
    assert yaml.safe_load(plan.front_matter)["pipeline_tag"] == "image-text-to-text"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    for file in plan.files:
        assert str(folder.parent).encode() not in file.read_bytes(), f"{file.name} names a path of this machine"


def test_scores_of_this_model_are_in_the_card(folder, tmp_path, caplog):
    changes = {"model__granularities": [1, 2, 4, 8, 16], "routing__levels": {"4": 0.25, "16": 0.75}}
    result = make_result("textvqa", **changes, model__fingerprint=fingerprint_model(folder))
    other = make_result("pope", **changes)
    write(folder / "eval", "textvqa.json", result)
    write(folder / "eval", "old.json", other)
    write(tmp_path, "old.json", other)
    card = plan_upload(folder, "ada/shapes").card
    (row,) = (row for row in tables(card) if row[0] == "textvqa" and "router" in row)
    assert row[2] == f"{result['metrics']['exact_match']['value']:.4g}"
    assert ["textvqa", "0.0 %", "0.0 %", "25.0 %", "0.0 %", "75.0 %"] in tables(card)
    assert "old.json is the result of another model" in caplog.text
    with pytest.raises(ResultError, match=r"old\.json is the result of another model"):
        plan_upload(folder, "ada/shapes", results=[tmp_path / "old.json"])


def test_what_is_no_whole_model_is_refused(folder, capsys):
    capsys.readouterr()

    def refusal(repository="ada/shapes") -> str:
        assert cli.main(["push", str(folder), repository]) == 1
        captured = capsys.readouterr()
        (line,) = [line for line in captured.err.splitlines() if line.startswith("avg-llava: ")]
        assert captured.out == ""
        return line

    assert "'shapes' is no repository" in refusal("shapes")
    write_manifest(folder, manifest(4, {"path": "s", "stage": 3, "created": None}, finished=False))
    assert "checkpoint of an unfinished run" in refusal()
    write_manifest(folder, manifest(4, {"path": "s", "stage": 3, "created": None}))
    (folder / "avg_llava_router.py").unlink()
    assert "cannot be loaded without this package (avg_llava_router.py)" in refusal()
    load_model(folder).save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(CheckpointError):
        plan_upload(folder, "ada/shapes")
    shutil.rmtree(folder)
    assert "is no folder" in refusal()
    other = Path(__file__).parents[1] / "data" / "checkpoints" / "llava16_vicuna"
    assert cli.main(["push", str(other), "ada/shapes"]) == 1
    assert "--to avg" in capsys.readouterr().err


def test_links_and_files_of_others_names_stay_here(folder, tmp_path):
    (tmp_path / "id_rsa").write_text("secret")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(tmp_path / "id_rsa")
    shutil.copy(folder / "model.safetensors", folder / "model-old.safetensors")
    for name in ("NOTICE.env", "avg_llava_secret.py"):
        (folder / name).write_text("secret")
    plan = plan_upload(folder, "ada/shapes")
    stay = {"LICENSE", "model-old.safetensors", "NOTICE.env", "avg_llava_secret.py"}
    assert stay <= plan.skipped.keys()
    assert not stay & plan.sizes.keys()
    (folder / "vocab.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(ValueError, match=r"vocab\.txt is a link: put a copy of the file there"):
        plan_upload(folder, "ada/shapes")


@pytest.mark.parametrize(
    "text",
    [
        "index: file:///home/ada/index",
        "command: train --dir=/home/ada/runs",
        "note: PYTHONPATH=src:/home/ada/code",
        "/home/ada/data: {weight: 1}",
        "list: [/home/ada]",
        "dir: /scratch",
        "dir: ~ada",
        r"dir: C:\Users\ada",
        "hub_token: hf_abcdefghijklmnop",
        "password: correcthorsebatterystaple",
    ],
)
def test_what_is_private_is_found_anywhere_in_a_file(folder, text):
    (folder / "train_config.yaml").write_text(text)
    assert re.match(
        "names a path|holds what looks like", plan_upload(folder, "ada/shapes").skipped["train_config.yaml"]
    )


def test_public_texts_are_not_taken_for_private_ones(folder):
    config = (
        "data: playground/data.json\nurl: https://huggingface.co/ada/shapes\nstop: [</s>, '[/INST]']\nmax_tokens: 4\n"
    )
    (folder / "train_config.yaml").write_text(config)
    plan = plan_upload(folder, "ada/shapes")
    assert "train_config.yaml" in plan.sizes
    template = "Q:\nyes\nno [/INST]</s> https://example.org/a/b"
    edit(folder / "tokenizer_config.json", chat_template=template)
    edit(folder / "config.json", pad_token="AVG_LLAVA_PAD_TOKEN")
    plan_upload(folder, "ada/shapes")
    (folder / "README.md").write_text("hf_abcdefghijklmnop")
    with pytest.raises(ValueError, match=r"README\.md is a link, or holds what looks like an access token"):
        plan_upload(folder, "ada/shapes")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit(folder / "config.json", _name_or_path="/home/ada/model"), "config.json names a path"),
        (
            lambda folder: edit(folder / "tokenizer_config.json", name_or_path="/home/ada/t"),
            "_config.json names a path",
        ),
        (lambda folder: (folder / "train_config.yaml").write_text("a: [\n- }"), "train_config.yaml is damaged"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be uploaded"),
        (lambda folder: change(folder, lambda tensor: tensor * torch.nan), "values are not finite"),
        (lambda folder: change(folder, None), "missing    lm_head.weight"),
    ],
)
def test_a_model_that_does_not_load_or_names_paths_is_refused(folder, capsys, damage, message):
    damage(folder)
    capsys.readouterr()
    assert cli.main(["push", str(folder), "ada/shapes"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("avg-llava: ")]
    assert " ".join(message.split()) in line


def edit(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change(folder: Path, to) -> None:
    """Changes the head, or removes it."""
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors if to is None else tensors | {"lm_head.weight": to(head)}, folder / "model.safetensors")


def test_dry_run(folder, capsys):
    assert cli.main(["push", str(folder), "ada/shapes", "--license", "mit"]) == 0
    text = capsys.readouterr().out
    assert f"{(folder / 'model.safetensors').stat().st_size:,}  model.safetensors" in text
    assert "checkpoint-9/: checkpoint of the run" in text
    assert "license: mit" in text
    assert text.strip().endswith("nothing was uploaded; to upload, add --yes")
    assert not (folder / "README.md").exists()


SCRIPT = """
import os, sys
from huggingface_hub import constants
from avg_llava import cli, load
folder, shards = sys.argv[1:]
assert cli.main(["push", folder, "ada/shapes", "--yes"]) == 0
assert cli.main(["push", shards, "ada/shards", "--yes"]) == 0
assert cli.main(["push", folder, "ada/shards", "--yes"]) == 0  # in place of the shards
for part in load(folder):
    part.push_to_hub("ada/parts")
load(folder)[0].save_pretrained(shards + "-saved", push_to_hub=True, repo_id="ada/saved", max_shard_size="100KB")
os.environ["HF_TOKEN"] = "hf_wrong"
assert cli.main(["push", folder, "ada/refused", "--yes"]) == 1
constants.ENDPOINT = "http://127.0.0.1:9"
assert cli.main(["push", folder, "ada/unreachable", "--yes"]) == 1
"""


def test_upload_and_download(folder, tmp_path):
    """By the command and by `push_to_hub`; then loaded from there by a process without this package."""
    hub = Hub(tmp_path / "hub")
    Thread(target=hub.serve_forever, daemon=True).start()
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    variables["HF_HUB_DISABLE_XET"] = "1"  # git-lfs, which the hub of this test speaks
    shards = tmp_path / "shards"
    model, processor = load(folder)
    model.save_pretrained(shards, max_shard_size="100KB")
    processor.save_pretrained(shards)
    (shards / "README.md").write_text("---\nlicense: mit\n---\nEdited.\n")

    command = [sys.executable, "-c", SCRIPT, str(folder), str(shards)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)
    assert done.returncode == 0, done.stderr[-3000:]
    refused, unreachable = done.stderr.strip().splitlines()[-2:]
    assert "401" in refused
    assert "http://127.0.0.1:9 cannot be reached" in unreachable
    for repository in ("shapes", "shards"):
        uploaded = tmp_path / "hub" / "ada" / repository / "main"
        files = {path.relative_to(uploaded).as_posix(): path for path in uploaded.rglob("*") if path.is_file()}
        assert files.keys() == plan_upload(folder, f"ada/{repository}").sizes.keys()
        for name, path in files.items():
            if name != "README.md":
                assert path.read_bytes() == (folder / name).read_bytes(), name
        assert f'name = "ada/{repository}"' in files["README.md"].read_text()
    assert "Edited" in [change for commit in hub.commits for change in decoded(commit, "README.md")][1]
    parts = load_model(tmp_path / "hub/ada/parts/main")
    assert torch.equal(parts.lm_head.weight, model.lm_head.weight)
    saved = {path.name for path in (tmp_path / "hub/ada/saved/main").iterdir()}
    assert saved - {"README.md"} == {path.name for path in (tmp_path / "shards-saved").iterdir()}
    assert "model-00002-of-00005.safetensors" in saved

    image = noise_images()[1]
    image.save(tmp_path / "image.png")
    (tmp_path / "output").mkdir()
    without_package.run(tmp_path / "image.png", tmp_path / "output", "ada/shapes", **variables)
    without_package.compare(tmp_path / "output", 0, model, processor, image)
    hub.shutdown()
    hub.server_close()


def decoded(commit: list[dict], name: str) -> list[str]:
    """Contents of a file in a commit."""
    values = [change["value"] for change in commit]
    return [base64.b64decode(value["content"]).decode() for value in values if value["path"] == name]
