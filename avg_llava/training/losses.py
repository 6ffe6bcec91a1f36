"""The training losses: next-token, answer log-probability, ranking and cross-entropy of the router.

Pure functions of tensors: no model, no device logic, no I/O. Shapes: B samples, L positions, V vocabulary,
G granularity levels in level order (coarse to fine).
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from avg_llava.model.splice import IGNORE_INDEX

RankingVariant = Literal["paper", "released"]
Reduction = Literal["mean", "sum"]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over every supervised token of a micro-batch.

    Args:
        logits: (B, L, V).
        labels: (B, L), `IGNORE_INDEX` where a token is not supervised; position i is predicted from i - 1.

    Returns:
        A float32 scalar. A micro-batch without any supervised token gives 0, still connected to `logits`, so that
        every rank of a sharded model runs the same backward pass.
    """
    token_losses, _ = _supervised_token_losses(logits, labels)
    return token_losses.sum() / max(token_losses.numel(), 1)


def answer_log_prob(logits: Tensor, labels: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Log-probability that the model gives to the supervised tokens of each sample.

    Args:
        logits: (B, L, V).
        labels: (B, L), `IGNORE_INDEX` where a token is not supervised; position i is predicted from i - 1.
        reduction: `mean` over the sample's supervised tokens (the released code's feedback), or their `sum` (the
            paper's equation as written).

    Returns:
        (B,) float32. A sample without supervised tokens has 0: see `supervised_samples` to leave it out.
    """
    _check_choice("reduction", reduction, Reduction)
    token_losses, rows = _supervised_token_losses(logits, labels)
    totals = token_losses.new_zeros(labels.shape[0]).index_add(0, rows, -token_losses)
    if reduction == "sum":
        return totals
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
    return totals / counts.clamp(min=1)


def supervised_samples(labels: Tensor) -> Tensor:
    """(B,) bool: which samples of `labels` (B, L) have at least one token that a loss can see after the shift."""
    return (labels[:, 1:] != IGNORE_INDEX).any(dim=1)


def ranking_loss(router_logits: Tensor, log_probs: Tensor, variant: RankingVariant = "paper") -> Tensor:
    """Ranking loss that aligns the router with the language model's feedback (RGLF; paper equations 5 and 6).

    The levels are ordered by `log_probs`, best first, equal ones coarse to fine. With s the log-softmax of the
    router's logits and l the log-probabilities in that order, a worse level j should stay below a better level i by
    at least what the language model makes of the difference:

    - `paper`: sum over all pairs i < j of max(0, s_j - s_i + (l_i - l_j)), then the mean over the batch.
    - `released`: sum over gaps d = 1 .. G-1 of the mean, over batch and pairs (i, i + d), of
      max(0, s_{i+d} - s_i + d (l_i - l_{i+d})): the margin grows with the gap, and every gap weighs the same.

    Args:
        router_logits: (B, G) in level order.
        log_probs: (B, G) in level order; no gradient flows into it.
        variant: which of the two forms.

    Returns:
        A scalar, float32 or wider. An empty batch gives 0, connected to `router_logits`.
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
        A scalar, float32 or wider. An empty batch gives 0, connected to `router_logits`.
    """
    _check_levels(router_logits, log_probs)
    if router_logits.shape[0] == 0:
        return _at_least_float32(router_logits).sum()
    return F.cross_entropy(_at_least_float32(router_logits), best_level(log_probs))


def best_level(log_probs: Tensor) -> Tensor:
    """(B,) index of the level of highest log-probability in (B, G); the coarsest of equal ones."""
    return log_probs.sort(dim=-1, descending=True, stable=True).indices[..., 0]


def settle_ties(log_probs: Tensor, tolerance: float) -> Tensor:
    """Count every level within `tolerance` nats of the best as equally good as the best.

    As both router losses settle equal levels in favour of the coarser one, this is what makes a router frugal where
    the levels differ by noise only. It is not part of the paper; a tolerance of 0 changes nothing.

    Args:
        log_probs: (B, G) in level order.
        tolerance: in nats, at least 0.
    """
    if tolerance < 0:
        raise ValueError(f"the tie tolerance is a number of nats of at least 0, got {tolerance}")
    best = log_probs.amax(dim=-1, keepdim=True)
    return torch.where(log_probs >= best - tolerance, best, log_probs)


def _supervised_token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every supervised token, and the sample that each belongs to: (K,) and (K,).

    Only the supervised positions are widened to float32: the answers are a small part of a sequence of thousands of
    visual tokens, and a float32 copy of all logits would be the largest tensor of a training step.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits (B, L, V) and labels (B, L) must share B and L, got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    targets = labels[:, 1:]
    rows, columns = torch.nonzero(targets != IGNORE_INDEX, as_tuple=True)
    selected = _at_least_float32(logits[rows, columns])  # (K, V)
    return F.cross_entropy(selected, targets[rows, columns], reduction="none"), rows


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
