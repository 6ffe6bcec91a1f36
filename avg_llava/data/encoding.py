"""Conversation templates: how turns become text, token ids, and labels on what the model is to say.

The released code finds answers by counting the tokens of pieces tokenised on their own, which fails (and then masks the
whole sample) whenever a piece has another number of tokens alone than in its place. Here text is tokenised once and
answers are found by the characters that tokens stand for: the same ids and labels wherever the released ones are well
defined, with any tokenizer that gives offsets. Whether a space token stands between `</s>` and the next `USER` is the
tokenizer's own affair (`legacy` in Vicuna's tokenizer_config.json).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from avg_llava.data.records import HUMAN, DataError, Turn, dialogue
from avg_llava.model.processing import IMAGE_PLACEHOLDER, VICUNA_SYSTEM, tokenize_with_images
from avg_llava.model.splice import IGNORE_INDEX


class RenderedConversation(NamedTuple):
    """Text of a conversation and the [start, end) character spans of it that are supervised.

    `masked_because` says why there is no span although there are answers.
    """

    text: str
    spans: list[tuple[int, int]]
    masked_because: str | None = None


class EncodedConversation(NamedTuple):
    """Token ids and labels of a conversation, of one length. Labels are ids or -100.

    `masked_because` says why every label is -100, where that is so.
    """

    input_ids: list[int]
    labels: list[int]
    masked_because: str | None = None


class Template(NamedTuple):
    """A format of conversations.

    Attributes:
        check: Raises DataError for a dialogue that the format cannot hold.
        render: The text of a dialogue, given the end-of-sequence text of the tokenizer.
    """

    check: Callable[[Sequence[Turn]], None]
    render: Callable[[Sequence[Turn], str], RenderedConversation]


def encode_conversation(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: str, image_token_id: int
) -> EncodedConversation:
    """Token ids and labels of a conversation, with one `image_token_id` per `<image>`.

    Args:
        turns: As in a record; a leading turn of the model is dropped.
        tokenizer: The language model's tokenizer.
        template: A key of `TEMPLATES`.
        image_token_id: Id of the placeholder.

    Raises:
        DataError: The roles do not alternate, or the template cannot hold the conversation.
    """
    used = dialogue(tuple(turns))
    if tokenizer.eos_token is None:
        raise ValueError(f"{type(tokenizer).__name__} has no eos_token, which ends every answer; set one")
    form = TEMPLATES[template]
    form.check(used)
    text, spans, masked_because = form.render(used, tokenizer.eos_token)
    input_ids, starts = tokenize_with_images(text, tokenizer, image_token_id)
    labels = [IGNORE_INDEX] * len(input_ids)
    position = 0
    for begin, end in spans:
        while position < len(starts) and starts[position] < begin:
            position += 1
        while position < len(starts) and starts[position] < end:
            labels[position] = input_ids[position]
            position += 1
    return EncodedConversation(input_ids, labels, masked_because)


def _check_plain(turns: Sequence[Turn]) -> None:
    if len(turns) != 2 or IMAGE_PLACEHOLDER not in turns[0].value:
        raise DataError(
            "template 'plain' is for captions: one human turn with an image and one answer; use 'vicuna_v1' for others"
        )


def _render_plain(turns: Sequence[Turn], eos_token: str) -> RenderedConversation:
    """Images and caption, nothing else: the question is dropped, the caption ends in a newline and not in EOS."""
    images = IMAGE_PLACEHOLDER * turns[0].value.count(IMAGE_PLACEHOLDER)
    text = f"{images}{turns[1].value}\n"
    return RenderedConversation(text, [(len(images), len(text))])


def _check_vicuna(turns: Sequence[Turn]) -> None:
    """Any dialogue will do."""


def _render_vicuna(turns: Sequence[Turn], eos_token: str) -> RenderedConversation:
    """`{system} USER: {question} ASSISTANT: {answer}</s>USER: ...`; answers and their `</s>` are supervised.

    As in the released code, nothing of a conversation is supervised whose text cannot be taken apart again: the last
    turn is a question or empty, or a turn holds " ASSISTANT: " or `</s>`. The caller is told why.
    """
    text, answers = VICUNA_SYSTEM + " ", []
    for turn in turns:
        if not turn.value:
            # An empty turn ends after its colon, without separator: so it is in the released code.
            text += "USER:" if turn.role == HUMAN else "ASSISTANT:"
        elif turn.role == HUMAN:
            text += f"USER: {_image_first(turn.value)} "
        else:
            text += "ASSISTANT:"
            begin = len(text)  # the space before an answer is the answer's: it is part of its first token
            text += f" {turn.value}{eos_token}"
            answers.append((begin, len(text)))
    if not text.endswith(eos_token):
        return RenderedConversation(text, [], "the last turn is not an answer of the model, or is an empty one")
    if _answers_found(text, eos_token) != answers:
        return RenderedConversation(
            text, [], f"a turn is empty, or its text holds {eos_token!r} or ' ASSISTANT: ', which mark turns"
        )
    return RenderedConversation(text, answers)


def _answers_found(text: str, eos_token: str) -> list[tuple[int, int]] | None:
    """Spans of answers as the released code finds them in the text; None where it gives up."""
    spans, cursor = [], 0
    for part in text.split(eos_token)[:-1]:
        around = part.split(" ASSISTANT: ")
        if len(around) != 2:
            return None
        begin = cursor + len(around[0]) + len(" ASSISTANT:")
        cursor += len(part) + len(eos_token)
        spans.append((begin, cursor))
    return spans


def _image_first(question: str) -> str:
    """A question with its single image before the text, as all of LLaVA's prompts; several images keep their places."""
    if question.count(IMAGE_PLACEHOLDER) != 1:
        return question
    return f"{IMAGE_PLACEHOLDER}\n{question.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


TEMPLATES: dict[str, Template] = {
    "plain": Template(_check_plain, _render_plain),
    "vicuna_v1": Template(_check_vicuna, _render_vicuna),
}

__all__ = ["IGNORE_INDEX", "TEMPLATES", "EncodedConversation", "Template", "encode_conversation"]
