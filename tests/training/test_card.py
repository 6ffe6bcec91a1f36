"""Model cards: filled from a run, usable as they stand, and never written over an edited one."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.router import ROUTERS, TransformerRouter
from avg_llava.training.card import UNKNOWN_REPOSITORY, Score, is_edited, lineage, render_card, write_card
from avg_llava.training.checkpoint import StageManifest, write_manifest
from tests.tiny import make_checkpoint

CONFIG = {
    "data": {
        "sources": [
            {"path": "/home/ada/data/shapes.json", "sampling": None, "weight": 2.0, "license": "cc-by-4.0"},
            {"path": "texts.jsonl", "sampling": "first:9", "weight": 1.0, "license": None},
        ]
    },
    "optim": {
        "lr": 1e-3, "vision_lr": 2e-4, "projector_lr": None, "lora_lr": None, "global_batch_size": 8,
        "scheduler": "cosine", "warmup_ratio": 0.03, "weight_decay": 0.1,
    },
    "runtime": {"precision": "bf16"},
    "lora": {"rank": 8, "alpha": 16.0},
    "seed": 7,
}  # fmt: skip
SCORE = Score("textvqa", "exact_match", 61.25, "auto", 0.375, 5000, {"16": 0.25, "4": 0.75})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("card"))


def manifest(stage: int, parent: dict, **fields) -> StageManifest:
    defaults = {"finished": True, "step": 99, "data_fingerprint": "f", "config": CONFIG, "world_size": 4}
    return StageManifest(stage=stage, parent=parent, **{**defaults, "samples": [12_000, 9], **fields})


@pytest.fixture
def runs(tmp_path) -> list[StageManifest]:
    """Stages 1 to 3, each in its folder."""
    runs = [manifest(1, {"vision": "openai/clip-vit-large-patch14-336", "language": "lmsys/vicuna-7b-v1.5"})]
    for stage in (2, 3):
        write_manifest_of(tmp_path, runs[-1])
        parent = {"path": str(tmp_path / str(stage - 1)), "stage": stage - 1, "created": runs[-1].created}
        runs.append(manifest(stage, parent))
    return runs


def write_manifest_of(root: Path, run: StageManifest) -> None:
    (root / str(run.stage)).mkdir()
    write_manifest(root / str(run.stage), run)


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def tables(card: str) -> list[list[str]]:
    """Cells of all rows of tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]


def test_a_card_tells_the_run(folder, runs):
    card = render_card(folder, runs[-1], [SCORE], "ada/shapes-7b", "cc-by-nc-4.0")
    assert card.startswith("---\n")
    assert front_matter(card) == {
        "license": "cc-by-nc-4.0",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["avg-llava", "llava-next"],
        "base_model": ["openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"],
    }
    rows = tables(card)
    (first,) = (row for row in rows if row[0] == "1" and len(row) == 9)
    assert first[2:6] == [
        "`openai/clip-vit-large-patch14-336` and `lmsys/vicuna-7b-v1.5`", "99", "8", "0.001, vision 0.0002"
    ]  # fmt: skip
    assert [row[0] for row in rows if len(row) == 9 and row[0].isdigit()] == ["1", "2", "3"]
    assert ["3", "shapes.json", "12,000", "2.0", "cc-by-4.0"] in rows
    assert ["3", "texts.jsonl (first:9)", "9", "1.0", "unknown"] in rows
    assert ["textvqa", "exact_match", "61.25", "5000", "router", "37.5 %"] in rows
    assert ["textvqa", "0.0 %", "0.0 %", "75.0 %", "0.0 %", "25.0 %"] in rows  # of 1, 2, 4, 8 and 16 tokens
    assert "/home/ada" not in card
    assert "seed 7" in card
    assert "(LoRA, rank 8, alpha 16.0)" in card


def test_a_card_says_that_a_part_is_defined_elsewhere(folder, tmp_path, monkeypatch):
    class OwnRouter(TransformerRouter):
        pass

    monkeypatch.setitem(ROUTERS, "own", OwnRouter)
    shutil.copytree(folder, tmp_path / "own")
    config = AvgLlavaConfig.from_pretrained(folder)
    config.router_config.kind = "own"
    config.save_pretrained(tmp_path / "own")
    assert f"`{__name__}`" in render_card(tmp_path / "own", None)
    assert "Python file of its author" not in render_card(folder, None)


def test_lineage_ends_where_the_start_is_another(runs, tmp_path):
    assert lineage(runs[-1]) == runs
    (tmp_path / "1" / "stage.json").unlink()
    write_manifest(tmp_path / "1", replace(runs[0], created="2020-01-01T00:00:00+00:00"))
    assert lineage(runs[-1]) == runs[1:]


def test_unknown_facts_are_called_unknown(folder):
    card = render_card(folder, None)
    assert front_matter(card)["license"] == "other"
    assert "base_model" not in front_matter(card)
    assert "Not recorded" in card
    assert "None are recorded here." in card
    older = render_card(folder, manifest(4, {"path": "owner/start", "stage": None, "created": None}, samples=[]))
    assert ["4", "shapes.json", "unknown", "2.0", "cc-by-4.0"] in tables(older)
    assert front_matter(older)["base_model"] == ["owner/start"]


@pytest.mark.parametrize("stage", [3, 4])
def test_the_snippets_run(folder, tmp_path, monkeypatch, capsys, stage):
    """All three as they stand, but for the name; before stage 4 they force a level."""
    card = render_card(folder, manifest(stage, {"path": "nowhere", "stage": stage - 1, "created": None}))
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(snippets) == 3
    assert all(("granularity" in snippet.replace("answer.granularity", "").replace("# granularity", "")) == (stage == 3)
               for snippet in snippets)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (70, 40), "red").save("picture.png")
    for snippet in snippets:
        assert snippet.count(f'"{UNKNOWN_REPOSITORY}"') == 1
        exec(snippet.replace(UNKNOWN_REPOSITORY, str(folder)), {})
        assert capsys.readouterr().out.strip()


def test_an_edited_card_is_kept(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert write_card(tmp_path, None)
    first = (tmp_path / "README.md").read_text()
    assert not is_edited(tmp_path)
    assert write_card(tmp_path, None, repository="ada/shapes")
    assert (tmp_path / "README.md").read_text() != first
    for edited in (first.replace("vision tower", "eye"), f"{first}More.\n", first[:-100], "Mine.\n"):
        (tmp_path / "README.md").write_text(edited)
        assert is_edited(tmp_path)
        assert not write_card(tmp_path, None)
        assert (tmp_path / "README.md").read_text() == edited
