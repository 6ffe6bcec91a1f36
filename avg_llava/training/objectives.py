"""Training objectives: model and loss in one module each, so that a sharded engine runs a single forward.

Under ZeRO-3 every rank must run the same modules in the same order at every step. Hence a micro-batch without images
encodes one blank crop, whose tokens have weight 0, and all levels go through the language model together.

Losses are means over the whole optimizer step: every supervised token (for the router: every image) has the same
weight. Tokens beyond the maximal length count too, so that the weights are known before the first forward pass.

Shapes: B samples, L positions, N images of the batch in order of samples, P crops per image, G levels coarse to fine, K
images that take part in the router's loss.
"""

import pkgutil
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration, ImageFeatures
from avg_llava.model.packing import pack
from avg_llava.model.splice import IGNORE_INDEX
from avg_llava.training.config import ObjectiveSettings
from avg_llava.training.levels import AnswerLogProbs, TextBatch, score_answers, total_log_prob, use_packed_attention
from avg_llava.training.losses import (
    answer_log_prob,
    best_level,
    num_supervised,
    ranking_loss,
    router_cross_entropy,
    settle_ties,
)
from avg_llava.training.stages import OBJECTIVES


class ObjectiveOutput(TypedDict):
    """Output of an objective; a dict, because ZeRO-3 searches a module's output for tensors.

    Attributes:
        loss: Scalar to differentiate: mean over the micro-batch's `num_items`.
        metrics: Scalars for the log, each a mean over `num_items`.
        num_items: Weight of loss and metrics: supervised tokens, or images that take part.
        chosen: (K,) index of the router's preferred level for each image.
        owners: (K,) index of each image's sample.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    num_items: int
    chosen: NotRequired[Tensor]
    owners: NotRequired[Tensor]


class Objective(nn.Module, ABC):
    """Base class: encodes the images of a micro-batch once, then calls `loss`."""

    def __init__(self, model: AvgLlavaForConditionalGeneration, settings: ObjectiveSettings):
        super().__init__()
        self.model = model
        self.settings = settings
        use_packed_attention(model)

    @property
    def config(self) -> AvgLlavaConfig:
        """The model's configuration; integrations of DeepSpeed and trackers read it here."""
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
        return self.loss(self.encode(pixel_values, image_sizes), TextBatch(input_ids, attention_mask, labels))

    def encode(self, pixel_values: Tensor | None, image_sizes: Tensor | None) -> ImageFeatures:
        """Features of the micro-batch's images, or of a blank crop if there are none."""
        if pixel_values is None:
            return self.model.encode_blank_image()
        return self.model.encode_images(pixel_values, image_sizes)

    def num_items(self, input_ids: Tensor, labels: Tensor) -> int:
        """Weight of a micro-batch in its optimizer step: supervised tokens before truncation; both are (B, L)."""
        return int(num_supervised(labels).sum())

    def owners(self, texts: TextBatch) -> Tensor:
        """(N,) index of each image's sample."""
        is_image = (texts.input_ids == self.config.image_token_id) & texts.attention_mask.bool()
        return torch.nonzero(is_image)[:, 0]

    @abstractmethod
    def loss(self, features: ImageFeatures, texts: TextBatch) -> ObjectiveOutput:
        """Loss of a micro-batch from its encoded images and its texts."""


class InstructionObjective(Objective):
    """Stages 1 and 2: next-token loss on supervised tokens, images at the finest level."""

    def loss(self, features: ImageFeatures, texts: TextBatch) -> ObjectiveOutput:
        total, _ = total_log_prob(self.model, features, texts, self.config.granularities[-1:])
        num_items = self.num_items(texts.input_ids, texts.labels)
        return {"loss": -total / max(num_items, 1), "metrics": {}, "num_items": num_items}


class MultiGranularityObjective(Objective):
    """Stage 3: mean of stage 2's loss over the levels, from one encoding of the images (paper equation 3)."""

    def loss(self, features: ImageFeatures, texts: TextBatch) -> ObjectiveOutput:
        """The metrics are the losses of the levels."""
        levels = self.config.granularities
        total, answers = total_log_prob(self.model, features, texts, levels)
        num_items = self.num_items(texts.input_ids, texts.labels)
        losses = -answers.log_probs.sum(dim=0) / answers.num_tokens.sum(dim=0).clamp(min=1)  # (G,)
        metrics = {f"loss_{level}": loss for level, loss in zip(levels, losses.unbind(), strict=True)}
        return {"loss": -total / (len(levels) * max(num_items, 1)), "metrics": metrics, "num_items": num_items}


