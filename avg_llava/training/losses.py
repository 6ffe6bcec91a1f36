"""The training losses: answer log-probability, ranking and cross-entropy of the router.

Pure functions of tensors: no model, no device logic, no I/O. Shapes: B samples, L positions, G granularity levels in
level order (coarse to fine).
"""

from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from avg_llava.model.splice import IGNORE_INDEX
from avg_llava.training.config import RankingVariant, Reduction


def answer_log_prob(log_probs: Tensor, num_tokens: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Log-probability of an answer, from the sum over its tokens.

    Args:
        log_probs: (...) sums over the answer's tokens.
        num_tokens: (...).
        reduction: `mean` over the tokens (the released code's feedback), or their `sum` (the paper's equation as
            written).

    Returns:
        (...); 0 where there are no tokens.
    """
    _check_choice("reduction", reduction, Reduction)
    return log_probs if reduction == "sum" else log_probs / num_tokens.clamp(min=1)


def num_supervised(labels: Tensor) -> Tensor:
    """(B,) supervised tokens in `labels` (B, L), without the first of a sequence, which nothing predicts."""
    return (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)


def ranking_loss(router_logits: Tensor, log_probs: Tensor, variant: RankingVariant = "paper") -> Tensor:
    """Ranking loss that aligns the router with the language model's feedback (RGLF; paper equations 5 and 6).

    The levels are ordered by `log_probs`, best first, equal ones coarse to fine. With s the log-softmax of the
    router's logits and l the log-probabilities in that order, a worse level j should score below a better level i by at
    least the difference of their log-probabilities:

    - `paper`: sum over all pairs i < j of max(0, s_j - s_i + (l_i - l_j)), then the mean over the batch.
    - `released`: sum over gaps d = 1 .. G-1 of the mean, over batch and pairs (i, i + d), of
      max(0, s_{i+d} - s_i + d (l_i - l_{i+d})): the margin grows with the gap, and every gap weighs the same.

    Args:
        router_logits: (B, G) in level order.
        log_probs: (B, G) in level order; no gradient flows into it.

    Returns:
        A scalar, float32 or wider. For an empty batch, 0 with a gradient to `router_logits`.
    """
    _check_choice("variant", variant, RankingVariant)
    _check_levels(router_logits, log_probs)
    scores, feedback = _best_first(router_logits, log_probs)
    batch_size, num_levels = scores.shape
    if batch_size == 0:
        return scores.sum()
    if variant == "paper":
        better, worse = torch.triu_indices(num_levels, num_levels, offset=1, device=scores.device)
        margins = feedback[:, better] - feedback[:, worse]  # (B, G (G - 1) / 2)
        return (scores[:, worse] - scores[:, better] + margins).clamp(min=0).sum(dim=1).mean()
    loss = scores.new_zeros(())
    for gap in range(1, num_levels):
        margins = gap * (feedback[:, :-gap] - feedback[:, gap:])  # (B, G - gap)
        loss = loss + (scores[:, gap:] - scores[:, :-gap] + margins).clamp(min=0).mean()
    return loss


def router_cross_entropy(router_logits: Tensor, log_probs: Tensor) -> Tensor:
    """Cross-entropy of the router's logits to the level of highest log-probability (paper equations 7 and 8).

    Args:
        router_logits: (B, G) in level order.
        log_probs: (B, G) in level order; among equal best levels the coarsest is the label.

    Returns:
        A scalar, float32 or wider. For an empty batch, 0 with a gradient to `router_logits`.
    """
    _check_levels(router_logits, log_probs)
    if router_logits.shape[0] == 0:
        return _at_least_float32(router_logits).sum()
    return F.cross_entropy(_at_least_float32(router_logits), best_level(log_probs))


def best_level(log_probs: Tensor) -> Tensor:
    """(B,) index of the level of highest log-probability in (B, G); the coarsest one among ties."""
    return log_probs.sort(dim=-1, descending=True, stable=True).indices[..., 0]


def settle_ties(log_probs: Tensor, tolerance: float) -> Tensor:
    """Raises every level within `tolerance` nats of the best to the best.

    Both router losses break ties in favour of the coarser level, so a tolerance makes the router choose coarse levels
    where the levels differ by noise only. Not part of the paper; a tolerance of 0 changes nothing.

    Args:
        log_probs: (B, G) in level order.
        tolerance: nats, at least 0.
    """
    if tolerance < 0:
        raise ValueError(f"the tie tolerance is a number of nats of at least 0, got {tolerance}")
    best = log_probs.amax(dim=-1, keepdim=True)
    return torch.where(log_probs >= best - tolerance, best, log_probs)


def _best_first(router_logits: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Router log-probabilities and feedback, both (B, G), with the levels ordered by the feedback, best first."""
    feedback, order = _at_least_float32(log_probs.detach()).sort(dim=-1, descending=True, stable=True)
    return _at_least_float32(router_logits).log_softmax(dim=-1).gather(-1, order), feedback


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_levels(router_logits: Tensor, log_probs: Tensor) -> None:
    if router_logits.dim() != 2 or router_logits.shape != log_probs.shape:
        raise ValueError(
            f"router_logits and log_probs must both be (B, G), got {tuple(router_logits.shape)} and "
            f"{tuple(log_probs.shape)}"
        )


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")
