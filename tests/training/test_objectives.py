"""Objectives against sums over the model's public forward pass, sample by sample."""

import pytest
import torch

from avg_llava.model.anyres import canvas_tiles, kept_window
from avg_llava.training.config import ObjectiveSettings
from avg_llava.training.losses import ranking_loss
from avg_llava.training.objectives import (
    InstructionObjective,
    MultiGranularityObjective,
    RouterObjective,
    objective_class,
)
from avg_llava.training.stages import STAGES, set_trainable
from tests.parity.golden import golden
from tests.tiny import images, pad, prompt, tiny_model

SIZES = [(32, 32), (60, 30)]


def _labels(ids: torch.Tensor, start: int) -> torch.Tensor:
    labels = ids.clone()
    labels[:start] = -100
    return labels


@pytest.fixture
def model():
    model = tiny_model()
    for layer in (model.model.router.merger, *model.model.router.merger.modules()):
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        elif isinstance(layer, torch.nn.MultiheadAttention):
            layer.dropout = 0.0
    return model


@pytest.fixture
def batch(model):
    """Two samples with one image each and one without, right-padded."""
    prompts = [prompt(20, 3, seed=1), prompt(26, 5, seed=2), prompt(14, seed=3)]
    labels = [_labels(ids, start) for ids, start in zip(prompts, (15, 19, 10), strict=True)]
    return {
        "input_ids": pad(prompts),
        "attention_mask": pad([torch.ones_like(ids) for ids in prompts]),
        "labels": pad(labels, value=-100),
        **images(model.config, *SIZES),
    }


def _text_only(batch):
    return {name: batch[name][2:] for name in ("input_ids", "attention_mask", "labels")}


def _objective(model, stage, **settings):
    """The default objective of a stage, or "gumbel"."""
    name = stage if stage == "gumbel" else STAGES[stage].objective
    set_trainable(model, STAGES[4 if stage == "gumbel" else stage])
    objective = objective_class(name)(model, ObjectiveSettings(**settings))
    objective.train()
    return objective


def test_instruction_loss_is_the_models_loss_at_the_finest_level(model, batch):
    output = _objective(model, 2)(**batch)
    expected = model(**batch, granularity=model.config.granularities[-1]).loss
    torch.testing.assert_close(output["loss"], expected, rtol=1e-6, atol=1e-6)
    assert output["num_items"] == 5 + 7 + 4


def test_multi_granularity_loss_is_the_mean_over_levels(model, batch):
    output = _objective(model, 3)(**batch)
    expected = [model(**batch, granularity=level).loss for level in model.config.granularities]
    torch.testing.assert_close(output["loss"], torch.stack(expected).mean(), rtol=1e-6, atol=1e-6)
    for level, loss in zip(model.config.granularities, expected, strict=True):
        torch.testing.assert_close(output["metrics"][f"loss_{level}"], loss.detach(), rtol=1e-6, atol=1e-6)


def _released_weights(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """One-hot samples with the gradient of a softmax, from the same random numbers as torch's Gumbel-softmax."""
    noise = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + noise) / temperature).softmax(-1)
    hard = torch.nn.functional.one_hot(soft.argmax(-1), logits.shape[-1])
    return hard - soft.detach() + soft


def _released_tokens(crops: torch.Tensor, weights: torch.Tensor, size: tuple[int, int], model) -> torch.Tensor:
    """All levels padded with zeros, summed with weights, truncated to the sampled level, laid out as an image."""
    config = model.config
    mixed = torch.zeros_like(crops)
    for weight, level in zip(weights, config.granularities, strict=True):
        padded = torch.zeros_like(crops)
        padded[:, :level] = config.ladder.pool(crops, level)
        mixed = mixed + weight * padded
    drawn = config.granularities[int(weights.argmax())]
    cut = mixed[:, :drawn]
    tile_rows, tile_columns = canvas_tiles(size, config)
    rows, columns = config.ladder.grid(drawn)
    window = kept_window(size, drawn, config)
    tokens = list(cut[0])
    for row in range(window.top, window.bottom):
        for column in range(window.left, window.right):
            tile = 1 + row // rows * tile_columns + column // columns
            tokens.append(cut[tile, row % rows * columns + column % columns])
        tokens.append(model.model.image_newline)
    assert window.bottom <= tile_rows * rows
    return torch.stack(tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gumbel_loss_and_gradient_by_brute_force(model, batch, temperature, seed):
    """The released formulation, sample by sample, on the language model's logits."""
    objective = _objective(model, "gumbel", temperature=temperature)
    torch.manual_seed(seed)
    output = objective(**batch)
    output["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in model.model.router.named_parameters()}

    model.zero_grad()
    features = model.encode_images(batch["pixel_values"], batch["image_sizes"])
    logits = model.route(features, batch["input_ids"], batch["attention_mask"], batch["labels"])
    torch.manual_seed(seed)
    weights = _released_weights(logits, temperature)
    total, count = 0, 0
    for sample, crops in enumerate(features.crops.split(features.num_crops)):
        length = int(batch["attention_mask"][sample].sum())
        ids, labels = batch["input_ids"][sample, :length], batch["labels"][sample, :length]
        place = int((ids == model.config.image_token_id).nonzero())
        visual = _released_tokens(crops, weights[sample], SIZES[sample], model)
        embed = model.get_input_embeddings()
        embeds = torch.cat([embed(ids[:place]), visual, embed(ids[place + 1 :])])
        hidden = model.model.language_model(inputs_embeds=embeds[None]).last_hidden_state[0]
        answer = labels[place + 1 :]
        log_probs = torch.nn.functional.linear(hidden, model.lm_head.weight).log_softmax(-1)
        for offset in range(len(answer)):
            if answer[offset] != -100:
                total = total - log_probs[place + len(visual) + offset - 1, answer[offset]]
                count += 1
    loss = total / count
    loss.backward()
    assert output["num_items"] == count == 5 + 7, "the sample of text does not count"
    torch.testing.assert_close(output["loss"], loss, rtol=1e-5, atol=1e-6)
    for name, parameter in model.model.router.named_parameters():
        scale = parameter.grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4 * scale.item(), msg=name)


def test_images_are_encoded_once(model, batch, monkeypatch):
    calls = []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda *arguments: calls.append(1) or encode(*arguments))
    for stage in (2, 3, 4, "gumbel"):
        _objective(model, stage)(**batch)
    assert len(calls) == 4


