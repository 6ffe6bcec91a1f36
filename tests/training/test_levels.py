"""One packed row, row by row and the reference loop agree under every attention; nothing superfluous is computed."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralModel

from avg_llava import AvgLlavaForConditionalGeneration
from avg_llava.bench.plain_loop import plain_loss, sums_over_logits
from avg_llava.model import packing
from avg_llava.model.attention import packed_attention
from avg_llava.model.packing import LanguageHead, PackedInputs
from avg_llava.training import levels
from avg_llava.training.config import ObjectiveSettings
from avg_llava.training.levels import TextBatch, score_answers, total_log_prob
from avg_llava.training.objectives import objective_class
from avg_llava.training.stages import STAGES, set_trainable
from tests.tiny import images, pad, prompt, tiny_config, tiny_model

SIZES = [(32, 32), (60, 30), (90, 90)]


@pytest.fixture
def batch():
    """A sample with an image, one with two, one of text between them, one with an image; right-padded."""
    prompts = [prompt(20, 3, seed=1), prompt(14, seed=3), prompt(26, 5, 9, seed=2)]
    labels = [ids.clone() for ids in prompts]
    for row, start in zip(labels, (14, 10, 19), strict=True):
        row[:start] = -100
    return {
        "input_ids": pad(prompts),
        "attention_mask": pad([torch.ones_like(ids) for ids in prompts]),
        "labels": pad(labels, value=-100),
        **images(tiny_model().config, *SIZES),
    }


@pytest.fixture
def model():
    return tiny_model().double()


def _texts(batch):
    return TextBatch(*(batch[name] for name in TextBatch._fields))


def _loss_and_gradients(model, stage, batch, reference=False):
    set_trainable(model, STAGES[stage])
    objective = objective_class(STAGES[stage].objective)(model, ObjectiveSettings())
    model.zero_grad()
    loss = (
        plain_loss(STAGES[stage].objective, model, batch, objective.settings)
        if reference
        else objective(**batch)["loss"]
    )
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return loss.detach(), gradients


def _assert_same(found, expected, rtol=1e-6):
    """The default tolerance is for float64, in which Llama's norms still compute in float32."""
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=0, check_dtype=False)
    assert found[1].keys() == expected[1].keys()
    whole = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        # Some gradients are zero but for rounding, as that of a key's bias.
        assert (found[1][name] - gradient).norm() <= rtol * gradient.norm() + 1e-8 * whole, name
    assert sum(gradient.abs().max() > 1e-6 for gradient in expected[1].values()) > len(expected[1]) / 2


@pytest.fixture(params=["together", "row by row"])
def way(request, monkeypatch):
    monkeypatch.setattr(levels, "runs_levels_together", lambda model: request.param == "together")
    return request.param


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_objectives_are_the_plain_loop(model, batch, stage, way):
    _assert_same(_loss_and_gradients(model, stage, batch), _loss_and_gradients(model, stage, batch, reference=True))


@pytest.mark.parametrize("feedback", ["mean", "sum"])
def test_router_objective_is_the_plain_loop(model, batch, feedback, way):
    """On the samples with images; in evaluation mode, without dropout."""
    with_images = [0, 2]
    batch |= {name: batch[name][with_images] for name in TextBatch._fields}
    _assert_same(_loss_and_gradients(model, 4, batch), _loss_and_gradients(model, 4, batch, reference=True))


def test_in_float32_too(batch, way):
    """At the documented tolerances: 1e-5 of the loss, 1e-4 of each gradient."""
    model = tiny_model()
    found, expected = (_loss_and_gradients(model, 3, batch, reference=reference) for reference in (False, True))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    _assert_same(found, expected, rtol=1e-4)


def test_in_mixed_precision(batch, way):
    """Autocast to bfloat16: only its rounding differs, and gradients stay float32."""
    model = tiny_model()
    expected = torch.cat([gradient.flatten() for gradient in _loss_and_gradients(model, 3, batch)[1].values()])
    objective = objective_class("multi_granularity")(model, ObjectiveSettings())
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(**batch)["loss"]
    loss.backward()
    found = torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 3e-2 * expected.norm()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "packed"])
@pytest.mark.parametrize("num_key_value_heads", [4, 2])
def test_every_attention_keeps_packed_sequences_apart(batch, attention, num_key_value_heads, way):
    config = tiny_config()
    config.text_config.num_key_value_heads = num_key_value_heads
    torch.manual_seed(0)
    model = AvgLlavaForConditionalGeneration(config).eval().double()
    expected = _loss_and_gradients(model, 3, batch, reference=True)
    objective = objective_class("multi_granularity")(model, ObjectiveSettings())
    model.set_attn_implementation({"text_config": attention})
    model.zero_grad()
    loss = objective(**batch)["loss"]
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    _assert_same((loss.detach(), gradients), expected)


