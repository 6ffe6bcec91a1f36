"""Conversation templates: the text of a conversation, for prompts and for training samples alike.

This module imports neither torch nor transformers, so that a configuration can be checked without them.
"""

from dataclasses import dataclass

IMAGE_PLACEHOLDER = "<image>"
"""Stands for an image in text. It is no token of the language model: the processor splits text at it."""


@dataclass(frozen=True)
class ConversationTemplate:
    """A conversation format. To add one, add an entry to :data:`TEMPLATES`.

    Attributes:
        jinja: Chat template in transformers' dialect of Jinja. It gets `messages`, each with a `role` ("system", "user"
            or "assistant") and a `content`, which is a text or a list of parts (`{"type": "image"}` and `{"type":
            "text", "text": ...}`; :data:`CONTENT_AS_TEXT` turns both into a text), further `add_generation_prompt` and
            the tokenizer's special tokens, as `eos_token`. Images become :data:`IMAGE_PLACEHOLDER`. A BOS token is
            added by the processor, not by the template. Text inside `{% generation %}` is supervised in training.
        is_for_captions: A conversation has one question with an image and one answer.
        answer_separator: Text between a question and its answer by which the released code finds answers. Conversations
            in which it cannot find them are not supervised, as there. None: answers are found by `{% generation %}`
            alone.
    """

    jinja: str
    is_for_captions: bool = False
    answer_separator: str | None = None


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

CONTENT_AS_TEXT = """\
  {%- if message['content'] is string -%}
    {%- set content = message['content'] -%}
  {%- else -%}
    {%- set parts = namespace(text='') -%}
    {%- for part in message['content'] -%}
      {%- set parts.text = parts.text + ('<image>\\n' if part['type'] == 'image' else part['text']) -%}
    {%- endfor -%}
    {%- set content = parts.text -%}
  {%- endif -%}
"""
"""Sets `content` to the text of `message`, inside a loop over messages."""

# Images and caption alone: the question is dropped, and a newline, not EOS, ends the caption.
PLAIN = (
    """\
{%- for message in messages -%}
"""
    + CONTENT_AS_TEXT
    + """\
  {%- if message['role'] == 'user' -%}
    {{- '<image>' * content.count('<image>') -}}
  {%- elif message['role'] == 'assistant' -%}
    {%- generation -%}{{- content + '\\n' -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
"""
)

# `{system} USER: {question} ASSISTANT: {answer}</s>USER: ...`. A turn's image comes before its text, as in all prompts
# of LLaVA; several images stay at their positions. An empty turn ends after its colon, as in the released code. The
# space before an answer is part of its first token, so it is supervised.
VICUNA = (
    """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set preamble = messages[0]['content'] if messages[0]['content'] is string \
else messages[0]['content'] | map(attribute='text') | join -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set preamble = "SYSTEM_TEXT" -%}
  {%- set turns = messages -%}
{%- endif -%}
{{- preamble + ' ' -}}
{%- for message in turns -%}
""".replace("SYSTEM_TEXT", VICUNA_SYSTEM)
    + CONTENT_AS_TEXT
    + """\
  {%- if message['role'] == 'user' -%}
    {%- set pieces = content.split('<image>') -%}
    {%- if pieces | length == 2 -%}
      {%- set content = ('<image>\\n' + (pieces | join).strip()).strip() -%}
    {%- endif -%}
    {{- 'USER: ' + content + ' ' if content else 'USER:' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- 'ASSISTANT:' -}}
    {%- if content -%}
      {%- generation -%}{{- ' ' + content + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
  {%- else -%}
    {{- raise_exception("role must be user or assistant (system: first message only), got " + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
)

TEMPLATES: dict[str, ConversationTemplate] = {
    "plain": ConversationTemplate(PLAIN, is_for_captions=True),
    "vicuna_v1": ConversationTemplate(VICUNA, answer_separator=" ASSISTANT: "),
}
"""Conversation templates by name, the value of `data.template`."""
