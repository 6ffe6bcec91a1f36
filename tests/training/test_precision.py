"""Router and losses are float32 in any precision of the model."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from avg_llava import load_model
from avg_llava.training import run
from avg_llava.training.assembly import build_model
from avg_llava.training.config import ObjectiveSettings, load_config
from avg_llava.training.losses import ranking_loss, router_cross_entropy
from avg_llava.training.objectives import objective_class
from avg_llava.training.stages import STAGES, set_trainable
from avg_llava.training.trainer import load_weights, training_arguments
from tests.tiny import images, pad, prompt, stage_values, tiny_model, write_backbones, write_data

pytestmark = pytest.mark.xdist_group("training-precision")


def batch_of(model) -> dict[str, torch.Tensor]:
    ids = [prompt(20, 3, seed=1), prompt(24, 5, seed=2)]
    return {
        "input_ids": pad(ids),
        "attention_mask": pad([torch.ones_like(each) for each in ids]),
        "labels": pad([torch.where(torch.arange(len(each)) < 12, -100, each) for each in ids], value=-100),
        **images(model.config, (60, 30), (32, 32)),
    }


def rounded_model():
    """A tiny float32 model without dropout whose weights, except the router's, are representable in bfloat16."""
    model = tiny_model(router_config={"num_text_tokens": 12, "dropout": 0.0})
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.bfloat16().float()
    return model


def routed(model, inputs, features, autocast: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The router's logits from given features, and the gradients of its weights."""
    model.zero_grad()
    texts = (inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model.route(features, *texts)
    logits.float().pow(2).mean(dim=0).sum().backward()
    return logits, {name: value.grad.float() for name, value in model.model.router.named_parameters()}


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_the_router_computes_in_float32(way):
    """From bfloat16 features, logits of the float32 router are close to the reference; a bfloat16 router's are not."""
    wide, narrow = rounded_model(), rounded_model()
    inputs = batch_of(wide)
    if way == "weights":
        narrow.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        features = narrow.encode_images(inputs["pixel_values"], inputs["image_sizes"])
    assert features.crops.dtype == torch.bfloat16
    expected, gradients = routed(wide, inputs, features)
    narrow.model.router.load_state_dict(wide.model.router.state_dict())
    rounded, _ = routed(narrow.bfloat16(), inputs, features)
    narrow.model.router.float().load_state_dict(wide.model.router.state_dict())
    found, found_gradients = routed(narrow, inputs, features, autocast=way == "autocast")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    assert (rounded - expected).abs().max() > 100 * (found - expected).abs().max()
    assert (rounded - expected).abs().max() > 1e-3


def test_the_loss_of_a_model_in_bfloat16_is_close():
    """Stage 4 without a store: only the rounding of the frozen parts differs."""
    wide, narrow = rounded_model(), rounded_model()
    inputs = batch_of(wide)
    narrow.bfloat16().model.router.float()
    losses = []
    for model in (wide, narrow):
        set_trainable(model, STAGES[4])
        objective = objective_class("router")(model, ObjectiveSettings()).train()
        output = objective(**inputs)
        output["loss"].backward()
        assert output["loss"].dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in output["metrics"].values())
        assert all(value.grad.dtype == torch.float32 for value in model.model.router.parameters())
        losses.append(output["loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_router_losses_sum_in_float32():
    """Many bfloat16 inputs of very different magnitudes: the loss equals that of the same values in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4096, 5, generator=generator).bfloat16()
    feedback = (torch.randn(4096, 5, generator=generator) * 20 - 50).bfloat16()
    for variant in ("paper", "released"):
        loss = ranking_loss(logits, feedback, variant)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(ranking_loss(logits.double(), feedback.double(), variant).item(), rel=1e-5)
    loss = router_cross_entropy(logits, feedback)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(router_cross_entropy(logits.double(), feedback.double()).item(), rel=1e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Stages 1 to 3 of one step each."""
    root = tmp_path_factory.mktemp("precision")
    write_backbones(root)
    write_data(root)
    for stage in (1, 2, 3):
        run.run_stage(load_config(write_config(root, stage), ["--optim.max_steps", "1"]))
    return root


def write_config(root: Path, stage: int) -> Path:
    path = root / f"stage{stage}.yaml"
    path.write_text(yaml.safe_dump(stage_values(stage, root, root)))
    return path


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_deepspeed_gets_to_train(world, tmp_path, precision):
    """Under DeepSpeed, frozen parts have the run's precision, the router is float32, and DeepSpeed casts nothing."""
    settings = json.loads(Path("configs/deepspeed/zero2.json").read_text())
    overrides = ["--runtime.deepspeed", "configs/deepspeed/zero2.json", "--runtime.precision", precision]
    config = load_config(write_config(world, 4), overrides)
    model, _ = build_model(config)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".router." in name else half), name
    arguments = training_arguments(config, settings, 1, use_cpu=True)
    assert not arguments.bf16
    assert not arguments.fp16
    # A checkpoint of it keeps every bit of the router, and gives it back.
    with torch.no_grad():
        for parameter in model.model.router.parameters():
            parameter.mul_(1 + 1e-6)
    model.save_pretrained(tmp_path / "checkpoint")
    saved = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert {name for name, tensor in saved.items() if tensor.dtype == torch.float32} == {
        name for name in saved if ".router." in name
    }
    again, _ = build_model(config)
    load_weights(again, tmp_path / "checkpoint")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert load_model(tmp_path / "checkpoint").model.router.voter.dtype == half, "inference is in one type"
