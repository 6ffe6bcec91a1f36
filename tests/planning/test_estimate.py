"""Estimates against counted parameters, state sizes worked out by hand, and tensors that autograd saves in a step."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from avg_llava import AvgLlavaForConditionalGeneration, cli, load_model
from avg_llava.bench.presets import PRESETS
from avg_llava.bench.training import make_batch, sample_shapes
from avg_llava.checkpoints.loading import load_model_config
from avg_llava.cli.training import Gpu, Zero
from avg_llava.common.machine import GPUS
from avg_llava.common.settings import ConfigError
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.planning import estimate
from avg_llava.planning.memory import SHARDINGS, Activations, Sharding, activation_memory, sharding_of, state_memory
from avg_llava.planning.meta_model import find_model_config
from avg_llava.training import levels
from avg_llava.training.assembly import build_dataset, load_processor
from avg_llava.training.config import ObjectiveSettings, load_config
from avg_llava.training.flops import SampleShape, step_flops
from avg_llava.training.objectives import objective_class
from avg_llava.training.processes import read_deepspeed_file
from avg_llava.training.stages import OBJECTIVES, STAGES, set_trainable
from tests.parity.golden import GOLDEN
from tests.tiny import stage_values, write_backbones, write_data

ROOT = Path(__file__).parents[2]
MINI = "avg_llava/mini/checkpoint"
B = 10**9


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_7b_model_is_counted_without_a_checkpoint(capsys):
    """From stage 3 back to the backbones of stage 1; the counts are those of the released weights."""
    assert cli.main(["estimate", "--config", "configs/vicuna-7b/stage3.yaml", "--gpus", "8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    expected = json.loads((GOLDEN / "I_params.json").read_text())
    parts = {part: count["total"] for part, count in result["model"]["by_part"].items()}
    assert (parts["router"], parts["llm"]) == (expected["router_total"], expected["llm"])
    assert result["model"]["trained"] == result["model"]["parameters"] - expected["router_total"]
    assert any("runs/vicuna-7b/stage2 does not exist" in line for line in result["assumptions"])
    assert any("lmsys/vicuna-7b-v1.5 has its published shape" in line for line in result["assumptions"])
    assert (result["sharding"], result["step"]["accumulation_steps"]) == ("3", 4)
    assert result["steps"] == 7969, "1,020,000 samples in batches of 128"
    shape = estimate.TYPICAL_SAMPLES[3]
    path = Path("configs/vicuna-7b/stage3.yaml")
    model_config, _ = find_model_config(load_config(path), path)
    flops = step_flops(STAGES[3].trains, STAGES[3].passes, [shape] * 128, model_config).total
    assert result["step"]["flops"] == pytest.approx(flops)
    assert result["hours"] == pytest.approx(7969 * flops / (8 * 989e12 * 0.4) / 3600)


def test_an_ablation_finds_its_parent_in_another_folder():
    path = Path("configs/ablations/k_16.yaml")
    result = estimate.estimate(path, estimate.Request(num_gpus=1))
    assert "configs/vicuna-7b/stage3.yaml" in result["assumptions"][0]
    assert result["model"]["by_part"]["router"]["total"] == 117_507_211 - 16, "a voter of 16 text slots fewer"
    assert result["model"]["by_part"]["llm"]["total"] < 2e8, "with a feedback store only the embeddings are there"


def test_a_local_start_is_counted_exactly(tmp_path, capsys):
    text = Path("configs/mini/stage3.yaml").read_text().replace("runs/mini/stage2", MINI)
    (tmp_path / "stage3.yaml").write_text(text)
    command = ["estimate", "--config", str(tmp_path / "stage3.yaml"), "--gpus", "2", "--num-samples", "3200"]
    assert cli.main([*command, "--image-size", "64x64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    model = load_model(MINI)
    assert result["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (result["samples"], result["steps"]) == (3200, 200)
    assert cli.main(command) == 0
    assert "parameters, " in capsys.readouterr().out
    assert cli.main([*command, "--gpus", "3"]) == 1
    assert "is not a multiple of" in capsys.readouterr().err


def test_a_token_budget(tmp_path, capsys):
    """Three equal samples, but not four, fit into a micro-batch; a step has two micro-batches per GPU."""
    values = yaml.safe_load(Path("configs/mini/stage3.yaml").read_text().replace("runs/mini/stage2", MINI))
    path = tmp_path / "stage3.yaml"

    def run(**optim) -> dict:
        values["optim"] |= {"global_batch_size": 16, "micro_batch_size": 4, "max_tokens_per_batch": None, **optim}
        path.write_text(yaml.safe_dump(values))
        shape = {"image_size": (64, 64), "num_prompt_tokens": 30, "num_answer_tokens": 10, "num_samples": 1200}
        return estimate.estimate(path, estimate.Request(num_gpus=2, **shape))

    config = load_model_config(MINI)
    length = SampleShape((64, 64), 30, 10).length(config.granularities[-1], config)
    reference, budget = run(micro_batch_size=3, global_batch_size=12), run(max_tokens_per_batch=3 * length + 5)
    assert reference["step"]["samples"] == budget["step"]["samples"] == 12
    assert reference["steps"] == budget["steps"] == 100
    for key in ("tokens", "flops", "accumulation_steps"):
        assert reference["step"][key] == budget["step"][key]
    assert reference["memory"] == budget["memory"]  # of three samples
    assert any(f"2 x {3 * length + 5:,} tokens per GPU" in line for line in estimate.table_lines(budget))
    alone = run(max_tokens_per_batch=10)
    assert alone["step"]["samples"] == 4


def test_samples_are_drawn_from_data_that_are_there(tmp_path):
    """All samples of a small data set: tokens and operations are theirs."""
    write_backbones(tmp_path)
    write_data(tmp_path, num_samples=6)
    values = stage_values(1, tmp_path, tmp_path)
    values["optim"] |= {"max_steps": None, "epochs": 2}
    path = tmp_path / "stage1.yaml"
    path.write_text(yaml.safe_dump(values))
    result = estimate.estimate(path, estimate.Request(num_gpus=1))
    assert result["assumptions"] == ["samples are like 6 sampled from the data"]
    assert (result["samples"], result["steps"], result["sharding"]) == (6, 4, "none")
    config = load_config(path)
    processor, model_config = load_processor(config)
    dataset = build_dataset(config, processor, model_config)
    num_tokens = 0
    for index in range(len(dataset)):
        item = dataset[index]
        visual = sum(
            num_visual_tokens(size, model_config.granularities[-1], model_config)
            for size in item["image_sizes"].tolist()
        )
        num_tokens += len(item["input_ids"]) - len(item["image_sizes"]) + int(visual)
    assert result["step"]["tokens"] == round(num_tokens / 6 * 4)


def test_a_start_that_nothing_describes(tmp_path):
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "stage3.yaml"
    path.write_text(Path("configs/mini/stage3.yaml").read_text().replace("runs/mini/stage2", "nowhere"))
    with pytest.raises(ConfigError, match="--model-of"):
        estimate.estimate(path, estimate.Request(num_gpus=1))
    found = estimate.estimate(path, estimate.Request(num_gpus=1, model_of=Path("configs/mini/stage1.yaml")))
    assert found["model"]["parameters"] == sum(each.numel() for each in load_model(MINI).parameters())


def test_names_of_the_command_line():
    assert tuple(GPUS) == get_args(Gpu)
    assert tuple(sharding.name for sharding in SHARDINGS) == get_args(Zero)


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        # GB of 7e9 bfloat16 parameters, 6e9 of them trained, on 4 GPUs: parameters, gradients, optimizer, host
        (Sharding(0), (14, 12, 72, 0)),
        (Sharding(1), (14, 12, 18, 0)),
        (Sharding(2), (14, 3, 18, 0)),
        (Sharding(3), (3.5, 3, 18, 0)),
        (Sharding(3, True, True), (0, 0, 0, 18 + 6 + 3.5)),
        (Sharding(3, True, False), (3.5, 0, 0, 18 + 6)),
        (Sharding(None), (28, 24, 48, 0)),
    ],
    ids=lambda value: value.name if isinstance(value, Sharding) else "",
)
def test_states_by_hand(sharding, expected):
    state = state_memory(sharding, 7 * B, 6 * B, 2, 4, 4096)
    found = (state.parameters, state.gradients, state.optimizer, state.host)
    assert [value / B for value in found] == pytest.approx(expected)


def test_quantised_states_by_hand():
    """5e9 of the 7e9 weights in 4 bits with a float32 scale per 64; the largest layer is dequantised."""
    sizes = {"num_parameters": 7 * B, "num_trained": B, "element_size": 2, "num_gpus": 4, "hidden_size": 4096}
    state = state_memory(Sharding(None), **sizes, frozen_size=2, quantized=[3 * B, 2 * B])
    assert state.parameters / B == pytest.approx(5 * 0.5625 + 2 + 4)
    assert state.buffers / B == pytest.approx(2 + 3 * 2)
    state = state_memory(Sharding(0), **sizes, quantized=[3 * B, 2 * B])
    assert (state.parameters / B, state.buffers / B) == pytest.approx((5 * 0.5625 + 2 + 2, 3 * 2))


def test_hub_ids_that_are_not_downloaded(tmp_path, capsys):
    """A known start has its published shape; of another one the error says what is missing."""
    path = tmp_path / "stage3.yaml"
    text = Path("configs/mini/stage3.yaml").read_text()
    path.write_text(text.replace("runs/mini/stage2", "lmms-lab/llama3-llava-next-8b"))
    result = estimate.estimate(path, estimate.Request(num_gpus=1))
    assert result["assumptions"][0] == "lmms-lab/llama3-llava-next-8b has its published shape"
    assert result["model"]["by_part"]["llm"]["total"] == 8_030_261_248
    path.write_text(text.replace("runs/mini/stage2", "llava-hf/llama3-llava-next-8b-hf"))
    padded = estimate.estimate(path, estimate.Request(num_gpus=1))
    assert padded["model"]["by_part"]["llm"]["total"] == 8_030_261_248 + 2 * 64 * 4096
    path.write_text(text.replace("runs/mini/stage2", "someone/their-llava"))
    assert cli.main(["estimate", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert "model.start someone/their-llava is neither a folder nor a downloaded hub repository" in error
    assert "Traceback" not in error


def test_shipped_deepspeed_files():
    found = {
        path.stem: sharding_of(read_deepspeed_file(str(path))) for path in Path("configs/deepspeed").glob("*.json")
    }
    assert found["zero2"] == Sharding(2)
    assert found["zero3"] == Sharding(3)
    assert found["zero3_offload"] == Sharding(3, True, True)
    assert sharding_of(None) == Sharding(None)


def _kept_bytes(model, run) -> int:
    """Bytes of storages that autograd saves while `run` computes the loss, without those of the model."""
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_storages:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


def _step_memory(stage: int, recompute: bool, monkeypatch) -> tuple[int, Activations]:
    """Bytes that autograd saves in a step with all levels in one packed row, and the estimate."""
    monkeypatch.setattr(levels, "runs_levels_together", lambda model: True)
    torch.manual_seed(0)
    config = PRESETS["mini"].config()
    model = AvgLlavaForConditionalGeneration(config)
    set_trainable(model, STAGES[stage])
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    samples = sample_shapes(stage, config)
    objective = objective_class(STAGES[stage].objective)(model, ObjectiveSettings()).train()
    batch = make_batch(samples, config, torch.device("cpu"))
    measured = _kept_bytes(model, lambda: objective(**batch)["loss"])
    return measured, activation_memory(STAGES[stage].trains, STAGES[stage].passes, samples, config, 4, recompute)


@pytest.mark.parametrize("stage", [2, 3, 4])
def test_activations_are_those_that_autograd_keeps(stage, monkeypatch):
    measured, estimated = _step_memory(stage, False, monkeypatch)
    found = estimated.router if stage == 4 else estimated.kept  # in stage 4 the language model keeps nothing
    assert found == pytest.approx(measured, rel=0.25)


def test_activations_of_a_drawn_level(monkeypatch):
    """At the finest level, through a frozen language model."""
    finest = torch.tensor([0.0, 0, 0, 0, 1])
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", lambda logits, **_: logits.softmax(-1) * 0 + finest)
    torch.manual_seed(0)
    config = PRESETS["mini"].config()
    model = AvgLlavaForConditionalGeneration(config)
    set_trainable(model, STAGES[4])
    samples = sample_shapes(4, config)
    objective = objective_class("gumbel")(model, ObjectiveSettings()).train()
    batch = make_batch(samples, config, torch.device("cpu"))
    measured = _kept_bytes(model, lambda: objective(**batch)["loss"])
    estimated = activation_memory(STAGES[4].trains, OBJECTIVES["gumbel"].passes, samples, config, 4, False)
    assert estimated.kept == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputed_activations(stage, monkeypatch):
    """The estimate includes the tensors that autograd saves, and one recomputed layer of each part."""
    measured, estimated = _step_memory(stage, True, monkeypatch)
    everything, _ = _step_memory(stage, False, monkeypatch)
    assert measured < estimated.kept < measured + everything / 2
