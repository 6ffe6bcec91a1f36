"""Two DeepSpeed processes against one process without DeepSpeed, all four stages on tiny models.

Micro-batches hold one sample each and every second sample is text only, so that in some steps one rank has an image and
the other has none. Starting processes costs most of the time, hence one launch for all stages of a ZeRO stage.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from avg_llava import load_model
from avg_llava.data.sampler import ShuffledBatches
from avg_llava.training.assembly import build_model
from avg_llava.training.checkpoint import latest_checkpoint, read_manifest
from avg_llava.training.config import load_config
from avg_llava.training.feedback import collect
from avg_llava.training.monitor import MACHINE_METRICS
from avg_llava.training.run import run_stage
from avg_llava.training.stages import STAGES, part_of
from tests.tiny import bpe_tokenizer, language_models, stage_values, towers, write_backbones, write_data

ROOT = Path(__file__).parents[2]
STEPS = {1: 3, 2: 3, 3: 7, 4: 3}  # four steps see all 16 samples: stage 3 runs into a second epoch
# Under ZeRO-3, parameters of at most so many elements stay whole. Stage 2 shards all, also the newline. Others
# shard less, because gathering a tiny parameter takes as long as gathering a large one.
PERSISTENCE = {1: 320, 2: 0, 3: 1200, 4: 320}
NUM_IMAGE_SAMPLES, NUM_TEXT_SAMPLES = 8, 8
PATIENCE = 500  # seconds for a launch (20 where nothing else runs); a rank that waits for ever fails the test

pytestmark = [pytest.mark.timeout(3 * PATIENCE), pytest.mark.xdist_group("distributed")]  # launches are shared


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_backbones(folder)
    write_data(folder, NUM_IMAGE_SAMPLES, NUM_TEXT_SAMPLES)
    shutil.copy(folder / "instruct.json", folder / "more.json")
    return folder


@pytest.fixture(scope="module")
def one_process(world, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("one")
    for stage in STAGES:
        run_stage(load_config(_write_config(stage, root, world, deepspeed=None)))
    return root


@pytest.fixture(scope="module")
def half_feedback(one_process) -> Path:
    """What the language model of the one process says in bfloat16."""
    path = _router_in_half(one_process / "stage4.yaml", one_process)
    collect(load_config(path), one_process / "half_feedback", num_processes=1)
    return one_process / "half_feedback"


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def two_processes(request, world, one_process, half_feedback, tmp_path_factory) -> Path:
    """All stages of a chain of their own, in one launch; the chain's folder."""
    root = tmp_path_factory.mktemp(f"zero{request.param}")
    configs = [
        _write_config(stage, root, world, _deepspeed_file(root, request.param, threshold))
        for stage, threshold in PERSISTENCE.items()
    ]
    # What the 7B configurations use, beside the plain runs: recomputed activations, and bfloat16.
    configs.append(_vary(configs[2], "checkpointed", gradient_checkpointing=True))
    configs.append(_vary(configs[2], "bf16", precision="bf16"))
    configs.append(_with_lora(configs[2]))
    configs.append(_with_budget(configs[2]))
    configs.append(_vary(configs[3], "gumbel", gradient_checkpointing=True))
    configs[-1].write_text(configs[-1].read_text() + "objective: {method: gumbel}\n")
    configs.append(_router_in_half(configs[3], one_process))
    if request.param == 3:  # optimizer and parameters in host memory
        configs.append(_vary(configs[2], "offload", deepspeed=str(ROOT / "configs/deepspeed/zero3_offload.json")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*launch, "-m", "tests.distributed.worker", *map(str, configs)],
        cwd=ROOT,
        env=_environment(root),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    return root


def _write_config(stage: int, root: Path, world: Path, deepspeed: Path | None) -> Path:
    values = stage_values(stage, root, world)
    values["data"]["group_by_modality_length"] = False
    values["optim"] |= {"global_batch_size": 4, "micro_batch_size": 1, "max_steps": STEPS[stage]}
    values["runtime"]["deepspeed"] = None if deepspeed is None else str(deepspeed)
    if stage == 1:
        values["model"]["router"]["dropout"] = 0.0  # its masks would depend on the number of processes
    if stage == 3:
        values["output"]["save_every"] = 1
    if stage == 4:  # the same records in the same order, from two sources
        half = (NUM_IMAGE_SAMPLES + NUM_TEXT_SAMPLES) // 4
        values["data"]["sources"] = [
            {"path": str(world / "instruct.json"), "sampling": f"first:{half}"},
            {"path": str(world / "more.json"), "sampling": f"end:{NUM_IMAGE_SAMPLES + NUM_TEXT_SAMPLES - half}"},
        ]
    path = root / f"stage{stage}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _deepspeed_file(root: Path, zero: int, persistence: int) -> Path:
    """The shipped file; under ZeRO-3 with another threshold."""
    shipped = ROOT / f"configs/deepspeed/zero{zero}.json"
    if zero == 2:
        return shipped
    settings = json.loads(shipped.read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = persistence
    path = root / f"zero3_{persistence}.json"
    path.write_text(json.dumps(settings))
    return path


def _vary(path: Path, name: str, **runtime: object) -> Path:
    """A short run of the same stage with another way of computing."""
    values = yaml.safe_load(path.read_text())
    values["runtime"] |= runtime
    values["optim"]["max_steps"] = 3
    values["output"] = {"dir": str(path.parent / name)}
    varied = path.with_name(f"{name}.yaml")
    varied.write_text(yaml.safe_dump(values))
    return varied


def _router_in_half(path: Path, start: Path) -> Path:
    """Stage 4 in bfloat16, from stored feedback: feedback of another precision may order the levels in another way."""
    varied = _vary(path, "router", precision="bf16")
    values = yaml.safe_load(varied.read_text())
    values["model"]["start"] = str(start / "stage3")
    values["objective"] = {"feedback_store": str(start / "half_feedback")}
    varied.write_text(yaml.safe_dump(values))
    return varied


def _with_lora(path: Path) -> Path:
    """A short run of the same stage with adapters in language model and tower."""
    varied = _vary(path, "lora")
    values = yaml.safe_load(varied.read_text())
    values["lora"] = {"rank": 4, "alpha": 8, "dropout": 0.0, "vision": True}
    varied.write_text(yaml.safe_dump(values))
    return varied


def _with_budget(path: Path) -> Path:
    """A run of the same stage, into its second epoch, whose micro-batches hold as many samples as a token budget."""
    varied = _vary(path, "budget")
    values = yaml.safe_load(varied.read_text())
    values["optim"] |= {"max_tokens_per_batch": 700, "max_steps": 4}
    values["data"]["group_by_modality_length"] = True
    varied.write_text(yaml.safe_dump(values))
    return varied


def _environment(folder: Path) -> dict[str, str]:
    """One thread for each process, and a folder of its own for compiled extensions, of which there must be none."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "NPROC_PER_NODE": "2",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "HF_HUB_OFFLINE": "1",
    }


def _steps(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log_history.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return steps


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in _steps(folder)]


def test_some_step_has_an_image_on_one_rank_only(world):
    """What the comparison below relies on, from the order that all runs share."""
    records = json.loads((world / "instruct.json").read_text())
    order = [batch[0] for batch in ShuffledBatches(len(records), 1, seed=stage_values(2, world, world)["seed"])]
    has_image = ["image" in records[index] for index in order]
    assert any(first != second for first, second in zip(has_image[::2], has_image[1::2], strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_losses_equal_one_process(two_processes, one_process, stage):
    expected, found = _losses(one_process / f"stage{stage}"), _losses(two_processes / f"stage{stage}")
    assert len(found) == STEPS[stage]
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(set(found)) > 1


@pytest.mark.parametrize("stage", STAGES)
def test_the_log_equals_one_process(two_processes, one_process, stage):
    """All figures that are not the machine's: of all ranks, where each sees other samples and holds other gradients."""
    expected, found = _steps(one_process / f"stage{stage}"), _steps(two_processes / f"stage{stage}")
    for reference, line in zip(expected, found, strict=True):
        assert line.keys() == reference.keys()
        for name in line.keys() - set(MACHINE_METRICS):
            assert line[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-4), name
    parts = {name.removeprefix("grad_norm_") for name in found[0] if name.startswith("grad_norm_")}
    assert parts == set(STAGES[stage].trains)
    if stage == 4:
        assert {f"share_{level}/{source}" for level in (4, 64) for source in ("instruct", "more")} <= found[0].keys()


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_stage_s_parts_change(two_processes, world, stage):
    """On the saved weights: gathered from all ranks, complete, and loaded by the public loader."""
    after = dict(load_model(two_processes / f"stage{stage}").named_parameters())
    if stage == 1:
        torch.manual_seed(0)
        before = build_model(load_config(two_processes / "stage1.yaml"))[0]
        fresh = {"projector", "newline", "router"}  # another seed: only the backbones can be compared
    else:
        before, fresh = load_model(two_processes / f"stage{stage - 1}"), set()
    changed = {name for name, weight in before.named_parameters() if not torch.equal(weight, after[name])}
    assert {part_of(name) for name in changed} - fresh == set(STAGES[stage].trains) - fresh
    if stage == 3:
        layers = [name for name in changed if name.startswith("model.vision_tower.encoder.layers.")]
        assert {name.split(".")[4] for name in layers} == {"0", "1"}, "of three layers, features come from the second"
        moved = max((weight - after[name]).abs().max().item() for name, weight in before.named_parameters())
        assert moved > 1e-3


@pytest.mark.parametrize("two_processes", [3], indirect=True, ids=["zero3"])
def test_offload_equals_one_process(two_processes, one_process):
    assert _losses(two_processes / "offload") == pytest.approx(_losses(one_process / "stage3")[:3], abs=1e-4)


def test_lora_equals_one_process(two_processes, one_process):
    """Losses, adapters and the merged weights that the first process gathers; the frozen ones are not touched."""
    run_stage(load_config(_with_lora(one_process / "stage3.yaml")))
    expected, found = one_process / "lora", two_processes / "lora"
    assert _losses(found) == pytest.approx(_losses(expected), abs=1e-4)
    assert len(set(_losses(found))) > 1
    before = load_file(two_processes / "stage2" / "model.safetensors")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        weights = load_file(found / file)
        for name, tensor in load_file(expected / file).items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    weights = load_file(found / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, weights[name])}
    assert any(name.endswith("q_proj.weight") for name in changed)
    assert not any("embed_tokens" in name or "lm_head" in name or "patch_embedding" in name for name in changed)


def test_router_is_float32_beside_a_model_in_bfloat16(two_processes, one_process):
    """What is learnt is close to what float32 weights learn under autocast, also in weights that are saved in full."""
    run_stage(load_config(_router_in_half(one_process / "stage4.yaml", one_process)))
    assert _losses(two_processes / "router") == pytest.approx(_losses(one_process / "router"), rel=3e-2)
    folders = (two_processes / "router", one_process / "router", one_process / "stage3")
    weights, expected, before = (load_file(folder / "model.safetensors") for folder in folders)
    for name, tensor in weights.items():  # a run from stored feedback leaves all others as its start has them
        assert tensor.dtype == torch.float32 if ".router." in name else torch.equal(tensor, before[name]), name
    name = next(name for name in weights if name.endswith("router.merger.linear1.weight"))
    found, moved = weights[name] - before[name], expected[name] - before[name]
    assert not torch.equal(weights[name], weights[name].bfloat16().float())
    assert torch.cosine_similarity(found.flatten(), moved.flatten(), dim=0) > 0.9


def test_token_budget_equals_one_process(two_processes, one_process):
    """Micro-batches of different numbers of samples on the two ranks, and as many on the one as on the other."""
    run_stage(load_config(_with_budget(one_process / "stage3.yaml")))
    found = _losses(two_processes / "budget")
    assert found == pytest.approx(_losses(one_process / "budget"), abs=1e-4)
    assert len(set(found)) == 4


@pytest.mark.parametrize(("name", "tolerance"), [("checkpointed", 1e-4), ("bf16", 3e-2)])
def test_other_ways_to_compute_learn_the_same(two_processes, one_process, name, tolerance):
    assert _losses(two_processes / name) == pytest.approx(_losses(one_process / "stage3")[:3], abs=tolerance)
    expected = torch.bfloat16 if name == "bf16" else torch.float32
    assert load_model(two_processes / name).dtype == expected


def test_router_from_the_instruction_loss(two_processes):
    """Also in steps in which one rank has no image, the launch goes on to its end, and the router learns."""
    losses = _losses(two_processes / "gumbel")
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
    before, after = (load_model(two_processes / name).state_dict() for name in ("stage3", "gumbel"))
    changed = {part_of(name) for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed == {"router"}


def test_router_from_stored_feedback(one_process, world, tmp_path):
    """Two processes under ZeRO-3 that hold no language model, killed and continued, against one process that computes
    feedback as it goes."""
    config = _write_config(4, tmp_path, world, _deepspeed_file(tmp_path, 3, PERSISTENCE[4]))
    values = yaml.safe_load(config.read_text())
    values["model"]["start"] = str(one_process / "stage3")
    values["objective"] = {"feedback_store": str(tmp_path / "feedback")}
    values["output"]["save_every"] = 1
    config.write_text(yaml.safe_dump(values))
    collect(load_config(config), tmp_path / "feedback", num_processes=1)
    output = tmp_path / "stage4"
    with _launch(config, tmp_path) as launched:
        _wait_for(output / "checkpoint-1" / "stage.json", launched)
        for process in [*_ranks(launched), psutil.Process(launched.pid)]:
            process.kill()
        launched.communicate(timeout=PATIENCE)
    assert read_manifest(output) is None, "killed before it was finished"
    _finish(config, tmp_path)
    assert _losses(output) == pytest.approx(_losses(one_process / "stage4"), abs=1e-5)
    expected, found = (load_model(folder / "stage4").state_dict() for folder in (one_process, tmp_path))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_the_disk_of_one_rank_is_full(one_process, world, tmp_path):
    """Two ZeRO-3 processes, of which the second cannot write its part of a checkpoint: both end, one line says why,
    and from the checkpoint before the same command continues; here with LoRA."""
    config = _with_lora(_write_config(3, tmp_path, world, _deepspeed_file(tmp_path, 3, PERSISTENCE[3])))
    values = yaml.safe_load(config.read_text())
    values["model"]["start"] = str(one_process / "stage2")
    values["output"]["save_every"] = 1
    config.write_text(yaml.safe_dump(values))
    output = tmp_path / "lora"
    with _launch(config, tmp_path) as launched:
        _wait_for(output / "checkpoint-1" / "stage.json", launched)
        (second,) = [process for process in _ranks(launched) if process.environ()["RANK"] == "1"]
        second.rlimit(psutil.RLIMIT_FSIZE, (1000, -1))
        _, messages = launched.communicate(timeout=PATIENCE)
    assert launched.returncode != 0
    errors = [line for line in messages.splitlines() if line.startswith("error")]
    assert len(errors) == 1, messages[-5000:]
    assert errors[0].startswith(f"error (process 1): cannot write {output}"), errors
    whole = latest_checkpoint(output)
    assert whole is not None
    assert f"{whole} is whole, and the run continues from it" in errors[0]
    assert "continuing from step" in _finish(config, tmp_path)
    run_stage(load_config(_with_lora(one_process / "stage3.yaml")))
    assert _losses(output) == pytest.approx(_losses(one_process / "lora"), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("tower", "language"), [("siglip2", "gemma2"), ("dinov2_registers", "gpt_neox")])
def test_other_backbones_equal_one_process(tmp_path, tower, language):
    """Stage 2 trains both under ZeRO-3, which shards every parameter: none is used outside of its module's call."""
    tokenizer = bpe_tokenizer()
    write_backbones(tmp_path, towers()[tower], language_models(tokenizer)[language], tokenizer)
    write_data(tmp_path, NUM_IMAGE_SAMPLES, NUM_TEXT_SAMPLES)
    run_stage(load_config(_write_config(1, tmp_path, tmp_path, deepspeed=None)))
    sharded = _write_config(2, tmp_path, tmp_path, _deepspeed_file(tmp_path, 3, persistence=0))
    alone = _vary(sharded, "alone", deepspeed=None)
    run_stage(load_config(alone))
    _finish(sharded, tmp_path)
    assert _losses(tmp_path / "stage2") == pytest.approx(_losses(tmp_path / "alone"), abs=1e-4)


def test_nothing_was_compiled(two_processes):
    assert not list((two_processes / "extensions").rglob("*"))


def test_manifests(two_processes):
    for stage in STAGES:
        manifest = read_manifest(two_processes / f"stage{stage}")
        assert (manifest.finished, manifest.step, manifest.world_size) == (True, STEPS[stage], 2)


def test_killed_and_resumed(two_processes, tmp_path):
    """Kill -9 of all ranks in the second epoch, then the same command: the curve goes on as if nothing had happened."""
    output = tmp_path / "run"
    command = ["bash", "scripts/train_stage3.sh", str(two_processes / "stage3.yaml"), "--output.dir", str(output)]
    settings = {"cwd": ROOT, "env": _environment(tmp_path), "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, stderr=subprocess.PIPE, **settings) as launched:
        _wait_for(output / "checkpoint-5" / "stage.json", launched)
        processes = psutil.Process(launched.pid).children(recursive=True)
        ranks = [process for process in processes if "avg_llava.training.run" in process.cmdline()]
        assert len(ranks) >= 2
        for process in [*ranks, *processes, psutil.Process(launched.pid)]:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        launched.communicate(timeout=60)
    assert launched.returncode != 0
    assert read_manifest(output) is None, "killed before it was finished"

    resumed = subprocess.run(command, stderr=subprocess.PIPE, timeout=PATIENCE, check=False, **settings)
    assert resumed.returncode == 0, resumed.stderr[-5000:]
    assert "continuing from step" in resumed.stderr
    assert _losses(output) == pytest.approx(_losses(two_processes / "stage3"), abs=1e-5)
    assert read_manifest(output).finished
    assert not list(output.glob("checkpoint-*"))


def test_one_rank_is_killed_and_one_process_goes_on(two_processes, tmp_path):
    """Kill -9 of one rank of two: the other ends too. One process alone, under the same ZeRO, continues the curve."""
    output = tmp_path / "run"
    command = ["bash", "scripts/train_stage3.sh", str(two_processes / "stage3.yaml"), "--output.dir", str(output)]
    settings = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=_environment(tmp_path), **settings) as launched:
        _wait_for(output / "checkpoint-3" / "stage.json", launched)
        ranks = _ranks(launched)
        (second,) = [process for process in ranks if process.environ()["RANK"] == "1"]
        second.kill()
        launched.communicate(timeout=PATIENCE)
    assert launched.returncode != 0
    assert not any(process.is_running() for process in ranks)
    assert read_manifest(output) is None, "killed before it was finished"

    environment = _environment(tmp_path) | {"NPROC_PER_NODE": "1"}
    resumed = subprocess.run(command, env=environment, timeout=PATIENCE, check=False, **settings)
    assert resumed.returncode == 0, resumed.stderr[-5000:]
    assert "for another number of processes" in resumed.stderr
    assert "continuing from step" in resumed.stderr
    assert _losses(output) == pytest.approx(_losses(two_processes / "stage3"), abs=1e-5)
    assert read_manifest(output).world_size == 1


def test_a_worker_of_one_rank_meets_a_bad_sample(world, tmp_path):
    """Two ZeRO-3 processes, a truncated image in a loader's worker of one: both end, and one line names the sample."""
    records = json.loads((world / "captions.json").read_text())
    config = _write_config(1, tmp_path, world, _deepspeed_file(tmp_path, 3, PERSISTENCE[1]))
    values = yaml.safe_load(config.read_text())
    order = [batch[0] for batch in ShuffledBatches(len(records), 1, seed=values["seed"])]
    victim = records[order[1]]  # of micro-batches of one sample, the second process takes every second
    content = (world / victim["image"]).read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "images").symlink_to(world / "images")
    victim["image"] = "cut.png"
    (tmp_path / "captions.json").write_text(json.dumps(records))
    values["data"] |= {"sources": [{"path": str(tmp_path / "captions.json"), "follow_links": True}], "num_workers": 1}
    config.write_text(yaml.safe_dump(values))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*launch, "-m", "avg_llava.training.run", str(config)],
        cwd=ROOT,
        env=_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert finished.returncode != 0
    named = [line for line in finished.stderr.splitlines() if "cut.png" in line]
    assert len(named) == 1, finished.stderr[-5000:]
    assert named[0].startswith(f"error (process 1): sample '{victim['id']}' (")


