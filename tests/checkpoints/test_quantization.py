"""8-bit, 4-bit and half-precision weights: which layers are quantised, errors of weights and answers, refusals."""

import json
import sys
from pathlib import Path

import pytest
import torch

import avg_llava
from avg_llava import Budget, Decoding, Pipeline, Request, load_model
from avg_llava.checkpoints.loading import pick_attention
from avg_llava.mini.world import WorldSize, write_world
from tests.parity.golden import GOLDEN
from tests.tiny import make_checkpoint

MINI = Path(avg_llava.__file__).parent / "mini/checkpoint"
# Bounds on rounding, as shares of the largest weight of a row (8 bits: half a step of 127) and of a block of 64 weights
# (4 bits: half of NF4's widest gap, between -1 and -0.6962).
WEIGHT_BOUND = {"8bit": 0.5 / 127, "4bit": (1 - 0.6962) / 2}
# Mean relative deviation of the logits of an answer. For rows of Gaussian weights the largest is about 3 standard
# deviations, so 8 bits round with 3 / 127 / sqrt(12) = 0.7% of noise in weights and as much in activations; NF4 rounds
# with 9%. Residual connections add up what seven layers of three blocks make of it: measured 1.3% and 9.2% on the mini
# model, whose 128 columns average out less than the 4096 of a 7B model.
LOGIT_BOUND = {"8bit": 0.03, "4bit": 0.15}
TOKEN_AGREEMENT = {"8bit": 0.95, "4bit": 0.9}  # of the most probable next token; measured 0.99 and 0.98


@pytest.fixture(scope="module")
def whole():
    return Pipeline.load(MINI)


@pytest.fixture(scope="module", params=["8bit", "4bit"])
def quantized(request):
    return request.param, Pipeline.load(MINI, quantization=request.param)


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, size=WorldSize(num_captions=0, num_instruct=0, num_router=0, num_eval=4))
    records = json.loads((folder / "eval.json").read_text())
    return [Request(record["conversations"][0]["value"], (folder / record["image"],)) for record in records]


def linear_layers(model):
    return {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}


def restored(layer):
    """The weights that a quantised layer multiplies with."""
    import bitsandbytes.functional as F

    if layer.weight.dtype == torch.int8:
        return layer.weight.data.float() * layer.weight.SCB[:, None] / 127
    return F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def test_only_the_blocks_of_the_language_model_are_quantised(whole, quantized):
    kind, model, whole = quantized[0], quantized[1].model, whole.model
    expected = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[kind]
    plain = linear_layers(whole)
    for name, found in linear_layers(model).items():
        assert found == (expected if name.startswith("model.language_model.layers.") else plain[name]), name
    blocks = whole.model.language_model.layers
    in_blocks = sum(parameter.nbytes for parameter in blocks.parameters() if parameter.dim() == 2)
    saved = whole.get_memory_footprint() - model.get_memory_footprint()
    assert saved == pytest.approx(in_blocks * {"8bit": 3 / 4, "4bit": 7 / 8}[kind], rel=0.03)


def test_weights_are_rounded_within_the_format(whole, quantized):
    kind, model, whole = quantized[0], quantized[1].model, whole.model
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        for block in range(len(whole.model.language_model.layers)):
            name_of_layer = f"model.language_model.layers.{block}.{name}"
            weight = whole.get_submodule(name_of_layer).weight.detach()
            group = weight if kind == "8bit" else weight.reshape(-1, 64)
            bound = WEIGHT_BOUND[kind] * group.abs().amax(1, keepdim=True)
            error = (restored(model.get_submodule(name_of_layer)) - weight).abs().reshape(group.shape)
            assert (error <= bound * 1.01).all(), name_of_layer
            assert error.max() > 0, "else nothing was rounded"


def logits_along(pipeline, requests, answers):
    """For each answer the logits that predict its tokens, at the finest level."""
    rows = []
    for request, answer in zip(requests, answers, strict=True):
        inputs = pipeline.predictor.inputs([request])
        ids = pipeline.processor.tokenizer(answer.text, add_special_tokens=False).input_ids
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            rows.append(pipeline.model(**inputs, granularity=64, logits_to_keep=len(ids) + 1).logits[0].float())
    return rows


def test_answers_within_the_tolerance(whole, quantized, requests):
    kind, pipeline = quantized
    expected = whole.generate_batch(requests, decoding=Decoding(8))
    answers = pipeline.generate_batch(requests, decoding=Decoding(8))
    for answer, reference in zip(answers, expected, strict=True):
        assert (answer.granularity, answer.router_probs) == (reference.granularity, reference.router_probs)
    deviations, agreeing = [], []
    pairs = zip(logits_along(pipeline, requests, expected), logits_along(whole, requests, expected), strict=True)
    for found, reference in pairs:
        deviations.append(float((found - reference).std() / reference.std()))
        agreeing += (found.argmax(-1) == reference.argmax(-1)).tolist()
    assert 0 < sum(deviations) / len(deviations) < LOGIT_BOUND[kind]
    assert sum(agreeing) / len(agreeing) >= TOKEN_AGREEMENT[kind]
    same = sum(answer.text == reference.text for answer, reference in zip(answers, expected, strict=True))
    assert same >= TOKEN_AGREEMENT[kind] * len(requests) - 1


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("bfloat16", None), ("float16", None), ("bfloat16", "8bit"), ("float16", "4bit")]
)
def test_half_precision(whole, requests, dtype, quantization):
    pipeline = Pipeline.load(MINI, dtype=dtype, quantization=quantization)
    model = pipeline.model
    assert model.dtype == model.model.vision_tower.dtype == getattr(torch, dtype)
    answers = pipeline.generate_batch(requests[:3], Budget(64), Decoding(8))
    expected = whole.generate_batch(requests[:3], Budget(64), Decoding(8))
    assert [answer.text for answer in answers] == [reference.text for reference in expected]
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            assert module.compute_dtype == getattr(torch, dtype)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_original_format(quantization):
    layers = linear_layers(load_model(GOLDEN / "checkpoint", quantization=quantization))
    blocks = {layers[name] for name in layers if "language_model" in name}
    assert blocks == {{"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[quantization]}
    assert {layers[name] for name in layers if "vision_tower" in name} == {"Linear"}


def test_impossible_quantizations_are_refused(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="quantization is '8bit' or '4bit', not '2bit'"):
        load_model(checkpoint, quantization="2bit")
    with pytest.raises(ValueError, match="bitsandbytes does not run on meta, only on cpu, cuda"):
        load_model(checkpoint, quantization="8bit", device="meta")
    for package in ("accelerate", "bitsandbytes"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)  # as if it were not installed
            with pytest.raises(ValueError, match=r"need bitsandbytes and accelerate .*: pip install -e '\.\[quant\]'"):
                load_model(checkpoint, quantization="4bit")


def test_attention_follows_device_and_type():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for half in (torch.bfloat16, torch.float16):
        assert pick_attention(gpu, half, flash_installed=True) == "flash_attention_2"
        assert pick_attention(gpu, half, flash_installed=False) == "sdpa"
        assert pick_attention(cpu, half, flash_installed=True) == "sdpa"
    assert pick_attention(gpu, torch.float32, flash_installed=True) == "sdpa"
    model = load_model(MINI)
    config = model.config
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == "sdpa"
