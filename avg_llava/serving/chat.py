"""Interactive conversation in the terminal."""

import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from PIL import Image
from transformers import TextStreamer

from avg_llava.inference.answers import Answer, Decoding
from avg_llava.inference.budget import Budget
from avg_llava.inference.conversation import Conversation
from avg_llava.inference.predictor import Predictor
from avg_llava.model.images import decode_image, load_image

Number = TypeVar("Number")

HELP = """\
/image FILE or URL   attach an image to the next question; repeat for several
/granularity N       visual tokens per crop for new images; auto lets the router choose
/cost X              router penalty in nats per doubling of visual tokens
/reset               start a new conversation
/help                show this list
/quit                exit"""
MAX_DOWNLOAD_BYTES, DOWNLOAD_SECONDS = 32 * 2**20, 30.0


def fetch_image(url: str) -> Image.Image:
    """Downloads an image. For URLs typed by the local user: private hosts are allowed.

    Raises:
        OSError: The download fails.
        ValueError: The file is larger than `MAX_DOWNLOAD_BYTES`, or not an image.
    """
    with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as response:
        content = response.read(MAX_DOWNLOAD_BYTES + 1)
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{url}: larger than {MAX_DOWNLOAD_BYTES} bytes")
    return decode_image(content, url)


class Chat:
    """Answers questions and executes commands, line by line.

    Args:
        budget: Initial budget; commands change it.
        say: Callback for each line of output, except answers, which are streamed to standard output.
    """

    def __init__(self, predictor: Predictor, budget: Budget, decoding: Decoding, say: Callable[[str], object]) -> None:
        self.predictor = predictor
        self.say = say
        self.images: list[Image.Image] = []
        self.conversation = Conversation(predictor, budget, decoding)

    def run(self, lines: Iterable[str]) -> None:
        """Processes lines until they end or one is /quit."""
        for line in lines:
            words = line.strip()
            if words == "/quit":
                return
            try:
                if words.startswith("/"):
                    self._execute(*words.split(maxsplit=1))
                elif words:
                    self._answer(words)
            except (ValueError, OSError) as error:
                self.say(f"error: {' '.join(str(error).split())}")

    def _answer(self, question: str) -> None:
        streamer = TextStreamer(self.predictor.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = self.conversation.ask(question, self.images, streamer)
        self.images = []
        self.say(describe(answer))

    def _execute(self, command: str, value: str = "") -> None:
        conversation = self.conversation
        if command == "/image":
            is_url = value.startswith(("http://", "https://"))
            image = fetch_image(value) if is_url else load_image(Path(value).expanduser())
            self.images.append(image)
            self.say(f"image of {image.width}x{image.height} pixels: ask about it")
        elif command == "/granularity":
            level = None if value == "auto" else _number(int, command, value)
            if level is not None:
                self.predictor.model.config.check_level(level)
            conversation.budget = replace(conversation.budget, granularity=level, token_cost=0.0)
            self.say("the router chooses" if level is None else f"{level} visual tokens per crop for new images")
        elif command == "/cost":
            cost = _number(float, command, value)
            conversation.budget = replace(conversation.budget, granularity=None, token_cost=cost)
            self.say(f"the router chooses, at {cost:g} nats per doubling of visual tokens")
        elif command == "/reset":
            self.images = []
            self.conversation = Conversation(self.predictor, conversation.budget, conversation.decoding)
            self.say("a new conversation")
        elif command == "/help":
            self.say(HELP)
        else:
            raise ValueError(f"unknown command {command}; /help lists them")


def _number(kind: Callable[[str], Number], command: str, value: str) -> Number:
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"{command} needs a number, got {value!r}") from error


def describe(answer: Answer) -> str:
    """Formats an answer's levels, token counts and times as one line."""
    levels = ", ".join(map(str, answer.granularity))
    granularity = f"{levels} tokens per crop ({'routed' if answer.router_probs else 'forced'}), " if levels else ""
    timings = answer.timings
    return (
        f"[{granularity}{answer.num_visual_tokens} visual of {answer.num_prompt_tokens} prompt tokens, "
        f"first token after {timings.first_token:.0f} ms, complete after {timings.first_token + timings.decode:.0f} ms]"
    )
