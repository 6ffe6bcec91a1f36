"""4-bit blocks under trained adapters (QLoRA), against a model that holds the dequantised weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file

from avg_llava import load_model
from avg_llava.checkpoints.formats import open_checkpoint
from avg_llava.checkpoints.loading import build_from_backbones
from avg_llava.checkpoints.quantization import freeze_in_4bit
from avg_llava.checkpoints.weight_files import CheckpointError
from avg_llava.model.processing import AvgLlavaProcessor
from avg_llava.planning import dry_run, estimate
from avg_llava.training import run
from avg_llava.training.assembly import build_model
from avg_llava.training.config import ConfigError, LoraSettings, ObjectiveSettings, TrainConfig, load_config
from avg_llava.training.lora import add_adapters
from avg_llava.training.objectives import objective_class
from avg_llava.training.stages import STAGES, count_parameters, is_adapter, part_of, set_trainable
from tests.tiny import (
    bpe_tokenizer,
    images,
    language_config,
    pad,
    prompt,
    stage_values,
    tiny_model,
    write_backbones,
    write_data,
)
from tests.training.interruption import interrupt_at

pytestmark = pytest.mark.xdist_group("training-qlora")  # the trained stages are shared

CPU = torch.device("cpu")
ROUTER = {"num_text_tokens": 6, "num_attention_heads": 2}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "quantization": "4bit"}


def model_of():
    """A tiny model whose layers have whole blocks of 64 inputs."""
    return tiny_model(language=language_config(intermediate_size=128))


def restored(model) -> dict[str, torch.Tensor]:
    """The weights that the 4-bit layers multiply with, by the names of a model without adapters."""
    return {
        f"{name.replace('.base_layer', '')}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if type(module).__name__ == "FrozenLinear4bit"
    }


def batch_of(model) -> dict[str, torch.Tensor]:
    """A sample with an image, and one without."""
    prompts = [prompt(20, 3, seed=1), prompt(14, seed=3)]
    return {
        "input_ids": pad(prompts),
        "attention_mask": pad([torch.ones_like(ids) for ids in prompts]),
        "labels": pad([torch.where(torch.arange(len(ids)) < 10, -100, ids) for ids in prompts], value=-100),
        **images(model.config, (60, 30)),
    }


def gradients(model, checkpointing: bool) -> dict[str, torch.Tensor]:
    set_trainable(model, STAGES[3])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    objective = objective_class("multi_granularity")(model, ObjectiveSettings()).train()
    objective(**batch_of(model))["loss"].backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_dequantised_model(checkpointing):
    settings = LoraSettings(rank=4, alpha=6, dropout=0.0, vision=True)
    model, reference = model_of(), model_of()
    freeze_in_4bit(model, torch.float32, CPU)
    weights = restored(model)
    assert len(weights) == 2 * 7
    original = reference.state_dict()
    for name, weight in weights.items():
        assert 0.01 < (weight - original[name]).std() / original[name].std() < 0.15, "NF4 rounds with 9 %"
    assert not reference.load_state_dict(weights, strict=False).unexpected_keys
    for each in (model, reference):
        add_adapters(each, settings, seed=3)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in each.named_parameters():
            if ".lora_B." in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    expected, found = gradients(reference, False), gradients(model, checkpointing)
    assert found.keys() == expected.keys()
    assert any(is_adapter(name) and part_of(name) == "llm" for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert count_parameters(model) == count_parameters(reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_blocks_are_those_of_quantised_inference(world, dtype):
    model = load_model(world / "start", dtype=dtype)
    freeze_in_4bit(model, dtype, CPU)
    expected = load_model(world / "start", dtype=dtype, quantization="4bit")
    for name in restored(model):
        found, wanted = (each.get_submodule(name.removesuffix(".weight")) for each in (model, expected))
        assert torch.equal(found.weight, wanted.weight)
        assert torch.equal(found.weight.quant_state.absmax, wanted.weight.quant_state.absmax)
        assert found.compute_dtype == dtype
    quantised_names = {
        name for name in expected.state_dict() if "language_model.layers." in name and "norm" not in name
    }
    assert model.state_dict().keys() == expected.state_dict().keys() - quantised_names, "they come from the start"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Data, a start of stage 3 in bfloat16, and its result in a run of that precision."""
    root = tmp_path_factory.mktemp("qlora")
    tokenizer = bpe_tokenizer()
    language = language_config(tokenizer, intermediate_size=128, max_position_embeddings=4096)
    write_backbones(root, language=language, tokenizer=tokenizer)
    write_data(root)
    model = build_from_backbones(root / "vision", root / "language", dtype=torch.bfloat16, router_config=ROUTER)
    model.save_pretrained(root / "start")
    AvgLlavaProcessor.from_backbones(root / "vision", root / "language", model.config).save_pretrained(root / "start")
    run.run_stage(config_of(root))
    return root


