"""A server in a thread of the test's process, on a real socket; and what to send to it."""

import asyncio
import base64
import contextlib
import http.client
import json
import threading
import time
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn

from avg_llava.serving.limits import Limits
from avg_llava.serving.server import Server

MINI = Path(__file__).resolve().parents[2] / "avg_llava/mini/checkpoint"
CHAT = "/v1/chat/completions"


class Running:
    """Where a server is, and plain requests to it; `drain` where it is of this process."""

    def __init__(self, port, drain=None):
        self.address, self.drain = f"http://127.0.0.1:{port}", drain

    def connect(self):
        where = urlsplit(self.address)
        return http.client.HTTPConnection(where.hostname, where.port, timeout=60)

    def request(self, method, path, body=None, headers=None):
        """(status, headers, body) of one request."""
        connection = self.connect()
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def chat(self, body, headers=None):
        """(status, JSON) of a chat request."""
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
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def png(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def image_part(content):
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


def question(text, *contents, **fields):
    """The body of a request with one turn."""
    parts = [image_part(content) for content in contents]
    content = [*parts, {"type": "text", "text": text}]
    return {"model": "mini", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


def endless(**fields):
    return {"model": "mini", "messages": [{"role": "user", "content": "go on"}], "max_tokens": 100_000, **fields}


def stream_of(server, body):
    """An open stream, after its first piece of text."""
    connection = server.connect()
    connection.request("POST", CHAT, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    while b'"content": ""' in (line := response.readline()) or not line.strip():
        pass
    return connection, response


def rest_of(response):
    """The texts of the rest of a stream, and whether it ended as it should."""
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
