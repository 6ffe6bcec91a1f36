"""Web page that answers questions about images and shows the router's choice.

Gradio runs the page's handlers in daemon threads. `Demo.close` waits for the step that is running in one of them:
a daemon thread inside torch aborts the process when the interpreter exits.
"""

import contextlib
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
import torch
from PIL import Image
from starlette.middleware import Middleware

from avg_llava.inference.answers import Answer, Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.predictor import LevelChoice, Predictor
from avg_llava.mini.tokenizer import build_tokenizer
from avg_llava.mini.world import encode_png, scene_of
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.images import decode_image
from avg_llava.serving.middleware import PageGuard
from avg_llava.serving.overlay import TokenPictures
from avg_llava.serving.panels import (
    CROPS_CAPTION,
    PLACEHOLDER,
    STYLE,
    LevelRow,
    cards_html,
    describe_token_count,
    level_rows,
    router_html,
    stats_html,
)
from avg_llava.serving.streams import stream_answer

MAX_UPLOAD_BYTES = 16 * 2**20
MAX_PIXELS = 32_000_000
"""Above the size of any canvas, so that a larger image would only be slower."""
MAX_QUEUE = 16
"""Maximum number of waiting requests; further ones are rejected with a message."""
MAX_QUESTION_CHARACTERS, MAX_NEW_TOKENS = 2000, 512
CACHE_SECONDS = 3600
"""Time after which uploads and drawn pictures are deleted."""
TIMING_ROUNDS, TIMING_SECONDS = 5, 2.0
ROUTED = "router"
EXAMPLES = [
    (5, "Which digits follow the bell?"),
    (5, "What shape is the purple object?"),
    (7, "What colour is the letter L?"),
    (7, "Which background colour covers most of the picture?"),
    (16, "Which digits follow the heart?"),
    (16, "What colour is inside the yellow frame?"),
]
"""(index in the mini world's evaluation split, question)."""

_FONT, _FONT_MONO = ["Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"], ["ui-monospace", "monospace"]

Step = TypeVar("Step")


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Shows errors that the user can fix as a message on the page; all others are logged with their traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error
    except torch.OutOfMemoryError as error:
        message = "the device is out of memory; use a smaller image, a coarser level or a lower limit"
        raise gr.Error(message, print_exception=False) from error


def read_upload(upload: Any) -> Image.Image | None:
    """Reads an uploaded image; gradio has checked that the path is one of its uploads.

    Raises:
        DataError: The file cannot be read as an image, or has too many pixels.
    """
    if upload is None:
        return None
    path = Path(upload["path"])
    return decode_image(path.read_bytes(), upload.get("orig_name") or path.name, MAX_PIXELS)


def read_controls(level: Any, token_cost: Any, max_visual_tokens: Any, max_new_tokens: Any) -> tuple[Budget, Decoding]:
    """Converts the values of the controls. The token cost is ignored at a forced level.

    Raises:
        ValueError: A value is out of range.
    """
    if int(max_new_tokens) > MAX_NEW_TOKENS:
        raise ValueError(f"the maximum length of an answer is {MAX_NEW_TOKENS} tokens, not {max_new_tokens}")
    forced = None if level == ROUTED else int(level)
    budget = Budget(forced, 0.0 if forced else float(token_cost), int(max_visual_tokens))
    return budget, Decoding(int(max_new_tokens))


def save_examples(folder: Path) -> list[list[str]]:
    """Renders the images of `EXAMPLES` into a folder and returns [path, question] pairs."""
    examples = []
    for index, question in EXAMPLES:
        path = folder / f"eval-{index:05d}.png"
        scene, _ = scene_of(0, "eval", index)
        path.write_bytes(encode_png(scene.pixels()))
        examples.append([str(path), question])
    return examples