def config_of(root: Path, *arguments: str, **lora) -> TrainConfig:
    values = stage_values(3, root, root)
    values["model"] |= {"start": str(root / "start"), "force_start": True}
    values["lora"] = LORA | lora
    values["optim"] |= {"lora_lr": 1e-2, "max_steps": 6}
    values["runtime"] |= {"precision": "bf16", "gradient_checkpointing": True}
    path = root / "stage3.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(path, arguments)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log_history.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_the_result_is_the_start_with_merged_adapters(world):
    """The adapters are added to the weights of the start's files in float32; the rest is the start's, or trained."""
    assert losses(world / "stage3")[-1] < losses(world / "stage3")[0]
    start, result = (open_checkpoint(world / name).tensors() for name in ("start", "stage3"))
    others = load_file(world / "stage3/adapter/other_parts.safetensors")
    adapters = load_file(world / "stage3/adapter/adapter_model.safetensors")
    assert result.keys() == start.keys()
    kinds = set()
    for name, tensor in result.items():
        before = start[name]
        assert tensor.dtype == before.dtype == torch.bfloat16, name
        own = name.removesuffix(".weight")
        down, up = (adapters.get(f"base_model.model.{own}.lora_{side}.weight") for side in "AB")
        if down is not None:
            kinds.add("adapted")
            assert up.abs().max() > 1e-3
            assert torch.equal(tensor, (before.float() + 2 * (up @ down)).bfloat16()), name
        elif name in others:
            kinds.add(part_of(name))
            assert torch.equal(tensor, others[name].bfloat16()), name
            if part_of(name) == "router":
                assert torch.equal(tensor, before), name
            else:
                assert others[name].dtype == torch.float32
        else:
            kinds.add("frozen")
            assert torch.equal(tensor, before), name
    assert kinds == {"adapted", "frozen", "vision", "projector", "newline", "router"}
    model = load_model(world / "stage3")
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")


