"""Exports are read back by plain transformers, which decodes the same tokens as the routed model."""

import base64
import io
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from avg_llava import Pipeline, Request, cli
from avg_llava.inference.export import ERRORS, INDEX, language_model
from tests.tiny import make_checkpoint, noise_images, tiny_model

QUESTIONS = [
    {"id": "routed", "prompt": "how many dots?", "image": "0.png"},
    {"id": "forced/4", "prompt": "what color is the background?", "image": "1.png", "granularity": 4},
    {"id": "two images", "prompt": "compare them", "image": ["2.png", "3.png"]},
    {"id": "cheap", "prompt": "which code?", "image": "4.png", "token_cost": 1000},
    {"id": "no image", "prompt": "no image here"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    make_checkpoint(folder)
    for number, image in enumerate(noise_images()):
        image.save(folder / f"{number}.png")
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    assert cli.main(["export", "model", "--model", str(folder / "model"), "--output", str(folder / "engine")]) == 0
    return folder


@pytest.fixture(scope="module")
def routed(folder):
    """The routed model's ids for each question, through transformers' `generate`, and the fields of its answer."""
    pipeline = Pipeline.load(folder / "model")
    found = {}
    for question in QUESTIONS:
        paths = question.get("image", [])
        request = Request(question["prompt"], tuple(folder / p for p in ([paths] if isinstance(paths, str) else paths)))
        inputs = pipeline.predictor.inputs([request])
        budget = {key: question[key] for key in ("granularity", "token_cost") if key in question}
        (ids,) = pipeline.model.generate(**inputs, **budget, do_sample=False, max_new_tokens=8, pad_token_id=0).tolist()
        found[question["id"]] = ids, pipeline.ask(request.images, request.prompt, **budget, max_new_tokens=8)
    return found


def read(file, form):
    """Embeddings and maximum answer length, as an engine reads them."""
    if form == "safetensors":
        return load_file(file)["prompt_embeds"], 8
    body = json.loads(file.read_text())
    if form == "vllm":
        assert body["temperature"] == 0
        content = io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True))
        return torch.load(content, weights_only=True), body["max_tokens"]
    assert body["sampling_params"]["temperature"] == 0
    return torch.tensor(body["input_embeds"]), body["sampling_params"]["max_new_tokens"]


@pytest.mark.parametrize("form", ["safetensors", "vllm", "sglang"])
def test_a_plain_language_model_decodes_the_same_answers(folder, routed, form, capsys):
    output = folder / form
    arguments = ["--model", str(folder / "model"), "--input", str(folder / "questions.jsonl"), "--output", str(output)]
    assert cli.main(["export", "prompts", *arguments, "--format", form, "--max-new-tokens", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"questions": 5, "failures": 0, "output": str(output)}
    engine = AutoModelForCausalLM.from_pretrained(folder / "engine")
    tokenizer = AutoTokenizer.from_pretrained(folder / "engine")
    index = [json.loads(line) for line in (output / INDEX).read_text().splitlines()]
    assert [line["id"] for line in index] == [question["id"] for question in QUESTIONS]
    for line in index:
        embeds, longest = read(output / line["file"], form)
        (ids,) = engine.generate(inputs_embeds=embeds[None], max_new_tokens=longest, do_sample=False).tolist()
        expected, answer = routed[line["id"]]
        assert ids == expected
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == answer.text
        assert tuple(line["granularity"]) == answer.granularity
        assert line["num_visual_tokens"] == answer.num_visual_tokens
        assert line["num_prompt_tokens"] == answer.num_prompt_tokens == len(embeds)
    assert len({tuple(ids) for ids, _ in routed.values()}) == len(QUESTIONS), "else the comparisons prove little"


def test_the_folder_is_a_plain_llama(folder):
    engine = LlamaForCausalLM.from_pretrained(folder / "engine")
    source = LlamaForCausalLM.from_pretrained(folder / "language")
    assert json.loads((folder / "engine" / "config.json").read_text())["model_type"] == "llama"
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, engine.state_dict()[name]), name
    assert engine.generation_config.eos_token_id == source.config.eos_token_id
    ids = AutoTokenizer.from_pretrained(folder / "engine")("how many dots?", return_tensors="pt").input_ids
    assert torch.equal(engine(ids).logits, source(ids).logits)


def test_weights_are_shared_not_copied():
    model = tiny_model()
    exported = language_model(model)
    assert exported.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    ours, theirs = model.model.language_model.state_dict(), exported.model.state_dict()
    assert all(theirs[name].data_ptr() == tensor.data_ptr() for name, tensor in ours.items())


def test_half_precision_and_questions_that_cannot_be_read(folder, tmp_path, capsys):
    questions = tmp_path / "questions.jsonl"
    lines = [QUESTIONS[0], {"id": "bad", "prompt": "what?", "image": "absent.png"}, {"id": "none"}]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--model", str(folder / "model"), "--input", str(questions), "--image-root", str(folder)]
    output = tmp_path / "prompts"
    assert cli.main(["export", "prompts", *arguments, "--output", str(output), "--dtype", "bfloat16"]) == 1
    assert f"1 prompts are in {output}, 2 failed: see {output / ERRORS}" in capsys.readouterr().out
    (line,) = (output / INDEX).read_text().splitlines()
    assert load_file(output / json.loads(line)["file"])["prompt_embeds"].dtype == torch.bfloat16
    errors = [json.loads(line) for line in (output / ERRORS).read_text().splitlines()]
    assert [error["id"] for error in errors] == ["bad", "none"]
    assert "absent.png: image file not found" in errors[0]["error"]


def test_quantised_blocks_do_not_change_prompts(folder, tmp_path):
    arguments = ["--model", str(folder / "model"), "--input", str(folder / "questions.jsonl")]
    for name, more in (("whole", []), ("quantised", ["--quantization", "4bit"])):
        assert cli.main(["export", "prompts", *arguments, "--output", str(tmp_path / name), *more]) == 0
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "quantised" / file.name).read_bytes()
