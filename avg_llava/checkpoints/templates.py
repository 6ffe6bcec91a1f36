"""The conversation template that a published model was trained with, from the files of its folder."""

import json
from pathlib import Path
from typing import Any

from avg_llava.model.chat_templates import PROCESSOR_TEMPLATE
from avg_llava.model.templates import template_of_family

TOKENIZER_CONFIG = "tokenizer_config.json"


def template_of_llava(folder: Path, text_type: str, has_own: bool) -> str | None:
    """The entry of `TEMPLATES` that a LLaVA model in a folder is prompted with; None if its family is not known.

    Args:
        folder: Folder with the tokenizer's files, if it has any.
        text_type: `model_type` of the language model's configuration.
        has_own: The folder's own chat template counts, as in transformers' layout. In the original layout it is a rest
            of the language model: conversations are written by LLaVA's code.
    """
    if has_own and has_chat_template(folder):
        return "tokenizer"
    return template_of_family(text_type, added_tokens(folder), of_llava=True)


def has_chat_template(folder: Path) -> bool:
    """True if the processor or the tokenizer of a folder brings a chat template along."""
    names = ("chat_template.jinja", PROCESSOR_TEMPLATE)
    return any((folder / name).is_file() for name in names) or "chat_template" in _read(folder / TOKENIZER_CONFIG)


def added_tokens(folder: Path) -> set[str]:
    """The special tokens of the tokenizer in a folder, as far as its files list them."""
    listed = _read(folder / TOKENIZER_CONFIG).get("added_tokens_decoder", {}).values()
    if not listed:
        listed = _read(folder / "tokenizer.json").get("added_tokens", [])
    return {token["content"] for token in listed} | _read(folder / "added_tokens.json").keys()


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
