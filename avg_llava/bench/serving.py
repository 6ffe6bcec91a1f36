"""`avg-llava bench serve`: many clients at once ask a server that is started for it, and every answer is compared.

Questions are the mini world's: routed, at forced levels, under prices and limits, with one image, several or none, of
one turn and more, drawn by a seed, ended by texts; half of them stream. The right answer to each is what the model says
when it is asked alone, in this process.
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

from avg_llava.common.machine import machine_facts
from avg_llava.inference.answers import Answer, Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.pipeline import Pipeline
from avg_llava.inference.predictor import Predictor
from avg_llava.mini.questions import choose_questions
from avg_llava.mini.world import NOT_ASKED, encode_png, scene_of

_NAME = "mini"
_NUM_QUESTIONS = 96
_MAX_TOLD = 5
_SOCKET_SECONDS = 150.0


@dataclass(frozen=True)
class Question:
    """What a client sends, and what must come back."""

    body: dict[str, Any]
    expected: Answer


@dataclass(frozen=True)
class Reply:
    """What came back; `first_seconds` until the first piece of a streamed answer."""

    status: int
    text: str
    granularity: tuple[int, ...]
    visual_tokens: int
    first_seconds: float | None


@dataclass
class Tally:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    num_wrong: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def make_questions(predictor: Predictor, num_questions: int = _NUM_QUESTIONS, seed: int = 0) -> list[Question]:
    """Questions about drawn pictures, each answered alone."""
    levels, questions = predictor.granularities, []
    for index in range(num_questions):
        scene, rng = scene_of(seed, "serve", index)
        other, _ = scene_of(seed, "serve-other", index)
        asked = [own.wordings[0] for own in choose_questions(scene, 2, rng, NOT_ASKED)]
        pictures = [encode_png(scene.pixels()), encode_png(other.pixels())]
        budget, decoding, fields = _ways(index, levels)
        num_images = (1, 1, 1, 2, 0)[index % 5]
        parts: list[dict[str, Any]] = [_image_part(picture) for picture in pictures[:num_images]]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": asked[0]}]}]
        if index % 7 == 0:
            messages += [{"role": "assistant", "content": "red"}, {"role": "user", "content": asked[-1]}]
        own_messages = json.loads(json.dumps(messages))
        own_messages[0]["content"] = [{"type": "image"}] * num_images + own_messages[0]["content"][num_images:]
        request = Request(own_messages, tuple(pictures[:num_images]))
        body = {"model": _NAME, "messages": messages, "max_tokens": decoding.max_new_tokens, **fields}
        questions.append(Question(body, predictor.predict([request], budget, decoding)[0]))
    return questions


def _ways(index: int, levels: Sequence[int]) -> tuple[Budget, Decoding, dict[str, Any]]:
    """How one question is to be answered: budget and decoding, and the same as fields of a request."""
    ways: list[tuple[Budget, Decoding, dict[str, Any]]] = [
        (Budget(), Decoding(16), {}),
        (Budget(levels[index % len(levels)]), Decoding(16), {"granularity": levels[index % len(levels)]}),
        (Budget(token_cost=0.5), Decoding(3), {"token_cost": 0.5}),
        (Budget(max_visual_tokens=400), Decoding(16), {"max_visual_tokens": 400}),
        (
            Budget(),
            Decoding(16, temperature=1.0, top_p=0.9, seed=index),
            {"temperature": 1.0, "top_p": 0.9, "seed": index},
        ),
        (Budget(), Decoding(16, stop=("e", " ")), {"stop": ["e", " "]}),
    ]
    return ways[index % len(ways)]


def _image_part(png: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}}


@contextlib.contextmanager
def started_server(model: str | Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`avg-llava serve` on a free port of this machine: its process and its address. Killed if it is left running.

    Raises:
        OSError: It ended before it listened; its own words are on standard error.
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
    """One chat request."""
    began = time.monotonic()
    fields = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    content = json.dumps({**body, **fields})
    connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200 or not stream:
        told = json.loads(response.read())
        if response.status != 200:
            return Reply(response.status, told["error"]["message"], (), 0, None)
        text, usage = told["choices"][0]["message"]["content"], told["usage"]
        return Reply(200, text, tuple(told["granularity"]), usage["prompt_tokens_details"]["visual_tokens"], None)
    pieces: list[str] = []
    levels: list[int] | None = None
    visual_tokens, first = 0, None
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]\n":
            response.read()
            return Reply(200, "".join(pieces), tuple(levels or ()), visual_tokens, first)
        event = json.loads(line[6:])
        if "error" in event:
            raise http.client.HTTPException(event["error"]["message"])
        for choice in event["choices"]:
            if piece := choice["delta"].get("content"):
                first = first or time.monotonic() - began
                pieces.append(piece)
        levels = event.get("granularity", levels)
        visual_tokens = (event.get("usage") or {"prompt_tokens_details": {"visual_tokens": 0}})[
            "prompt_tokens_details"
        ]["visual_tokens"]
    raise http.client.IncompleteRead(b"", None)


def _be_a_client(address: str, questions: Sequence[Question], number: int, until: float, tally: Tally) -> None:
    rng = random.Random(number)
    where = urlsplit(address)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=_SOCKET_SECONDS)
    while time.monotonic() < until:
        question, stream = rng.choice(questions), rng.random() < 0.5
        began = time.monotonic()
        try:
            reply = ask(connection, question.body, stream)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            with tally.lock:
                tally.failures[type(error).__name__] += 1
            continue
        seconds = time.monotonic() - began
        expected = question.expected
        with tally.lock:
            if reply.status != 200:
                tally.failures[str(reply.status)] += 1
                continue
            tally.seconds.append(seconds)
            if reply.first_seconds is not None:
                tally.first_seconds.append(reply.first_seconds)
            wanted = (expected.text, expected.granularity, expected.num_visual_tokens)
            if (reply.text, reply.granularity, reply.visual_tokens) != wanted:
                tally.num_wrong += 1
                tally.wrong.append(f"{wanted} is {reply}")
                del tally.wrong[_MAX_TOLD:]
    connection.close()


def read_metrics(address: str) -> dict[str, float]:
    """The server's metrics: name, with labels in braces if any, and value."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=_SOCKET_SECONDS)
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
    """Runs the clients.

    Args:
        model: A checkpoint that knows the mini world.
        clients: How many ask at once, each again as soon as it has its answer.
        seconds: How long they ask.

    Returns:
        Numbers of requests, failures by status and wrong answers; seconds by percentile; memory; the exit code.
    """
    questions = make_questions(Pipeline.load(model).predictor)
    tally = Tally()
    with started_server(model, "--name", _NAME, "--max-queue", str(max(64, clients))) as (process, address):
        before = read_metrics(address)
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=_be_a_client, args=(address, questions, number, until, tally))
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
        "answered": len(tally.seconds),
        "wrong": tally.num_wrong,
        "wrong_examples": tally.wrong,
        "failures": dict(tally.failures),
        "requests_per_second": len(tally.seconds) / seconds,
        "latency_seconds": _percentiles(tally.seconds),
        "first_token_seconds": _percentiles(tally.first_seconds),
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
        "machine": machine_facts(),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return dict.fromkeys(("p50", "p95", "max"), values[0] if values else 0.0)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "max": max(values)}


