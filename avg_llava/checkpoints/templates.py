"""The conversation template that a published model was trained with, from the files of its folder."""

from pathlib import Path
from typing import Any

from avg_llava.checkpoints.weight_files import read_json
from avg_llava.model.chat_templates import PROCESSOR_TEMPLATES, default_template
from avg_llava.model.templates import template_of_family, template_of_text

TOKENIZER_CONFIG = "tokenizer_config.json"


def template_of_llava(folder: Path, text_type: str, has_own: bool) -> str | None:
    """The entry of `TEMPLATES` that a LLaVA model in a folder is prompted with; None if its family is not known.

    Args:
        folder: Folder with the tokenizer's files, if it has any.
        text_type: `model_type` of the language model's configuration.
        has_own: The folder's own chat template counts, as in transformers' layout. In the original layout it is a rest
            of the language model: conversations are written by LLaVA's code.

    Raises:
        CheckpointError: A file is damaged.
    """
    own = _chat_template(folder) if has_own else None
    if own is not None:
        default = default_template(own)
        return "tokenizer" if default is None else template_of_text(default)
    return template_of_family(text_type, added_tokens(folder), of_llava=True)


def added_tokens(folder: Path) -> set[str]:
    """The special tokens of the tokenizer in a folder, as far as its files list them."""
    listed = _read(folder / TOKENIZER_CONFIG).get("added_tokens_decoder")
    entries = (
        listed.values() if isinstance(listed, dict) else _read(folder / "tokenizer.json").get("added_tokens") or ()
    )
    texts = (entry.get("content") for entry in entries if isinstance(entry, dict))
    return {text for text in texts if isinstance(text, str)} | _read(folder / "added_tokens.json").keys()


def _chat_template(folder: Path) -> Any:
    """The chat template in the files of a folder's processor or tokenizer, or several with their names."""
    for name in PROCESSOR_TEMPLATES:
        found = _read(folder / name).get("chat_template")
        if found is not None:
            return found
    file = folder / "chat_template.jinja"
    return file.read_text("utf-8") if file.is_file() else _read(folder / TOKENIZER_CONFIG).get("chat_template")


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
