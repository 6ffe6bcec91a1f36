"""Chat templates that a folder brings along: finding them, and making them take the messages of this package."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from avg_llava.model.templates import CONTENT_AS_TEXT, IMAGE_PLACEHOLDER

Messages = Sequence[Mapping[str, Any]]

PROCESSOR_TEMPLATE = "chat_template.json"  # of older processors; tokenizers do not read it

# In front of a template whose messages are texts.
AS_TEXT = (
    """\
{%- set turns = namespace(messages=[]) -%}
{%- for message in messages -%}
"""
    + CONTENT_AS_TEXT
    + """\
  {%- set turns.messages = turns.messages + [{'role': message['role'], 'content': content}] -%}
{%- endfor -%}
{%- set messages = turns.messages %}
"""
)

# In front of a template whose messages are lists of parts.
AS_PARTS = """\
{%- set turns = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = namespace(parts=message['content']) -%}
  {%- if message['content'] is string -%}
    {%- set content.parts = [] -%}
    {%- for piece in message['content'].split('<image>') -%}
      {%- if not loop.first -%}
        {%- set content.parts = content.parts + [{'type': 'image'}] -%}
        {%- set piece = piece[1:] if piece.startswith('\\n') else piece -%}
      {%- endif -%}
      {%- if piece -%}{%- set content.parts = content.parts + [{'type': 'text', 'text': piece}] -%}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set turns.messages = turns.messages + [{'role': message['role'], 'content': content.parts}] -%}
{%- endfor -%}
{%- set messages = turns.messages %}
"""


def render(messages: Messages, jinja: str, special_tokens: Mapping[str, Any], add_generation_prompt: bool) -> str:
    """The text of messages.

    Args:
        special_tokens: `special_tokens_map` of the tokenizer.

    Raises:
        ValueError: The template refuses the messages.
    """
    try:
        (text,), _ = render_jinja_template(
            [list(messages)], chat_template=jinja, add_generation_prompt=add_generation_prompt, **special_tokens
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    return str(text)


def read_chat_template(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that a folder brings along, in the files of its processor or of its tokenizer."""
    path = Path(folder) / PROCESSOR_TEMPLATE
    found = json.loads(path.read_text("utf-8"))["chat_template"] if path.is_file() else tokenizer.chat_template
    if isinstance(found, dict):  # several, by name
        found = found.get("default")
    return found


def adapt(jinja: str, special_tokens: Mapping[str, Any]) -> str | None:
    """A template that takes contents as texts with `<image>` and as lists of parts, whichever of both `jinja` takes.

    None if `jinja` takes neither, or writes something else for an image.
    """
    question = f"{IMAGE_PLACEHOLDER}\nWhat is it?"
    for preamble, wanted in ((AS_TEXT, question), (AS_PARTS, "What is it?")):
        try:
            text = render([{"role": "user", "content": question}], preamble + jinja, special_tokens, True)
        except ValueError:
            continue
        if text.count(wanted) == 1 and text.count(IMAGE_PLACEHOLDER) == 1:
            return preamble + jinja
    return None
