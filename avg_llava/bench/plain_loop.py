"""Reference losses as the released code computes them: one forward pass per level through the model's public forward.

Every level encodes the images again, pads all samples to the longest and computes the logits of every token. Training
does not use this loop: tests compare the objectives with it, and `avg-llava bench train` measures them against it.

Shapes: B samples, L positions, V vocabulary, G levels coarse to fine, N images.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.splice import IGNORE_INDEX
from avg_llava.training.config import ObjectiveSettings
from avg_llava.training.losses import answer_log_prob, ranking_loss, router_cross_entropy, settle_ties

Batch = dict[str, Any]


def plain_loss(
    objective: str, model: AvgLlavaForConditionalGeneration, batch: Batch, settings: ObjectiveSettings
) -> Tensor:
    """The scalar loss that the named objective returns for a micro-batch.

    Args:
        objective: "instruction", "multi_granularity" or "router".
        model: The model.
        batch: Arguments of `Objective.forward`. For the router every sample must have images and supervised tokens,
            none of them truncated.
        settings: Loss weights and variants.
    """
    levels = model.config.granularities
    if objective == "instruction":
        return _next_token_loss(model, batch, levels[-1])
    if objective == "multi_granularity":
        return torch.stack([_next_token_loss(model, batch, level) for level in levels]).mean()
    assert objective == "router", "sampled levels have no plain loop"
    return _router_loss(model, batch, settings)


def _next_token_loss(model: AvgLlavaForConditionalGeneration, batch: Batch, level: int) -> Tensor:
    output = model(**batch, granularity=level)
    log_probs, num_tokens = sums_over_logits(output.logits, output.labels)
    return -log_probs.sum() / num_tokens.sum()


def _router_loss(model: AvgLlavaForConditionalGeneration, batch: Batch, settings: ObjectiveSettings) -> Tensor:
    columns = []
    with torch.no_grad():
        for level in model.config.granularities:
            output = model(**batch, granularity=level)
            columns.append(answer_log_prob(*sums_over_logits(output.logits, output.labels), settings.feedback))
    log_probs = settle_ties(torch.stack(columns, dim=1), settings.tie_tolerance)  # (B, G)
    features = model.encode_images(batch["pixel_values"], batch["image_sizes"])
    router_logits = model.route(features, batch["input_ids"], batch["attention_mask"], batch["labels"])
    is_image = (batch["input_ids"] == model.config.image_token_id) & batch["attention_mask"].bool()
    log_probs = log_probs[torch.nonzero(is_image)[:, 0]]  # (N, G)
    ranking = ranking_loss(router_logits, log_probs, settings.ranking)
    cross_entropy = router_cross_entropy(router_logits, log_probs)
    return settings.rank_loss_weight * ranking + settings.cross_entropy_weight * cross_entropy


def sums_over_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities (B,) float32 of each sample's supervised tokens, and their number (B,).

    Args:
        logits: (B, L, V).
        labels: (B, L), `IGNORE_INDEX` where a token is not supervised; position i is predicted from i - 1.
    """
    targets = labels[:, 1:]
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = -F.cross_entropy(wide.transpose(1, 2), targets, reduction="none")  # (B, L - 1)
    is_supervised = targets != IGNORE_INDEX
    return (log_probs * is_supervised).sum(dim=1), is_supervised.sum(dim=1)