def test_the_loss_of_one_rank_is_not_finite(world, tmp_path):
    """Two ZeRO-3 processes, one of which meets a word whose embedding is NaN: both end, and one line names the sample.

    The other is in its backward pass by then, and waits for gradients that never come.
    """
    records = json.loads((world / "captions.json").read_text())
    config = _write_config(1, tmp_path, world, _deepspeed_file(tmp_path, 3, PERSISTENCE[1]))
    values = yaml.safe_load(config.read_text())
    victim = records[list(ShuffledBatches(len(records), 1, seed=values["seed"]))[1][0]]  # the second process's first
    victim["conversations"][1]["value"] = "~"
    (tmp_path / "captions.json").write_text(json.dumps(records))
    shutil.copytree(world / "language", tmp_path / "language")
    token = AutoTokenizer.from_pretrained(tmp_path / "language").convert_tokens_to_ids("~")
    weights = load_file(tmp_path / "language" / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, tmp_path / "language" / "model.safetensors", {"format": "pt"})
    values["model"]["language"] = str(tmp_path / "language")
    values["data"]["sources"] = [{"path": str(tmp_path / "captions.json"), "image_root": str(world)}]
    config.write_text(yaml.safe_dump(values))
    with _launch(config, tmp_path) as launched:
        _, messages = launched.communicate(timeout=PATIENCE)
    assert launched.returncode != 0
    (named,) = [line for line in messages.splitlines() if "the loss is" in line]
    assert named.startswith(f"error (process 1): the loss is nan at step 1 on sample '{victim['id']}' ("), named
    assert "optim.lr" in named
    assert read_manifest(tmp_path / "stage1") is None


def _launch(config: Path, folder: Path) -> subprocess.Popen:
    """Two processes that train a stage."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*launch, "-m", "avg_llava.training.run", str(config)],
        cwd=ROOT,
        env=_environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(config: Path, folder: Path) -> str:
    """Two processes that train a stage to its end; what they say."""
    with _launch(config, folder) as launched:
        _, messages = launched.communicate(timeout=PATIENCE)
    assert launched.returncode == 0, messages[-5000:]
    return messages


def _ranks(launched: subprocess.Popen) -> list[psutil.Process]:
    """The processes that train."""
    children = psutil.Process(launched.pid).children(recursive=True)
    return [each for each in children if "avg_llava.training.run" in each.cmdline() and "RANK" in each.environ()]


def _wait_for(path: Path, launched: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert launched.poll() is None, "the run ended too early: " + launched.communicate()[1][-5000:]
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.01)
