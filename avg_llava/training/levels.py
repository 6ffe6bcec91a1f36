"""What the language model makes of a micro-batch's answers at every level, from one encoding of the images.

Every sample at every level is a sequence; one without images is the same at all levels and is one sequence. Where
attention over sequences of different lengths costs no more than its parts (a GPU), and where every call of a module
gathers its weights from all ranks (ZeRO-3), all sequences go through the language model as one packed row of tokens.
Elsewhere they are packed into several rows, none longer than the longest sequence, which go one after another; a row's
gradients are then taken before the next row begins, so that the activations of one row are in memory.

Shapes: B samples, L positions, G levels coarse to fine, U sequences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.attention import PACKED
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.outputs import ImageFeatures
from avg_llava.model.packing import pack
from avg_llava.model.splice import check_placeholders


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


def answers_by_level(model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: Texts) -> Answers:
    """The answers under every level of the model."""
    return _answers(model, features, texts, _plan(model, features, texts, model.config.granularities))


def total_log_prob(
    model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: Texts, levels: Sequence[int]
) -> tuple[Tensor, Answers]:
    """The sum over samples and levels of the answers' log-probabilities, to be differentiated once.

    Returns:
        A float32 scalar, and the answers it is the sum of, without gradients; its levels are those given.
    """
    plan = _plan(model, features, texts, levels)
    if runs_levels_together(model) or not torch.is_grad_enabled():
        answers = _answers(model, features, texts, plan)
        return answers.log_probs.sum(), Answers(answers.log_probs.detach(), answers.num_tokens)
    inputs = [tensor for tensor in (features.crops, *_language_parameters(model)) if tensor.requires_grad]
    total, log_probs, num_tokens = _RowByRow.apply(model, features, texts, plan, *inputs)
    return total, Answers(log_probs, num_tokens)


class _RowByRow(torch.autograd.Function):
    """`total_log_prob` of one row after another: the forward pass takes the gradients, the backward pass scales them.

    For the world outside it is one operation with one gradient for every parameter, so that what counts on that (data
    parallelism, ZeRO-2) works as ever. Micro-batches of a single row are no exception: on all ranks gradients must come
    in the same order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        model: AvgLlavaForConditionalGeneration,
        features: ImageFeatures,
        texts: Texts,
        plan: "_Plan",
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The total, and the answers' `log_probs` and `num_tokens`."""
        crops = features.crops.detach().requires_grad_(features.crops.requires_grad)
        leaves = [crops if tensor is features.crops else tensor for tensor in inputs]
        gradients: list[Tensor | None] = [None] * len(leaves)
        weights = plan.places.flatten().bincount()  # (U,)
        answers = []
        for row in plan.rows:
            with torch.enable_grad():
                log_probs, num_tokens = _run(model, replace(features, crops=crops), texts, plan, row)
                total = (log_probs * weights[row]).sum()
            answers.append((log_probs.detach(), num_tokens))
            if total.requires_grad:
                found = torch.autograd.grad(total, leaves, allow_unused=True)
                for place, gradient in enumerate(found):
                    gradients[place] = _sum(gradients[place], gradient)
        ctx.gradients = gradients
        result = _by_level(plan, answers)
        ctx.mark_non_differentiable(result.log_probs, result.num_tokens)
        return result.log_probs.sum(), result.log_probs, result.num_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients taken, times that of the total; each is let go as soon as it is scaled."""
        scaled: list[Tensor | None] = []
        while ctx.gradients:
            gradient = ctx.gradients.pop()
            scaled.append(None if gradient is None else gradient * grad_total)
        return None, None, None, None, *reversed(scaled)


@dataclass(frozen=True)
class _Plan:
    """The sequences of a micro-batch, and which go together.

    Attributes:
        levels: the G levels.
        sequences: U pairs of a level and a sample.
        places: (B, G) number of the sequence that each sample is at each level.
        rows: the sequences of each row, by number.
    """

    levels: list[int]
    sequences: list[tuple[int, int]]
    places: Tensor
    rows: list[list[int]]


def _plan(
    model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: Texts, levels: Sequence[int]
) -> _Plan:
    """The sequences of every sample at the given levels, in one row or several."""
    is_image = (texts.input_ids == model.config.image_token_id) & texts.attention_mask.bool()
    check_placeholders(is_image, len(features.image_sizes))
    num_texts = (texts.attention_mask.bool() & ~is_image).sum(dim=1).tolist()
    sizes = iter(features.image_sizes)
    sequences: list[tuple[int, int]] = []
    lengths, places = [], []
    for sample, (num_images, num_text) in enumerate(zip(is_image.sum(dim=1).tolist(), num_texts, strict=True)):
        own_sizes = [next(sizes) for _ in range(num_images)]
        places.append([len(sequences) + (place if own_sizes else 0) for place in range(len(levels))])
        for level in levels if own_sizes else levels[-1:]:
            num_visual = sum(num_visual_tokens(size, level, model.config) for size in own_sizes)
            sequences.append((level, sample))
            lengths.append(min(num_text + num_visual, model.config.max_sequence_length))
    rows = [list(range(len(lengths)))] if runs_levels_together(model) else _fill_rows(lengths)
    return _Plan(list(levels), sequences, torch.tensor(places, device=texts.input_ids.device), rows)


def _fill_rows(lengths: list[int]) -> list[list[int]]:
    """Numbers of sequences in rows as long as the longest: longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = next((place for place, left in enumerate(room) if left >= lengths[number]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[place].append(number)
        room[place] -= lengths[number]
    return rows


def _answers(model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: Texts, plan: _Plan) -> Answers:
    return _by_level(plan, [_run(model, features, texts, plan, row) for row in plan.rows])


def _run(
    model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: Texts, plan: _Plan, row: list[int]
) -> tuple[Tensor, Tensor]:
    """One pass of a row's sequences: the log-probabilities of their answers, and the number of tokens of these."""
    sequences = [plan.sequences[number] for number in row]
    levels = plan.levels
    if len(plan.rows) > 1:  # in a single row all levels are spliced, so that all ranks run the same modules
        levels = [level for level in levels if any(level == own for own, _ in sequences)]
    batches = []
    for level in levels:
        spliced = model.splice(features, *texts, granularity=level, padding_side="right")
        takes_part = torch.zeros_like(spliced.attention_mask)
        takes_part[[sample for own, sample in sequences if own == level]] = 1
        batches.append(replace(spliced, attention_mask=spliced.attention_mask * takes_part))
    packed = pack(batches)
    num_samples = len(texts.input_ids)
    places = [levels.index(level) * num_samples + sample for level, sample in sequences]
    log_probs = model.token_log_probs(packed)
    num_tokens = packed.sums(torch.ones_like(log_probs, dtype=torch.long))
    return packed.sums(log_probs)[places], num_tokens[places]


def _by_level(plan: _Plan, rows: list[tuple[Tensor, Tensor]]) -> Answers:
    """(B, G) answers from those of each row's sequences."""
    back = torch.tensor([number for row in plan.rows for number in row], device=plan.places.device).argsort()
    log_probs, num_tokens = (torch.cat(values)[back][plan.places] for values in zip(*rows, strict=True))
    return Answers(log_probs, num_tokens)


def _language_parameters(model: AvgLlavaForConditionalGeneration) -> Iterator[nn.Parameter]:
    """What the language model's pass may train, each once also where the head is tied to the embeddings."""
    parts = (model.model.language_model.parameters(), model.lm_head.parameters(), (model.model.image_newline,))
    yield from dict.fromkeys(parameter for part in parts for parameter in part)


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Not in place: autograd may hand out one tensor as the gradient of two."""
    if total is None or more is None:
        return more if total is None else total
    return total + more
