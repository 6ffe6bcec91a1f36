"""Test helpers: a server in a thread, on a real socket, and requests for it."""

import asyncio
import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn

from avg_llava.checkpoints.loading import load
from avg_llava.serving.limits import Limits
from avg_llava.serving.server import Server
from tests.tiny import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "avg_llava/mini/checkpoint"
CHAT = "/v1/chat/completions"


class Running:
    """Client of a running server; `drain` is set for servers of this process."""

    def __init__(self, port, drain=None):
        self.address, self.drain = f"http://127.0.0.1:{port}", drain

    def connect(self):
        url = urlsplit(self.address)
        return http.client.HTTPConnection(url.hostname, url.port, timeout=60)

    def request(self, method, path, body=None, headers=None):
        """Sends one request; returns (status, headers, body)."""
        connection = self.connect()
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def chat(self, body, headers=None):
        """Sends a chat request; returns (status, JSON)."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, answer = self.request("POST", CHAT, content, headers)
        return status, json.loads(answer)

    def metric(self, name):
        _, _, text = self.request("GET", "/metrics")
        return next(
            (float(line.split()[-1]) for line in text.decode().splitlines() if line.startswith(f"{name} ")), 0.0
        )


@contextlib.contextmanager
def running(predictor, api_key=None, **limits):
    server = Server(predictor, "mini", Limits(**limits), api_key)
    config = uvicorn.Config(server.app, port=0, log_config=None, timeout_graceful_shutdown=5)
    inner = uvicorn.Server(config)
    thread = threading.Thread(target=inner.run)
    thread.start()
    try:
        while not inner.started:
            assert thread.is_alive()
            time.sleep(0.01)
        (loop,) = (listening.get_loop() for listening in inner.servers)
        yield Running(
            inner.servers[0].sockets[0].getsockname()[1],
            lambda: asyncio.run_coroutine_threadsafe(server.drain(), loop).result(),
        )
    finally:
        inner.should_exit = True
        thread.join()


def until(condition, seconds=30):
    """Waits until a condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.02)


def save_talker(folder):
    """Saves a tiny model whose answers end at the maximum length only; returns its folder."""
    model, processor = load(make_checkpoint(folder / "tiny"))
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id = 10**6
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def png(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def image_part(content):
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


def question(text, *contents, **fields):
    """Body of a request with one user turn."""
    parts = [image_part(content) for content in contents]
    content = [*parts, {"type": "text", "text": text}]
    return {"model": "mini", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


def endless(**fields):
    return {"model": "mini", "messages": [{"role": "user", "content": "go on"}], "max_tokens": 100_000, **fields}


def stream_of(server, body):
    """Opens a stream and reads its first piece of text."""
    connection = server.connect()
    connection.request("POST", CHAT, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    while b'"content": ""' in (line := response.readline()) or not line.strip():
        pass
    return connection, response


def rest_of(response):
    """Reads the rest of a stream; returns its texts and how it ended: done, cut, or an error code."""
    texts, done = [], False
    for line in response:
        done = line == b"data: [DONE]\n"
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                return texts, event["error"]["code"]
            texts += [choice["delta"].get("content") or "" for choice in event["choices"]]
        if done:
            return texts, "done"
    return texts, "cut"
