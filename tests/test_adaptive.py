"""The commands of docs/adaptive.md, on a tiny model that the original code wrote, and the page's figures."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from avg_llava import cli
from avg_llava.checkpoints.loading import load_model_config
from avg_llava.mini.benchmarks import write_benchmarks
from avg_llava.mini.world import WorldSize, write_world
from avg_llava.planning import dry_run
from avg_llava.planning.estimate import Request, estimate
from avg_llava.training import run
from avg_llava.training.checkpoint import read_manifest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/adaptive.md").read_text("utf-8")
START = "llava-v1.6-vicuna-7b"
STAND_IN = ROOT / "tests/data/checkpoints/llava16_vicuna"
EVALUATION = ["--data", "benchmarks", "--limit", "2", "--timed", "0"]
"""Options in place of a download."""


def commands() -> list[list[str]]:
    """The words of all commands of the page, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    return [shlex.split(line) for line in "".join(blocks).replace("\\\n", "").splitlines()]


def execute(words: list[str]) -> int:
    """Runs a command in this process, where the scripts would start another one; returns its exit code."""
    if words[0] == "avg-llava":
        return cli.main([*words[1:], *(EVALUATION if words[1] == "evaluate" else [])])
    assert re.fullmatch(r"bash scripts/train_stage[34]\.sh", " ".join(words[:2]))
    return (dry_run if "--dry-run" in words else run).main(words[2:])


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder like the project's, whose configurations start from the stand-in and train on 4 drawn samples."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    write_world(tmp_path / "world", size=WorldSize(num_captions=0, num_instruct=4, num_router=0, num_eval=0))
    write_benchmarks(tmp_path / "benchmarks")
    for stage in (3, 4):
        path = tmp_path / f"configs/{START}/qlora/stage{stage}.yaml"
        values = yaml.safe_load(path.read_text())
        values["data"] = {"sources": [{"path": "world/instruct.json", "sampling": "random:4"}], "num_workers": 0}
        values["optim"] |= {"global_batch_size": 2, "micro_batch_size": 2, "epochs": 3, "lr": 1e-3}
        values["logging"] = {"trackers": [], "progress_bar": False}
        if stage == 3:
            values["model"] = {"start": str(STAND_IN)}
            values["optim"]["lora_lr"] = 1e-2
        path.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands(project, capsys):
    """To the end: the loss falls, the router chooses a level, and the benchmark has a score."""
    for words in commands():
        assert execute(words) == 0, (words, capsys.readouterr().err)
    for stage in (3, 4):
        assert read_manifest(project / f"runs/{START}/qlora/stage{stage}").finished
    log = (project / f"runs/{START}/qlora/stage3/log_history.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, log) if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert load_model_config(project / f"runs/{START}/qlora/stage4").template == "vicuna_v1"
    told = capsys.readouterr().out
    answer = json.loads(re.search(r"^\{\n.*?^\}$", told, flags=re.DOTALL | re.MULTILINE)[0])
    assert answer["granularity"] in (36, 72, 144, 288, 576)
    assert json.loads((project / "runs/eval/pope.json").read_text())["model"]


def test_the_figures(monkeypatch, capsys):
    """What `estimate` prints, and the table of all starts."""
    monkeypatch.chdir(ROOT)
    assert cli.main(commands()[0][1:]) == 0
    assert f"```text\n{capsys.readouterr().out}```" in PAGE
    rows = []
    for start in re.findall(r"^\| `([\w.-]+)` \| `", PAGE, flags=re.MULTILINE):
        request = Request(num_gpus=1, gpu="rtx4090")
        stage3, stage4 = (estimate(Path(f"configs/{start}/qlora/stage{stage}.yaml"), request) for stage in (3, 4))
        feedback = {"total": stage4["feedback"]["memory"], "hours": stage4["feedback"]["hours"]}
        parts = [stage3["memory"]["none"] | stage3, feedback, stage4["memory"]["none"] | stage4]
        rows.append([start, *(f"{part['total'] / 2**30:.1f} GiB, {part['hours']:.1f} h" for part in parts)])
    assert len(rows) == 3
    lines = [["", "stage 3", "feedback, once", "router"], ["---"] * 4, *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    assert f"<!-- rows of tests/test_adaptive.py -->\n{table}\n<!-- end of rows -->" in PAGE, table
