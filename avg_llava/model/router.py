"""Granularity router: scores the levels of each image from all its levels and the instruction.

Shapes: N images, C crops of all images (image after image), P crops of one image, G levels, T tokens of the finest
level, V tokens of all levels together, K text slots, M text tokens, D language-model width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig
from transformers import initialization as init

from avg_llava.common.registry import find_entry

FLOAT32 = 4  # bytes


class Router(nn.Module, ABC):
    """Scores the levels of each image; the model uses the level with the highest score.

    To add a router, subclass this class, implement :meth:`score`, :meth:`forward_flops` and :meth:`activation_bytes`,
    and add the subclass to :data:`ROUTERS`. A model has the router that `router_config.kind` of its configuration
    names. `docs/examples/extending/router.py` is a complete example.

    The parameters of a router are saved and loaded under `model.router.`, and stage 4 trains all of them. Two rules:
    scores of an image must not depend on the other images of the batch, and every parameter must take part in every
    call, because under ZeRO all processes run the same modules in the same order.

    Args:
        config: The model's `AvgLlavaConfig`. A router needs of it `granularities` (the G levels, coarse to fine),
            `ladder` (pools crops to a level), `text_config.hidden_size` (D), and `router_config` with the router's
            hyperparameters; fields that `RouterConfig` does not declare are kept as attributes.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights and of the computation."""
        return next(self.parameters()).dtype

    def forward(self, crops: Tensor, num_crops: list[int], text: Tensor, text_mask: Tensor) -> Tensor:
        """Scores the levels in the data type of the router's weights; arguments and result as of :meth:`score`.

        The rest of the model may have another type, and autocast is off: the router is trained in float32 beside a
        frozen model in half precision.
        """
        with torch.autocast(crops.device.type, enabled=False):
            return self.score(crops.to(self.dtype), num_crops, text.to(self.dtype), text_mask)

    @abstractmethod
    def score(self, crops: Tensor, num_crops: list[int], text: Tensor, text_mask: Tensor) -> Tensor:
        """Scores the levels of each image.

        Args:
            crops: (C, T, D) finest tokens of all crops; the first crop of each image is its overview.
            num_crops: Crops of each image; they add up to C.
            text: (N, M, D) input embeddings of each image's text; zero at image placeholders.
            text_mask: (N, M) bool, True at tokens of the instruction.

        Returns:
            (N, G) logits, levels coarse to fine.
        """

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises all weights; by default, every submodule as PyTorch does.

        Called for a router that no checkpoint holds. Override it for parameters that belong to no submodule, with the
        functions of `transformers.initialization`, which leave loaded weights as they are.
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()

    @classmethod
    def check_config(cls, config: PreTrainedConfig) -> None:
        """Raises ValueError for an `AvgLlavaConfig` that this router cannot be built for; by default, never."""

    @classmethod
    @abstractmethod
    def forward_flops(cls, num_crops: int, config: PreTrainedConfig) -> float:
        """Floating-point operations of the forward pass over `num_crops` crops, a multiply-add counting as two."""

    @classmethod
    @abstractmethod
    def activation_bytes(cls, num_crops: int, config: PreTrainedConfig) -> float:
        """Bytes that autograd keeps of the forward pass over `num_crops` crops when the router is trained (float32)."""


def filter_text(text: Tensor, mask: Tensor, overview: Tensor, num_text_tokens: int) -> tuple[Tensor, Tensor]:
    """Selects the instruction tokens that are most similar to the image.

    Similarity is the cosine between a token's input embedding and an overview token, averaged over the overview, as in
    the released code.

    Args:
        text: (N, M, D) input embeddings of each image's text.
        mask: (N, M) bool, True at tokens of the instruction.
        overview: (N, T, D) finest tokens of each overview crop.
        num_text_tokens: K.

    Returns:
        (N, min(M, K)) indices into M, instruction tokens before all others and the most similar first; and (N, min(M,
        K)) bool, True where the index is that of an instruction token.
    """
    image = F.normalize(overview, dim=-1).mean(1)  # (N, D)
    similarity = (F.normalize(text, dim=-1) @ image[:, :, None])[..., 0]  # (N, M)
    order = similarity.masked_fill(~mask, -torch.inf).sort(descending=True).indices[:, :num_text_tokens]
    return order, mask.gather(1, order)


class TransformerRouter(Router):
    """The paper's router: one Transformer layer over visual and text tokens, an MLP, and a voter over token positions.

    Parameter names are those of the released weights. The Transformer layer attends, with `behavior` "paper" of the
    configuration, over the tokens of a crop, each normalised to unit variance, absent text slots masked; with
    "released" over the crops of an image, one token position at a time, without normalisation, absent text slots being
    zero. (Word embeddings are much smaller than visual tokens. Without normalisation, attention is uniform at first,
    and the router learns to read the instruction many times slower.)
    Both end in a LayerNorm over the G scores, which the paper does not mention and the released weights need.

    Args:
        config: The model's `AvgLlavaConfig`.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        router, width = config.router_config, config.text_config.hidden_size
        num_levels = len(config.granularities)
        self.merger = nn.TransformerEncoderLayer(
            d_model=width,
            nhead=router.num_attention_heads,
            dim_feedforward=router.intermediate_size or width,
            dropout=router.dropout,
            batch_first=True,
        )
        self.router = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, num_levels))
        self.voter = nn.Parameter(torch.empty(sum(config.granularities) + router.num_text_tokens, 1))
        self.norm = nn.LayerNorm(num_levels)
        self.reset_parameters()

    @classmethod
    def check_config(cls, config: PreTrainedConfig) -> None:
        """Raises ValueError unless the number of attention heads divides the width."""
        width, heads = config.text_config.hidden_size, config.router_config.num_attention_heads
        if width % heads:
            raise ValueError(
                f"router_config.num_attention_heads {heads} does not divide the language model's width {width}"
            )

    @classmethod
    def forward_flops(cls, num_crops: int, config: PreTrainedConfig) -> float:
        """Operations of the Transformer layer and the MLP over the V+K tokens of each crop, as in behaviour "paper"."""
        router, width = config.router_config, config.text_config.hidden_size
        tokens = sum(config.granularities) + router.num_text_tokens
        feed_forward = 2 * width * (router.intermediate_size or width)
        per_token = 4 * width**2 + feed_forward + width**2 + width * len(config.granularities)
        return 2.0 * num_crops * (tokens * per_token + 2 * tokens**2 * width)

    @classmethod
    def activation_bytes(cls, num_crops: int, config: PreTrainedConfig) -> float:
        """Bytes that the Transformer layer and the MLP keep of the V+K tokens of each crop."""
        router, width = config.router_config, config.text_config.hidden_size
        tokens = num_crops * (sum(config.granularities) + router.num_text_tokens)
        inner = router.intermediate_size or width
        dropout_masks = (2 * width + inner) if router.dropout > 0 else 0
        return float(tokens * FLOAT32 * (12 * width + 2 * inner + dropout_masks))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises the MLP Kaiming-normal and all else as PyTorch does, as the released training starts.

        The voter starts normal in behaviour "released", so half of the tokens vote against the MLP's scores; in
        behaviour "paper", on which the paper says nothing, all votes start equal, which learns faster.
        """
        if self.config.behavior == "released":
            init.normal_(self.voter)
        else:
            init.constant_(self.voter, 1 / len(self.voter))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                init.uniform_(module.weight, -bound, bound)
                init.uniform_(module.bias, -bound, bound)
            elif isinstance(module, nn.LayerNorm):
                init.ones_(module.weight)
                init.zeros_(module.bias)
        for module in self.router:
            if isinstance(module, nn.Linear):
                init.kaiming_normal_(module.weight)
        attention = self.merger.self_attn
        init.xavier_uniform_(attention.in_proj_weight)
        init.zeros_(attention.in_proj_bias)
        init.zeros_(attention.out_proj.bias)

    def score(self, crops: Tensor, num_crops: list[int], text: Tensor, text_mask: Tensor) -> Tensor:
        """(N, G) logits; see :meth:`Router.score`."""
        counts = torch.tensor(num_crops, device=crops.device)
        overview = crops[counts.cumsum(0) - counts]  # (N, T, D)
        slots, slot_mask = self._text_slots(overview, text, text_mask)  # (N, K, D), (N, K)
        levels = [self.config.ladder.pool(crops, granularity) for granularity in self.config.granularities]
        # Without `output_size`, `repeat_interleave` would wait for the GPU to compute it.
        tokens = torch.cat([*levels, slots.repeat_interleave(counts, 0, output_size=len(crops))], 1)  # (C, V+K, D)
        if self.config.behavior == "released":
            merged = self._attend_across_crops(tokens, num_crops)
            votes = self.voter[:, 0].expand(len(tokens), -1)  # (C, V+K)
        else:
            absent = F.pad(~slot_mask, (tokens.shape[1] - slot_mask.shape[1], 0))
            absent = absent.repeat_interleave(counts, 0, output_size=len(crops))
            merged = self._merge(F.layer_norm(tokens, tokens.shape[-1:]), absent)
            votes = self.voter[:, 0].masked_fill(absent, 0)  # (C, V+K)
        # Linear layer and vote commute: summing the votes first leaves the last layer one row per crop instead of V+K.
        first, activation, last = cast(tuple[nn.Linear, nn.GELU, nn.Linear], tuple(self.router))
        summed = (votes[:, None] @ activation(first(merged)))[:, 0]  # (C, D)
        crop_logits = F.linear(summed, last.weight) + votes.sum(-1, keepdim=True) * last.bias  # (C, G)
        return self.norm(torch.stack([logits.mean(0) for logits in crop_logits.split(num_crops)]))

    def _text_slots(self, overview: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Filtered text (N, K, D), and (N, K) bool, True at slots that hold a token of the instruction."""
        num_slots = self.config.router_config.num_text_tokens
        order, valid = filter_text(text, text_mask, overview, num_slots)
        slots = text.gather(1, order[..., None].expand(-1, -1, text.shape[-1]))
        if self.config.behavior == "paper":
            slots = slots * valid[..., None]
        missing = num_slots - order.shape[1]
        return F.pad(slots, (0, 0, 0, missing)), F.pad(valid, (0, missing))

    def _merge(self, tokens: Tensor, absent: Tensor) -> Tensor:
        """Applies the Transformer layer to sequences (B, L, D); `absent` (B, L) is True at padding.

        Equals `self.merger(tokens, src_key_padding_mask=absent)`, which materialises the attention matrix under a mask.
        """
        layer, attention = self.merger, self.merger.self_attn
        states = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = states.unflatten(-1, (3, attention.num_heads, -1)).transpose(1, 3).unbind(2)
        dropout = attention.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, ~absent[:, None, None], dropout)
        attended = attention.out_proj(attended.transpose(1, 2).flatten(2))
        tokens = layer.norm1(tokens + layer.dropout1(attended))
        return layer.norm2(
            tokens + layer.dropout2(layer.linear2(layer.dropout(layer.activation(layer.linear1(tokens)))))
        )

    def _attend_across_crops(self, tokens: Tensor, num_crops: list[int]) -> Tensor:
        """Applies the Transformer layer to the crops of an image as a sequence, at each token position separately."""
        images = pad_sequence(list(tokens.split(num_crops)), batch_first=True)  # (N, P, V+K, D)
        num_images, most_crops, num_tokens, _ = images.shape
        counts = torch.tensor(num_crops, device=tokens.device)
        absent = torch.arange(most_crops, device=tokens.device) >= counts[:, None]  # (N, P)
        sequences = images.transpose(1, 2).flatten(0, 1)  # (N*(V+K), P, D)
        merged = self._merge(sequences, absent.repeat_interleave(num_tokens, 0))
        merged = merged.unflatten(0, (num_images, num_tokens)).transpose(1, 2)  # (N, P, V+K, D)
        return merged[~absent]  # (C, V+K, D)


ROUTERS: dict[str, type[Router]] = {"transformer": TransformerRouter}
"""Routers by name, the value of the configuration field `router_config.kind`."""


def find_router(config: PreTrainedConfig) -> type[Router]:
    """The class of the router that an `AvgLlavaConfig` asks for.

    Raises:
        ValueError: There is no router of that kind.
    """
    return find_entry(ROUTERS, config.router_config.kind, "router_config.kind")


def level_values(router_logits: Tensor, granularities: Sequence[int], token_cost: float | Tensor = 0.0) -> Tensor:
    """Value of each level: its log-probability minus the price of its tokens.

    Args:
        router_logits: (N, G).
        granularities: Visual tokens per crop of the G levels.
        token_cost: Nats per doubling of visual tokens; a number or (N,).

    Returns:
        (N, G) float32.
    """
    doublings = torch.tensor(granularities, device=router_logits.device).log2()
    price = torch.as_tensor(token_cost, device=router_logits.device, dtype=torch.float32).reshape(-1, 1)
    return router_logits.float().log_softmax(-1) - price * doublings
