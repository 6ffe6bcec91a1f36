"""Admission control for chat requests, as ASGI middleware: API key, queue slot, and size and time limits of the body.

A body is read only once its request holds a queue slot, so memory is bounded by the number of slots times the limit on
bodies.
"""

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avg_llava.serving.batching import Batcher, Job
from avg_llava.serving.limits import Limits
from avg_llava.serving.metrics import CLIENT_GONE, Metrics
from avg_llava.serving.middleware import replay_body
from avg_llava.serving.protocol import ApiError

CHAT_PATH = "/v1/chat/completions"
BODY_SECONDS = 30.0
_DISCARD_SECONDS, _DISCARD_FACTOR = 5.0, 4


def client_gone() -> ApiError:
    """Returns the error of a request whose client has disconnected; it is counted, not sent."""
    return ApiError(CLIENT_GONE, "client_gone", "the client has disconnected")


def shutting_down() -> ApiError:
    """Returns the error of a request that arrives, or is still open, during shutdown."""
    return ApiError(503, "shutting_down", "the server is shutting down", {"Retry-After": "5", "Connection": "close"})


@dataclass
class RequestState:
    """State of an open chat request, shared by the middleware and the endpoint.

    Attributes:
        arrived: Time on the `time.monotonic` clock, which is the event loop's.
        deadline: Time on the same clock.
        slot: From `Batcher.acquire_slot`.
        job: None before it is submitted.
        error_status: Status of an error that occurred after the response had started.
    """

    arrived: float
    deadline: float
    slot: contextlib.ExitStack
    job: Job | None = None
    error_status: int | None = None


class Gate:
    """Admits chat requests to the application, with their `RequestState` in the scope under "request_state".

    Attributes:
        num_open: Number of unfinished chat requests.
        draining: If True, new requests are rejected.
    """

    def __init__(self, app: ASGIApp, batcher: Batcher, limits: Limits, metrics: Metrics, api_key: str | None) -> None:
        self._app, self._batcher, self._limits, self._metrics = app, batcher, limits, metrics
        self._credentials = None if api_key is None else f"Bearer {api_key}".encode()
        self.num_open = 0
        metrics.in_flight.set_function(lambda: self.num_open)
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        receive = _BodyReceiver(receive)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self._credentials is not None and not secrets.compare_digest(given, self._credentials):
            error = ApiError(401, "invalid_api_key", "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"})
            await self._reject(error, scope, receive, send)
        elif (scope["method"], scope["path"]) == ("POST", CHAT_PATH):
            await self._chat(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _chat(self, scope: Scope, receive: "_BodyReceiver", send: Send) -> None:
        arrived, status, complete = time.monotonic(), CLIENT_GONE, False

        async def send_and_watch(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        self.num_open += 1
        state: RequestState | None = None
        try:
            if self.draining:
                raise shutting_down()
            state = RequestState(arrived, arrived + self._limits.timeout, self._batcher.acquire_slot())
            scope["request_state"] = state
            body = await _read_body(scope, receive, self._limits.max_body_mib * 2**20)
            await self._app(scope, replay_body(body, receive), send_and_watch)
        except ApiError as error:
            await self._reject(error, scope, receive, send_and_watch)
        finally:
            if state is not None:
                state.slot.close()
                if state.job is not None:
                    state.job.fail(client_gone())
                status = state.error_status or status
            self.num_open -= 1
            self._metrics.requests.labels(status if complete else CLIENT_GONE).inc()
            self._metrics.request_seconds.observe(time.monotonic() - arrived)

    async def _reject(self, error: ApiError, scope: Scope, receive: "_BodyReceiver", send: Send) -> None:
        """Sends an error after discarding the rest of the body: many clients read nothing before they have sent it."""
        with contextlib.suppress(TimeoutError):  # respond to a slow client, too
            async with asyncio.timeout(_DISCARD_SECONDS):
                await receive.discard(_DISCARD_FACTOR * self._limits.max_body_mib * 2**20)
        await error.response()(scope, receive, send)


class _BodyReceiver:
    """An ASGI `receive` that keeps track of the end of the body."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._complete = receive, False

    async def __call__(self) -> Message:
        message = await self._receive()
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def discard(self, max_bytes: int) -> None:
        """Receives and drops the rest of the body, up to `max_bytes`."""
        while not self._complete and max_bytes > 0:
            message = await self()
            max_bytes -= len(message.get("body", b""))


async def _read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    too_large = ApiError(413, "body_too_large", f"the request body is larger than {max_bytes} bytes")
    request = Request(scope, receive)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
        return bytes(body)
    except ClientDisconnect as error:
        raise client_gone() from error
    except TimeoutError as error:
        raise ApiError(408, "body_too_slow", f"the body was not received within {BODY_SECONDS:g} seconds") from error
