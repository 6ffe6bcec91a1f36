"""What the language model makes of a micro-batch's answers at every level, from one encoding of the images.

Where attention over sequences of different lengths costs no more than its parts (a GPU), and where every call of a
module gathers its weights from all ranks (ZeRO-3), all levels go through the language model as one packed row of
tokens. Elsewhere they go one after another, the finest first; a level's gradients are then taken before the next level
begins, so that the activations of a single level are in memory. A sample without images is the same at every level
and goes once.

Shapes: B samples, L positions, G levels coarse to fine, K supervised tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from avg_llava.model.attention import PACKED
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.outputs import ImageFeatures
from avg_llava.model.packing import pack


class Texts(NamedTuple):
    """The prompts of a micro-batch, right-padded, with one placeholder per image.

    Attributes:
        input_ids: (B, L).
        attention_mask: (B, L).
        labels: (B, L), -100 where not supervised.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Answers:
    """The supervised tokens of every sample under some levels.

    Attributes:
        log_probs: (B, G) float32 sums of their log-probabilities.
        num_tokens: (B, G) int64, how many there are; fewer where the maximal length cuts a sample.
    """

    log_probs: Tensor
    num_tokens: Tensor


def use_packed_attention(model: AvgLlavaForConditionalGeneration) -> None:
    """Give the language model the attention for packed rows, unless one other than SDPA was asked for."""
    if model.model.language_model.config._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": PACKED})


def runs_levels_together(model: AvgLlavaForConditionalGeneration) -> bool:
    """Whether all levels go through the language model as one row (see the head of this module)."""
    is_sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # by ZeRO-3
    return is_sharded or model.device.type != "cpu"


def answers_at(
    model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: Texts, granularity: int
) -> Answers:
    """The answers with every image at one level; B columns of G = 1."""
    return _run(model, features, texts, [granularity], with_text=True)


def answers_by_level(model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: Texts) -> Answers:
    """The answers under every level of the model."""
    finest_first = model.config.granularities[::-1]
    if runs_levels_together(model):
        return _in_level_order(model, texts, [_run(model, features, texts, finest_first, with_text=True)])
    passes = [_run(model, features, texts, [level], with_text=level == finest_first[0]) for level in finest_first]
    return _in_level_order(model, texts, passes)


def total_log_prob(
    model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: Texts
) -> tuple[Tensor, Answers]:
    """The sum over samples and levels of the answers' log-probabilities, to be differentiated once.

    Returns:
        A float32 scalar, and the answers it is the sum of, without gradients.
    """
    if runs_levels_together(model) or not torch.is_grad_enabled():
        answers = answers_by_level(model, features, texts)
        return answers.log_probs.sum(), Answers(answers.log_probs.detach(), answers.num_tokens)
    inputs = [tensor for tensor in (features.crops, *_language_parameters(model)) if tensor.requires_grad]
    total, log_probs, num_tokens = _LevelByLevel.apply(model, features, texts, *inputs)
    return total, Answers(log_probs, num_tokens)


class _LevelByLevel(torch.autograd.Function):
    """`total_log_prob` of one level after another: the forward pass takes the gradients, the backward pass scales them.

    For the world outside it is one operation with one gradient for every parameter, so that what counts on that (data
    parallelism, ZeRO-2) works as ever.
    """

    @staticmethod
    def forward(
        ctx: Any, model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: Texts, *inputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The total, and the answers' `log_probs` and `num_tokens`."""
        crops = features.crops.detach().requires_grad_(features.crops.requires_grad)
        leaves = [crops if tensor is features.crops else tensor for tensor in inputs]
        gradients: list[Tensor | None] = [None] * len(leaves)
        num_levels = len(model.config.granularities)
        passes: list[Answers] = []
        for level in model.config.granularities[::-1]:
            with torch.enable_grad():
                answers = _run(model, replace(features, crops=crops), texts, [level], with_text=not passes)
                weights = torch.where(_has_image(model, texts), 1, 1 if passes else num_levels)
                total = (answers.log_probs[:, 0] * weights).sum()
            passes.append(Answers(answers.log_probs.detach(), answers.num_tokens))
            if total.requires_grad:
                found = torch.autograd.grad(total, leaves, allow_unused=True)
                for place, gradient in enumerate(found):
                    gradients[place] = _sum(gradients[place], gradient)
        ctx.gradients = gradients
        answers = _in_level_order(model, texts, passes)
        ctx.mark_non_differentiable(answers.log_probs, answers.num_tokens)
        return answers.log_probs.sum(), answers.log_probs, answers.num_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients taken, times that of the total; each is let go as soon as it is scaled."""
        scaled: list[Tensor | None] = []
        while ctx.gradients:
            gradient = ctx.gradients.pop()
            scaled.append(None if gradient is None else gradient * grad_total)
        return None, None, None, *reversed(scaled)


def _run(
    model: AvgLlavaForConditionalGeneration,
    features: ImageFeatures,
    texts: Texts,
    levels: list[int],
    with_text: bool,
) -> Answers:
    """One packed pass: the samples with images at every level, those without at the first one, if `with_text`.

    What is left out counts 0.
    """
    has_image = _has_image(model, texts)
    batches = []
    for place, level in enumerate(levels):
        spliced = model.splice(features, *texts, granularity=level, padding_side="right")
        if place > 0 or not with_text:
            spliced = replace(spliced, attention_mask=spliced.attention_mask * has_image[:, None])
        batches.append(spliced)
    packed = pack(batches)
    shape = (len(levels), len(texts.input_ids))
    if not any(packed.lengths):
        zeros = torch.zeros(shape, device=has_image.device).T
        return Answers(zeros, zeros.long())
    log_probs = model.token_log_probs(packed)
    num_tokens = packed.sums(torch.ones_like(log_probs, dtype=torch.long))
    return Answers(packed.sums(log_probs).view(shape).T, num_tokens.view(shape).T)


def _in_level_order(model: AvgLlavaForConditionalGeneration, texts: Texts, passes: list[Answers]) -> Answers:
    """Columns that come finest first as (B, G), coarse to fine; a sample without images counts alike in all."""
    has_image = _has_image(model, texts)[:, None]
    log_probs = torch.cat([each.log_probs for each in passes], dim=1)
    num_tokens = torch.cat([each.num_tokens for each in passes], dim=1)
    return Answers(
        torch.where(has_image, log_probs, log_probs[:, :1]).flip(1),
        torch.where(has_image, num_tokens, num_tokens[:, :1]).flip(1),
    )


def _has_image(model: AvgLlavaForConditionalGeneration, texts: Texts) -> Tensor:
    """(B,) bool."""
    is_image = (texts.input_ids == model.config.image_token_id) & texts.attention_mask.bool()
    return is_image.any(dim=1)


def _language_parameters(model: AvgLlavaForConditionalGeneration) -> Iterator[nn.Parameter]:
    """What the language model's pass may train, each once also where the head is tied to the embeddings."""
    parts = (model.model.language_model.parameters(), model.lm_head.parameters(), (model.model.image_newline,))
    yield from dict.fromkeys(parameter for part in parts for parameter in part)


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Not in place: autograd may hand out one tensor as the gradient of two."""
    if total is None or more is None:
        return more if total is None else total
    return total + more
