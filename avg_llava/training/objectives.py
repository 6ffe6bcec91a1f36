"""Model and loss in one module, one class per objective, so that a sharded engine sees a single forward.

Under ZeRO every rank must run the same modules in the same order at every step. Hence a micro-batch without images
encodes one blank crop, whose tokens count with weight 0, and levels are run one after another in a fixed order.

Shapes: B samples, L positions, N images of the batch (sample after sample), P crops, G levels coarse to fine.
"""

from abc import ABC, abstractmethod
from typing import TypedDict

import torch
from torch import Tensor, nn

from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.outputs import ImageFeatures
from avg_llava.model.splice import SplicedInputs
from avg_llava.training.config import ObjectiveSettings
from avg_llava.training.losses import (
    IGNORE_INDEX,
    answer_log_prob,
    best_level,
    next_token_loss,
    ranking_loss,
    router_cross_entropy,
    settle_ties,
)
from avg_llava.training.stages import ObjectiveName


class ObjectiveOutput(TypedDict):
    """What one forward pass of an objective gives: a dict, because ZeRO-3 looks for the tensors of a module's output.

    Attributes:
        loss: Scalar to differentiate; the mean over the micro-batch's supervised tokens (or, for the router, images).
        metrics: Scalars for the log, each a mean over `num_items`.
        num_items: Weight of the metrics: supervised tokens, or images that took part.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    num_items: int


class Objective(nn.Module, ABC):
    """Common part: encodes a micro-batch once, and runs the language model at a level."""

    def __init__(self, model: AvgLlavaForConditionalGeneration, settings: ObjectiveSettings):
        super().__init__()
        self.model = model
        self.settings = settings

    @property
    def config(self) -> AvgLlavaConfig:
        """The model's configuration: DeepSpeed's and the trackers' integrations look for it here."""
        return self.model.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Loss of one micro-batch.

        Args:
            input_ids: (B, L) with one placeholder per image.
            attention_mask: (B, L).
            labels: (B, L), -100 where not supervised.
            pixel_values: (N, P, 3, S, S), or None for a micro-batch without images.
            image_sizes: (N, 2) as (height, width), or None.
        """
        if pixel_values is None:
            features = self.model.encode_blank_image()
        else:
            features = self.model.encode_images(pixel_values, image_sizes)
        return self.loss(features, input_ids, attention_mask, labels)

    @abstractmethod
    def loss(
        self, features: ImageFeatures, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> ObjectiveOutput:
        """The objective, of a micro-batch whose images are encoded; arguments as in `forward`."""

    def run_level(
        self, features: ImageFeatures, granularity: int, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, SplicedInputs, Tensor]:
        """Logits (B, L', V), spliced inputs and their labels (B, L') with every image at one level."""
        levels = [granularity] * len(features.num_crops)
        spliced = self.model.splice(features, input_ids, attention_mask, labels, levels, padding_side="right")
        assert spliced.labels is not None
        return self.model.language_logits(spliced), spliced, spliced.labels


class InstructionObjective(Objective):
    """Stages 1 and 2: next-token loss on supervised tokens, images at the finest level."""

    def loss(
        self, features: ImageFeatures, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> ObjectiveOutput:
        finest = self.config.granularities[-1]
        logits, _, spliced_labels = self.run_level(features, finest, input_ids, attention_mask, labels)
        return {
            "loss": next_token_loss(logits, spliced_labels),
            "metrics": {},
            "num_items": _num_supervised(spliced_labels),
        }


class MultiGranularityObjective(Objective):
    """Stage 3: the mean, over the levels, of stage 2's loss, all from one encoding of the images (paper equation 3)."""

    def loss(
        self, features: ImageFeatures, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> ObjectiveOutput:
        """The metrics are the loss of each level."""
        losses = {}
        for granularity in self.config.granularities:
            logits, _, spliced_labels = self.run_level(features, granularity, input_ids, attention_mask, labels)
            losses[granularity] = next_token_loss(logits, spliced_labels)
        metrics = {f"loss_{granularity}": loss.detach() for granularity, loss in losses.items()}
        loss = torch.stack(list(losses.values())).mean()
        return {"loss": loss, "metrics": metrics, "num_items": _num_supervised(labels)}


class RouterObjective(Objective):
    """Stage 4: the router learns from the frozen language model's feedback (RGLF; paper equations 4 to 9).

    Every image is one item. Its feedback is its sample's: the log-probability of the sample's answer with all of the
    sample's images at a level. Samples without images take no part; nor do samples whose supervised tokens are none, or
    are cut off by the maximal length at some level, because log-probabilities of different tokens cannot be compared.
    """

    def train(self, mode: bool = True) -> "RouterObjective":
        """Training mode for the router only, so that the feedback is a function of the sample."""
        super().train(mode)
        self.model.eval()
        self.model.model.router.train(mode)
        return self

    def loss(
        self, features: ImageFeatures, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> ObjectiveOutput:
        with torch.no_grad():
            log_probs, comparable = self.feedback(features, input_ids, attention_mask, labels)
        router_logits = self.model.route(features, input_ids, attention_mask, labels)  # (N, G), or (1, G) if blank
        # A blank crop's logits are selected by no index: they stay in the graph without a say in the loss.
        owners = self._owners(input_ids, attention_mask)  # (N,)
        items = torch.nonzero(comparable[owners])[:, 0]
        item_logits, item_log_probs = router_logits[items], log_probs[owners[items]]
        ranking = ranking_loss(item_logits, item_log_probs, self.settings.ranking)
        cross_entropy = router_cross_entropy(item_logits, item_log_probs)
        loss = self.settings.rank_loss_weight * ranking + self.settings.cross_entropy_weight * cross_entropy
        metrics = {"ranking_loss": ranking.detach(), "cross_entropy": cross_entropy.detach()}
        if len(items) > 0:
            metrics |= self._routing_metrics(item_logits.detach().float(), item_log_probs)
        return {"loss": loss, "metrics": metrics, "num_items": len(items)}

    def feedback(
        self, features: ImageFeatures, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the language model makes of each level.

        Returns:
            Log-probabilities of the answers (B, G), and (B,) bool, True where they can be compared across levels.
        """
        log_probs, counts = [], []
        for granularity in self.config.granularities:
            logits, _, spliced_labels = self.run_level(features, granularity, input_ids, attention_mask, labels)
            log_probs.append(answer_log_prob(logits, spliced_labels, self.settings.feedback))
            counts.append((spliced_labels[:, 1:] != IGNORE_INDEX).sum(dim=1))
        num_supervised = torch.stack(counts, dim=1)  # (B, G)
        comparable = (num_supervised > 0).all(dim=1) & (num_supervised == num_supervised[:, :1]).all(dim=1)
        return settle_ties(torch.stack(log_probs, dim=1), self.settings.tie_tolerance), comparable

    def _owners(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(N,) sample that each image belongs to."""
        is_image = (input_ids == self.config.image_token_id) & attention_mask.bool()
        return torch.nonzero(is_image)[:, 0]

    def _routing_metrics(self, logits: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
        """Entropy, agreement with the feedback, and how often each level is chosen; of (K, G) logits and feedback."""
        log_shares = logits.log_softmax(dim=-1)
        chosen = logits.argmax(dim=-1)
        metrics = {
            "router_entropy": -(log_shares.exp() * log_shares).sum(dim=-1).mean(),
            "router_agreement": (chosen == best_level(log_probs)).float().mean(),
        }
        for level, granularity in enumerate(self.config.granularities):
            metrics[f"share_{granularity}"] = (chosen == level).float().mean()
        return metrics


OBJECTIVES: dict[ObjectiveName, type[Objective]] = {
    "instruction": InstructionObjective,
    "multi_granularity": MultiGranularityObjective,
    "router": RouterObjective,
}


def _num_supervised(labels: Tensor) -> int:
    return int((labels[:, 1:] != IGNORE_INDEX).sum())
