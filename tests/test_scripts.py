"""The shell scripts: they parse, the quickstart skips and continues, the set-up refuses an old Python by name."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]

# Stand-ins for what the quickstart calls: they write down the call, and leave the result that it promises.
SETUP = "exit 0\n"
STAGE = """
echo "stage{stage} $1 $NPROC_PER_NODE" >>calls
[[ ! -f fail-stage{stage} ]] || exit 1
mkdir -p runs/mini/stage{stage} && touch runs/mini/stage{stage}/stage.json
"""
COMMAND = """#!/usr/bin/env bash
echo "$*" >>calls
if [[ $2 == data ]]; then mkdir -p playground/data/mini && touch playground/data/mini/manifest.json; fi
"""
SWEEP = "runs/mini/ablations"
PYTHON = """#!/usr/bin/env bash
echo "${FAKE_GPUS:-0}"
"""


def run(script: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script)],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def project(tmp_path):
    """A folder in which the real quickstart.sh runs stand-ins."""
    files = {
        "avg_llava/mini/world.py": "",
        "scripts/setup.sh": SETUP,
        ".venv/bin/avg-llava": COMMAND,
        ".venv/bin/python": PYTHON,
    }
    for stage in range(1, 5):
        files[f"scripts/train_stage{stage}.sh"] = STAGE.format(stage=stage)
        files[f"configs/mini/stage{stage}.yaml"] = f"stage: {stage}"
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    shutil.copy(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts")
    return tmp_path


def calls(project: Path) -> list[str]:
    """The calls since the last look, by their first words."""
    lines = (project / "calls").read_text().splitlines()
    (project / "calls").write_text("")
    return [" ".join(line.split()[:2]) for line in lines]


def test_quickstart_runs_every_step_and_then_only_the_report(project):
    quickstart = project / "scripts" / "quickstart.sh"
    done = run(quickstart, project)
    assert done.returncode == 0, done.stderr
    stages = [f"stage{stage} configs/mini/stage{stage}.yaml" for stage in range(1, 5)]
    assert calls(project) == ["mini data", *stages, "mini claims"]
    assert run(quickstart, project).returncode == 0
    assert calls(project) == ["mini claims"]


def test_quickstart_continues_after_a_failure(project):
    quickstart = project / "scripts" / "quickstart.sh"
    (project / "fail-stage2").touch()
    assert run(quickstart, project).returncode != 0
    assert calls(project)[-1].startswith("stage2")
    (project / "fail-stage2").unlink()
    assert run(quickstart, project).returncode == 0
    assert [call.split()[0] for call in calls(project)] == ["stage2", "stage3", "stage4", "mini"]
    times = (project / "runs/mini/times.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in times] == ["data", "stage1", "stage2", "stage3", "stage4"]


def test_quickstart_runs_a_stage_again_whose_inputs_changed(project):
    quickstart = project / "scripts" / "quickstart.sh"
    run(quickstart, project)
    calls(project)
    (project / "configs/mini/stage3.yaml").write_text("stage: 3  # changed")
    shutil.rmtree(project / "runs/mini/stage4")
    run(quickstart, project)
    assert [call.split()[0] for call in calls(project)] == ["stage3", "stage4", "mini"]


def test_ablations_share_one_store_and_end_in_a_table(project):
    for script in ("scripts/ablations.sh", "configs/mini/ablations/full.yaml", "configs/mini/ablations/other.yaml"):
        (project / script).parent.mkdir(parents=True, exist_ok=True)
        (project / script).write_text((ROOT / "scripts/ablations.sh").read_text() if script.endswith(".sh") else "")
    environment = {"FAKE_GPUS": "0", "NPROC_PER_NODE": "1"}
    done = run(project / "scripts/ablations.sh", project, **environment)
    assert done.returncode == 0, done.stderr
    lines = (project / "calls").read_text().splitlines()
    data, feedback, *trainings, table = lines
    assert data == "mini data --output playground/data/mini"
    assert feedback.split() == [
        "feedback",
        "--config",
        "configs/mini/ablations/full.yaml",
        "--output",
        f"{SWEEP}/feedback",
    ]
    assert trainings == [f"stage4 configs/mini/ablations/{name}.yaml 1" for name in ("full", "other")]
    assert table.startswith("mini routers --model avg_llava/mini/checkpoint ")
    assert table.split()[-2:] == [f"{SWEEP}/full", f"{SWEEP}/other"]
    (project / "calls").write_text("")
    run(project / "scripts/ablations.sh", project, **environment)
    assert [call.split()[0] for call in calls(project)] == ["feedback", "stage4", "stage4", "mini"]
    (project / "fail-stage4").touch()
    assert run(project / "scripts/ablations.sh", project, **environment).returncode == 1


@pytest.mark.parametrize(("gpus", "processes"), [("0", "2"), ("1", "1"), ("2", "2"), ("8", "2")])
def test_quickstart_takes_two_processes_unless_there_is_one_gpu(project, gpus, processes):
    run(project / "scripts" / "quickstart.sh", project, FAKE_GPUS=gpus, OMP_NUM_THREADS="1")
    assert f"stage1 configs/mini/stage1.yaml {processes}" in (project / "calls").read_text()


def test_setup_names_the_python_that_it_needs(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    done = run(tmp_path / "scripts" / "setup.sh", tmp_path, PYTHON="no-such-python")
    assert done.returncode == 1
    assert "Python 3.11 or newer was not found (tried: no-such-python)" in done.stderr
    assert not (tmp_path / ".venv").exists()