class RouterObjective(Objective):
    """Stage 4: the router learns from the frozen language model's feedback (RGLF; paper equations 4 to 9).

    Every image is one item. Its feedback is that of its sample: the log-probability of the answer with all images of
    the sample at one level. Samples without images, without supervised tokens, or whose supervised tokens are truncated
    at some level take no part: log-probabilities of different tokens cannot be compared.
    """

    def train(self, mode: bool = True) -> "RouterObjective":
        """Sets training mode for the router only, so that the feedback is a function of the sample."""
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
        """Loss of one micro-batch, from stored feedback if the batch has any.

        Args:
            answer_log_probs: (B, G) sums over the answers' tokens.
            num_answer_tokens: (B,) tokens of each answer, 0 for a sample that takes no part.
        """
        features, texts = self.encode(pixel_values, image_sizes), TextBatch(input_ids, attention_mask, labels)
        if answer_log_probs is None or num_answer_tokens is None:
            return self.loss(features, texts)
        stored = AnswerLogProbs(answer_log_probs, num_answer_tokens[:, None].expand_as(answer_log_probs))
        return self.loss(features, texts, stored)

    def loss(self, features: ImageFeatures, texts: TextBatch, stored: AnswerLogProbs | None = None) -> ObjectiveOutput:
        """Ranking and cross-entropy loss, from `stored` feedback or from feedback computed now."""
        with torch.no_grad():
            answers = stored or score_answers(self.model, features, texts)
            log_probs, comparable = self.feedback(answers)
        router_logits = self.model.route(features, *texts)  # (N, G), or (1, G) if blank
        # No index selects the logits of a blank crop: they stay in the graph with weight 0.
        owners = self.owners(texts)  # (N,)
        items = torch.nonzero(comparable[owners])[:, 0]  # (K,)
        item_logits, item_log_probs = router_logits[items], log_probs[owners[items]]  # (K, G)
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
        return {"loss": loss, "metrics": metrics, "num_items": len(items), "chosen": chosen, "owners": owners[items]}

    def num_items(self, input_ids: Tensor, labels: Tensor) -> int:
        """Images of samples with supervised tokens; `loss` may exclude some of them."""
        num_images = (input_ids == self.config.image_token_id).sum(dim=1)
        return int(num_images[num_supervised(labels) > 0].sum())

    def feedback(self, answers: AnswerLogProbs) -> tuple[Tensor, Tensor]:
        """The router's targets (B, G), and (B,) bool, True where they can be compared across levels."""
        num_tokens = answers.num_tokens
        comparable = (num_tokens > 0).all(dim=1) & (num_tokens == num_tokens[:, :1]).all(dim=1)
        log_probs = answer_log_prob(answers.log_probs, num_tokens, self.settings.feedback)
        return settle_ties(log_probs, self.settings.tie_tolerance), comparable


class GumbelObjective(Objective):
    """Stage 4 without feedback: stage 2's loss at a level sampled by the router (paper, Table 4, row e).

    The level is sampled by a straight-through Gumbel-softmax: one-hot weights (G,) of an image's levels, with the
    gradient of a softmax. The language model reads the tokens of the level with weight 1. As in the released code, they
    stand for the sum of all levels' tokens times their weights, where shorter levels are padded with zeros and longer
    ones truncated. The gradient of a weight is therefore the product of its level's tokens with the loss's gradient at
    the input tokens, index by index, regardless of their positions in the image.

    Supervised tokens of samples without images do not count. The metrics, which are means over images, have the weight
    of the micro-batch's tokens.
    """

    def loss(self, features: ImageFeatures, texts: TextBatch) -> ObjectiveOutput:
        """Loss at newly sampled levels; its gradient reaches the router through the crops."""
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
        """The same features, connected in the graph to the weights (N, G) of their levels.

        Adds zeros to the finest tokens whose pooling to the sampled level has the gradient of the weighted sum in the
        class's docstring. The value of that sum is the sampled level itself, so only its gradient has to be added.
        """
        ladder = self.config.ladder
        connected = []
        zeros = weights - weights.detach()
        counts = features.num_crops or [len(features.crops)]
        for crops, image_zeros, sampled in zip(
            features.crops.split(counts), zeros.to(features.crops), levels, strict=True
        ):
            total = crops.new_zeros(len(crops), sampled, crops.shape[-1])
            for zero, level in zip(image_zeros, self.config.granularities, strict=True):
                tokens = ladder.pool(crops, level)[:, :sampled]
                total = total + F.pad(zero * tokens, (0, 0, 0, sampled - tokens.shape[1]))
            connected.append(crops + ladder.spread(total))
        return replace(features, crops=torch.cat(connected))


def routing_metrics(router_logits: Tensor, preferred: Tensor, granularities: list[int]) -> dict[str, Tensor]:
    """Entropy of a router's logits (K, G) in nats, and the share of images for which each level is preferred (K,)."""
    log_shares = router_logits.log_softmax(dim=-1)
    metrics = {"router_entropy": -(log_shares.exp() * log_shares).sum(dim=-1).mean()}
    for level, granularity in enumerate(granularities):
        metrics[f"share_{granularity}"] = (preferred == level).float().mean()
    return metrics


def objective_class(name: str) -> type[Objective]:
    """The class that implements an entry of `OBJECTIVES`."""
    implementation = OBJECTIVES[name].implementation
    if isinstance(implementation, str):
        implementation = pkgutil.resolve_name(implementation)
    assert isinstance(implementation, type), f"{name} names no class"
    assert issubclass(implementation, Objective), f"{name} is not an Objective"
    return implementation
