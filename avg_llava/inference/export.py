"""Exports for inference engines: the language model as a plain causal LM, and routed prompts as input embeddings.

Images are encoded, routed and spliced here, so that any engine that accepts prompt embeddings can decode the answers.

Shapes: L tokens of a prompt, visual ones included, D language-model width.
"""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from avg_llava.common.files import encode_json
from avg_llava.common.jsonl import JsonLines
from avg_llava.inference.answers import Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.predictor import Predictor
from avg_llava.inference.question_files import Question, write_errors
from avg_llava.model.language import language_parts
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration

INDEX, ERRORS = "index.jsonl", "errors.jsonl"


def language_model(model: AvgLlavaForConditionalGeneration) -> PreTrainedModel:
    """The language model with its head as a transformers causal LM that shares the weights."""
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(
            model.config.text_config, dtype=model.dtype, trust_remote_code=False
        )
    parts = language_parts(model.config.text_config)
    weights = {f"{parts.base}.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()}
    weights |= {f"{parts.head}.{name}": tensor for name, tensor in model.lm_head.state_dict().items()}
    language.load_state_dict(weights, assign=True)
    language.tie_weights()
    language.generation_config = model.generation_config
    return language


@torch.inference_mode()
def route_prompt(predictor: Predictor, request: Request, budget: Budget) -> tuple[Tensor, list[int], int]:
    """Encodes, routes and splices a prompt.

    Returns:
        (L, D) input embeddings, the level of each image, and the number of visual tokens.
    """
    encoded = predictor.encode([request])
    levels = [] if encoded.features is None else predictor.choose(encoded, budget).levels
    spliced = predictor.model.splice(encoded.features, encoded.input_ids, encoded.attention_mask, granularity=levels)
    return spliced.inputs_embeds[0], levels, int(spliced.num_visual_tokens.sum())


def as_safetensors(embeds: Tensor, max_new_tokens: int) -> bytes:
    """A safetensors file with `prompt_embeds` (L, D), for engines called from Python."""
    return save({"prompt_embeds": embeds.contiguous().cpu()})


def as_vllm_request(embeds: Tensor, max_new_tokens: int) -> bytes:
    """Request body for `/v1/completions` of vLLM: the tensor saved by torch, in base64."""
    stream = io.BytesIO()
    torch.save(embeds.clone().cpu(), stream)
    encoded = base64.b64encode(stream.getvalue()).decode()
    return encode_json({"prompt_embeds": encoded, "max_tokens": max_new_tokens, "temperature": 0})


def as_sglang_request(embeds: Tensor, max_new_tokens: int) -> bytes:
    """Request body for `/generate` of SGLang: L lists of D numbers."""
    sampling = {"max_new_tokens": max_new_tokens, "temperature": 0}
    return encode_json({"input_embeds": embeds.float().tolist(), "sampling_params": sampling})


FORMATS: dict[str, tuple[Callable[[Tensor, int], bytes], str]] = {
    "safetensors": (as_safetensors, ".safetensors"),
    "vllm": (as_vllm_request, ".json"),
    "sglang": (as_sglang_request, ".json"),
}
"""Format -> function of a prompt's embeddings and the maximum answer length that gives a file's bytes, and suffix."""


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
    index = JsonLines(output / INDEX)
    index.write([])
    failures: list[dict[str, str]] = []
    for number, question in enumerate(tqdm(questions, unit="question", disable=None)):
        try:
            if question.request is None:
                raise ValueError(question.error)
            embeds, levels, num_visual_tokens = route_prompt(predictor, question.request, question.budget)
        except ValueError as error:
            failures.append({"id": question.id, "error": str(error)})
            continue
        file = output / f"{number:06d}{suffix}"
        file.write_bytes(serialize(embeds, max_new_tokens))
        facts = {
            "id": question.id,
            "file": file.name,
            "granularity": levels,
            "num_visual_tokens": num_visual_tokens,
            "num_prompt_tokens": len(embeds),
        }
        index.append([facts])
    write_errors(output / ERRORS, failures)
    return len(failures)
