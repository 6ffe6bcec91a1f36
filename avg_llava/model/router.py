"""Granularity router: looks at all levels of an image and at the instruction, and scores the levels.

Shapes: N images, C crops of all images (image after image), P crops of one image, G levels, T tokens of the finest
level, V tokens of all levels together, K text slots, M instruction tokens, D language-model width.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import initialization as init

from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.scaler import pool_tokens


def filter_text(text: Tensor, mask: Tensor, overview: Tensor, num_text_tokens: int) -> tuple[Tensor, Tensor]:
    """Keeps the instruction tokens that are most similar to the image.

    Similarity is the cosine between a token's input embedding and an overview token, averaged over the overview (as the
    released code does).

    Args:
        text: (N, M, D) input embeddings of each image's text.
        mask: (N, M) bool, True where the token belongs to the instruction.
        overview: (N, T, D) finest tokens of each overview crop.
        num_text_tokens: K.

    Returns:
        Indices (N, min(M, K)) into M, most similar first and instruction tokens before all others; and whether each
        belongs to the instruction (N, min(M, K)).
    """
    image = F.normalize(overview, dim=-1).mean(1)  # (N, D)
    similarity = (F.normalize(text, dim=-1) @ image[:, :, None])[..., 0]  # (N, M)
    order = similarity.masked_fill(~mask, -torch.inf).sort(descending=True).indices[:, :num_text_tokens]
    return order, mask.gather(1, order)


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


class GranularityRouter(nn.Module):
    """One Transformer layer over visual and text tokens, an MLP, and a voter over token positions.

    Parameter names are those of the released weights. `behavior` of the configuration decides what the Transformer
    layer attends over: "paper" the tokens of a crop, each brought to unit variance, absent text slots masked;
    "released" the crops of an image, one token position at a time, as they are, absent text slots being rows of zeros.
    (Word embeddings are tiny. As they are, attention begins uniform, and the instruction is learnt many times slower.)
    Both end in a LayerNorm over the G scores, which the paper does not mention and the released weights need.

    It computes in the type of its own weights, whatever that of the rest of the model is and under autocast too: it is
    trained in float32 beside a frozen model in half precision.
    """

    def __init__(self, config: AvgLlavaConfig):
        super().__init__()
        self.config = config
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

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming-normal MLP, PyTorch's defaults elsewhere, as the released training starts.

        The released voter starts normal, so half of the tokens vote against what the MLP says of them. The paper does
        not say; there all votes start equal, which learns faster.
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

    def forward(self, crops: Tensor, num_crops: list[int], text: Tensor, text_mask: Tensor) -> Tensor:
        """Scores the levels of each image; arguments and result as of :meth:`score`."""
        with torch.autocast(crops.device.type, enabled=False):
            return self.score(crops.to(self.voter.dtype), num_crops, text.to(self.voter.dtype), text_mask)

    def score(self, crops: Tensor, num_crops: list[int], text: Tensor, text_mask: Tensor) -> Tensor:
        """The scores, of inputs in the type of the weights.

        Args:
            crops: (C, T, D) finest tokens of all crops; the first crop of each image is its overview.
            num_crops: Crops of each image; they add up to C.
            text: (N, M, D) input embeddings of each image's text.
            text_mask: (N, M) bool, True at the instruction's tokens.

        Returns:
            (N, G) logits, levels coarse to fine.
        """
        side, counts = self.config.num_patches_per_side, torch.tensor(num_crops, device=crops.device)
        overview = crops[counts.cumsum(0) - counts]  # (N, T, D)
        slots, slot_mask = self._text_slots(overview, text, text_mask)  # (N, K, D), (N, K)
        levels = [pool_tokens(crops, side, granularity) for granularity in self.config.granularities]
        # With the output's size given, nobody waits for the GPU to say it.
        tokens = torch.cat([*levels, slots.repeat_interleave(counts, 0, output_size=len(crops))], 1)  # (C, V+K, D)
        if self.config.behavior == "released":
            merged = self._attend_across_crops(tokens, num_crops)
            votes = self.voter[:, 0].expand(len(tokens), -1)  # (C, V+K)
        else:
            absent = F.pad(~slot_mask, (tokens.shape[1] - slot_mask.shape[1], 0))
            absent = absent.repeat_interleave(counts, 0, output_size=len(crops))
            merged = self._merge(F.layer_norm(tokens, tokens.shape[-1:]), absent)
            votes = self.voter[:, 0].masked_fill(absent, 0)  # (C, V+K)
        # The votes are summed before the last linear layer, which then sees one row a crop instead of V+K.
        first, activation, last = cast(tuple[nn.Linear, nn.GELU, nn.Linear], tuple(self.router))
        summed = (votes[:, None] @ activation(first(merged)))[:, 0]  # (C, D)
        crop_logits = F.linear(summed, last.weight) + votes.sum(-1, keepdim=True) * last.bias  # (C, G)
        return self.norm(torch.stack([logits.mean(0) for logits in crop_logits.split(num_crops)]))

    def _text_slots(self, overview: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Filtered text (N, K, D), zero where there is none, and which slots hold a token of the instruction (N, K)."""
        num_slots = self.config.router_config.num_text_tokens
        order, valid = filter_text(text, text_mask, overview, num_slots)
        slots = text.gather(1, order[..., None].expand(-1, -1, text.shape[-1]))
        if self.config.behavior == "paper":
            slots = slots * valid[..., None]
        missing = num_slots - order.shape[1]
        return F.pad(slots, (0, 0, 0, missing)), F.pad(valid, (0, missing))

    def _merge(self, tokens: Tensor, absent: Tensor) -> Tensor:
        """The Transformer layer on sequences (B, L, D), of which `absent` (B, L) says what is not there.

        What `self.merger` computes; its own inference path writes the whole attention matrix where there is a mask.
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
        """The Transformer layer with the crops of an image as its sequence, at each token position by itself."""
        images = pad_sequence(list(tokens.split(num_crops)), batch_first=True)  # (N, P, V+K, D)
        num_images, most_crops, num_tokens, _ = images.shape
        counts = torch.tensor(num_crops, device=tokens.device)
        absent = torch.arange(most_crops, device=tokens.device) >= counts[:, None]  # (N, P)
        sequences = images.transpose(1, 2).flatten(0, 1)  # (N*(V+K), P, D)
        merged = self._merge(sequences, absent.repeat_interleave(num_tokens, 0))
        merged = merged.unflatten(0, (num_images, num_tokens)).transpose(1, 2)  # (N, P, V+K, D)
        return merged[~absent]  # (C, V+K, D)


__all__ = ["GranularityRouter", "filter_text", "level_values"]
