"""Computed operations against those that torch counts while the model runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from avg_llava import AvgLlavaForConditionalGeneration
from avg_llava.bench.plain_loop import plain_loss
from avg_llava.bench.presets import PRESETS
from avg_llava.bench.training import make_batch, sample_shapes
from avg_llava.training import flops
from avg_llava.training.config import LoraSettings, ObjectiveSettings
from avg_llava.training.lora import adapter_shapes, add_adapters
from avg_llava.training.objectives import objective_class
from avg_llava.training.stages import OBJECTIVES, STAGES, set_trainable


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AvgLlavaForConditionalGeneration(PRESETS["mini"].config())


def _counted(run) -> float:
    """Operations of matrix products and convolutions, without fused attention, which hides some."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class TestForwardPasses:
    def test_vision(self, model):
        pixels = torch.randn(3, 3, 48, 48)
        assert flops.vision_flops(3, model.config) == pytest.approx(
            _counted(lambda: model.model.encode_crops(pixels)), rel=1e-6
        )

    def test_language(self, model):
        embeds = torch.randn(2, 70, 128)
        mask = torch.ones(2, 70, dtype=torch.long)
        mask[1, 50:] = 0
        counted = _counted(lambda: model.model.language_model(inputs_embeds=embeds, attention_mask=mask))
        assert flops.language_flops([70, 70], model.config, masked=True) == pytest.approx(counted, rel=1e-3)
        linear = flops.language_flops([70], model.config, masked=True) - flops.language_flops([70], model.config)
        assert linear == 4 * 2 * 70**2 * 128, "of 4 layers, half the pairs, for scores and sums"

    def test_head(self, model):
        hidden = torch.randn(9, 128)
        assert flops.head_flops(9, model.config) == _counted(lambda: model.lm_head(hidden))

    def test_router(self, model):
        model.model.router.train()
        arguments = (torch.randn(5, 64, 128), [3, 2], torch.randn(2, 40, 128), torch.ones(2, 40, dtype=torch.bool))
        counted = _counted(lambda: model.model.router(*arguments))
        assert flops.router_flops(5, model.config) == pytest.approx(counted, rel=1e-2)


def test_steps_at_a_drawn_level(model, monkeypatch):
    """The mean of steps that sample each level once. Within 10%: attention has two factors to differentiate, where a
    frozen matrix has one, and is a larger part of this model than of a real one.
    """
    config = model.config
    model.zero_grad()
    set_trainable(model, STAGES[4])
    samples = sample_shapes(4, config)
    batch = make_batch(samples, config, torch.device("cpu"))
    objective = objective_class("gumbel")(model, ObjectiveSettings()).train()
    counted = causal = 0.0
    for level in range(len(config.granularities)):

        def draw(logits, tau, hard, level=level):
            return logits.softmax(-1) * 0 + torch.eye(logits.shape[-1])[level]

        monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", draw)
        counted += _counted(lambda: objective(**batch)["loss"].backward()) / len(config.granularities)
        lengths = [sample.length(config.granularities[level], config) for sample in samples]
        masked, unmasked = (flops.language_flops(lengths, config, masked) for masked in (True, False))
        causal += 2 * (masked - unmasked) / len(config.granularities)
    expected = flops.step_flops(STAGES[4].trains, OBJECTIVES["gumbel"].passes, samples, config)
    assert expected.total + causal == pytest.approx(counted, rel=0.1)
    assert expected.language < flops.step_flops(STAGES[4].trains, STAGES[4].passes, samples, config).language


@pytest.mark.parametrize("way", ["plain", "ours"])
@pytest.mark.parametrize("stage", [2, 3, 4])
def test_steps(model, stage, way):
    """Within 5%: neither the tower's last layer nor the pixels have a backward pass."""
    config = model.config
    model.zero_grad()
    set_trainable(model, STAGES[stage])
    samples = sample_shapes(stage, config)
    batch = make_batch(samples, config, torch.device("cpu"))
    name, settings = STAGES[stage].objective, ObjectiveSettings()
    objective = objective_class(name)(model, settings).train()

    def run():
        loss = plain_loss(name, model, batch, settings) if way == "plain" else objective(**batch)["loss"]
        loss.backward()

    expected = flops.step_flops(
        STAGES[stage].trains, STAGES[stage].passes, samples, config, reference=way == "plain"
    ).total
    if way == "ours":  # here it runs without the kernel that leaves out the masked half of all pairs of tokens
        for level in config.granularities if stage > 2 else config.granularities[-1:]:
            seen = [each for each in samples if each.image_size is not None or level == config.granularities[-1]]
            lengths = [sample.length(level, config) for sample in seen]
            masked, causal = (flops.language_flops(lengths, config, masked) for masked in (True, False))
            expected += (1 if stage == 4 else 3) * (masked - causal)
    assert expected == pytest.approx(_counted(run), rel=0.05)


@pytest.mark.parametrize("vision", [False, True])
def test_steps_with_adapters(vision):
    """Stage 3, where frozen matrices have no weight gradients, and adapters have small ones."""
    torch.manual_seed(0)
    model = AvgLlavaForConditionalGeneration(PRESETS["mini"].config())
    config = model.config
    add_adapters(model, LoraSettings(rank=16, dropout=0.0, vision=vision), seed=0)
    set_trainable(model, STAGES[3])
    samples = sample_shapes(3, config)
    batch = make_batch(samples, config, torch.device("cpu"))
    objective = objective_class("multi_granularity")(model, ObjectiveSettings()).train()
    counted = _counted(lambda: objective(**batch)["loss"].backward())
    expected = flops.step_flops(
        STAGES[3].trains, STAGES[3].passes, samples, config, adapters=adapter_shapes(model)
    ).total
    for level in config.granularities:
        seen = [each for each in samples if each.image_size is not None or level == config.granularities[-1]]
        lengths = [sample.length(level, config) for sample in seen]
        masked, causal = (flops.language_flops(lengths, config, masked) for masked in (True, False))
        expected += 3 * (masked - causal)
    assert expected == pytest.approx(counted, rel=0.05)


def test_proportioned_is_the_7b_model_in_small():
    shares = {}
    for preset in ("proportioned", "7b"):
        config = PRESETS[preset].config()
        language = flops.language_flops([600], config)
        shares[preset] = (flops.vision_flops(1, config) / language, flops.router_flops(1, config) / language)
    assert shares["proportioned"][0] == pytest.approx(shares["7b"][0], rel=0.3)
    assert shares["7b"][1] <= shares["proportioned"][1] <= 0.1, "attention over the router's tokens does not shrink"