@pytest.mark.parametrize("feedback", ["mean", "sum"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_router_loss_by_brute_force(model, batch, variant, feedback):
    """Feedback from the public forward pass, one sample at a time."""
    output = _objective(model, 4, ranking=variant, feedback=feedback)(**batch)
    log_probs, logits = [], []
    for sample, size in enumerate(SIZES):
        inputs = {name: batch[name][sample : sample + 1] for name in ("input_ids", "attention_mask")}
        inputs |= images(model.config, size)
        labels = batch["labels"][sample : sample + 1]
        count = int((labels != -100).sum())
        with torch.no_grad():
            losses = [model(**inputs, labels=labels, granularity=level).loss for level in model.config.granularities]
            logits.append(model(**inputs, labels=labels).router_logits[0])
        log_probs.append(-torch.stack(losses) * (count if feedback == "sum" else 1))
    log_probs, logits = torch.stack(log_probs), torch.stack(logits)
    ranking = ranking_loss(logits, log_probs, variant)
    cross_entropy = torch.nn.functional.cross_entropy(logits, log_probs.argmax(-1))
    torch.testing.assert_close(output["loss"], ranking + 0.1 * cross_entropy, rtol=1e-4, atol=1e-5)
    assert output["num_items"] == 2
    shares = [output["metrics"][f"share_{level}"].item() for level in model.config.granularities]
    assert sum(shares) == pytest.approx(1)
    assert torch.equal(torch.tensor(shares) > 0, torch.bincount(logits.argmax(-1), minlength=5) > 0)
    chosen = [row.argmax().item() for row in logits]
    assert output["chosen"].tolist() == chosen
    assert output["owners"].tolist() == [0, 1]
    regrets = [max(row) - row[level] for row, level in zip(log_probs.tolist(), chosen, strict=True)]
    assert sum(regrets) > 0
    assert output["metrics"]["router_regret"].item() == pytest.approx(sum(regrets) / 2, rel=1e-4, abs=1e-5)
    agreed = [regret == 0 for regret in regrets]
    assert output["metrics"]["router_agreement"].item() == pytest.approx(sum(agreed) / 2)


def test_router_stage_trains_the_router_alone_and_drops_out_only_there(batch):
    model = tiny_model()
    objective = _objective(model, 4)
    assert not any(module.training for module in (model, model.model.vision_tower, model.model.language_model))
    assert model.model.router.training
    assert model.model.router.merger.dropout1.training
    objective(**batch)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("model.router."), name
    first, second = objective(**batch)["loss"].item(), objective(**batch)["loss"].item()
    assert first != second, "dropout of the router is active while it trains"


def test_every_image_of_a_sample_gets_the_sample_s_feedback(model):
    ids = prompt(24, 3, 6, seed=4)[None]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": _labels(ids[0], 18)[None],
        **images(model.config, *SIZES),
    }
    output = _objective(model, 4)(**batch)
    with torch.no_grad():
        losses = [model(**batch, granularity=level).loss for level in model.config.granularities]
        logits = model(**batch).router_logits
    log_probs = -torch.stack(losses).expand(2, -1)
    expected = ranking_loss(logits, log_probs) + 0.1 * torch.nn.functional.cross_entropy(logits, log_probs.argmax(-1))
    torch.testing.assert_close(output["loss"], expected, rtol=1e-4, atol=1e-5)
    assert output["num_items"] == 2


def test_tie_tolerance_makes_the_coarsest_level_the_label(model, batch):
    output = _objective(model, 4, tie_tolerance=1e6)(**batch)
    with torch.no_grad():
        logits = model(**batch).router_logits
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(output["metrics"]["cross_entropy"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3, 4, "gumbel"])
def test_a_batch_without_images_runs_every_trained_part(model, batch, stage):
    """Under ZeRO, all ranks must have gradients of the same parts; without images they are zero."""
    objective = _objective(model, stage)
    output = objective(**_text_only(batch))
    output["loss"].backward()
    assert torch.isfinite(output["loss"])
    graded = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    objective(**batch)["loss"].backward()
    with_images = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graded == with_images
    if stage in (4, "gumbel"):
        assert (output["loss"].item(), output["num_items"]) == (0.0, 0)
        assert "router_entropy" not in output["metrics"]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_blank_crop_has_no_say(model, batch, stage):
    """Without images, the loss is the language model's, and the gradients of vision and projector are zero."""
    text = _text_only(batch)
    output = _objective(model, stage)(**text)
    output["loss"].backward()
    reference = model(**text)
    torch.testing.assert_close(output["loss"], reference.loss, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name.startswith(("model.vision_tower", "model.multi_modal_projector", "model.image_newline")):
            assert parameter.grad is None or parameter.grad.abs().max() == 0, name


@pytest.mark.parametrize("stage", [1, 2, 3, 4, "gumbel"])
def test_a_fully_masked_batch_gives_zero(model, batch, stage):
    output = _objective(model, stage)(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    output["loss"].backward()
    assert output["loss"].item() == 0
    assert output["num_items"] == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_samples_that_are_masked_or_cut_take_no_part_in_stage_4(model, batch):
    both = _objective(model, 4)(**batch)
    masked = {**batch, "labels": batch["labels"].clone()}
    masked["labels"][0] = -100
    output = _objective(model, 4)(**masked)
    assert (both["num_items"], output["num_items"]) == (2, 1)

    # At a length that cuts the larger image's answer at the finest level only, that sample is left out.
    spliced = [
        model.splice(
            model.encode_images(batch["pixel_values"], batch["image_sizes"]),
            batch["input_ids"],
            batch["attention_mask"],
            batch["labels"],
            level,
        )
        for level in model.config.granularities[-2:]
    ]
    lengths = [int(each.attention_mask[1].sum()) for each in spliced]
    shorter = int(spliced[-1].attention_mask[0].sum())
    assert lengths[0] < lengths[1]
    assert shorter < lengths[1] - 1
    model.config.max_sequence_length = lengths[1] - 1
    output = _objective(model, 4)(**batch)
    assert output["num_items"] == 1
    alone = {name: batch[name][:1, :20] for name in ("input_ids", "attention_mask", "labels")}
    alone |= images(model.config, SIZES[0])
    torch.testing.assert_close(output["loss"], _objective(model, 4)(**alone)["loss"], rtol=1e-4, atol=1e-5)


class TestReleasedTensors:
    """The objectives on the golden batches."""

    def test_stage_3(self, released_model, batch_inputs):
        tensors, _ = golden("E_stage3")
        inputs = batch_inputs(
            tensors["input_ids"], ["w400x120", "w300x200"], tensors["attention_mask"], tensors["labels"]
        )
        with torch.no_grad():
            output = MultiGranularityObjective(released_model, ObjectiveSettings())(**inputs)
        torch.testing.assert_close(output["loss"], tensors["loss_total"], rtol=0, atol=1e-5)

    def test_stage_4(self, released_model, batch_inputs):
        tensors, _ = golden("F_stage4")
        names = ("input_ids", "attention_mask", "labels")
        ids, mask, labels = (tensors[f"batch2/{name}"] for name in names)
        inputs = batch_inputs(ids, ["w400x120", "w300x200"], mask, labels)
        with torch.no_grad():
            output = RouterObjective(released_model, ObjectiveSettings(ranking="released"))(**inputs)
        torch.testing.assert_close(output["loss"], tensors["batch2/total"], rtol=1e-4, atol=0)
        torch.testing.assert_close(output["metrics"]["cross_entropy"], tensors["batch2/ce"], rtol=1e-4, atol=0)

    def test_finest_level_is_stage_2(self, released_model, batch_inputs):
        tensors, _ = golden("E_stage3")
        inputs = batch_inputs(
            tensors["input_ids"], ["w400x120", "w300x200"], tensors["attention_mask"], tensors["labels"]
        )
        with torch.no_grad():
            output = InstructionObjective(released_model, ObjectiveSettings())(**inputs)
        torch.testing.assert_close(output["loss"], tensors["loss_per_granularity"][-1], rtol=0, atol=1e-5)
