"""`avg-llava bench serve`: concurrent clients load-test a server started for the purpose and check every answer.

Questions come from the mini world and cover routed and forced levels, token costs and limits, zero to two images,
single and multiple turns, seeded sampling and stop texts; half of the answers are streamed. The reference (`expected`)
is the model's answer to the same question alone, computed in this process.
"""

import base64
import contextlib
import http.client
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from avg_llava.bench.timing import environment
from avg_llava.common.tables import render_table
from avg_llava.inference.answers import Answer, Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.pipeline import Pipeline
from avg_llava.inference.predictor import Predictor
from avg_llava.mini.questions import choose_questions
from avg_llava.mini.world import NOT_ASKED, encode_png, scene_of

MODEL_NAME = "mini"
NUM_QUESTIONS = 96
MAX_WRONG_EXAMPLES = 5
SOCKET_TIMEOUT = 150.0  # seconds
PERCENTILES = ("p50", "p95", "max")


@dataclass(frozen=True)
class Question:
    """A request body and the answer expected from the server."""

    body: dict[str, Any]
    expected: Answer


@dataclass(frozen=True)
class Reply:
    """The server's reply; `first_seconds` is the time to the first piece of a streamed answer."""

    status: int
    text: str
    granularity: tuple[int, ...]
    visual_tokens: int
    first_seconds: float | None


@dataclass
class ClientResults:
    """Latencies in seconds, failures and wrong answers of all clients, which hold the lock while they add theirs.

    `first_seconds` are the times to the first piece of streamed answers; `failures` counts by HTTP status or exception.
    """

    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def make_questions(predictor: Predictor, num_questions: int = NUM_QUESTIONS, seed: int = 0) -> list[Question]:
    """Questions about mini-world images with the answers that the predictor gives to each alone."""
    questions = []
    for index in range(num_questions):
        scene, rng = scene_of(seed, "serve", index)
        other, _ = scene_of(seed, "serve-other", index)
        asked = [question.wordings[0] for question in choose_questions(scene, 2, rng, NOT_ASKED)]
        num_images = (1, 1, 1, 2, 0)[index % 5]
        images = [encode_png(scene.pixels()), encode_png(other.pixels())][:num_images]
        later: list[dict[str, Any]] = []
        if index % 7 == 0:
            later = [{"role": "assistant", "content": "red"}, {"role": "user", "content": asked[-1]}]
        text: dict[str, Any] = {"type": "text", "text": asked[0]}
        asked_alone = {"role": "user", "content": [*[{"type": "image"}] * num_images, text]}
        asked_server = {"role": "user", "content": [*map(_image_part, images), text]}
        budget, decoding, fields = _settings(index, predictor.granularities)
        request = Request([asked_alone, *later], tuple(images))
        body = {
            "model": MODEL_NAME,
            "messages": [asked_server, *later],
            "max_tokens": decoding.max_new_tokens,
            **fields,
        }
        questions.append(Question(body, predictor.predict([request], budget, decoding)[0]))
    return questions


def _settings(index: int, levels: Sequence[int]) -> tuple[Budget, Decoding, dict[str, Any]]:
    """Budget and decoding of a question, and the same as fields of the request body."""
    level = levels[index % len(levels)]
    settings: list[tuple[Budget, Decoding, dict[str, Any]]] = [
        (Budget(), Decoding(16), {}),
        (Budget(level), Decoding(16), {"granularity": level}),
        (Budget(token_cost=0.5), Decoding(3), {"token_cost": 0.5}),
        (Budget(max_visual_tokens=400), Decoding(16), {"max_visual_tokens": 400}),
        (
            Budget(),
            Decoding(16, temperature=1.0, top_p=0.9, seed=index),
            {"temperature": 1.0, "top_p": 0.9, "seed": index},
        ),
        (Budget(), Decoding(16, stop=("e", " ")), {"stop": ["e", " "]}),
    ]
    return settings[index % len(settings)]


def _image_part(png: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}}


