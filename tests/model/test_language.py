"""Language models of every family against transformers' own causal LM: logits, answers, packed losses, files."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, JambaConfig, Qwen3NextConfig
from transformers.models.gemma3.configuration_gemma3 import Gemma3Config

from avg_llava.checkpoints.loading import build_from_backbones
from avg_llava.inference.export import language_model
from avg_llava.model.language import language_parts
from avg_llava.model.packing import pack
from avg_llava.training.levels import use_packed_attention
from tests.tiny import language_config, language_models, pad, prompt, tiny_config, write_backbones

FAMILIES = list(language_models())


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """Our model from backbones, and transformers' causal LM that wrote the second one."""
    folder = tmp_path_factory.mktemp(request.param)
    write_backbones(folder, language=language_models()[request.param])
    theirs = AutoModelForCausalLM.from_pretrained(folder / "language").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too are far from their initial values
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder / "language")
    return build_from_backbones(folder / "vision", folder / "language"), theirs


@pytest.fixture
def texts():
    prompts = [prompt(20, seed=1), prompt(27, seed=2), prompt(13, seed=3)]
    return {"input_ids": pad(prompts), "attention_mask": pad([torch.ones_like(ids) for ids in prompts])}


def test_logits_are_those_of_transformers(pair, texts):
    ours, theirs = pair
    with torch.no_grad():
        found, expected = ours(**texts).logits, theirs(**texts).logits
    real = texts["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


def test_answers_are_those_of_transformers(pair):
    ours, theirs = pair
    ids = torch.stack([prompt(20, seed=1), prompt(20, seed=2)])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = theirs.generate(**given)[:, 20:]
    assert torch.equal(ours.generate(**given)[:, : expected.shape[1]], expected)


def test_losses_of_a_packed_row_are_those_of_the_samples(pair, texts):
    ours, theirs = pair
    ours.set_attn_implementation({"text_config": "sdpa" if theirs._supports_sdpa else "eager"})
    use_packed_attention(ours)
    labels = texts["input_ids"].masked_fill((torch.arange(27) < 5) | (texts["attention_mask"] == 0), -100)
    packed = pack([ours.splice(None, **texts, labels=labels)])
    log_probs = packed.sums(ours.token_log_probs(packed))
    expected = []
    for ids, targets, mask in zip(texts["input_ids"], labels, texts["attention_mask"], strict=True):
        length = int(mask.sum())
        loss = theirs(input_ids=ids[None, :length], labels=targets[None, :length]).loss
        expected.append(-loss * (targets != -100).sum())
    torch.testing.assert_close(log_probs, torch.stack(expected), atol=1e-4, rtol=1e-5)  # sums of 22 tokens
    ours.zero_grad()
    theirs.zero_grad()
    log_probs.sum().backward()
    torch.stack(expected).sum().backward()
    gradients = [model.get_input_embeddings().weight.grad for model in pair]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_saved_and_exported_models_are_the_same(pair, texts, tmp_path):
    ours, theirs = pair
    ours.save_pretrained(tmp_path)
    loaded = type(ours).from_pretrained(tmp_path)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    if ours.config.text_config.tie_word_embeddings:
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    exported = language_model(ours)
    assert type(exported) is type(theirs)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_are_those_of_the_layers(name):
    config = language_models()[name]
    parts, model = language_parts(config), AutoModelForCausalLM.from_config(config)
    layers = model.base_model.get_submodule(parts.layers)
    assert len(layers) == config.num_hidden_layers
    assert parts.layer_weights == sum(weight.numel() for weight in layers.parameters() if weight.dim() > 1)
    keys = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values.layers[0].keys
    assert parts.key_value_width == 2 * keys.shape[1] * keys.shape[3]
    assert parts.attention_width == config.num_attention_heads * keys.shape[3]


SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CohereConfig(**SIZES), "'cohere' is not supported .* it computes its logits otherwise"),
        (GraniteConfig(**SIZES, logits_scaling=8.0), "'granite' is not supported .* it computes its logits otherwise"),
        (JambaConfig(**SIZES), "'jamba' is not supported .* tokens see each other not only through attention"),
        (Qwen3NextConfig(**SIZES), r"'qwen3_next' is not supported .* attention \(linear_attention\)"),
        (Gemma3Config(), "'gemma3' is not supported .* no causal language model of text alone"),
    ],
)
def test_other_language_models_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        language_parts(config)


def test_the_callers_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    language_parts(language_config(vocab_size=65))  # of no other test, so that it is not remembered
    assert torch.equal(torch.get_rng_state(), before)


def test_capped_logits_change_the_loss():
    """The cap of the head is not lost: without it the families' tests above could not fail."""
    config = language_models()["gemma2"]
    assert language_parts(config).softcap == 3.0
    assert language_parts(language_config()).softcap is None
    assert tiny_config(language=config).text_config.final_logit_softcapping == 3.0