def test_interrupted_and_continued(world, monkeypatch):
    """To the same losses and the same files, bit by bit, with dropout."""
    arguments = ["--output.save_every", "1", "--lora.dropout", "0.1", "--output.dir"]
    run.run_stage(config_of(world, *arguments, str(world / "whole")))
    config = config_of(world, *arguments, str(world / "continued"))
    interrupt_at(3, config, monkeypatch)
    assert load_model(world / "continued/checkpoint-3").dtype == torch.bfloat16
    run.run_stage(config)
    assert losses(world / "continued") == losses(world / "whole")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/other_parts.safetensors"):
        expected, found = load_file(world / "whole" / name), load_file(world / "continued" / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key


def test_the_next_stage_starts_from_it(world):
    values = stage_values(4, world, world)
    (world / "stage4.yaml").write_text(yaml.safe_dump(values))
    run.run_stage(load_config(world / "stage4.yaml", ["--optim.max_steps", "1"]))
    assert load_model(world / "stage4").dtype == torch.float32


def test_refusals(world, tmp_path, monkeypatch):
    zero3 = config_of(world, "--runtime.deepspeed", "configs/deepspeed/zero3.json", "--output.dir", str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"lora\.quantization: ZeRO-3 \(configs/deepspeed/zero3\.json\) cannot shard"):
        run.run_stage(zero3)
    report = dry_run.dry_run(world / "stage3.yaml", ["--runtime.deepspeed", "configs/deepspeed/zero3.json"])
    assert any("quantization: ZeRO-3" in problem for problem in report.problems)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
        with pytest.raises(
            ConfigError, match=r"lora\.quantization: .*need bitsandbytes .*pip install -e '\.\[quant\]'"
        ):
            run.run_stage(config_of(world, "--output.dir", str(tmp_path / "b")))
    for stage in (1, 4):
        values = stage_values(stage, tmp_path, tmp_path) | {"lora": {"quantization": "4bit"}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(ConfigError, match=f"lora is for stages 2 and 3, .* stage {stage} does not"):
            load_config(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"down_proj has 96 inputs; 4-bit weights need a multiple of 64"):
        freeze_in_4bit(tiny_model(), torch.float32, CPU)


def test_a_checkpoint_without_its_adapters(world, monkeypatch):
    config = config_of(world, "--output.save_every", "1", "--output.dir", str(world / "broken"))
    interrupt_at(1, config, monkeypatch)
    (world / "broken/checkpoint-1/adapter/other_parts.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no .*other_parts\.safetensors; pass --output\.overwrite"):
        run.run_stage(config)


def test_the_estimate_counts_what_is_in_memory(world):
    """Parameters as they are held, 4-bit scales too; never under ZeRO-3."""
    config = config_of(world)
    model, _ = build_model(config)
    counts = set_trainable(model, STAGES[3])
    held = sum(parameter.nbytes for parameter in model.parameters())
    held += sum(weight.quant_state.absmax.nbytes for weight in model.parameters() if hasattr(weight, "quant_state"))
    found = estimate.estimate(world / "stage3.yaml", estimate.Request(num_gpus=1))
    assert found["model"]["by_part"] == {part: vars(count) for part, count in counts.items()}
    assert found["memory"]["none"]["parameters"] == held
    assert found["memory"].keys() == {"none", "0", "1", "2"}
    with pytest.raises(ConfigError, match=r"lora\.quantization: ZeRO-3 cannot shard"):
        estimate.estimate(world / "stage3.yaml", estimate.Request(num_gpus=1, zero="3"))


def test_stage_2(world, tmp_path):
    """Only the adapted layers of the language model differ from the start."""
    values = stage_values(2, tmp_path, world)
    values["model"] = {"start": str(world / "start"), "force_start": True}
    values["lora"] = LORA
    (tmp_path / "stage2.yaml").write_text(yaml.safe_dump(values))
    folder = run.run_stage(load_config(tmp_path / "stage2.yaml", ["--optim.max_steps", "2"]))
    start, result = (open_checkpoint(path).tensors() for path in (world / "start", folder))
    changed = {
        name for name, tensor in result.items() if part_of(name) == "llm" and not torch.equal(tensor, start[name])
    }
    assert changed == {name for name in start if "language_model.layers" in name and "proj" in name}


@pytest.mark.slow
def test_zero_2(world, tmp_path):
    """DeepSpeed shards the adapters' optimizer; the result is as whole as without it."""
    config = config_of(
        world, "--runtime.deepspeed", "configs/deepspeed/zero2.json", "--output.dir", str(tmp_path / "run")
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "avg_llava.training.run", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    expected, found = (load_model(folder).state_dict() for folder in (world / "stage3", tmp_path / "run"))
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }


@pytest.mark.gpu
def test_on_a_gpu(world, tmp_path):
    """The loss falls as on the CPU, up to the kernels' rounding."""
    run.run_stage(config_of(world, "--runtime.device", "auto", "--output.dir", str(tmp_path / "run")))
    assert losses(tmp_path / "run") == pytest.approx(losses(world / "stage3"), rel=0.05)