def is_fine(result: Mapping[str, Any]) -> bool:
    """Whether every request was answered, and rightly, and the server ended as it should."""
    return bool(result["answered"] and not result["wrong"] and not result["failures"] and result["exit_code"] == 0)


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """A result for people."""
    latency, first, memory = result["latency_seconds"], result["first_token_seconds"], result["memory_bytes"]
    return [
        f"{result['clients']} clients for {result['seconds']} s: {result['answered']} answers "
        f"({result['requests_per_second']:.1f} a second), {result['wrong']} wrong, "
        f"{sum(result['failures'].values())} failed {result['failures'] or ''}".rstrip(),
        *(f"  wrong: {example}" for example in result["wrong_examples"]),
        f"whole answer: p50 {latency['p50']:.3f} s, p95 {latency['p95']:.3f} s, longest {latency['max']:.3f} s",
        f"first token of streams: p50 {first['p50']:.3f} s, p95 {first['p95']:.3f} s, longest {first['max']:.3f} s",
        f"mean batch {result['mean_batch_size']:.1f}; images by level {result['images_by_granularity']}",
        "server's memory in MB: "
        + ", ".join(f"{name.replace('_', ' ')} {size / 1e6:.0f}" for name, size in memory.items()),
        f"after SIGTERM the server ended with exit code {result['exit_code']}",
    ]


__all__ = ["ask", "bench_serve", "is_fine", "make_questions", "read_metrics", "started_server", "table_lines"]