@contextlib.contextmanager
def started_server(model: str | Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs `avg-llava serve` on a free port; yields the process and its address, and kills the process at the end.

    Raises:
        OSError: The server ended before it listened; its messages are on standard error.
    """
    command = [sys.executable, "-m", "avg_llava.cli", "serve", "--model", str(model), "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise OSError(f"the server did not start (exit code {process.wait()})")
            yield process, line.rsplit(" at ", 1)[1].strip()
        finally:
            process.kill()


def ask(connection: http.client.HTTPConnection, body: Mapping[str, Any], stream: bool) -> Reply:
    """Sends one chat request and reads the whole reply.

    Raises:
        OSError: The connection failed.
        http.client.HTTPException: The stream reported an error or ended early.
    """
    start = time.monotonic()
    fields = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    content = json.dumps({**body, **fields})
    connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        return Reply(response.status, json.loads(response.read())["error"]["message"], (), 0, None)
    if stream:
        return _read_stream(response, start)
    answer = json.loads(response.read())
    text, usage = answer["choices"][0]["message"]["content"], answer["usage"]
    return Reply(200, text, tuple(answer["granularity"]), usage["prompt_tokens_details"]["visual_tokens"], None)


def _read_stream(response: http.client.HTTPResponse, start: float) -> Reply:
    """Reads server-sent events up to `[DONE]`; `start` is the time of the request."""
    pieces: list[str] = []
    levels: list[int] = []
    visual_tokens, first = 0, None
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]\n":
            response.read()
            return Reply(200, "".join(pieces), tuple(levels), visual_tokens, first)
        event = json.loads(line[6:])
        if "error" in event:
            raise http.client.HTTPException(event["error"]["message"])
        for choice in event["choices"]:
            if piece := choice["delta"].get("content"):
                first = first or time.monotonic() - start
                pieces.append(piece)
        levels = event.get("granularity", levels)
        if event.get("usage"):
            visual_tokens = event["usage"]["prompt_tokens_details"]["visual_tokens"]
    raise http.client.IncompleteRead(b"", None)


def _connect(address: str) -> http.client.HTTPConnection:
    url = urlsplit(address)
    return http.client.HTTPConnection(str(url.hostname), url.port, timeout=SOCKET_TIMEOUT)


def _run_client(address: str, questions: Sequence[Question], seed: int, until: float, results: ClientResults) -> None:
    """Main function of a client's thread: asks random questions one after another until the time `until`."""
    rng = random.Random(seed)
    connection = _connect(address)
    while time.monotonic() < until:
        question, stream = rng.choice(questions), rng.random() < 0.5
        start = time.monotonic()
        try:
            reply = ask(connection, question.body, stream)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            with results.lock:
                results.failures[type(error).__name__] += 1
            continue
        seconds = time.monotonic() - start
        expected = question.expected
        with results.lock:
            if reply.status != 200:
                results.failures[str(reply.status)] += 1
                continue
            results.seconds.append(seconds)
            if reply.first_seconds is not None:
                results.first_seconds.append(reply.first_seconds)
            wanted = (expected.text, expected.granularity, expected.num_visual_tokens)
            if (reply.text, reply.granularity, reply.visual_tokens) != wanted:
                results.wrong.append(f"{wanted} is {reply}")
    connection.close()


def read_metrics(address: str) -> dict[str, float]:
    """Values of the server's Prometheus metrics by name, with labels in braces if there are any."""
    connection = _connect(address)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return values


def bench_serve(model: str | Path, clients: int = 64, seconds: int = 120) -> dict[str, Any]:
    """Starts a server and runs the clients against it.

    Args:
        model: A checkpoint trained on the mini world.
        clients: Number of concurrent clients; each asks again as soon as it has its answer.

    Returns:
        Numbers of answers, failures by status and wrong answers; latencies in seconds by percentile; the server's
        memory, batch sizes and exit code; the machine.
    """
    questions = make_questions(Pipeline.load(model).predictor)
    results = ClientResults()
    with started_server(model, "--name", MODEL_NAME, "--max-queue", str(max(64, clients))) as (process, address):
        before = read_metrics(address)
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=_run_client, args=(address, questions, number, until, results))
            for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        memory = []
        while any(thread.is_alive() for thread in threads):
            memory.append((time.monotonic(), read_metrics(address)["process_resident_memory_bytes"]))
            time.sleep(min(1.0, seconds / 20))
        after = read_metrics(address)
        process.terminate()
        exit_code = process.wait()
    halfway = until - seconds / 2
    batches = after["avg_llava_batch_size_count"]
    return {
        "clients": clients,
        "seconds": seconds,
        "questions": len(questions),
        "answered": len(results.seconds),
        "wrong": len(results.wrong),
        "wrong_examples": results.wrong[:MAX_WRONG_EXAMPLES],
        "failures": dict(results.failures),
        "requests_per_second": len(results.seconds) / seconds,
        "latency_seconds": _percentiles(results.seconds),
        "first_token_seconds": _percentiles(results.first_seconds),
        "mean_batch_size": after["avg_llava_batch_size_sum"] / batches if batches else 0.0,
        "images_by_granularity": {
            key.partition("granularity=")[2].rstrip("}"): int(value)
            for key, value in after.items()
            if key.startswith("avg_llava_images_total{")
        },
        "memory_bytes": {
            "start": before["process_resident_memory_bytes"],
            "peak_of_first_half": max((size for at, size in memory if at <= halfway), default=0.0),
            "peak": max(size for _, size in memory),
            "end": after["process_resident_memory_bytes"],
        },
        "exit_code": exit_code,
        **environment(),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return dict.fromkeys(PERCENTILES, values[0] if values else 0.0)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "max": max(values)}


def is_fine(result: Mapping[str, Any]) -> bool:
    """True if there were answers, all correct, no request failed and the server exited with code 0."""
    return bool(result["answered"] and not result["wrong"] and not result["failures"] and result["exit_code"] == 0)


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """The result as lines of text."""
    latencies = [
        (name, *(f"{result[key][column]:.3f} s" for column in PERCENTILES))
        for name, key in (("whole answer", "latency_seconds"), ("first token of streams", "first_token_seconds"))
    ]
    memory = ", ".join(f"{name.replace('_', ' ')} {size / 1e6:.0f}" for name, size in result["memory_bytes"].items())
    return [
        f"{result['clients']} clients for {result['seconds']} s: {result['answered']} answers "
        f"({result['requests_per_second']:.1f} per second), {result['wrong']} wrong, "
        f"{sum(result['failures'].values())} failed {result['failures'] or ''}".rstrip(),
        *(f"  wrong: {example}" for example in result["wrong_examples"]),
        *render_table(("", *PERCENTILES), latencies).splitlines(),
        f"mean batch size {result['mean_batch_size']:.1f}; images by level {result['images_by_granularity']}",
        f"server's memory in MB: {memory}",
        f"after SIGTERM the server ended with exit code {result['exit_code']}",
    ]
