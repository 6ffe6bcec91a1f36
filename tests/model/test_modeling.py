"""The whole model against transformers' LLaVA-NeXT, batches against single samples, and error messages."""

import pytest
import torch

from avg_llava.evaluation.llava_next import as_llava_next
from avg_llava.model.anyres import kept_window, num_visual_tokens
from avg_llava.model.packing import pack
from tests.tiny import IMAGE_TOKEN, images, pad, prompt, tiny_config, tiny_model

# (height, width). In the second list a ratio falls just short of a whole number, so that the original code's truncation
# and transformers' rounding keep other rows or columns; paper behaviour follows transformers.
SIZES = [(64, 64), (40, 100), (100, 40), (20, 30), (32, 32), (500, 90), (77, 123), (300, 301), (1, 90)]
ROUNDED_SIZES = [(47, 376), (637, 784), (784, 637), (735, 784), (1176, 343)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def llava_next(model):
    """Transformers' model with the same weights, without the router."""
    return as_llava_next(model)


def test_rounding_matters_for_some_sizes(model):
    released = tiny_config(behavior="released", image_grid_pinpoints=model.config.image_grid_pinpoints)
    for size in ROUNDED_SIZES:
        assert kept_window(size, 64, released) != kept_window(size, 64, model.config)


@pytest.mark.parametrize("size", [*SIZES, *ROUNDED_SIZES])
def test_finest_level_equals_transformers(model, llava_next, size):
    ids = prompt(11, 4)
    inputs = images(model.config, size)
    count = num_visual_tokens(size, 64, model.config)
    expanded = torch.cat([ids[:4], torch.full((count,), IMAGE_TOKEN), ids[5:]])
    with torch.no_grad():
        output = model(ids[None], **inputs, granularity=64)
        expected = llava_next(input_ids=expanded[None], **inputs).logits
    assert output.num_visual_tokens.tolist() == [count]
    torch.testing.assert_close(output.logits, expected[..., :-1], rtol=0, atol=1e-5)


# Samples of a mixed batch: prompt length, placeholders, image sizes, forced levels.
SAMPLES = [
    (9, (2,), [(64, 64)], [64]),
    (14, (), [], []),  # text only
    (12, (1, 7), [(40, 100), (20, 30)], [4, 32]),  # two images
    (7, (5,), [(300, 77)], [16]),
]


def _batch(model, samples, side="right"):
    ids = [prompt(length, *places, seed=length) for length, places, _, _ in samples]
    sizes = [size for sample in samples for size in sample[2]]
    batch = {"input_ids": pad(ids, side), "attention_mask": pad([torch.ones_like(row) for row in ids], side)}
    return batch | (images(model.config, *sizes) if sizes else {})


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single_samples(model, side, routed):
    """Mixed sizes, levels, a text-only sample and one with two images, padded on either side."""
    levels = [level for sample in SAMPLES for level in sample[3]]
    with torch.no_grad():
        together = model(**_batch(model, SAMPLES, side), granularity=None if routed else levels)
    image = 0
    for row, sample in enumerate(SAMPLES):
        with torch.no_grad():
            alone = model(**_batch(model, [sample]), granularity=None if routed or not sample[3] else sample[3])
        count, length = len(sample[3]), alone.logits.shape[1]
        kept = together.logits[row, -length:] if side == "left" else together.logits[row, :length]
        torch.testing.assert_close(kept, alone.logits[0], rtol=0, atol=1e-5)
        if count:
            ours = slice(image, image + count)
            assert together.granularity[ours].tolist() == alone.granularity.tolist()
            assert together.num_visual_tokens[ours].tolist() == alone.num_visual_tokens.tolist()
            if routed:
                torch.testing.assert_close(together.router_logits[ours], alone.router_logits, rtol=0, atol=1e-5)
        image += count


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_generation_equals_single_samples(model, side, routed):
    levels = [level for sample in SAMPLES for level in sample[3]]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    together = model.generate(**_batch(model, SAMPLES, side), granularity=None if routed else levels, **options)
    for row, sample in enumerate(SAMPLES):
        forced = None if routed or not sample[3] else sample[3]
        alone = model.generate(**_batch(model, [sample]), granularity=forced, **options)
        assert together[row].tolist() == alone[0].tolist()


def test_routed_generation_equals_the_forced_level_it_chose(model):
    inputs = _batch(model, SAMPLES)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    for token_cost in (0.0, 0.3):
        chosen = model(**inputs, token_cost=token_cost).granularity
        routed = model.generate(**inputs, token_cost=token_cost, **options)
        assert torch.equal(routed, model.generate(**inputs, granularity=chosen, **options))


def test_cached_decoding_equals_the_full_forward(model):
    """Greedy tokens of `generate` are those of uncached passes over prompt and answer so far."""
    inputs = _batch(model, SAMPLES[:1])
    generated = model.generate(**inputs, granularity=16, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    ids = torch.cat([inputs["input_ids"], generated], 1)
    with torch.no_grad():
        images_of = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
        logits = model(ids, **images_of, granularity=16).logits
    assert torch.equal(logits[:, -6:-1].argmax(-1), generated)


def test_loss_is_the_mean_over_supervised_tokens(model):
    inputs = _batch(model, SAMPLES[:3])
    labels = inputs["input_ids"].clone()
    labels[:, :6] = -100
    labels[inputs["attention_mask"] == 0] = -100
    labels[inputs["input_ids"] == IMAGE_TOKEN] = -100
    with torch.no_grad():
        output = model(**inputs, labels=labels, granularity=8)
    log_probs = output.logits[:, :-1].log_softmax(-1)
    targets = output.labels[:, 1:]
    picked = [-log_probs[b, t, targets[b, t]] for b, t in torch.nonzero(targets != -100).tolist()]
    assert len(picked) == int((labels != -100).sum())
    torch.testing.assert_close(output.loss, torch.stack(picked).mean())


def test_blank_encoding_counts_nothing_and_touches_every_part(model):
    """A micro-batch without images: logits as without a tower, and gradients of zero in the tower."""
    inputs = _batch(model, SAMPLES[1:2])
    model.zero_grad()
    features = model.encode_blank_image()
    labels = inputs["input_ids"]
    packed = pack([model.splice(features, labels, inputs["attention_mask"], labels)])
    log_probs = model.token_log_probs(packed)
    with torch.no_grad():
        torch.testing.assert_close(-log_probs.mean(), model(**inputs, labels=labels).loss)
    router_logits = model.route(features, inputs["input_ids"], inputs["attention_mask"])
    (log_probs.sum() + 0 * router_logits.sum()).backward()
    for name in (
        "vision_tower.embeddings.patch_embedding.weight",
        "image_newline",
        "multi_modal_projector.linear_1.bias",
    ):
        assert model.model.get_parameter(name).grad.abs().max() == 0
    assert all(parameter.grad is not None for parameter in model.model.router.parameters())
    model.zero_grad()


def test_every_level_trains_the_vision_tower(model):
    for level in model.config.granularities:
        model.zero_grad()
        inputs = _batch(model, SAMPLES[:1])
        model(**inputs, labels=inputs["input_ids"].clamp(max=63), granularity=level).loss.backward()
        gradient = model.model.vision_tower.embeddings.patch_embedding.weight.grad
        assert gradient.abs().max() > 0
    model.zero_grad()


def test_errors_say_what_to_do(model):
    inputs = _batch(model, SAMPLES[:1])
    with pytest.raises(ValueError, match=r"granularity 5 is not one of this model's levels: 4, 8, 16, 32, 64"):
        model(**inputs, granularity=5)
    with pytest.raises(ValueError, match="names 2 levels for 1 images"):
        model(**inputs, granularity=[4, 8])
    with pytest.raises(ValueError, match="1 images but its samples hold"):
        model(**inputs | {"input_ids": inputs["input_ids"].clamp(max=63)})
    with pytest.raises(ValueError, match="0 images but its samples hold"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match=r"one \(height, width\) row of image_sizes"):
        model(**inputs | {"image_sizes": None})
    with pytest.raises(ValueError, match="disagree about the pinpoints"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:, :2]})
    with pytest.raises(ValueError, match="max_sequence_length 2048"):
        model.generate(torch.ones(1, 2049, dtype=torch.long))
