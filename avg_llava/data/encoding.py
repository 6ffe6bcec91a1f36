"""Encoding of conversations: turns to text, text to token ids, and labels on the answers.

The released code finds answers by counting the tokens of separately tokenised pieces. It masks the whole sample where a
piece has a different number of tokens in context. Here the text is tokenised once, and a token is supervised if its
first character lies in an answer: ids and labels equal the released ones wherever those are well defined, and any
tokenizer with character offsets will do. The tokenizer alone (`legacy` in Vicuna's tokenizer_config.json) decides
whether a space token stands between `</s>` and the next `USER`.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from avg_llava.data.records import ASSISTANT, HUMAN, DataError, Turn, dialogue
from avg_llava.model.chat_templates import chat_format
from avg_llava.model.processing import tokenize_with_images
from avg_llava.model.splice import IGNORE_INDEX
from avg_llava.model.templates import IMAGE_PLACEHOLDER, TEMPLATES

ROLES = {HUMAN: "user", ASSISTANT: "assistant"}  # of records, of chat templates


class RenderedConversation(NamedTuple):
    """Text of a conversation, [start, end) of its supervised characters, and the reason if there are none."""

    text: str
    spans: list[tuple[int, int]]
    masked_because: str | None = None


class EncodedConversation(NamedTuple):
    """L token ids of a conversation, L labels, `IGNORE_INDEX` where not supervised, and the reason if all are."""

    input_ids: list[int]
    labels: list[int]
    masked_because: str | None = None


def encode_conversation(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    image_token_id: int,
    chat_template: str | None = None,
    num_embeddings: int | None = None,
) -> EncodedConversation:
    """Token ids and labels of a conversation, with one `image_token_id` per `<image>`.

    Args:
        turns: As in a record; a leading turn of the model is dropped.
        template: A key of `TEMPLATES`.
        chat_template: Jinja source of the template `tokenizer`.
        num_embeddings: Tokens that the model embeds, if that is known.

    Raises:
        DataError: The roles do not alternate, or the template cannot hold the conversation.
        ValueError: The text cannot be tokenised for the model; see :func:`tokenize_with_images`.
    """
    used = dialogue(tuple(turns))
    if tokenizer.eos_token is None:
        raise ValueError(f"{type(tokenizer).__name__} has no eos_token, which ends every answer; set one")
    check_conversation(used, template)
    text, spans, masked_because = render_conversation(used, template, tokenizer, chat_template)
    input_ids, starts = tokenize_with_images(text, tokenizer, image_token_id, num_embeddings)
    labels = [IGNORE_INDEX] * len(input_ids)
    for begin, end in spans:
        supervised = slice(bisect_left(starts, begin), bisect_left(starts, end))
        labels[supervised] = input_ids[supervised]
    return EncodedConversation(input_ids, labels, masked_because)


def check_conversation(turns: Sequence[Turn], template: str) -> None:
    """Raises DataError if a template is for captions and the turns are no caption of an image."""
    is_caption = len(turns) == 2 and IMAGE_PLACEHOLDER in turns[0].value
    if TEMPLATES[template].is_for_captions and not is_caption:
        raise DataError(
            f"template {template!r} is for captions: one human turn with an image and one answer; use "
            f"{_others(template)} for other conversations"
        )


def render_conversation(
    turns: Sequence[Turn], template: str, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> RenderedConversation:
    """Text and supervised spans of turns that alternate and begin with the human's.

    Arguments as for :func:`encode_conversation`.

    Raises:
        DataError: The template cannot hold the conversation, or does not end answers with a token of the tokenizer.
    """
    entry = TEMPLATES[template]
    jinja = entry.jinja or chat_template
    if jinja is None:
        raise DataError(
            f"template {template!r}: the model brings no usable chat template along; use {_others(template)}"
        )
    chat = chat_format(jinja, tokenizer)
    messages = [{"role": ROLES[turn.role], "content": turn.value} for turn in turns]
    try:
        text, spans = chat.render_answers(messages)
    except ValueError as error:
        raise DataError(f"template {template!r} {error}; use {_others(template)}") from error
    end = chat.end_token
    if not entry.is_for_captions and (
        end is None or not all(text[slice(*span)].rstrip().endswith(end) for span in spans)
    ):
        raise DataError(
            f"template {template!r} ends answers with no token that this tokenizer has, so that the model would not "
            f"learn to stop; use {_others(template)}"
        )
    masked_because = None if spans else "no turn is an answer of the model"
    if entry.answer_separator is not None:
        masked_because = find_masking_reason(text, spans, entry.answer_separator, str(tokenizer.eos_token))
    elif not entry.is_for_captions:
        found = next(filter(None, (chat.find_marker(turn.value) for turn in turns)), None)
        masked_because = masked_because if found is None else f"a turn holds {found!r}, which marks turns"
    return RenderedConversation(text, spans if masked_because is None else [], masked_because)


def _others(template: str) -> str:
    names = [name for name, entry in TEMPLATES.items() if name != template and not entry.is_for_captions]
    return ", ".join(map(repr, names))


def find_masking_reason(text: str, spans: list[tuple[int, int]], separator: str, eos_token: str) -> str | None:
    """The reason why the released code supervises nothing of a conversation; None if it supervises the answers.

    It takes the text apart again, at `eos_token` and at the separator between question and answer, and gives up where
    the last turn is a question or empty, or where a turn contains one of the two. `spans` are the answers, each with
    `eos_token`.
    """
    if not text.endswith(eos_token):
        return "the last turn is not an answer of the model, or is an empty one"
    found, begin = [], 0
    for part in text.split(eos_token)[:-1]:
        question, *answers = part.split(separator)
        if len(answers) != 1:
            break
        end = begin + len(part + eos_token)
        found.append((begin + len(question + separator.rstrip()), end))
        begin = end
    if found != spans:
        return f"a turn is empty, or its text holds {eos_token!r} or {separator!r}, which mark turns"
    return None


def find_wrong_label(labels: Sequence[int], turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Says how the labels of a supervised conversation differ from its answers, each with its end; None: not at all."""
    spans = [list(span) for kept, span in groupby(labels, lambda label: label != IGNORE_INDEX) if kept]
    answers = [turn.value for turn in dialogue(tuple(turns)) if turn.role == ASSISTANT]
    if len(spans) != len(answers):
        answers = [answer for answer in answers if answer]  # a template may write nothing for an empty one
    if len(spans) != len(answers):
        return f"{len(spans)} supervised spans for {len(answers)} answers"
    for span, answer in zip(spans, answers, strict=True):
        found = tokenizer.decode(span[:-1] if span[-1] in tokenizer.added_tokens_decoder else span)
        wanted = tokenizer.decode(tokenizer(answer, add_special_tokens=False).input_ids)
        if found.strip() != wanted.strip():
            return f"the supervised text {found!r} is not the answer {answer!r}"
    return None
