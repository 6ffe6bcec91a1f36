"""The web page: a question about an image, answered before one's eyes, with what the router saw in it."""

import contextlib
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import gradio as gr
import torch
from PIL import Image
from starlette.middleware import Middleware

from avg_llava.inference.answers import Answer, Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.predictor import Choice, Predictor
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.images import decode_image
from avg_llava.serving.examples import draw_examples, knows_the_mini_world
from avg_llava.serving.middleware import PageGuard
from avg_llava.serving.overlay import TokenPictures
from avg_llava.serving.panels import (
    INVITATION,
    PICTURES,
    STYLE,
    LevelRow,
    cards_html,
    level_rows,
    router_html,
    stats_html,
    token_sum,
)
from avg_llava.serving.streams import stream_answer
from avg_llava.serving.timing import time_first_tokens

MAX_UPLOAD_BYTES = 16 * 2**20
MAX_PIXELS = 32_000_000
"""More than any canvas holds: what is above is only slow."""
MAX_WAITING = 16
"""Requests in the queue; the next one is told to come again."""
MAX_QUESTION_CHARACTERS, MAX_NEW_TOKENS = 2000, 512
KEPT_SECONDS = 3600
"""How long uploads and drawn pictures stay on the disk."""
ROUTED = "router"

_FONT, _FONT_MONO = ["Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"], ["ui-monospace", "monospace"]


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """What a user can put right becomes a message on the page; a bug stays one, and its traceback in the terminal."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error
    except torch.OutOfMemoryError as error:
        message = "the device has no memory left for this; a smaller image, a coarser level or a lower limit takes less"
        raise gr.Error(message, print_exception=False) from error


def read_upload(upload: Any) -> Image.Image | None:
    """The image of an upload, as the page sends it; gradio has seen to it that the file is one of its uploads.

    Raises:
        DataError: The file cannot be read as an image, or has too many pixels.
    """
    if upload is None:
        return None
    path = Path(upload["path"])
    return decode_image(path.read_bytes(), upload.get("orig_name") or path.name, MAX_PIXELS)


def read_controls(level: Any, token_cost: Any, max_visual_tokens: Any, max_new_tokens: Any) -> tuple[Budget, Decoding]:
    """What the controls mean. The price is the router's, so a forced level has none.

    Raises:
        ValueError: A value that the controls cannot have.
    """
    if int(max_new_tokens) > MAX_NEW_TOKENS:
        raise ValueError(f"an answer here is at most {MAX_NEW_TOKENS} tokens long, not {max_new_tokens}")
    forced = None if level == ROUTED else int(level)
    budget = Budget(forced, 0.0 if forced else float(token_cost), int(max_visual_tokens))
    return budget, Decoding(int(max_new_tokens))


class Demo:
    """What the page's buttons do.

    Args:
        predictor: Answers.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.config = predictor.model.config

    def warm_up(self) -> None:
        """Answers a blank image at every level, so that the first measured time is no start-up time."""
        size = self.config.vision_config.image_size
        encoded = self.predictor.encode([Request("?", (Image.new("RGB", (2 * size, 2 * size)),))])
        self.predictor.choose(encoded)
        for level in self.predictor.granularities:
            self.predictor.answer(encoded, level, Decoding(1))

    def check(self, upload: Any) -> None:
        """Tells at once what is wrong with an image."""
        with errors_as_messages():
            read_upload(upload)

    def ask(self, upload: Any, question: Any, *controls: Any) -> Iterator[tuple[Any, ...]]:
        """Answers a question.

        Yields:
            The text so far, the figures, the router's bars, and the pictures of tiles and overview.
        """
        with errors_as_messages():
            image, request, budget, decoding = self._begin(upload, question, controls)
            encoded = self.predictor.encode([request])
            if image is None:
                for part in stream_answer(self.predictor, encoded, None, decoding):
                    yield _text(part), "", "", None, None
                return
            choice = self.predictor.choose(encoded, budget)
            rows, sizes = self._rows(image, budget, choice)
            yield "", stats_html(rows, sizes, None, None), router_html(rows, budget.token_cost), None, None
            for part in stream_answer(self.predictor, encoded, choice, decoding):
                if isinstance(part, str):
                    yield part, *_unchanged(4)
                else:
                    yield part.text, stats_html(rows, sizes, part, None), *_unchanged(3)
                    finest = Budget(self.predictor.granularities[-1])
                    own, slow = time_first_tokens(self.predictor, request, [budget, finest])
                    # Pictures come last: the work they make here and in the browser would be in the times.
                    pictures, level = self._pictures(image), choice.levels[0]
                    drawn = pictures.tiles(level), pictures.overview(level)
                    yield gr.skip(), stats_html(rows, sizes, part, (own, slow)), gr.skip(), *drawn

    def compare(self, upload: Any, question: Any, *controls: Any) -> Iterator[str]:
        """Answers a question at every level, from one encoding of the image.

        Yields:
            The cards of the levels, one more of them filled each time; at the end with times and pictures.
        """
        with errors_as_messages():
            image, request, budget, decoding = self._begin(upload, question, controls)
            if image is None:
                raise ValueError("levels are compared on an image: choose one")
            encoded = self.predictor.encode([request])
            budget = replace(budget, granularity=None)
            rows, _ = self._rows(image, budget, self.predictor.choose(encoded, budget))
            answers: dict[int, Answer] = {}
            yield cards_html(rows, answers, {}, {})
            for row in rows:
                answers[row.granularity] = self.predictor.answer(encoded, row.granularity, decoding)[0]
                yield cards_html(rows, answers, {}, {})
            times = time_first_tokens(self.predictor, request, [Budget(level) for level in answers])
            pictures = self._pictures(image)
            drawn = {level: pictures.tiles(level) for level in answers}
            yield cards_html(rows, answers, dict(zip(answers, times, strict=True)), drawn)

    def _begin(
        self, upload: Any, question: Any, controls: tuple[Any, ...]
    ) -> tuple[Image.Image | None, Request, Budget, Decoding]:
        """What both buttons begin with: reading what they come with."""
        text = str(question or "").strip()
        if not text:
            raise ValueError("there is no question: type one")
        if len(text) > MAX_QUESTION_CHARACTERS:
            raise ValueError(f"the question has {len(text)} characters, {MAX_QUESTION_CHARACTERS} at most are read")
        budget, decoding = read_controls(*controls)
        image = read_upload(upload)
        return image, Request(text, () if image is None else (image,)), budget, decoding

    def _pictures(self, image: Image.Image) -> TokenPictures:
        return TokenPictures(image, self.predictor.processor.image_processor, self.config)

    def _rows(self, image: Image.Image, budget: Budget, choice: Choice) -> tuple[list[LevelRow], str]:
        """The levels of an image, and how the tokens of the chosen one come about."""
        size, level = (image.height, image.width), choice.levels[0]
        probabilities = choice.router_probs(slice(0, 1))
        rows = level_rows(size, self.config, budget, probabilities[0] if probabilities else None, level)
        return rows, token_sum(size, level, self.config)


