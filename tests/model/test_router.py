"""The router in behaviour "paper" against a reference for single crops, invariances, and the choice of a level."""

import pytest
import torch

from avg_llava import AvgLlavaForConditionalGeneration, load_model
from avg_llava.model.router import TransformerRouter
from avg_llava.model.scaler import WidthFirstLadder
from tests.tiny import images, prompt, tiny_config, tiny_model


@pytest.fixture(scope="module")
def router() -> TransformerRouter:
    return tiny_model().model.router


def _inputs(num_words=9, num_valid=6, counts=(3, 5), seed=0):
    torch.manual_seed(seed)
    crops = torch.randn(sum(counts), 64, 64)
    text = torch.randn(len(counts), num_words, 64)
    mask = torch.arange(num_words).expand(len(counts), -1) < num_valid
    return crops, list(counts), text, mask


def _reference(router, crops, counts, text, mask):
    """The logits, image by image and crop by crop, without padding."""
    slots = router.config.router_config.num_text_tokens
    num_visual = sum(router.config.granularities)
    logits, start = [], 0
    for image, count in enumerate(counts):
        words = text[image][mask[image]]
        overview = crops[start]
        cosine = torch.nn.functional.cosine_similarity(words[:, None], overview[None], dim=-1).mean(1)
        words = words[cosine.argsort(descending=True)[:slots]]
        votes = torch.cat([router.voter[:num_visual], router.voter[num_visual:][: len(words)]])
        of_crops = []
        for crop in crops[start : start + count]:
            levels = [
                WidthFirstLadder(8).pool(crop[None], granularity)[0] for granularity in router.config.granularities
            ]
            tokens = torch.cat([*levels, words])
            deviation = tokens - tokens.mean(1, keepdim=True)
            tokens = deviation / (deviation.square().mean(1, keepdim=True) + 1e-5).sqrt()
            scores = router.router(router.merger(tokens[None]))[0]
            of_crops.append((votes * scores).sum(0))
        logits.append(router.norm(torch.stack(of_crops).mean(0)))
        start += count
    return torch.stack(logits)


@pytest.mark.parametrize("num_valid", [0, 6, 9])
def test_router_equals_reference(router, num_valid):
    inputs = _inputs(num_valid=num_valid)
    with torch.no_grad():
        torch.testing.assert_close(router(*inputs), _reference(router, *inputs), rtol=0, atol=1e-5)


def test_more_words_than_slots(router):
    inputs = _inputs(num_words=40, num_valid=30)
    with torch.no_grad():
        torch.testing.assert_close(router(*inputs), _reference(router, *inputs), rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=["paper", "released"])
def image_only(request) -> AvgLlavaForConditionalGeneration:
    return tiny_model(behavior=request.param, router_config={"num_text_tokens": 0})


def test_image_only_router_equals_reference():
    router = tiny_model(router_config={"num_text_tokens": 0}).model.router
    with torch.no_grad():
        torch.testing.assert_close(router(*_inputs()), _reference(router, *_inputs()), rtol=0, atol=1e-5)


def test_only_the_image_only_router_ignores_the_instruction(image_only):
    """Through the whole model: other instructions, longer ones, and none."""
    normal = tiny_model(behavior=image_only.config.behavior)
    size, other = (60, 30), (32, 32)
    for model in (image_only, normal):
        with torch.no_grad():
            found = [
                model(input_ids=prompt(length, 3, seed=seed)[None], **images(model.config, size)).router_logits
                for length, seed in ((20, 1), (20, 2), (31, 3), (4, 4))
            ]
            other_image = model(input_ids=prompt(20, 3, seed=1)[None], **images(model.config, other)).router_logits
        differences = [(logits - found[0]).abs().max() for logits in found[1:]]
        if model is image_only:
            assert max(differences) == 0
        else:
            assert min(differences) > 1e-4
        assert (other_image - found[0]).abs().max() > 1e-4


def test_image_only_router_is_saved_and_loaded_as_such(image_only, tmp_path):
    image_only.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.router_config.num_text_tokens == 0
    assert loaded.model.router.voter.shape == (4 + 8 + 16 + 32 + 64, 1)
    inputs = {"input_ids": prompt(20, 3)[None], **images(image_only.config, (60, 30))}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).router_logits, image_only(**inputs).router_logits)


