"""Conversation templates: the text of a conversation, for prompts and for training samples alike.

This module imports neither torch nor transformers, so that a configuration can be checked without them.
"""

from collections.abc import Collection
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
            the tokenizer's special tokens, as `eos_token`. Images become :data:`IMAGE_PLACEHOLDER`. The processor adds
            a BOS token if the text does not begin with it. Text inside `{% generation %}` is supervised in training:
            an answer and the token that ends it. None: the chat template of the model's folder.
        is_for_captions: A conversation has one question with an image and one answer.
        answer_separator: Text between a question and its answer by which the released code finds answers. Conversations
            in which it cannot find them are not supervised, as there. None: answers are found by `{% generation %}`
            alone.
    """

    jinja: str | None
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

IMAGE_FIRST = """\
    {%- set pieces = content.split('<image>') -%}
    {%- if pieces | length == 2 -%}
      {%- set content = ('<image>\\n' + (pieces | join).strip()).strip() -%}
    {%- endif -%}
"""
"""Moves the only image of `content` before its text, as in the training data of LLaVA."""

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
"""
    + IMAGE_FIRST
    + """\
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


def _with_headers(
    header: str,
    end: str,
    separator: str,
    *,
    assistant: str = "assistant",
    system: str | None = None,
    bos: bool = False,
    checks: str = "",
    strips: bool = False,
    moves_image: bool = False,
    closing: str = "",
) -> str:
    """A template whose turns are a header, the text, `end` and `separator`.

    Args:
        header: Contains `{role}`.
        assistant: The role of the model in headers.
        system: The system message of conversations without one.
        bos: The text begins with the BOS token.
        checks: Jinja that refuses conversations.
        strips: White space around texts is removed.
        moves_image: The only image of a turn is moved before its text.
        closing: Jinja at the end of a text that is no prompt.
    """
    start, stop = (text.replace("\n", "\\n") for text in header.split("{role}"))
    separator = separator.replace("\n", "\\n")
    lines = ["{{- bos_token -}}"] if bos else []
    lines += [checks] if checks else []
    if system is not None:
        lines.append(
            f"""\
{{%- if messages[0]['role'] != 'system' -%}}
  {{{{- '{start}system{stop}{system}{end}{separator}' -}}}}
{{%- endif -%}}"""
        )
    lines += ["{%- for message in messages -%}", CONTENT_AS_TEXT.rstrip("\n")]
    if strips:
        lines.append("  {%- set content = content.strip() -%}")
    if moves_image:
        lines.append("  {%- if message['role'] == 'user' -%}\n" + IMAGE_FIRST + "  {%- endif -%}")
    lines.append(
        f"""\
  {{%- if message['role'] == 'assistant' -%}}
    {{{{- '{start}{assistant}{stop}' -}}}}
    {{%- generation -%}}{{{{- content + '{end}' -}}}}{{%- endgeneration -%}}
  {{%- else -%}}
    {{{{- '{start}' + message['role'] + '{stop}' + content + '{end}' -}}}}
  {{%- endif -%}}
  {{{{- '{separator}' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '{start}{assistant}{stop}' -}}}}{closing}{{%- endif -%}}
"""
    )
    return "\n".join(lines)


ALTERNATION = """\
{%- for message in turns -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('the roles must alternate: user, assistant, user, ...') -}}
  {%- endif -%}
{%- endfor -%}"""
"""Refuses `turns` whose roles do not alternate."""

NO_SYSTEM = (
    """\
{%- if messages[0]['role'] == 'system' -%}
  {{- raise_exception('these models have no system message: put its text into the first question') -}}
{%- endif -%}
{%- set turns = messages -%}
"""
    + ALTERNATION
)

LLAVA_LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def _with_instructions(first: str, question: str, answer: str, moves_image: bool, bos: bool) -> str:
    """A template of Mistral's kind: `first` joins a system message and the first question."""
    lines = ["{{- bos_token -}}"] if bos else []
    lines += [
        f"""\
{{%- set opening = namespace(text='') -%}}
{{%- set turns = messages -%}}
{{%- if messages[0]['role'] == 'system' -%}}
  {{%- set message = messages[0] -%}}
{CONTENT_AS_TEXT.rstrip()}
  {{%- set opening.text = {first} -%}}
  {{%- set turns = messages[1:] -%}}
{{%- endif -%}}""",
        ALTERNATION,
        "{%- for message in turns -%}",
        CONTENT_AS_TEXT.rstrip("\n"),
        "  {%- if message['role'] == 'user' -%}",
    ]
    lines += [IMAGE_FIRST.rstrip("\n")] if moves_image else []
    lines.append(
        f"""\
    {{%- if loop.first -%}}{{%- set content = opening.text + content -%}}{{%- endif -%}}
    {{{{- {question} -}}}}
  {{%- else -%}}
    {{%- generation -%}}{{{{- {answer} -}}}}{{%- endgeneration -%}}
  {{%- endif -%}}
{{%- endfor -%}}
"""
    )
    return "\n".join(lines)