def test_the_attention_is_chosen_unless_one_was_asked_for(model):
    def chosen():
        objective_class("instruction")(model, ObjectiveSettings())
        return model.model.language_model.config._attn_implementation

    assert chosen() == "packed"
    model.set_attn_implementation({"text_config": "eager"})
    assert chosen() == "eager"


def test_with_recomputed_activations(model, batch, way):
    expected = _loss_and_gradients(model, 3, batch, reference=True)
    model.activation_checkpointing_enable({"use_reentrant": False})
    _assert_same(_loss_and_gradients(model.train(), 3, batch), expected)


def test_head_tied_to_the_embeddings(model, batch, way):
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    _assert_same(_loss_and_gradients(model, 3, batch), _loss_and_gradients(model, 3, batch, reference=True))


def test_a_second_micro_batch_adds_its_gradients(model, batch, way):
    text = {name: batch[name][1:2] for name in TextBatch._fields}
    first, second = (_loss_and_gradients(model, 3, each)[1] for each in (batch, text))
    objective = objective_class("multi_granularity")(model, ObjectiveSettings())
    model.zero_grad()
    for each in (batch, text):
        objective(**each)["loss"].backward()
    for name, gradient in first.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient + second[name], rtol=1e-9, atol=1e-12)


def test_answers_are_the_same_without_gradients(model, batch, way):
    features = model.encode_images(batch["pixel_values"], batch["image_sizes"])
    with torch.no_grad():
        found = score_answers(model, features, _texts(batch))
    total, expected = total_log_prob(model, features, _texts(batch), model.config.granularities)
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    torch.testing.assert_close(found.log_probs.sum(), total.detach())
    assert torch.equal(found.num_tokens, torch.tensor([6, 4, 7])[:, None].expand(3, 5))


@pytest.mark.parametrize("longest", [70, 100])
def test_cut_samples_are_the_plain_loop_s(model, batch, longest, way):
    """Where the maximal length truncates answers at fine levels, all remaining tokens have the same weight."""
    model.config.max_sequence_length = longest
    features = model.encode_images(batch["pixel_values"], batch["image_sizes"])
    with torch.no_grad():
        found = score_answers(model, features, _texts(batch))
        for column, level in enumerate(model.config.granularities):
            output = model(**batch, granularity=level)
            log_probs, num_tokens = sums_over_logits(output.logits, output.labels)
            torch.testing.assert_close(found.log_probs[:, column], log_probs, check_dtype=False)
            assert torch.equal(found.num_tokens[:, column], num_tokens)
    assert (found.num_tokens[:, 0] > found.num_tokens[:, -1]).any()
    loss = objective_class("multi_granularity")(model, ObjectiveSettings())(**batch)["loss"]
    torch.testing.assert_close(loss, -found.log_probs.sum() / (5 * 17), check_dtype=False)