def _text(part: str | Answer) -> str:
    return part if isinstance(part, str) else part.text


def _unchanged(count: int) -> list[Any]:
    return [gr.skip()] * count


def build_page(demo: Demo, examples: list[tuple[str, str]]) -> gr.Blocks:
    """The page.

    Args:
        demo: What its buttons do.
        examples: Paths of images and questions about them; may be empty.
    """
    config = demo.config
    levels = config.granularities
    canvases = [tuple(pinpoint) for pinpoint in config.image_grid_pinpoints]
    tokens = [num_visual_tokens(size, level, config) for size in canvases for level in (levels[0], levels[-1])]
    with gr.Blocks(title="AVG-LLaVA", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(
            "**AVG-LLaVA** · the router looks at the image and the question, and chooses how many visual tokens the "
            "language model gets to see"
        )
        with gr.Row():
            with gr.Column(scale=4, min_width=340):
                image = gr.Image(
                    label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=250,
                    elem_id="image",
                )  # fmt: skip
                question = gr.Textbox(
                    label="Question", placeholder="What is in the image?", elem_id="question",
                    max_length=MAX_QUESTION_CHARACTERS,
                )  # fmt: skip
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=80)
                    compare = gr.Button("All levels", elem_id="compare", min_width=80)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80)
                level = gr.Radio(
                    [("router", ROUTED), *((str(level), str(level)) for level in levels)],
                    value=ROUTED, label="Visual tokens per crop", elem_id="level",
                )  # fmt: skip
                token_cost = gr.Slider(
                    0, 1, value=0, step=0.01, label="Price of tokens", elem_id="token-cost",
                    info="nats per doubling of visual tokens; 0 is the paper",
                )  # fmt: skip
                max_visual_tokens = gr.Slider(
                    min(tokens), max(tokens), value=max(tokens), step=1, label="Most visual tokens",
                    elem_id="max-visual-tokens",
                )  # fmt: skip
                max_new_tokens = gr.Slider(
                    1, MAX_NEW_TOKENS, value=128, step=1, label="Longest answer, in tokens", elem_id="max-new-tokens"
                )
            with gr.Column(scale=7, min_width=500):
                answer = gr.Textbox(label="Answer", lines=2, interactive=False, elem_id="answer")
                stats = gr.HTML(elem_id="stats")
                router = gr.HTML(INVITATION, elem_id="router")
                gr.HTML(PICTURES, elem_id="pictures")
                with gr.Row():
                    shown: dict[str, Any] = {
                        "format": "png", "interactive": False, "height": 330, "show_label": False,
                        "buttons": ["fullscreen"],
                    }  # fmt: skip
                    tiles = gr.Image(scale=2, elem_id="tiles", **shown)
                    overview = gr.Image(scale=1, min_width=120, elem_id="overview", **shown)
        cards = gr.HTML(elem_id="levels")
        if examples:
            gr.Examples(
                [list(example) for example in examples], [image, question], label="Examples", elem_id="examples"
            )

        inputs = [image, question, level, token_cost, max_visual_tokens, max_new_tokens]
        # Values come as the page sends them (preprocess=False): gradio would open images without our limits.
        options: dict[str, Any] = {
            "inputs": inputs, "preprocess": False, "concurrency_id": "model", "api_visibility": "private",
        }  # fmt: skip
        asked = gr.on(
            [ask.click, question.submit], demo.ask, outputs=[answer, stats, router, tiles, overview],
            show_progress="minimal", show_progress_on=answer, **options,
        )  # fmt: skip
        compared = compare.click(demo.compare, outputs=cards, show_progress="minimal", **options)
        stop.click(None, cancels=[asked, compared])
        image.upload(demo.check, image, preprocess=False, api_visibility="private")
        level.change(
            lambda chosen: gr.Slider(interactive=chosen == ROUTED), level, token_cost,
            queue=False, api_visibility="private",
        )  # fmt: skip
    return page