def test_a_negative_number_of_text_tokens_is_refused():
    with pytest.raises(ValueError, match=r"router_config\.num_text_tokens must be at least 0, got -1"):
        tiny_config(router_config={"num_text_tokens": -1})


def test_absent_words_change_nothing(router):
    """Neither the values nor the order nor the number of masked tokens matter."""
    crops, counts, text, mask = _inputs()
    with torch.no_grad():
        expected = router(crops, counts, text, mask)
        scrambled = text.clone()
        scrambled[:, 6:] = torch.randn(2, 3, 64) * 50
        torch.testing.assert_close(router(crops, counts, scrambled, mask), expected, rtol=0, atol=1e-6)
        flipped = torch.cat([text[:, :6], text[:, 6:].flip(1)], 1)
        torch.testing.assert_close(router(crops, counts, flipped, mask), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(router(crops, counts, text[:, :6], mask[:, :6]), expected, rtol=0, atol=1e-6)
        front = torch.cat([torch.randn(2, 4, 64), text], 1)
        front_mask = torch.cat([torch.zeros(2, 4, dtype=torch.bool), mask], 1)
        torch.testing.assert_close(router(crops, counts, front, front_mask), expected, rtol=0, atol=1e-6)


def test_tokens_of_a_crop_attend_to_one_another(router):
    """A merged token depends on all tokens of its crop and on no others; the order of the tiles does not matter."""
    crops, counts, text, mask = _inputs(counts=(3,))
    with torch.no_grad():
        swapped = crops[[0, 2, 1]]
        torch.testing.assert_close(
            router(swapped, counts, text, mask), router(crops, counts, text, mask), rtol=0, atol=1e-5
        )
    gradient_of = crops.clone().requires_grad_()
    levels = [WidthFirstLadder(8).pool(gradient_of, granularity) for granularity in router.config.granularities]
    merged = router.merger(torch.cat(levels, 1))
    merged[1, 7].sum().backward()
    assert gradient_of.grad[1].abs().sum(-1).min() > 0
    assert gradient_of.grad[[0, 2]].abs().max() == 0


def test_router_gradients_are_finite_with_masked_slots(router):
    crops, counts, text, mask = _inputs(num_valid=0)
    router.zero_grad()
    router(crops, counts, text, mask)[:, 0].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in router.parameters())
    router.zero_grad()


def test_fresh_router_is_initialised_as_published():
    """Kaiming-normal MLP, normal voter, PyTorch's defaults elsewhere, also as part of a model."""
    torch.manual_seed(0)
    router = AvgLlavaForConditionalGeneration(tiny_config(behavior="released")).model.router
    std = {name: parameter.std().item() for name, parameter in router.named_parameters()}
    assert std["voter"] == pytest.approx(1, abs=0.15)
    assert std["router.0.weight"] == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert std["router.2.weight"] == pytest.approx((2 / 64) ** 0.5, rel=0.2)
    assert std["merger.linear1.weight"] == pytest.approx(64**-0.5 / 3**0.5, rel=0.1)
    assert std["merger.self_attn.in_proj_weight"] == pytest.approx((2 / 256) ** 0.5, rel=0.1)
    assert router.norm.weight.tolist() == [1] * 5
    votes = AvgLlavaForConditionalGeneration(tiny_config()).model.router.voter  # paper: equal votes
    assert torch.equal(votes, torch.full_like(votes, 1 / len(votes)))


def test_token_cost_buys_coarser_levels():
    model = tiny_model()
    logits = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4], [5.0, 0, 0, 0, 0], [0, 0, 0, 0, 5.0]])
    assert model.choose_granularity(logits).tolist() == [64, 4, 64]
    assert model.choose_granularity(logits, 0.11).tolist() == [4, 4, 64]  # 0.1 nats gained per doubling, 0.11 paid
    assert model.choose_granularity(logits, 2.0).tolist() == [4, 4, 4]
    assert model.choose_granularity(logits, torch.tensor([0.0, 0.0, 2.0])).tolist() == [64, 4, 4]