TEMPLATES: dict[str, ConversationTemplate] = {
    "plain": ConversationTemplate(PLAIN, is_for_captions=True),
    "vicuna_v1": ConversationTemplate(VICUNA, answer_separator=" ASSISTANT: "),
    "llama_3": ConversationTemplate(
        _with_headers("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "", bos=True, strips=True)
    ),
    "llava_llama_3": ConversationTemplate(
        _with_headers(
            "<|start_header_id|>{role}<|end_header_id|>\n\n",
            "<|eot_id|>",
            "",
            bos=True,
            strips=True,
            moves_image=True,
            system=LLAVA_LLAMA_3_SYSTEM,
        )
    ),
    "mistral": ConversationTemplate(
        _with_instructions(
            r"content + '\n\n'", "' [INST] ' + content + ' [/INST]'", "' ' + content + eos_token", False, True
        )
    ),
    "mistral_instruct": ConversationTemplate(
        _with_instructions(
            r"'<<SYS>>\n' + content + '\n<</SYS>>\n\n'",
            "'[INST] ' + content + ' [/INST]'",
            "' ' + content + ' ' + eos_token",
            True,
            False,
        )
    ),
    "chatml": ConversationTemplate(
        _with_headers("<|im_start|>{role}\n", "<|im_end|>", "\n", system="You are a helpful assistant.")
    ),
    "chatml_direct": ConversationTemplate(
        _with_headers("<|im_start|>{role}\n", "<|im_end|>", "", system="Answer the questions.", moves_image=True)
    ),
    "gemma": ConversationTemplate(
        _with_headers(
            "<start_of_turn>{role}\n",
            "<end_of_turn>",
            "\n",
            assistant="model",
            bos=True,
            checks=NO_SYSTEM,
            strips=True,
        )
    ),
    "phi_3": ConversationTemplate(
        _with_headers("<|{role}|>\n", "<|end|>", "\n", closing="{%- else -%}{{- eos_token -}}")
    ),
    "tokenizer": ConversationTemplate(None),
}
"""Conversation templates by name, the value of `data.template`.

`mistral_instruct`, `chatml_direct` and `llava_llama_3` are what LLaVA's models of these families were trained with.
"""

FAMILIES = {
    "gemma": ("gemma", "gemma"),
    "gemma2": ("gemma", "gemma"),
    "gemma3_text": ("gemma", "gemma"),
    "mistral": ("mistral", "mistral_instruct"),
    "mixtral": ("mistral", "mistral_instruct"),
    "phi3": ("phi_3", "phi_3"),
    "qwen2": ("chatml", "chatml"),
    "qwen2_moe": ("chatml", "chatml"),
    "qwen3": ("chatml", "chatml"),
    "qwen3_moe": ("chatml", "chatml"),
}
"""By `model_type` of the language model: its own template, and that of LLaVA's models with it."""

LLAMA_FAMILIES = {"<|eot_id|>": ("llama_3", "llava_llama_3"), "<|im_end|>": ("chatml", "chatml_direct")}
"""The same for models of type `llama`, by a token that only their tokenizers have; others are Vicuna's."""


def template_of_text(jinja: str) -> str:
    """The entry of `TEMPLATES` with a Jinja source; `tokenizer` if no other has it."""
    return next((name for name, entry in TEMPLATES.items() if entry.jinja == jinja), "tokenizer")


def template_of_family(text_type: str, tokens: Collection[str], of_llava: bool) -> str | None:
    """The entry of `TEMPLATES` that a language model was trained with, by its family; None if that is not known.

    Args:
        text_type: `model_type` of the language model's configuration.
        tokens: At least the special tokens of its tokenizer.
        of_llava: The language model is that of a LLaVA model.
    """
    if text_type == "llama":
        known = next((names for token, names in LLAMA_FAMILIES.items() if token in tokens), ("vicuna_v1", "vicuna_v1"))
    elif text_type in FAMILIES:
        known = FAMILIES[text_type]
    else:
        return None
    return known[of_llava]
