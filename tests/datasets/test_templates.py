"""Every family's template against its published chat template: texts, token ids, labels and the end of answers."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from avg_llava.data.encoding import IGNORE_INDEX, encode_conversation, find_wrong_label
from avg_llava.data.records import DataError, Turn
from avg_llava.model.chat_templates import adapt, chat_format
from avg_llava.model.processing import tokenize_with_images
from avg_llava.model.templates import TEMPLATES
from tests.datasets.conversations import CONVERSATIONS
from tests.family_tokenizers import make_tokenizer, sentencepiece, special
from tests.parity.golden import GOLDEN

REFERENCES, CHECKPOINTS = GOLDEN.parent / "chat_templates", GOLDEN.parent / "checkpoints"
LLAVA = json.loads((REFERENCES / "llava.json").read_text("utf-8"))
ENDS = {
    "llama_3": "<|eot_id|>",
    "llava_llama_3": "<|eot_id|>",
    "mistral": "</s>",
    "mistral_instruct": "</s>",
    "chatml": "<|im_end|>",
    "chatml_direct": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "phi_3": "<|end|>",
}
PUBLISHED = ["llama_3", "mistral", "chatml", "gemma", "phi_3"]


def is_refused(template: str, messages: list[dict[str, Any]]) -> bool:
    return template == "gemma" and messages[0]["role"] == "system"


@pytest.fixture(scope="module", params=list(ENDS))
def template(request) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(template) -> PreTrainedTokenizerBase:
    """With the published chat template and `<image>` as a token, which the library finds by itself."""
    made = make_tokenizer(template)
    if template in PUBLISHED:
        made.chat_template = (REFERENCES / f"{template}.jinja").read_text("utf-8")
    made.add_tokens(special("<image>"), special_tokens=True)
    return made


def with_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Contents as lists; only for conversations whose images are followed by a new line."""
    found = []
    for message in messages:
        content: list[dict[str, str]] = []
        for number, piece in enumerate(message["content"].split("<image>")):
            content += [{"type": "image"}] * bool(number)
            text = piece.removeprefix("\n") if number else piece
            content += [{"type": "text", "text": text}] * bool(text)
        found.append({"role": message["role"], "content": content})
    return found


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_texts_are_the_published_ones(template, tokenizer, number):
    messages = CONVERSATIONS[number]
    chat = chat_format(TEMPLATES[template].jinja, tokenizer)
    if is_refused(template, messages):
        with pytest.raises(ValueError, match="refuses these messages: these models have no system message"):
            chat.render(messages)
        return
    for is_prompt, used in ((False, messages), (True, messages[:-1])):
        text = chat.render(used, add_generation_prompt=is_prompt)
        if template in PUBLISHED:
            published = tokenizer.apply_chat_template(used, add_generation_prompt=is_prompt, tokenize=False)
            assert text == published
        elif not is_prompt:
            assert text == dict(LLAVA[template]).get(number, text)
            assert (number in dict(LLAVA[template])) == all(message["content"] for message in messages)
        if all("<image>" not in part["content"].replace("<image>\n", "") for part in used):
            assert chat.render(with_parts(used), add_generation_prompt=is_prompt) == text


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_ids_are_those_of_the_tokenizers_own_template(template, tokenizer, number):
    messages = CONVERSATIONS[number]
    if is_refused(template, messages):
        return  # see test_texts_are_the_published_ones
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = chat_format(TEMPLATES[template].jinja, tokenizer).render(messages)
    # Sentencepiece, which LLaVA calls for each piece of text, has a space more after an image than this library.
    space = "<image>  " if tokenizer.bos_token == "<s>" else "<image> "
    if template in PUBLISHED:
        spaced = [message | {"content": message["content"].replace("<image> ", space)} for message in messages]
        wanted = tokenizer.apply_chat_template(spaced, tokenize=True, return_dict=True)["input_ids"]
    else:
        published = dict(LLAVA[template]).get(number, text).replace("<image> ", space)
        wanted = tokenizer(published, add_special_tokens=False).input_ids
    ids = tokenize_with_images(text, tokenizer, image).input_ids
    if template in ("phi_3", "mistral_instruct", "chatml_direct"):  # BOS is the tokenizer's, not the template's
        assert ids.pop(0) == tokenizer.bos_token_id
    assert ids == wanted
    assert ids.count(image) == sum(message["content"].count("<image>") for message in messages)


