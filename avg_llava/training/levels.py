"""Log-probabilities of a micro-batch's answers at several levels, from one encoding of the images.

Every sample at every level is a sequence; a sample without images is the same at all levels and is one sequence. On a
GPU, where variable-length attention costs no more than its sequences, and under ZeRO-3, where every call of a module
gathers its weights from all ranks, all sequences go through the language model as one packed row of tokens. Elsewhere
they are packed into several rows, none longer than the longest sequence, which are run one after another; the gradients
of a row are computed before the next row is run, so that the activations of only one row are in memory.

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
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration, ImageFeatures
from avg_llava.model.packing import pack
from avg_llava.model.splice import check_placeholders


class TextBatch(NamedTuple):
    """Texts of a micro-batch, right-padded, with one placeholder per image.

    Attributes:
        input_ids: (B, L).
        attention_mask: (B, L).
        labels: (B, L), -100 where not supervised.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class AnswerLogProbs:
    """Log-probabilities of the answers (the supervised tokens) of a micro-batch at several levels.

    Attributes:
        log_probs: (B, G) float32 sums over the answers' tokens.
        num_tokens: (B, G) int64 tokens of each answer, fewer where the maximal length truncates it.
    """

    log_probs: Tensor
    num_tokens: Tensor


def use_packed_attention(model: AvgLlavaForConditionalGeneration) -> None:
    """Sets the language model's attention to the one for packed rows, unless another one than SDPA was selected."""
    if model.model.language_model.config._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": PACKED})


def runs_levels_together(model: AvgLlavaForConditionalGeneration) -> bool:
    """True if all levels go through the language model as one row: on a GPU and under ZeRO-3."""
    is_sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # by ZeRO-3
    return is_sharded or model.device.type != "cpu"


def score_answers(model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: TextBatch) -> AnswerLogProbs:
    """Log-probabilities of the answers at all levels of the model."""
    return _score(model, features, texts, _pack_sequences(model, features, texts, model.config.granularities))


def total_log_prob(
    model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: TextBatch, levels: Sequence[int]
) -> tuple[Tensor, AnswerLogProbs]:
    """Sum of the answers' log-probabilities over samples and levels, to be differentiated once.

    Args:
        levels: G granularities, coarse to fine.

    Returns:
        A float32 scalar, and its terms (B, G) without gradients.
    """
    packing = _pack_sequences(model, features, texts, levels)
    if runs_levels_together(model) or not torch.is_grad_enabled():
        answers = _score(model, features, texts, packing)
        return answers.log_probs.sum(), AnswerLogProbs(answers.log_probs.detach(), answers.num_tokens)
    inputs = [tensor for tensor in (features.crops, *_language_parameters(model)) if tensor.requires_grad]
    total, log_probs, num_tokens = _RowByRow.apply(model, features, texts, packing, *inputs)
    return total, AnswerLogProbs(log_probs, num_tokens)