def measure_first_token(predictor: Predictor, request: Request, budgets: Sequence[Budget]) -> list[float]:
    """Measures the median time to first token, in milliseconds, under each budget.

    Budgets alternate, so that drift affects them alike. There are `TIMING_ROUNDS` rounds, or fewer if they take longer
    than `TIMING_SECONDS` in total.
    """
    times: list[list[float]] = [[] for _ in budgets]
    start = time.monotonic()
    for _ in range(TIMING_ROUNDS):
        for samples, budget in zip(times, budgets, strict=True):
            samples.append(predictor.predict([request], budget, Decoding(1))[0].timings.first_token)
        if time.monotonic() - start > TIMING_SECONDS:
            break
    return [statistics.median(samples) for samples in times]


class Run:
    """One run of an event handler, which can be stopped between any two of its `steps`; None while it is queued."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.steps: Generator[Any] | None = None
        self._stopped = False

    def iterate(self, steps: Generator[Step]) -> Iterator[Step]:
        """Yields from `steps` until they end or the run is stopped."""
        self.steps = steps
        try:
            while True:
                with self._lock:
                    if self._stopped or (step := next(steps, None)) is None:
                        return
                yield step
        finally:
            with self._lock:
                steps.close()

    def stop(self) -> None:
        """Ends the run after the current step; before its first step, prevents it."""
        self._stopped = True

    def stop_and_wait(self) -> None:
        """Ends the run and returns when the current step and its background threads have ended."""
        self._stopped = True
        with self._lock:
            if self.steps is not None:
                self.steps.close()


class Demo:
    """Event handlers of the page.

    A click on a button calls `start` at once, then queues `ask` or `compare`. Gradio's own cancellation is not used:
    it leaves the page in a pending state if a result arrives after the cancellation.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.config = predictor.model.config
        self._closed = False
        self._runs: dict[str, Run] = {}  # by session, from `start` to the end of the handler

    def warm_up(self) -> None:
        """Answers a blank image at every level, so that measured times exclude one-time initialization."""
        size = self.config.crop_size
        encoded = self.predictor.encode([Request("?", (Image.new("RGB", (2 * size, 2 * size)),))])
        self.predictor.choose(encoded)
        for level in self.predictor.granularities:
            self.predictor.answer(encoded, level, Decoding(1))

    def close(self) -> None:
        """Stops all runs and returns when none uses the model any more; later runs end before their first step."""
        self._closed = True
        for run in list(self._runs.values()):
            run.stop_and_wait()

    def start(self, request: gr.Request) -> list[gr.Button]:
        """Registers the run of a click, so that it can be stopped while it is queued; returns the buttons' states."""
        current = self._runs.get(request.session_hash)
        if current is None or current.steps is not None:
            self._runs[request.session_hash] = Run()
        return button_states(busy=True)

    def stop(self, request: gr.Request) -> None:
        """Stops the session's run."""
        if request.session_hash in self._runs:
            self._runs[request.session_hash].stop()

    def leave(self, request: gr.Request) -> None:
        """Stops the session's run when its tab is closed."""
        run = self._runs.pop(request.session_hash, None)
        if run is not None:
            run.stop()

    def check(self, upload: Any) -> None:
        """Shows a message if an uploaded image cannot be read."""
        with errors_as_messages():
            read_upload(upload)

    def ask(self, request: gr.Request, upload: Any, question: Any, *controls: Any) -> Iterator[tuple[Any, ...]]:
        """Answers a question.

        Yields:
            The text so far, the figures, the router's bars, and the pictures of tiles and overview.
        """
        yield from self._run(request, self._ask(upload, question, controls))

    def compare(self, request: gr.Request, upload: Any, question: Any, *controls: Any) -> Iterator[str]:
        """Answers a question at every level, with one encoding of the image.

        Yields:
            The cards of all levels: after each answer, and finally with times and pictures.
        """
        yield from self._run(request, self._compare(upload, question, controls))

    def _run(self, request: gr.Request, steps: Generator[Step]) -> Iterator[Step]:
        run = self._runs.setdefault(request.session_hash, Run())
        if self._closed:
            run.stop()
        try:
            with errors_as_messages():
                yield from run.iterate(steps)
        finally:
            self._runs.pop(request.session_hash, None)

    def _ask(self, upload: Any, question: Any, controls: tuple[Any, ...]) -> Generator[tuple[Any, ...]]:
        image, request, budget, decoding = self._read(upload, question, controls)
        encoded = self.predictor.encode([request])
        if image is None:
            for part in stream_answer(self.predictor, encoded, None, decoding):
                yield part.text if isinstance(part, Answer) else part, "", "", None, None
            return
        choice = self.predictor.choose(encoded, budget)
        rows, token_count = self._rows(image, budget, choice)
        yield "", stats_html(rows, token_count, None, None), router_html(rows, budget.token_cost), None, None
        for part in stream_answer(self.predictor, encoded, choice, decoding):
            if isinstance(part, str):
                yield part, *[gr.skip()] * 4
            else:
                yield part.text, stats_html(rows, token_count, part, None), *[gr.skip()] * 3
                finest = Budget(self.predictor.granularities[-1])
                first, slowest = measure_first_token(self.predictor, request, [budget, finest])
                # Last, since drawing here and in the browser would disturb the measurement.
                pictures, level = self._pictures(image), choice.levels[0]
                figures = stats_html(rows, token_count, part, (first, slowest))
                yield gr.skip(), figures, gr.skip(), pictures.tiles(level), pictures.overview(level)

    def _compare(self, upload: Any, question: Any, controls: tuple[Any, ...]) -> Generator[str]:
        image, request, budget, decoding = self._read(upload, question, controls)
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
        times = measure_first_token(self.predictor, request, [Budget(level) for level in answers])
        pictures = self._pictures(image)
        tiles = {level: pictures.tiles(level) for level in answers}
        yield cards_html(rows, answers, dict(zip(answers, times, strict=True)), tiles)

    def _read(
        self, upload: Any, question: Any, controls: tuple[Any, ...]
    ) -> tuple[Image.Image | None, Request, Budget, Decoding]:
        """Validates the inputs of `ask` and `compare`."""
        text = str(question or "").strip()
        if not text:
            raise ValueError("there is no question: type one")
        if len(text) > MAX_QUESTION_CHARACTERS:
            raise ValueError(f"the question has {len(text)} characters; the maximum is {MAX_QUESTION_CHARACTERS}")
        budget, decoding = read_controls(*controls)
        image = read_upload(upload)
        return image, Request(text, () if image is None else (image,)), budget, decoding

    def _pictures(self, image: Image.Image) -> TokenPictures:
        return TokenPictures(image, self.predictor.processor.image_processor, self.config)

    def _rows(self, image: Image.Image, budget: Budget, choice: LevelChoice) -> tuple[list[LevelRow], str]:
        """Returns the levels of an image and a description of its number of visual tokens."""
        size, level = (image.height, image.width), choice.levels[0]
        probabilities = choice.router_probs(slice(0, 1))
        rows = level_rows(size, self.config, budget, probabilities[0] if probabilities else None, level)
        return rows, describe_token_count(size, level, self.config)


