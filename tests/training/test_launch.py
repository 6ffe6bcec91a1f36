"""Commands of the launch script, recorded by fake `python` and `deepspeed` that print their arguments."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = """#!/bin/sh
case "$*" in
    *device_count*) echo "$FAKE_GPUS" ;;
    *cpu_count*) echo 8 ;;
    *) echo "python $*"; echo "threads=$OMP_NUM_THREADS" ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """Runs scripts/train_stageN.sh with fakes; returns the finished process."""
    for name, text in {"python": PYTHON, "deepspeed": '#!/bin/sh\necho "deepspeed $*"\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    says_where = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HOSTFILE", "OMP_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in says_where}

    def run(stage: int, *arguments: str, gpus: int = 0, **environment: str) -> subprocess.CompletedProcess:
        settings = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(tmp_path),  # or the script would put the project's environment first
            "FAKE_GPUS": str(gpus),
        }
        command = ["bash", str(ROOT / f"scripts/train_stage{stage}.sh"), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=kept | settings | environment, capture_output=True, text=True, check=False
        )

    return run


def test_one_process(launch):
    result = launch(2, str(ROOT / "configs/mini/stage2.yaml"), "--optim.lr", "1e-4")
    assert result.returncode == 0, result.stderr
    program, threads = result.stdout.splitlines()
    assert program == f"python -m avg_llava.training.run {ROOT}/configs/mini/stage2.yaml --optim.lr 1e-4"
    assert threads == "threads=8"


def test_a_dry_run_is_planned_not_trained(launch):
    result = launch(2, str(ROOT / "configs/mini/stage2.yaml"), "--dry-run")
    assert f"python -m avg_llava.planning.dry_run {ROOT}/configs/mini/stage2.yaml --dry-run" in result.stdout


def test_the_7b_configuration_is_the_default(launch):
    result = launch(3, "--output.dir", "elsewhere")
    assert "-m avg_llava.training.run configs/vicuna-7b/stage3.yaml --output.dir elsewhere" in result.stdout


def test_a_relative_configuration_is_the_callers(launch, tmp_path):
    (tmp_path / "mine.yaml").write_text("stage: 1\n")
    assert f"-m avg_llava.training.run {tmp_path}/mine.yaml" in launch(1, "mine.yaml").stdout


def test_several_processes_find_a_free_port(launch):
    result = launch(1, NPROC_PER_NODE="2")
    assert "python -m torch.distributed.run --standalone --nproc_per_node 2 -m avg_llava.training.run" in result.stdout
    assert "threads=4" in result.stdout, "the cores are divided"


def test_one_process_for_each_gpu(launch):
    assert "--standalone --nproc_per_node 4 " in launch(1, gpus=4).stdout


def test_several_machines(launch):
    result = launch(1, gpus=8, NNODES="4", NODE_RANK="2", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    expected = "--nnodes 4 --node_rank 2 --nproc_per_node 8 --master_addr 10.0.0.1 --master_port 1234"
    assert f"python -m torch.distributed.run {expected} -m avg_llava.training.run" in result.stdout


def test_hostfile(launch, tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    result = launch(1, "configs/mini/stage1.yaml", "--seed", "3", HOSTFILE="hosts")
    assert result.stdout.startswith(f"deepspeed --hostfile {tmp_path}/hosts --master_port 29500 --no_local_rank")
    assert result.stdout.rstrip().endswith("--module avg_llava.training.run configs/mini/stage1.yaml --seed 3")


@pytest.mark.parametrize(
    ("stage", "arguments", "environment", "message"),
    [
        (1, ["configs/mini/stage2.yaml"], {}, "is for stage 2; use scripts/train_stage2.sh"),
        (1, ["none.yaml"], {}, "none.yaml does not exist"),
        (1, [], {"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE must be a whole number"),
        (1, [], {"NNODES": "2"}, "needs NODE_RANK"),
        (1, [], {"NNODES": "2", "NODE_RANK": "0"}, "needs MASTER_ADDR"),
        (1, [], {"HOSTFILE": "none"}, "HOSTFILE none does not exist"),
    ],
)
def test_wrong_usage(launch, stage, arguments, environment, message):
    result = launch(stage, *arguments, **environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_help(launch, stage):
    result = launch(stage, "--help")
    assert result.returncode == 0
    assert f"bash scripts/train_stage{stage}.sh configs/mini/stage{stage}.yaml" in result.stdout
    for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HOSTFILE"):
        assert name in result.stdout