class _RowByRow(torch.autograd.Function):
    """`total_log_prob` row by row: the forward pass computes the gradients, the backward pass scales them.

    To the rest of autograd this is one operation with one gradient per parameter, as data parallelism and ZeRO-2
    require. Micro-batches of a single row take this path too: gradients must arrive in the same order on all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        model: AvgLlavaForConditionalGeneration,
        features: ImageFeatures,
        texts: TextBatch,
        packing: "_Packing",
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The total, and the answers' `log_probs` and `num_tokens`."""
        crops = features.crops.detach().requires_grad_(features.crops.requires_grad)
        leaves = [crops if tensor is features.crops else tensor for tensor in inputs]
        gradients: list[Tensor | None] = [None] * len(leaves)
        weights = packing.indices.flatten().bincount()  # (U,)
        answers = []
        for row in packing.rows:
            with torch.enable_grad():
                log_probs, num_tokens = _run(model, replace(features, crops=crops), texts, packing, row)
                total = (log_probs * weights[row]).sum()
            answers.append((log_probs.detach(), num_tokens))
            if total.requires_grad:
                found = torch.autograd.grad(total, leaves, allow_unused=True)
                for index, gradient in enumerate(found):
                    gradients[index] = _sum(gradients[index], gradient)
        ctx.gradients = gradients
        result = _by_level(packing, answers)
        ctx.mark_non_differentiable(result.log_probs, result.num_tokens)
        return result.log_probs.sum(), result.log_probs, result.num_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times that of the total; each is freed as soon as it is scaled."""
        scaled: list[Tensor | None] = []
        while ctx.gradients:
            gradient = ctx.gradients.pop()
            scaled.append(None if gradient is None else gradient * grad_total)
        return None, None, None, None, *reversed(scaled)


@dataclass(frozen=True)
class _Packing:
    """The sequences of a micro-batch and their distribution over rows.

    Attributes:
        sequences: (level, sample) of each of the U sequences.
        indices: (B, G) sequence of each sample at each level.
        rows: Sequences of each row, as indices.
    """

    levels: list[int]
    sequences: list[tuple[int, int]]
    indices: Tensor
    rows: list[list[int]]


def _pack_sequences(
    model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: TextBatch, levels: Sequence[int]
) -> _Packing:
    """The sequences of all samples at the given levels, in one row or several."""
    is_image = (texts.input_ids == model.config.image_token_id) & texts.attention_mask.bool()
    check_placeholders(is_image, len(features.image_sizes))
    num_texts = (texts.attention_mask.bool() & ~is_image).sum(dim=1).tolist()
    sizes = iter(features.image_sizes)
    sequences: list[tuple[int, int]] = []
    lengths, indices = [], []
    for sample, (num_images, num_text) in enumerate(zip(is_image.sum(dim=1).tolist(), num_texts, strict=True)):
        sample_sizes = [next(sizes) for _ in range(num_images)]
        indices.append([len(sequences) + (offset if sample_sizes else 0) for offset in range(len(levels))])
        for level in levels if sample_sizes else levels[-1:]:
            num_visual = sum(num_visual_tokens(size, level, model.config) for size in sample_sizes)
            sequences.append((level, sample))
            lengths.append(min(num_text + num_visual, model.config.max_sequence_length))
    rows = [list(range(len(lengths)))] if runs_levels_together(model) else _fill_rows(lengths)
    return _Packing(list(levels), sequences, torch.tensor(indices, device=texts.input_ids.device), rows)


def _fill_rows(lengths: list[int]) -> list[list[int]]:
    """Sequences of each row by first-fit decreasing, from their lengths in tokens; a row is as long as the longest."""
    rows: list[list[int]] = []
    room: list[int] = []
    for sequence in sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence]):
        row = next((row for row, left in enumerate(room) if left >= lengths[sequence]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[row].append(sequence)
        room[row] -= lengths[sequence]
    return rows


def _score(
    model: AvgLlavaForConditionalGeneration, features: ImageFeatures, texts: TextBatch, packing: _Packing
) -> AnswerLogProbs:
    return _by_level(packing, [_run(model, features, texts, packing, row) for row in packing.rows])


def _run(
    model: AvgLlavaForConditionalGeneration,
    features: ImageFeatures,
    texts: TextBatch,
    packing: _Packing,
    row: list[int],
) -> tuple[Tensor, Tensor]:
    """One pass of a row: sums of its sequences' supervised log-probabilities, and numbers of supervised tokens."""
    sequences = [packing.sequences[index] for index in row]
    levels = packing.levels
    if len(packing.rows) > 1:  # in a single row all levels are spliced, so that all ranks run the same modules
        levels = [level for level in levels if any(level == used for used, _ in sequences)]
    batches = []
    for level in levels:
        spliced = model.splice(features, *texts, granularity=level, padding_side="right")
        takes_part = torch.zeros_like(spliced.attention_mask)
        takes_part[[sample for used, sample in sequences if used == level]] = 1
        batches.append(replace(spliced, attention_mask=spliced.attention_mask * takes_part))
    packed = pack(batches)
    num_samples = len(texts.input_ids)
    indices = [levels.index(level) * num_samples + sample for level, sample in sequences]
    log_probs = model.token_log_probs(packed)
    num_tokens = packed.sums(torch.ones_like(log_probs, dtype=torch.long))
    return packed.sums(log_probs)[indices], num_tokens[indices]


def _by_level(packing: _Packing, rows: list[tuple[Tensor, Tensor]]) -> AnswerLogProbs:
    """(B, G) log-probabilities and numbers of tokens, from those of each row's sequences."""
    order = torch.tensor(
        [sequence for row in packing.rows for sequence in row], device=packing.indices.device
    ).argsort()
    log_probs, num_tokens = (torch.cat(values)[order][packing.indices] for values in zip(*rows, strict=True))
    return AnswerLogProbs(log_probs, num_tokens)


def _language_parameters(model: AvgLlavaForConditionalGeneration) -> Iterator[nn.Parameter]:
    """Parameters that the language model's pass may train, without duplicates where head and embeddings are tied."""
    parts = (model.model.language_model.parameters(), model.lm_head.parameters(), (model.model.image_newline,))
    yield from dict.fromkeys(parameter for part in parts for parameter in part)


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Sum of two gradients; not in place, because autograd may return one tensor as the gradient of two inputs."""
    if total is None or more is None:
        return more if total is None else total
    return total + more
