"""Packing: spliced samples as one row of tokens without padding, and a head that scores supervised tokens only.

Shapes: S sequences, T tokens of all sequences, K supervised tokens, D language-model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avg_llava.model.language import cap_logits
from avg_llava.model.splice import IGNORE_INDEX, SplicedInputs

MAX_LOGITS = 2**25
"""Logits per chunk of the head in training: 128 MiB in float32."""


@dataclass
class PackedInputs:
    """Sequences one after another, which do not attend to each other.

    Attributes:
        inputs_embeds: (T, D).
        position_ids: (T,) int64, counted from each sequence's first token.
        targets: (T,) int64, the next token of the sequence, or `IGNORE_INDEX`.
        lengths: S tokens of each sequence, 0 for one that is left out; they add up to T.
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    targets: Tensor
    lengths: list[int]

    @property
    def is_supervised(self) -> Tensor:
        """(T,) bool, True where the next token is supervised."""
        return self.targets != IGNORE_INDEX

    def language_inputs(self) -> dict[str, Any]:
        """Arguments of a language model of transformers, for a batch of one row.

        Attention implementations find the sequences by their positions; those for variable lengths take the
        `cu_seq_lens`, which saves a search of the positions in every layer.
        """
        lengths = [length for length in self.lengths if length > 0]
        ends = torch.tensor([0, *lengths], device=self.targets.device).cumsum(0).int()
        return {
            "inputs_embeds": self.inputs_embeds[None],
            "position_ids": self.position_ids[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }

    def sums(self, token_values: Tensor) -> Tensor:
        """(S,) sums of values (K,) of the supervised tokens, over the tokens of each sequence."""
        lengths = torch.tensor(self.lengths, device=self.targets.device)
        owners = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)[self.is_supervised]
        return token_values.new_zeros(len(lengths)).index_add(0, owners, token_values)


def pack(batches: Sequence[SplicedInputs]) -> PackedInputs:
    """Packs the samples of spliced batches with labels, batch after batch, without their padding."""
    embeds, positions, targets, lengths = [], [], [], []
    for spliced in batches:
        assert spliced.labels is not None, "training sequences have labels"
        real = spliced.attention_mask.bool()
        following = F.pad(spliced.labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        embeds.append(spliced.inputs_embeds[real])
        positions.append(spliced.position_ids[real])
        targets.append(following[real])
        lengths += real.sum(dim=1).tolist()
    return PackedInputs(torch.cat(embeds), torch.cat(positions), torch.cat(targets), lengths)


class LanguageHead(nn.Linear):
    """Language-model head: logits over the vocabulary, or log-probabilities of given tokens.

    Log-probabilities are computed in chunks of `MAX_LOGITS` logits, so that the logits of all tokens are never in
    memory together. All chunks are in one call, so that ZeRO-3 gathers the weight once, whatever the number of tokens.

    Args:
        in_features: D.
        out_features: V.
        bias: Add a bias.
        softcap: Bound of the logits; None: there is none.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, softcap: float | None = None):
        super().__init__(in_features, out_features, bias=bias)
        self.softcap = softcap

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """(..., D) to logits (..., V); with `targets` (K,), from (K, D) to their log-probabilities (K,), float32."""
        if targets is None:
            return cap_logits(super().forward(hidden), self.softcap)
        rows = max(MAX_LOGITS // self.out_features, 1)
        if len(targets) <= rows:
            return self._log_probs(hidden, targets)
        chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.cat([checkpoint(self._log_probs, *chunk, use_reentrant=False) for chunk in chunks])

    def _log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = cap_logits(super().forward(hidden), self.softcap)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(wide, targets, reduction="none")
