"""The `generation_config.json` of a checkpoint, whose values are checked before a model generates with them."""

import math
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from avg_llava.checkpoints.weight_files import CheckpointError, read_json

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_FORCED_TOKENS = ("forced_bos_token_id", "forced_eos_token_id")
_FLAGS = (
    *("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "disable_compile"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
)
# Smallest and largest value of numbers.
_NUMBERS: dict[str, tuple[float, float]] = {
    "max_length": (0, math.inf),
    "max_new_tokens": (1, math.inf),
    "min_length": (0, math.inf),
    "min_new_tokens": (0, math.inf),
    "max_cache_len": (1, math.inf),
    "max_time": (0, math.inf),
    "temperature": (0, math.inf),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1),
    "repetition_penalty": (1e-6, math.inf),
    "length_penalty": (-math.inf, math.inf),
    "no_repeat_ngram_size": (0, math.inf),
}
_WHOLE = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_cache_len", "top_k")
# The library checks these, or they change nothing without an assistant model, as `assistant_...` do.
_UNCHECKED = ("cache_implementation", "early_stopping", "transformers_version", "is_assistant")
_SINGLE = ("num_beams", "num_return_sequences", "num_beam_groups")  # answers are generated one per prompt


def read_generation_config(file: Path, vocab_size: int) -> GenerationConfig:
    """The generation settings in a file, for a model of `vocab_size` tokens.

    Raises:
        CheckpointError: A value is none that its key may have, or asks for a kind of generation that is not supported.
    """
    values = read_json(file)
    defaults = GenerationConfig()
    for key, value in values.items():
        if value is not None and hasattr(defaults, key) and (wanted := _expected(key, value, vocab_size)):
            raise CheckpointError(f"{file}: {key} is {value!r}; {wanted}")
    try:
        return GenerationConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: {' '.join(str(error).split())}") from error


def _expected(key: str, value: Any, vocab_size: int) -> str | None:
    """The values that a key may have; None if the value is one of them."""
    if key in _TOKENS or key in _FORCED_TOKENS:
        limit = vocab_size if key in _FORCED_TOKENS else math.inf
        ids = value if isinstance(value, list) and key.endswith("eos_token_id") else [value]
        if ids and all(type(each) is int and -1 <= each < limit for each in ids):
            return None
        return "token ids are whole numbers" + (f" below {vocab_size}" if limit == vocab_size else "")
    if key in _FLAGS:
        return None if isinstance(value, bool) else "true and false are supported"
    if key in _NUMBERS:
        low, high = _NUMBERS[key]
        kinds = (int,) if key in _WHOLE else (int, float)
        if type(value) in kinds and math.isfinite(value) and low <= value <= high:
            return None
        return f"{'whole ' if key in _WHOLE else ''}numbers from {low:g} to {high:g} are supported"
    if key in _SINGLE:
        return None if value == 1 else "only 1 is supported"
    if hasattr(GenerationConfig, key):
        return "it is no setting of generation"
    if key in _UNCHECKED or key.startswith(("_", "assistant_", "num_assistant_", "target_")):
        return None
    return None if value in (False, 0, [], {}) else "only null is supported"
