"""LoRA against training all weights, and against loading and merging by peft."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from avg_llava import load_model
from avg_llava.planning import estimate
from avg_llava.training import run
from avg_llava.training.assembly import build_model
from avg_llava.training.checkpoint import read_manifest
from avg_llava.training.config import ConfigError, LoraSettings, ObjectiveSettings, TrainConfig, load_config
from avg_llava.training.lora import add_adapters, merge_adapters
from avg_llava.training.objectives import objective_class
from avg_llava.training.stages import STAGES, count_parameters, is_adapter, part_of, set_trainable
from avg_llava.training.trainer import parameter_groups
from tests.tiny import images, pad, prompt, stage_values, tiny_model, write_backbones, write_data
from tests.training.interruption import interrupt_at

pytestmark = pytest.mark.xdist_group("training-lora")  # the trained stages are shared

SETTINGS = LoraSettings(rank=4, alpha=6, dropout=0.0, vision=True)
LANGUAGE_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted_model(settings: LoraSettings = SETTINGS, trained: bool = True):
    """A tiny model with adapters whose matrices are not zero, as after training."""
    model = tiny_model()
    add_adapters(model, settings, seed=3)
    if trained:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def batch_of(model) -> dict[str, torch.Tensor]:
    """A sample with an image, and one without."""
    prompts = [prompt(20, 3, seed=1), prompt(14, seed=3)]
    labels = [torch.where(torch.arange(len(ids)) < 10, -100, ids) for ids in prompts]
    return {
        "input_ids": pad(prompts),
        "attention_mask": pad([torch.ones_like(ids) for ids in prompts]),
        "labels": pad(labels, value=-100),
        **images(model.config, (60, 30)),
    }


def logits(model, level: int = 64) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch_of(model), granularity=level).logits


def gradients(model, stage: int, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    set_trainable(model, STAGES[stage])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    objective = objective_class(STAGES[stage].objective)(model, ObjectiveSettings()).train()
    torch.manual_seed(5)  # of dropout
    objective(**batch_of(model))["loss"].backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("vision", [False, True])
def test_what_is_adapted_and_what_is_trained(vision):
    model = adapted_model(LoraSettings(rank=4, vision=vision))
    counts = set_trainable(model, STAGES[2])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = {"projector", "newline"} | ({"vision"} if not vision else set())
    for name in dict(model.named_parameters()):
        is_trained = part_of(name) in whole or is_adapter(name)
        assert (name in trained) == is_trained, name
    adapted = {name.rsplit(".", 4)[-4] for name in trained if part_of(name) == "llm"}
    assert adapted == LANGUAGE_LAYERS
    # by hand: two layers of 4 x (64 + 64) and 3 x (64 + 96) features, rank 4
    assert counts["llm"].trainable == 2 * 4 * (4 * 128 + 3 * 160)
    assert part_of("lm_head.weight") == "llm"
    assert "lm_head.weight" not in trained
    if vision:  # three layers of 4 x (32 + 32) and 2 x (32 + 64)
        assert counts["vision"].trainable == 3 * 4 * (4 * 64 + 2 * 96)


def test_chosen_layers():
    model = adapted_model(LoraSettings(rank=2, target_modules=("q_proj", "v_proj")))
    layers = {name.rsplit(".", 3)[0] for name in dict(model.named_parameters()) if is_adapter(name)}
    prefix = "model.language_model.layers"
    assert layers == {f"{prefix}.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")}
    with pytest.raises(ConfigError, match=r"names q_prj; the language model's linear layers are down_proj, "):
        adapted_model(LoraSettings(target_modules=("q_prj", "v_proj")))


def test_new_adapters_change_nothing_and_are_the_same_every_time():
    reference, first, second = tiny_model(), adapted_model(trained=False), adapted_model(trained=False)
    torch.testing.assert_close(logits(first), logits(reference), rtol=0, atol=0)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_are_those_of_the_whole_model(stage):
    """With W + s B A and B = 0, the gradient of B is s times that of W times A transposed, and that of A is zero."""
    whole, adapted = gradients(tiny_model(), stage), adapted_model(trained=False)
    found = gradients(adapted, stage)
    assert found.keys() <= {name for name, value in adapted.named_parameters() if value.requires_grad}
    num_adapters = 0
    for name, gradient in found.items():
        if not is_adapter(name):
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)
        elif ".lora_A." in name:
            assert not gradient.any()
        else:
            num_adapters += 1
            down = adapted.get_parameter(name.replace("lora_B", "lora_A"))
            expected = 6 / 4 * whole[name.replace("lora_B.default.", "")] @ down.T
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)
    assert num_adapters == 2 * 7 + 2 * 6, "of three layers of the tower, features come from the second"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputed_activations_give_the_same_gradients(dropout):
    settings = LoraSettings(rank=4, alpha=6, dropout=dropout, vision=True)
    expected, found = (gradients(adapted_model(settings), 3, checkpointing) for checkpointing in (False, True))
    assert found.keys() == expected.keys()
    assert any(is_adapter(name) and gradient.abs().max() > 1e-6 for name, gradient in expected.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_merged_equals_unmerged():
    model = adapted_model()
    reference = tiny_model()
    assert (logits(model) - logits(reference)).abs().max() > 1e-2
    reference.load_state_dict(merge_adapters(model.state_dict(), SETTINGS))
    for level in model.config.granularities:
        torch.testing.assert_close(logits(reference, level), logits(model, level), rtol=0, atol=1e-5)
    by_peft = copy.deepcopy(model)
    for module in by_peft.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    for name, tensor in reference.state_dict().items():
        layer, _, last = name.rpartition(".")
        merged = by_peft.state_dict().get(f"{layer}.base_layer.{last}", by_peft.state_dict().get(name))
        torch.testing.assert_close(tensor, merged, rtol=1e-6, atol=1e-6, msg=name)


def test_half_precision_is_rounded_once():
    weights = {name: tensor.bfloat16() for name, tensor in adapted_model().state_dict().items()}
    merged = merge_adapters(weights, SETTINGS)
    layer = "model.language_model.layers.1.mlp.up_proj"
    down, up = (weights[f"{layer}.lora_{side}.default.weight"].double() for side in "AB")
    exact = weights[f"{layer}.base_layer.weight"].double() + 1.5 * (up @ down)
    assert torch.equal(merged[f"{layer}.weight"], exact.float().bfloat16())


def test_learning_rates():
    model = adapted_model()
    set_trainable(model, STAGES[2])
    optim = load_config("configs/vicuna-7b/lora/stage2.yaml").optim
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, optim)}
    assert rates == {"vision": 2e-4, "projector": 2e-5, "newline": 2e-5, "llm": 2e-4}


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """Stage 1; stage 2 with adapters in the language model, stage 3 also in the vision tower."""
    root = tmp_path_factory.mktemp("lora")
    write_backbones(root)
    write_data(root)
    run.run_stage(load_config(write_config(root, 1)))
    for stage in (2, 3):
        run.run_stage(load_config(write_config(root, stage)))
    return root


def write_config(root: Path, stage: int) -> Path:
    values = stage_values(stage, root, root)
    if stage in (2, 3):
        values["lora"] = {"rank": 4, "alpha": 8, "dropout": 0.0 if stage == 2 else 0.1, "vision": stage == 3}
        values["optim"]["lora_lr"] = 1e-2
    path = root / f"stage{stage}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log_history.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_result_is_a_whole_model_that_says_lora(stages, stage):
    folder = stages / f"stage{stage}"
    assert read_manifest(folder).config["lora"]["rank"] == 4
    names = set(load_file(folder / "model.safetensors"))
    assert names == set(load_file(stages / "stage1" / "model.safetensors"))
    before, after = load_model(stages / f"stage{stage - 1}"), load_model(folder)
    changed = {name for name, weight in before.named_parameters() if not torch.equal(weight, after.get_parameter(name))}
    assert {part_of(name) for name in changed} == set(STAGES[stage].trains)
    language = {name.rsplit(".", 2)[-2] for name in changed if part_of(name) == "llm"}
    assert language == LANGUAGE_LAYERS, "neither embeddings nor norms nor the head"
    has_adapted_tower = not any("vision_tower.embeddings" in name for name in changed)
    assert has_adapted_tower == (stage == 3)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_kept_adapter_on_the_start_is_the_result(stages, stage):
    """peft loads the adapter into the stage's start; projector and newline come from the result."""
    folder = stages / f"stage{stage}"
    expected, model = load_model(folder), load_model(stages / f"stage{stage - 1}")
    adapted = {"llm"} if stage == 2 else {"llm", "vision"}
    whole = {name: tensor for name, tensor in expected.state_dict().items() if part_of(name) not in adapted}
    assert not model.load_state_dict(whole, strict=False).unexpected_keys
    batch = {
        "input_ids": torch.tensor([[1, 50, model.config.image_token_id, 60, 70, 80]]),
        "pixel_values": torch.randn(1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        "image_sizes": torch.tensor([[16, 16]]),
        "granularity": 16,
    }
    batch["pixel_values"] = batch["pixel_values"].expand(1, 5, 3, 16, 16)
    with torch.no_grad():
        start = model(**batch).logits
        found = PeftModel.from_pretrained(model, folder / "adapter")(**batch).logits
        result = expected(**batch).logits
    assert (result - start).abs().max() > 1e-2
    torch.testing.assert_close(found, result, rtol=0, atol=1e-5)


def test_the_next_stage_starts_from_it(stages, tmp_path):
    arguments = ["--output.dir", str(tmp_path / "stage4"), "--optim.max_steps", "1"]
    folder = run.run_stage(load_config(write_config(stages, 4), arguments))
    assert read_manifest(folder).parent["stage"] == 3


def test_interrupted_and_continued(stages, tmp_path, monkeypatch):
    """Continued after the first step, with dropout, to the same losses, adapters and merged weights."""
    arguments = ["--output.dir", str(tmp_path / "run"), "--output.save_every", "1"]
    config = load_config(write_config(stages, 3), arguments)

    interrupt_at(2, config, monkeypatch)
    assert not (tmp_path / "run" / "stage.json").exists()
    load_model(tmp_path / "run" / "checkpoint-2")  # whole, too
    run.run_stage(config)
    assert losses(tmp_path / "run") == pytest.approx(losses(stages / "stage3"), rel=1e-6)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        expected, found = load_file(stages / "stage3" / name), load_file(tmp_path / "run" / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


def test_estimate_counts_adapters(stages):
    """Parameter counts equal those of the run; less optimizer memory; fewer operations."""
    path = write_config(stages, 3)
    config = load_config(path)
    model, _ = build_model(config)
    set_trainable(model, STAGES[3])
    found = estimate.estimate(path, estimate.Request(num_gpus=1, zero="0"))
    counts = count_parameters(model)
    assert found["model"]["by_part"] == {part: vars(count) for part, count in counts.items()}
    trained = sum(count.trainable for count in counts.values())
    assert found["memory"]["0"]["optimizer"] == 12 * trained
    reference = yaml.safe_load(path.read_text())
    del reference["lora"], reference["optim"]["lora_lr"]
    (stages / "reference.yaml").write_text(yaml.safe_dump(reference))
    whole = estimate.estimate(stages / "reference.yaml", estimate.Request(num_gpus=1, zero="0"))
    assert found["step"]["flops"] < whole["step"]["flops"]
    assert (
        whole["model"]["parameters"]
        == found["model"]["parameters"] - counts["llm"].trainable - counts["vision"].trainable
    )


def config_with(tmp_path: Path, stage: int, **sections) -> TrainConfig:
    values = stage_values(stage, tmp_path, tmp_path) | {"lora": sections.pop("lora", {})}
    values["optim"] |= sections.pop("optim", {})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(path)


def test_configurations(tmp_path):
    assert config_with(tmp_path, 2).lora == LoraSettings()
    assert config_with(tmp_path, 2, lora=None).lora is None
    for stage in (1, 4):
        with pytest.raises(ConfigError, match=f"lora is for stages 2 and 3, .* stage {stage} does not"):
            config_with(tmp_path, stage)
    for wrong in ({"rank": 0}, {"alpha": 0}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match=r"lora\.rank must be at least 1"):
            config_with(tmp_path, 2, lora=wrong)
    with pytest.raises(ConfigError, match=r"optim\.lora_lr is for runs with a section lora"):
        config_with(tmp_path, 2, lora=None, optim={"lora_lr": 1e-4})