@contextlib.contextmanager
def serving(predictor: Predictor, host: str, port: int) -> Iterator[str]:
    """Serves the page while the context lasts; uploads and pictures are gone after it.

    Yields:
        Its address.

    Raises:
        OSError: The port is taken, or the host is none of this machine's.
    """
    demo = Demo(predictor)
    demo.warm_up()
    with tempfile.TemporaryDirectory(prefix="avg-llava-demo-") as folder:
        drawn = draw_examples(Path(folder)) if knows_the_mini_world(predictor.processor.tokenizer) else []
        page = build_page(demo, drawn)
        page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=MAX_UPLOAD_BYTES,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                app_kwargs={"middleware": [Middleware(PageGuard, max_upload_bytes=MAX_UPLOAD_BYTES)]},
                theme=gr.themes.Default(font=_FONT, font_mono=_FONT_MONO),
                css=STYLE,
            )
        except OSError as error:
            raise OSError(f"cannot listen on {host}, port {port}: choose another --port, or --host") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def wait_for_the_end() -> None:
    """Returns when the process is told to end (Ctrl-C or SIGTERM)."""
    told = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        told.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    while not told.wait(1):  # a signal that reaches another thread does not end a wait
        continue


__all__ = ["Demo", "build_page", "read_controls", "read_upload", "serving", "wait_for_the_end"]
