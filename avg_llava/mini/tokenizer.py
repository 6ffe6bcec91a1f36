"""A sentencepiece-style tokenizer of a few hundred tokens with one token for every word of the mini world."""

from __future__ import annotations

import re
import string

from transformers import LlamaTokenizer

from avg_llava.mini.glyphs import COLOURS, DIGITS, GROUNDS, LETTERS, SHAPES, SIGNS
from avg_llava.mini.questions import NUMBERS, WORDINGS
from avg_llava.model.templates import VICUNA_SYSTEM

BOUNDARY = "▁"
MAX_LENGTH = 2048


def build_tokenizer() -> LlamaTokenizer:
    """Builds the tokenizer: Llama's special tokens, byte fallback, ASCII characters, and words with their prefixes.

    Byte-pair merges extend a word's prefix by one character at a time, so a known word becomes one token, and an
    unknown word its longest known prefix and single characters. Merges of words after a space have priority over merges
    of words at the start of a text, which would otherwise also apply in the middle of a word.
    """
    questions = [wording for wordings, _ in WORDINGS.values() for wording in wordings]
    texts = [VICUNA_SYSTEM, "USER ASSISTANT", *questions, *(statement for _, statement in WORDINGS.values())]
    texts += [*COLOURS, *GROUNDS, *SHAPES, *SIGNS, *NUMBERS, *LETTERS, *DIGITS, "top bottom left right yes no"]
    words = re.findall("[A-Za-z0-9]+", " ".join(texts).replace("{key}", " ").replace("{answer}", " "))
    opening = {"USER", *(question.split()[0] for question in questions)}  # words that may start a text
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), BOUNDARY]
    vocabulary += [char for char in string.printable if char.isprintable() and char != " "]
    merges: dict[tuple[str, str], None] = {}
    for first, group in ((BOUNDARY, sorted(set(words))), ("", sorted(opening))):
        for length in range(1, 1 + max(map(len, words))):
            for word in group:
                start, char = first + word[: length - 1], word[length - 1 : length]
                if start and char:
                    merges[start, char] = None
    vocabulary += ["".join(pair) for pair in merges]
    return LlamaTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=list(merges),
        legacy=False,
        add_bos_token=True,
        add_eos_token=False,
        pad_token="<unk>",
        padding_side="right",
        model_max_length=MAX_LENGTH,
    )
