"""Model and loss in one module, one class per objective, so that a sharded engine sees a single forward.

Under ZeRO every rank must run the same modules in the same order at every step. Hence a micro-batch without images
encodes one blank crop, whose tokens count with weight 0, and all levels go through the language model together.

Every supervised token of an optimizer step weighs the same, as does, for the router, every image; what the maximal
length cuts off counts as well, so that the weights are known before the first forward pass.

Shapes: B samples, L positions, N images of the batch (sample after sample), P crops, G levels coarse to fine.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.outputs import ImageFeatures
from avg_llava.model.packing import pack
from avg_llava.model.scaler import pool_tokens, spread_tokens
from avg_llava.model.splice import IGNORE_INDEX
from avg_llava.training.config import ObjectiveSettings
from avg_llava.training.levels import Answers, Texts, answers_by_level, total_log_prob, use_packed_attention
from avg_llava.training.losses import (
    answer_log_prob,
    best_level,
    num_supervised,
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
        num_items: Weight of the loss and the metrics: supervised tokens, or images that took part.
        chosen: (K,) number of the level that the router prefers for each of K images.
        owners: (K,) number of the sample that each of these images belongs to.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    num_items: int
    chosen: NotRequired[Tensor]
    owners: NotRequired[Tensor]


class Objective(nn.Module, ABC):
    """Common part: encodes a micro-batch once."""

    def __init__(self, model: AvgLlavaForConditionalGeneration, settings: ObjectiveSettings):
        super().__init__()
        self.model = model
        self.settings = settings
        use_packed_attention(model)

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
        return self.loss(self.encode(pixel_values, image_sizes), Texts(input_ids, attention_mask, labels))

    def encode(self, pixel_values: Tensor | None, image_sizes: Tensor | None) -> ImageFeatures:
        """One encoding of the images of a micro-batch; of a blank crop where it has none."""
        if pixel_values is None:
            return self.model.encode_blank_image()
        return self.model.encode_images(pixel_values, image_sizes)

    def num_items(self, input_ids: Tensor, labels: Tensor) -> int:
        """What a micro-batch weighs in its optimizer step: supervised tokens, before any is cut off; both (B, L)."""
        return int(num_supervised(labels).sum())

    def owners(self, texts: Texts) -> Tensor:
        """(N,) sample that each image belongs to."""
        is_image = (texts.input_ids == self.config.image_token_id) & texts.attention_mask.bool()
        return torch.nonzero(is_image)[:, 0]

    @abstractmethod
    def loss(self, features: ImageFeatures, texts: Texts) -> ObjectiveOutput:
        """The objective, of a micro-batch whose images are encoded."""


class InstructionObjective(Objective):
    """Stages 1 and 2: next-token loss on supervised tokens, images at the finest level."""

    def loss(self, features: ImageFeatures, texts: Texts) -> ObjectiveOutput:
        total, _ = total_log_prob(self.model, features, texts, self.config.granularities[-1:])
        num_items = self.num_items(texts.input_ids, texts.labels)
        return {"loss": -total / max(num_items, 1), "metrics": {}, "num_items": num_items}


class MultiGranularityObjective(Objective):
    """Stage 3: the mean, over the levels, of stage 2's loss, all from one encoding of the images (paper equation 3)."""

    def loss(self, features: ImageFeatures, texts: Texts) -> ObjectiveOutput:
        """The metrics are the loss of each level."""
        levels = self.config.granularities
        total, answers = total_log_prob(self.model, features, texts, levels)
        num_items = self.num_items(texts.input_ids, texts.labels)
        losses = -answers.log_probs.sum(dim=0) / answers.num_tokens.sum(dim=0).clamp(min=1)  # (G,)
        metrics = {f"loss_{level}": loss for level, loss in zip(levels, losses.unbind(), strict=True)}
        return {"loss": -total / (len(levels) * max(num_items, 1)), "metrics": metrics, "num_items": num_items}


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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        answer_log_probs: Tensor | None = None,
        num_answer_tokens: Tensor | None = None,
    ) -> ObjectiveOutput:
        """As of every objective, but from stored feedback where the batch brings it along.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L).
            labels: (B, L).
            pixel_values: (N, P, 3, S, S) or None.
            image_sizes: (N, 2) or None.
            answer_log_probs: (B, G) sums over the answers' tokens, or None.
            num_answer_tokens: (B,) how many these are, 0 for a sample that takes no part; or None.
        """
        features, texts = self.encode(pixel_values, image_sizes), Texts(input_ids, attention_mask, labels)
        if answer_log_probs is None or num_answer_tokens is None:
            return self.loss(features, texts)
        stored = Answers(answer_log_probs, num_answer_tokens[:, None].expand_as(answer_log_probs))
        return self.loss(features, texts, stored)

    def loss(self, features: ImageFeatures, texts: Texts, stored: Answers | None = None) -> ObjectiveOutput:
        """The loss, from `stored` feedback or from what the language model makes of the answers now."""
        with torch.no_grad():
            answers = stored or answers_by_level(self.model, features, texts)
            log_probs, comparable = self.feedback(answers)
        router_logits = self.model.route(features, *texts)  # (N, G), or (1, G) if blank
        # A blank crop's logits are selected by no index: they stay in the graph without a say in the loss.
        owners = self.owners(texts)  # (N,)
        items = torch.nonzero(comparable[owners])[:, 0]
        item_logits, item_log_probs = router_logits[items], log_probs[owners[items]]
        ranking = ranking_loss(item_logits, item_log_probs, self.settings.ranking)
        cross_entropy = router_cross_entropy(item_logits, item_log_probs)
        loss = self.settings.rank_loss_weight * ranking + self.settings.cross_entropy_weight * cross_entropy
        metrics = {"ranking_loss": ranking.detach(), "cross_entropy": cross_entropy.detach()}
        chosen = item_logits.argmax(dim=-1)  # (K,)
        if len(items) > 0:
            regret = item_log_probs.amax(dim=-1) - item_log_probs.gather(-1, chosen[:, None])[:, 0]  # (K,) nats
            metrics |= routing_metrics(item_logits.detach().float(), chosen, self.config.granularities)
            metrics["router_agreement"] = (chosen == best_level(item_log_probs)).float().mean()
            metrics["router_regret"] = regret.mean()
        return {
            "loss": loss,
            "metrics": metrics,
            "num_items": len(items),
            "chosen": chosen,
            "owners": owners[items],
        }

    def num_items(self, input_ids: Tensor, labels: Tensor) -> int:
        """The images of samples with supervised tokens; `loss` may find that some of these take no part."""
        num_images = (input_ids == self.config.image_token_id).sum(dim=1)
        return int(num_images[num_supervised(labels) > 0].sum())

    def feedback(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """What the router is to learn from the language model's answers under each level.

        Returns:
            Log-probabilities of the answers (B, G), and (B,) bool, True where they can be compared across levels.
        """
        num_tokens = answers.num_tokens
        comparable = (num_tokens > 0).all(dim=1) & (num_tokens == num_tokens[:, :1]).all(dim=1)
        log_probs = answer_log_prob(answers.log_probs, num_tokens, self.settings.feedback)
        return settle_ties(log_probs, self.settings.tie_tolerance), comparable


class GumbelObjective(Objective):
    """Stage 4 without feedback: stage 2's loss at a level that the router draws (paper, Table 4, e).

    The draw is a straight-through Gumbel-softmax: weights (G,) of an image's levels that are 0 and 1, with the gradient
    of a softmax. The language model sees the image's tokens at the level of weight 1. As in the released code, they
    stand for the sum of all levels' tokens, each times its weight, where the tokens of a shorter level are followed by
    zeros and those of a longer one are cut off: so the gradient of a weight is the product of its level's tokens with
    the loss's gradient at the tokens seen, token number by token number, wherever in the image these are.

    Supervised tokens of samples without images do not count. The metrics, of images, weigh as their micro-batch's
    tokens.
    """

    def loss(self, features: ImageFeatures, texts: Texts) -> ObjectiveOutput:
        """The loss at levels drawn now; its gradient reaches the router through the crops."""
        router_logits = self.model.route(features, *texts)  # (N, G), or (1, G) if blank
        weights = F.gumbel_softmax(router_logits.float(), tau=self.settings.temperature, hard=True)
        levels = [self.config.granularities[level] for level in weights.argmax(dim=-1).tolist()]
        labels = texts.labels.masked_fill(~self._has_image(texts.input_ids)[:, None], IGNORE_INDEX)
        spliced = self.model.splice(
            self._weighted(features, weights, levels), texts.input_ids, texts.attention_mask, labels, levels
        )
        num_items = self.num_items(texts.input_ids, texts.labels)
        total = self.model.token_log_probs(pack([spliced])).sum()
        output: ObjectiveOutput = {"loss": -total / max(num_items, 1), "metrics": {}, "num_items": num_items}
        if not features.is_blank:
            preferred = router_logits.argmax(dim=-1)
            output["metrics"] = routing_metrics(router_logits.detach().float(), preferred, self.config.granularities)
            output |= {"chosen": preferred, "owners": self.owners(texts)}
        return output

    def num_items(self, input_ids: Tensor, labels: Tensor) -> int:
        """Supervised tokens of samples with images."""
        return int(num_supervised(labels)[self._has_image(input_ids)].sum())

    def _has_image(self, input_ids: Tensor) -> Tensor:
        """(B,) bool."""
        return (input_ids == self.config.image_token_id).any(dim=1)

    def _weighted(self, features: ImageFeatures, weights: Tensor, levels: list[int]) -> ImageFeatures:
        """The same features, connected to the weights (N, G) of their levels.

        To the finest tokens something is added that is 0, and whose pooling to the drawn level has the gradient of the
        sum described above. The level of weight 1 is that sum's value, so only the weights' gradients are needed.
        """
        side = self.config.num_patches_per_side
        connected = []
        zeros = weights - weights.detach()
        counts = features.num_crops or [len(features.crops)]
        for crops, image_zeros, drawn in zip(
            features.crops.split(counts), zeros.to(features.crops), levels, strict=True
        ):
            total = crops.new_zeros(len(crops), drawn, crops.shape[-1])
            for zero, level in zip(image_zeros, self.config.granularities, strict=True):
                tokens = pool_tokens(crops, side, level)[:, :drawn]
                total = total + F.pad(zero * tokens, (0, 0, 0, drawn - tokens.shape[1]))
            connected.append(crops + spread_tokens(total, side))
        return replace(features, crops=torch.cat(connected))


def routing_metrics(router_logits: Tensor, preferred: Tensor, granularities: list[int]) -> dict[str, Tensor]:
    """Entropy of a router's (K, G) logits, and how often each level is the preferred one, of (K,) numbers."""
    log_shares = router_logits.log_softmax(dim=-1)
    metrics = {"router_entropy": -(log_shares.exp() * log_shares).sum(dim=-1).mean()}
    for level, granularity in enumerate(granularities):
        metrics[f"share_{granularity}"] = (preferred == level).float().mean()
    return metrics


OBJECTIVES: dict[ObjectiveName, type[Objective]] = {
    "instruction": InstructionObjective,
    "multi_granularity": MultiGranularityObjective,
    "router": RouterObjective,
    "gumbel": GumbelObjective,
}
