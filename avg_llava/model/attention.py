"""Attention over packed sequences, registered with transformers as `packed`.

A packed batch is one row with the tokens of several sequences one after another; each token attends to the earlier
tokens of its sequence. Nothing is computed for padding or for pairs of tokens of different sequences. A batch that is
not packed is passed to `sdpa`.

Shapes: H heads, T tokens of all sequences, S sequences, E width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row.

    On a GPU in half precision this is one call of PyTorch's variable-length kernel, elsewhere one SDPA per sequence.

    Args:
        module: The attention layer.
        query: (1, H, T, E) if packed.
        key: (1, H, T, E), or with fewer heads under grouped-query attention.
        value: As `key`.
        attention_mask: Mask from :func:`packed_mask`; None: causal attention.
        dropout: Dropout probability of the attention weights.
        scaling: Factor of the scores; None: 1 / sqrt(E).
        cu_seq_lens_q: (S + 1,) int32 cumulative lengths of the sequences, from 0; None: not packed.
        max_length_q: Tokens of the longest sequence.
        **kwargs: Passed to transformers' SDPA.

    Returns:
        (1, T, H, E) and None in place of the attention weights.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and dropout == 0:
        assert max_length_q is not None, "given together with cu_seq_lens_q"
        return _varlen_kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    lengths = cu_seq_lens_q.diff().tolist()
    sequences = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    kwargs["is_causal"] = True
    outputs = [sdpa_attention_forward(module, *each, None, dropout, scaling, **kwargs)[0] for each in sequences]
    return torch.cat(outputs, dim=1), None


def _varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """PyTorch's FlashAttention for variable lengths; arguments and result as in :func:`packed_attention`."""
    rows, key_rows, value_rows = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, H, E)
    output = varlen_attn(
        rows,
        key_rows,
        value_rows,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=rows.shape[1] != key_rows.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """None for a single row without padding, packed or not; otherwise the mask of `sdpa`.

    With sliding-window attention (`local_size`) there is a mask, which also separates the sequences of a packed row.
    """
    if batch_size == 1 and q_length == kv_length and attention_mask is None and local_size is None:
        return None
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )
    return mask


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
