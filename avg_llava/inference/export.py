"""Exports for inference engines: the language model as a plain causal LM, and routed prompts as input embeddings.

Images are encoded, routed and spliced here, so that any engine that accepts prompt embeddings can decode the answers.

Shapes: L tokens of a prompt, visual ones included, D language-model width.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from avg_llava.inference.answers import Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.predictor import Predictor
from avg_llava.inference.question_files import Question, write_errors
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration

INDEX, ERRORS = "index.jsonl", "errors.jsonl"


class Prompt(NamedTuple):
    """A routed prompt: (L, D) input embeddings, and the levels of its images."""

    embeds: Tensor
    granularity: tuple[int, ...]
    num_visual_tokens: int


def language_model(model: AvgLlavaForConditionalGeneration) -> PreTrainedModel:
    """The language model with its head as a transformers causal LM that shares the weights."""
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(model.config.text_config, dtype=model.dtype)
    weights = {
        f"{language.base_model_prefix}.{name}": tensor
        for name, tensor in model.model.language_model.state_dict().items()
    }
    language.load_state_dict(weights | {"lm_head.weight": model.lm_head.weight}, assign=True)
    language.tie_weights()
    language.generation_config = model.generation_config
    return language


@torch.inference_mode()
def route_prompt(predictor: Predictor, request: Request, budget: Budget) -> Prompt:
    """Encodes, routes and splices a prompt."""
    encoded = predictor.encode([request])
    levels = [] if encoded.features is None else predictor.choose(encoded, budget).levels
    spliced = predictor.model.splice(encoded.features, encoded.input_ids, encoded.attention_mask, granularity=levels)
    return Prompt(spliced.inputs_embeds[0], tuple(levels), int(spliced.num_visual_tokens.sum()))


def as_safetensors(prompt: Prompt, max_new_tokens: int) -> bytes:
    """A safetensors file with `prompt_embeds` (L, D), for engines called from Python."""
    return save({"prompt_embeds": prompt.embeds.contiguous().cpu()})


def as_vllm_request(prompt: Prompt, max_new_tokens: int) -> bytes:
    """Request body for `/v1/completions` of vLLM: the tensor saved by torch, in base64."""
    stream = io.BytesIO()
    torch.save(prompt.embeds.clone().cpu(), stream)
    encoded = base64.b64encode(stream.getvalue()).decode()
    return _json({"prompt_embeds": encoded, "max_tokens": max_new_tokens, "temperature": 0})


def as_sglang_request(prompt: Prompt, max_new_tokens: int) -> bytes:
    """Request body for `/generate` of SGLang: L lists of D numbers."""
    sampling = {"max_new_tokens": max_new_tokens, "temperature": 0}
    return _json({"input_embeds": prompt.embeds.float().tolist(), "sampling_params": sampling})


FORMATS: dict[str, tuple[Callable[[Prompt, int], bytes], str]] = {
    "safetensors": (as_safetensors, ".safetensors"),
    "vllm": (as_vllm_request, ".json"),
    "sglang": (as_sglang_request, ".json"),
}
"""Format -> function of a prompt and the maximum answer length that gives a file's bytes, and the file suffix."""


def write_prompts(
    predictor: Predictor, questions: Sequence[Question], output: Path, form: str, max_new_tokens: int
) -> int:
    """Writes one file per question, and `index.jsonl` with the file, levels and token counts of each id.

    Failed questions are listed with the reason in `errors.jsonl`.

    Returns:
        Number of failed questions.
    """
    serialize, suffix = FORMATS[form]
    output.mkdir(parents=True, exist_ok=True)
    failures: list[dict[str, str]] = []
    with (output / INDEX).open("w", encoding="utf-8") as index:
        for number, question in enumerate(tqdm(questions, unit="question", disable=None)):
            try:
                if question.request is None:
                    raise ValueError(question.error)
                prompt = route_prompt(predictor, question.request, question.budget)
            except ValueError as error:
                failures.append({"id": question.id, "error": str(error)})
                continue
            file = output / f"{number:06d}{suffix}"
            file.write_bytes(serialize(prompt, max_new_tokens))
            facts = {
                "id": question.id,
                "file": file.name,
                "granularity": prompt.granularity,
                "num_visual_tokens": prompt.num_visual_tokens,
                "num_prompt_tokens": len(prompt.embeds),
            }
            index.write(json.dumps(facts, ensure_ascii=False) + "\n")
    write_errors(output / ERRORS, failures)
    return len(failures)


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()