def test_no_padding_and_text_goes_once(model, batch, way):
    """Tokens through the language model, counted on the masks of the reference loop."""
    seen = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    objective = objective_class("multi_granularity")(model, ObjectiveSettings())
    objective(**batch)
    expected = []
    for level in model.config.granularities:
        features = model.encode_images(batch["pixel_values"], batch["image_sizes"])
        mask = model.splice(features, *_texts(batch), granularity=level).attention_mask
        expected += mask[[0, 2]].sum(dim=1).tolist()
    expected.append(14)
    assert [shape[0] for shape in seen] == [1] * len(seen)
    lengths = [shape[1] for shape in seen]
    assert sum(lengths) == sum(expected)
    if way == "together":
        assert len(lengths) == 1
    else:
        assert max(lengths) == max(expected)
        assert len(lengths) == -(-sum(expected) // max(expected)), "no more rows than it takes"


def test_rows_are_filled_longest_first():
    assert levels._fill_rows([3, 10, 7, 2, 5, 4]) == [[1], [2, 0], [4, 5], [3]]
    assert levels._fill_rows([4]) == [[0]]


class _LargestLogits(TorchDispatchMode):
    """Rows of the largest tensor with the vocabulary as last dimension, except the head's transposed weight."""

    def __init__(self, vocabulary, hidden_size=64):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0
        self.weight = (hidden_size, vocabulary)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if not isinstance(tensor, torch.Tensor) or tensor.shape == self.weight:
                continue
            if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("stage", [2, 3, 4])
def test_logits_exist_for_a_few_supervised_tokens_at_a_time(batch, stage, way, monkeypatch):
    """Forward and backward; no other dimension has the size of the vocabulary."""
    config = tiny_config()
    config.text_config.vocab_size = vocabulary = 997
    torch.manual_seed(0)
    model = AvgLlavaForConditionalGeneration(config).eval().double()
    if stage == 4:
        batch |= {name: batch[name][[0, 2]] for name in TextBatch._fields}
    expected = _loss_and_gradients(model, stage, batch, reference=True)
    for rows, most in ((3, 3), (1000, 13 * 5 + 4)):
        monkeypatch.setattr(packing, "MAX_LOGITS", rows * vocabulary + 1)
        with _LargestLogits(vocabulary) as largest:
            _assert_same(_loss_and_gradients(model, stage, batch), expected)
        assert 0 < largest.rows <= most
    with _LargestLogits(vocabulary) as largest:
        _loss_and_gradients(model, stage, batch, reference=True)
    assert largest.rows > 3 * 100, "the reference loop holds them all, so the test would see them"


class TestHead:
    """Gradients in float32 within 1e-6 of those of the full logits."""

    @pytest.mark.parametrize("rows", [1, 7, 1000])
    def test_chunks_are_the_full_logits(self, rows, monkeypatch):
        generator = torch.Generator().manual_seed(0)
        head = LanguageHead(16, 50, bias=False)
        hidden = torch.randn(40, 16, generator=generator, requires_grad=True)
        targets = torch.randint(0, 50, (40,), generator=generator)
        monkeypatch.setattr(packing, "MAX_LOGITS", rows * 50)
        head(hidden, targets).mean().backward()
        found = [hidden.grad.clone(), head.weight.grad.clone()]
        hidden.grad = head.weight.grad = None
        log_probs = head(hidden).log_softmax(-1).gather(1, targets[:, None])
        log_probs.mean().backward()
        for gradient, expected in zip(found, (hidden.grad, head.weight.grad), strict=True):
            assert (gradient - expected).norm() <= 1e-6 * expected.norm()

    def test_nothing_supervised_stays_connected(self):
        head = LanguageHead(4, 9, bias=False)
        hidden = torch.randn(0, 4, requires_grad=True)
        head(hidden, torch.zeros(0, dtype=torch.long)).sum().backward()
        assert head.weight.grad.abs().max() == 0

    def test_low_precision_is_scored_in_float32(self):
        head = LanguageHead(4, 9, bias=False).bfloat16()
        hidden, targets = torch.randn(6, 4).bfloat16(), torch.arange(6)
        found = head(hidden, targets)
        assert found.dtype == torch.float32
        expected = head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(found, expected)


def test_attention_windows_hold_within_packed_sequences():
    """A language model with sliding-window attention, such as Mistral: packing changes no sequence."""
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
    )
    torch.manual_seed(0)
    language = MistralModel(config).double().eval()
    language.set_attn_implementation("packed")
    embeds = torch.randn(1, 30, 32, dtype=torch.float64)
    lengths = [12, 4, 14]
    packed = PackedInputs(
        embeds[0], torch.cat([torch.arange(length) for length in lengths]), torch.zeros(30, dtype=torch.long), lengths
    )
    with torch.no_grad():
        together = language(**packed.language_inputs(), use_cache=False).last_hidden_state
        language.set_attn_implementation("eager")
        alone = [language(inputs_embeds=part).last_hidden_state for part in embeds.split(lengths, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_key_value_heads", [4, 2])
def test_gpu_kernel_is_the_attention_of_each_sequence(num_key_value_heads):
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = [130, 1, 700]

    def states(heads):
        shape = (1, heads, sum(lengths), 64)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    query, key, value = states(4), states(num_key_value_heads), states(num_key_value_heads)
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    module = torch.nn.Module()
    output, _ = packed_attention(module, query, key, value, None, cu_seq_lens_q=ends, max_length_q=max(lengths))
    output.float().square().sum().backward()
    found = [output.float(), *(tensor.grad.float() for tensor in (query, key, value))]
    query, key, value = (tensor.detach().float().requires_grad_() for tensor in (query, key, value))
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    expected = torch.cat(outputs, dim=2).transpose(1, 2)
    expected.square().sum().backward()
    for tensor, reference in zip(found, (expected, query.grad, key.grad, value.grad), strict=True):
        assert (tensor - reference).norm() <= 2e-2 * reference.norm()