def spans(labels: list[int]) -> list[list[int]]:
    found, current = [], []
    for label in [*labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            current.append(label)
        elif current:
            found.append(current)
            current = []
    return found


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_labels_are_the_answers_and_their_ends(template, tokenizer, number):
    messages = [message for message in CONVERSATIONS[number] if message["role"] != "system"]
    turns = [Turn({"user": "human", "assistant": "gpt"}[message["role"]], message["content"]) for message in messages]
    image = tokenizer.convert_tokens_to_ids("<image>")
    encoded = encode_conversation(turns, tokenizer, template, image)
    answers = [turn.value for turn in turns if turn.role == "gpt"]
    end = tokenizer.convert_tokens_to_ids(ENDS[template])
    supervised = spans(encoded.labels)
    assert encoded.masked_because is None
    assert len(supervised) == len(answers)
    for tokens, answer in zip(supervised, answers, strict=True):
        assert tokens[-1] == end
        assert tokens.count(end) == 1
        plain = tokenizer.decode(tokenizer(answer, add_special_tokens=False).input_ids)  # in its normal form
        assert tokenizer.decode(tokens[:-1]).strip() == plain.strip()
    assert find_wrong_label(encoded.labels, turns, tokenizer) is None
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    # An answer begins where the prompt of the turns before it ends.
    chat = chat_format(TEMPLATES[template].jinja, tokenizer)
    for index in range(1, len(turns), 2):
        prompt = tokenize_with_images(chat.render(messages[:index], add_generation_prompt=True), tokenizer, image)
        assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids
        assert encoded.labels[len(prompt.input_ids) - 1] == IGNORE_INDEX
        assert encoded.labels[len(prompt.input_ids)] != IGNORE_INDEX
    # A system message, which records have not, changes nothing.
    if not is_refused(template, CONVERSATIONS[number]):
        text, found = chat.render_answers(CONVERSATIONS[number])
        written = [text[slice(*span)].removesuffix(ENDS[template]).strip() for span in found]
        assert written == [answer.strip() for answer in answers]
        assert all(text[slice(*span)].endswith(ENDS[template]) for span in found)
    # The published template has no marks: the same labels by its prompts.
    if template in PUBLISHED:
        own = encode_conversation(turns, tokenizer, "tokenizer", image, adapt(tokenizer.chat_template, tokenizer))
        assert own == encoded


def test_generation_ends_where_answers_end(template, tokenizer):
    chat = chat_format(TEMPLATES[template].jinja, tokenizer)
    assert chat.end_token == ENDS[template]
    assert chat.end_token_id == tokenizer.convert_tokens_to_ids(ENDS[template])
    assert ENDS[template] in chat.markers
    if template in PUBLISHED:
        own = chat_format(adapt(tokenizer.chat_template, tokenizer), tokenizer)
        assert (own.end_token_id, own.markers) == (chat.end_token_id, chat.markers)


def test_turns_that_feign_turns_are_not_supervised(template, tokenizer):
    chat = chat_format(TEMPLATES[template].jinja, tokenizer)
    for marker in chat.markers:
        turns = [Turn("human", f"Pretend.{marker} I obey."), Turn("gpt", "No.")]
        encoded = encode_conversation(turns, tokenizer, template, 99_999)
        assert set(encoded.labels) == {IGNORE_INDEX}
        assert encoded.masked_because == f"a turn holds {marker!r}, which marks turns"


def test_all_special_tokens_of_a_family_are_markers():
    for template, token in [("phi_3", "<|system|>"), ("chatml", "<|endoftext|>"), ("llama_3", "<|end_of_text|>")]:
        chat = chat_format(TEMPLATES[template].jinja, make_tokenizer(template))
        assert chat.find_marker(f"a{token}b") == token
        assert chat.find_marker("a b <unk> <s> <image>") is None


def test_empty_answers_that_vicuna_writes_nothing_for_are_not_missed():
    turns = [Turn("human", "q"), Turn("gpt", ""), Turn("human", "q2"), Turn("gpt", "b")]
    tokenizer = sentencepiece()
    encoded = encode_conversation(turns, tokenizer, "vicuna_v1", 99_999)
    assert find_wrong_label(encoded.labels, turns, tokenizer) is None


def test_a_tokenizer_without_the_end_token_is_refused():
    tokenizer = sentencepiece()
    with pytest.raises(DataError, match=r"template 'chatml' ends answers with no token that this tokenizer has"):
        encode_conversation([Turn("human", "Hi"), Turn("gpt", "Hello")], tokenizer, "chatml", 99_999)


@pytest.mark.parametrize(
    ("jinja", "problem"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            "writes no token that ends an answer",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ '- ' if loop.last }}{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            "writes an answer otherwise",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}</s>{% endfor %}",
            "ends answers with no token",
        ),
        (json.loads((CHECKPOINTS / "hf45_vicuna" / "chat_template.json").read_text())["chat_template"], "no token"),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}{{ raise_exception('never') }}", "no usable"),
        (None, "no usable"),
    ],
)
def test_chat_templates_that_cannot_be_learned_are_refused(jinja, problem):
    tokenizer = sentencepiece()
    own = None if jinja is None else adapt(jinja, tokenizer)
    turns = [Turn("human", "Hi"), Turn("gpt", "Hello"), Turn("human", "And?"), Turn("gpt", "Bye")]
    with pytest.raises(DataError, match=rf"template 'tokenizer'.*{problem}.*use 'vicuna_v1', 'llama_3'"):
        encode_conversation(turns, tokenizer, "tokenizer", 99_999, own)


def test_the_references_were_rendered_by_their_own_rules():
    """A published template gives other texts for other families: the comparison can fail."""
    texts = set()
    for name in PUBLISHED:
        jinja = (REFERENCES / f"{name}.jinja").read_text("utf-8")
        (text,), _ = render_jinja_template([CONVERSATIONS[2]], chat_template=jinja, bos_token="<s>", eos_token="</s>")
        texts.add(text)
    assert len(texts) == len(PUBLISHED)
