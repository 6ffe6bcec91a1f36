"""Chat templates with a tokenizer: texts, answers in them and their end; and those that a folder brings along."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, PROCESSOR_NAME
from transformers.utils.chat_template_utils import render_jinja_template

from avg_llava.model.templates import CONTENT_AS_TEXT, IMAGE_PLACEHOLDER

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
"""[start, end) in characters."""

MARKS = re.compile(r"\{%-?\s*generation\b")
PLAIN_MARKERS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")  # of templates that mark turns without special tokens

# Files of processors that may hold a chat template under this key, in transformers' order; tokenizers do not read them.
PROCESSOR_TEMPLATES = (PROCESSOR_NAME, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)

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


class RefusedPromptError(ValueError):
    """A chat template refuses messages, or one of them holds a text that marks turns."""


@dataclass(frozen=True)
class ChatFormat:
    """A chat template with a tokenizer.

    Attributes:
        has_marks: Answers stand between `{% generation %}` and `{% endgeneration %}`.
        special_tokens: `special_tokens_map` of the tokenizer.
        added_tokens: Texts of all tokens that are found in a text before it is tokenised.
        end_token: Text of the token that ends an answer; None if the template writes none.
        end_token_id: Its id.
        markers: Texts with which the template begins and ends turns, and the tokenizer's special tokens but those for
            the beginning of a text and unknown words; a message with one of them could feign turns.
    """

    jinja: str
    has_marks: bool
    special_tokens: Mapping[str, Any]
    added_tokens: tuple[str, ...]
    end_token: str | None = None
    end_token_id: int | None = None
    markers: tuple[str, ...] = ()

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The text of messages.

        Raises:
            ValueError: The template refuses them.
        """
        return self._render(messages, add_generation_prompt)[0]

    def render_answers(self, messages: Messages) -> tuple[str, list[Span]]:
        """The text of messages, and where in it the answers stand, each with the token that ends it.

        Without marks in the template, an answer begins where the prompt of the messages before it ends.

        Raises:
            ValueError: The template refuses the messages, or does not write an answer at once after its prompt and with
                an end token behind it.
        """
        if self.has_marks:
            return self._render(messages, False)
        text = self.render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True)
            begin = len(prompt)
            # As far as later messages do not change it.
            end = len(commonprefix([text, self.render(messages[: index + 1])]))  # noqa: RUF071 (characters, not paths)
            answer = re.compile(rf"\s*{re.escape(str(message['content']).strip())}\s*").match(text, begin, end)
            if not text.startswith(prompt) or answer is None:
                raise ValueError("writes an answer otherwise than after its prompt, or otherwise in later turns")
            token = self.added_token_at(text[:end], answer.end())
            if token is None:
                raise ValueError("writes no token that ends an answer")
            spans.append((begin, answer.end() + len(token)))
        return text, spans

    def added_token_at(self, text: str, begin: int) -> str | None:
        """The longest of `added_tokens` that a text has at a position."""
        return max((token for token in self.added_tokens if text.startswith(token, begin)), key=len, default=None)

    def find_marker(self, content: str | Sequence[Mapping[str, Any]]) -> str | None:
        """The first of `markers` in a content as a template may write it: parts joined, and images moved away."""
        placed = f"{IMAGE_PLACEHOLDER}\n"
        text = content
        if not isinstance(text, str):
            text = "".join(placed if part.get("type") == "image" else part.get("text") or "" for part in text)
        removed = text.replace(IMAGE_PLACEHOLDER, "")
        texts = (text, removed, text.replace(placed, "").replace(IMAGE_PLACEHOLDER, ""))
        return next((marker for marker in self.markers if any(marker in each for each in texts)), None)

    def _render(self, messages: Messages, add_generation_prompt: bool) -> tuple[str, list[Span]]:
        try:
            (text,), spans = render_jinja_template(
                [list(messages)],
                chat_template=self.jinja,
                return_assistant_tokens_mask=self.has_marks,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (TemplateError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"refuses these messages: {error}") from error
        return text, spans[0] if spans else []


@lru_cache(16)
def chat_format(jinja: str, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """A chat template with a tokenizer, and what a question and its answer show of it."""
    added = tuple(tokenizer.added_tokens_encoder)
    harmless = (tokenizer.bos_token, tokenizer.unk_token, IMAGE_PLACEHOLDER)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    markers = [token for token in added if token in special and token not in harmless]
    has_marks = MARKS.search(jinja) is not None
    chat = ChatFormat(jinja, has_marks, tokenizer.special_tokens_map, added, markers=tuple(markers))
    answer = "Quartz"
    try:
        text = chat.render([{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}])
    except ValueError:
        return chat
    end = chat.added_token_at(text.rpartition(answer)[2].lstrip(), 0)
    markers += [token for token in (*added, *PLAIN_MARKERS) if token in text and token not in (*markers, *harmless)]
    end_id = None if end is None else tokenizer.convert_tokens_to_ids(end)
    return replace(chat, end_token=end, end_token_id=end_id, markers=tuple(markers))


def read_chat_template(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that a folder brings along, in the files of its processor or of its tokenizer.

    In the order of transformers, and of several by name `default`; None if there is none.

    Raises:
        ValueError: A file of the processor is damaged.
    """
    for name in PROCESSOR_TEMPLATES:
        path = Path(folder) / name
        if path.is_file():
            try:
                found = json.loads(path.read_text("utf-8")).get("chat_template")
            except (ValueError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path} must hold a JSON object with the key chat_template ({error!r})") from error
            if found is not None:
                return default_template(found)
    return default_template(tokenizer.chat_template)


def default_template(found: Any) -> str | None:
    """A chat template as files hold it: a text, or of several by name `default`."""
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def adapt(jinja: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template that takes contents as texts with `<image>` and as lists of parts, whichever of both `jinja` takes.

    None if `jinja` takes neither, or writes something else for an image.
    """
    if jinja.startswith((AS_TEXT, AS_PARTS)):
        return jinja
    question = f"{IMAGE_PLACEHOLDER}\nWhat is it?"
    for preamble, wanted in ((AS_TEXT, question), (AS_PARTS, "What is it?")):
        try:
            text = chat_format(preamble + jinja, tokenizer).render([{"role": "user", "content": question}], True)
        except ValueError:
            continue
        if text.count(wanted) == 1 and text.count(IMAGE_PLACEHOLDER) == 1:
            return preamble + jinja
    return None
