"""What every chat request passes before its body is looked at: key, place in the queue, size and time of its body.

Only what has a place is read, so that memory is bounded by places times the size of a body.
"""

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse

from avg_llava.serving.asgi import Message, Receive, Scope, Send, replayed
from avg_llava.serving.batching import Batcher, Job, Place
from avg_llava.serving.limits import Limits
from avg_llava.serving.metrics import CLIENT_GONE, Metrics
from avg_llava.serving.protocol import ApiError

CHAT_PATH = "/v1/chat/completions"
BODY_SECONDS = 30.0
_DISCARD_SECONDS, _DISCARD_FACTOR = 5.0, 4


def client_gone() -> ApiError:
    """The end of a request whose client has left; nobody reads it."""
    return ApiError(CLIENT_GONE, "client_gone", "the client has left")


def shutting_down() -> ApiError:
    """The end of a request that comes or goes on while the server stops."""
    return ApiError(503, "shutting_down", "the server is shutting down", {"Retry-After": "5", "Connection": "close"})


@dataclass
class Visit:
    """A chat request while the server has to do with it.

    Attributes:
        arrived: When it came, on the clock of `time.monotonic`, which is the event loop's.
        deadline: When its time is over, on the same clock.
        place: Its place in the queue.
        job: What the model has to do for it.
        status: Status of an error that came after the response had begun.
    """

    arrived: float
    deadline: float
    place: Place
    job: Job | None = None
    status: int | None = None


class Gate:
    """ASGI middleware.

    Args:
        app: The application behind it, which finds the :class:`Visit` in the scope under "visit".
        batcher: Gives places in the queue.
        limits: The server's limits.
        metrics: Counts.
        api_key: What requests must bring; None asks for nothing.

    Attributes:
        num_open: Chat requests that have not ended.
        draining: Whether no more are taken.
    """

    def __init__(self, app: Any, batcher: Batcher, limits: Limits, metrics: Metrics, api_key: str | None) -> None:
        self._app, self._batcher, self._limits, self._metrics = app, batcher, limits, metrics
        self._credentials = None if api_key is None else f"Bearer {api_key}".encode()
        self.num_open = 0
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        receive = _Incoming(receive)
        if not self._is_known(scope):
            error = ApiError(401, "invalid_api_key", "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"})
            await self._refuse(error, scope, receive, send)
        elif (scope["method"], scope["path"]) == ("POST", CHAT_PATH):
            await self._chat(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._credentials is None or secrets.compare_digest(given, self._credentials)

    async def _chat(self, scope: Scope, receive: "_Incoming", send: Send) -> None:
        arrived, status, complete = time.monotonic(), CLIENT_GONE, False

        async def watch(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        self._open(1)
        visit: Visit | None = None
        try:
            if self.draining:
                raise shutting_down()
            visit = scope["visit"] = Visit(arrived, arrived + self._limits.timeout, self._batcher.enter())
            body = await _read_body(scope, receive, self._limits.max_body_mib * 2**20)
            await self._app(scope, replayed(body, receive), watch)
        except ApiError as error:
            await self._refuse(error, scope, receive, watch)
        finally:
            if visit is not None:
                visit.place.release()
                if visit.job is not None:
                    visit.job.fail(client_gone())
                status = visit.status or status
            self._open(-1)
            self._metrics.requests.labels(status if complete else CLIENT_GONE).inc()
            self._metrics.request_seconds.observe(time.monotonic() - arrived)

    def _open(self, change: int) -> None:
        self.num_open += change
        self._metrics.in_flight.set(self.num_open)

    async def _refuse(self, error: ApiError, scope: Scope, receive: "_Incoming", send: Send) -> None:
        """Answers with an error, after what the client still sends: many read nothing before they have sent all."""
        with contextlib.suppress(TimeoutError):  # it has had its time
            async with asyncio.timeout(_DISCARD_SECONDS):
                await receive.discard(_DISCARD_FACTOR * self._limits.max_body_mib * 2**20)
        response = JSONResponse(error.content(), error.status, error.headers)
        await response(scope, receive, send)


class _Incoming:
    """What a client sends; knows when its body is complete."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._complete = receive, False

    async def __call__(self) -> Message:
        message = await self._receive()
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def discard(self, max_bytes: int) -> None:
        """Lets the client send the rest of its body, up to a limit."""
        while not self._complete and max_bytes > 0:
            message = await self()
            max_bytes -= len(message.get("body", b""))


async def _read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    too_large = ApiError(413, "body_too_large", f"the request's body is larger than {max_bytes} bytes")
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise client_gone()
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise ApiError(408, "body_too_slow", f"the body was not there within {BODY_SECONDS:g} seconds") from error


__all__ = ["CHAT_PATH", "Gate", "Visit", "client_gone", "shutting_down"]