def button_states(busy: bool) -> list[gr.Button]:
    """Returns updates of the buttons Ask, All levels and Stop."""
    return [gr.Button(interactive=interactive) for interactive in (not busy, not busy, busy)]


def build_page(demo: Demo, examples: list[list[str]]) -> gr.Blocks:
    """Builds the page, with [image path, question] pairs as examples if there are any."""
    config = demo.config
    levels = config.granularities
    ends = (levels[0], levels[-1])
    tokens = [num_visual_tokens(size, level, config) for size in config.image_grid_pinpoints for level in ends]
    with gr.Blocks(title="AVG-LLaVA", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
        gr.Markdown(
            "**AVG-LLaVA** · the router chooses, from the image and the question, how many visual tokens the language "
            "model sees"
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
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80, interactive=False)
                level = gr.Radio(
                    [("router", ROUTED), *((str(level), str(level)) for level in levels)],
                    value=ROUTED, label="Visual tokens per crop", elem_id="level",
                )  # fmt: skip
                token_cost = gr.Slider(
                    0, 1, value=0, step=0.01, label="Token cost", elem_id="token-cost",
                    info="nats per doubling of visual tokens; paper: 0",
                )  # fmt: skip
                max_visual_tokens = gr.Slider(
                    min(tokens), max(tokens), value=max(tokens), step=1, label="Maximum visual tokens",
                    elem_id="max-visual-tokens",
                )  # fmt: skip
                max_new_tokens = gr.Slider(
                    1,
                    MAX_NEW_TOKENS,
                    value=128,
                    step=1,
                    label="Maximum answer length in tokens",
                    elem_id="max-new-tokens",
                )
            with gr.Column(scale=7, min_width=500):
                answer = gr.Textbox(label="Answer", lines=2, interactive=False, elem_id="answer")
                stats = gr.HTML(elem_id="stats")
                router = gr.HTML(PLACEHOLDER, elem_id="router")
                gr.HTML(CROPS_CAPTION, elem_id="pictures")
                with gr.Row():
                    picture: dict[str, Any] = {
                        "format": "png", "interactive": False, "height": 330, "show_label": False,
                        "buttons": ["fullscreen"],
                    }  # fmt: skip
                    tiles = gr.Image(scale=2, elem_id="tiles", **picture)
                    overview = gr.Image(scale=1, min_width=120, elem_id="overview", **picture)
        cards = gr.HTML(elem_id="levels")
        if examples:
            gr.Examples(examples, [image, question], label="Examples", elem_id="examples")

        buttons = [ask, compare, stop]
        unqueued: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        # preprocess=False: gradio would decode uploaded images without a limit on pixels.
        queued: dict[str, Any] = {
            "inputs": [image, question, level, token_cost, max_visual_tokens, max_new_tokens], "preprocess": False,
            "concurrency_id": "model", "show_progress": "minimal", "api_visibility": "private",
        }  # fmt: skip
        handlers = [
            gr.on([ask.click, question.submit], demo.start, outputs=buttons, **unqueued).then(
                demo.ask, outputs=[answer, stats, router, tiles, overview], show_progress_on=answer, **queued
            ),
            compare.click(demo.start, outputs=buttons, **unqueued).then(demo.compare, outputs=cards, **queued),
        ]
        for handler in handlers:
            handler.then(lambda: button_states(busy=False), outputs=buttons, **unqueued)
        stop.click(demo.stop, **unqueued)
        page.unload(demo.leave)
        image.upload(demo.check, image, preprocess=False, api_visibility="private")
        level.change(
            lambda chosen: gr.Slider(interactive=chosen == ROUTED), level, token_cost,
            queue=False, api_visibility="private",
        )  # fmt: skip
    return page


@contextlib.contextmanager
def serve_page(predictor: Predictor, host: str, port: int) -> Iterator[str]:
    """Serves the page inside the context; uploads and pictures are deleted at its end.

    Yields:
        The page's URL.

    Raises:
        OSError: The address is not available.
    """
    demo = Demo(predictor)
    demo.warm_up()
    with tempfile.TemporaryDirectory(prefix="avg-llava-demo-") as folder:
        is_mini = predictor.processor.tokenizer.get_vocab() == build_tokenizer().get_vocab()
        page = build_page(demo, save_examples(Path(folder)) if is_mini else [])
        page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1, api_open=False)
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
            demo.close()
            page.close(verbose=False)


def wait_for_signal() -> None:
    """Blocks until SIGINT (Ctrl-C) or SIGTERM."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    while not received:
        time.sleep(0.1)
