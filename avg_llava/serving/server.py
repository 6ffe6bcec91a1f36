"""OpenAI-compatible HTTP server for one model, with graceful shutdown."""

import asyncio
import contextlib
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

import avg_llava.serving.protocol as protocol
from avg_llava.inference.answers import Answer
from avg_llava.inference.predictor import Predictor
from avg_llava.serving.batching import Batcher, Event, Job
from avg_llava.serving.gate import CHAT_PATH, Gate, RequestState, client_gone, shutting_down
from avg_llava.serving.limits import Limits
from avg_llava.serving.metrics import Metrics
from avg_llava.serving.prompts import PromptBuilder
from avg_llava.serving.protocol import ApiError, ChatRequest, invalid_request
from avg_llava.serving.streams import TextDeltas

_NUM_PREPARATION_THREADS = 4
_ABORT_SECONDS = 5.0  # for the error responses of requests that outlast the grace period
_CLOSE_SECONDS = 2  # for idle connections
_MAX_MESSAGE_CHARACTERS = 500


class Server:
    """An ASGI application that serves one model.

    Args:
        name: The model's name in requests.
        api_key: The key that requests must send; None for no authentication.

    Attributes:
        app: The application; its lifespan starts and stops the batcher.
    """

    def __init__(self, predictor: Predictor, name: str, limits: Limits, api_key: str | None = None) -> None:
        self._predictor, self._name, self._limits = predictor, name, limits
        self._metrics = Metrics()
        self._batcher = Batcher(predictor, limits, self._metrics)
        self._prompt_builder = PromptBuilder(predictor, limits)
        self._executor = ThreadPoolExecutor(_NUM_PREPARATION_THREADS, thread_name_prefix="prepare")
        self._created = int(time.time())
        self._api = self._build_api(api_key is not None)
        self.app = self._gate = Gate(self._api, self._batcher, limits, self._metrics, api_key)

    async def drain(self) -> bool:
        """Rejects new requests and aborts those open after the grace period; returns True if there are none."""
        self._gate.draining = True
        if await self._is_idle_within(self._limits.grace):
            return True
        self.abort()
        await self._is_idle_within(_ABORT_SECONDS)
        return False

    def abort(self) -> bool:
        """Fails all queued and running requests; returns True if any was open, even if its body is incomplete."""
        self._batcher.fail_all(shutting_down())
        return self._gate.num_open > 0

    async def _is_idle_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self._gate.num_open and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._gate.num_open

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        batcher = asyncio.create_task(self._batcher.run())
        try:
            yield
        finally:
            batcher.cancel()
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _build_api(self, with_key: bool) -> FastAPI:
        errors: dict[int | str, dict[str, Any]] = {
            status: {"model": protocol.ErrorResponse, "description": text} for status, text in protocol.ERRORS.items()
        }
        # The gate checks the key; this describes it in the schema.
        key = [Security(HTTPBearer(scheme_name="key", auto_error=False))] if with_key else []
        api = FastAPI(
            title="AVG-LLaVA",
            docs_url=None,
            redoc_url=None,
            lifespan=self._lifespan,
            exception_handlers=dict.fromkeys((ApiError, RequestValidationError, HTTPException, Exception), _on_error),
        )
        api.post(
            CHAT_PATH,
            response_model=protocol.ChatCompletion,
            responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **errors},
            dependencies=key,
        )(self._create_completion)
        api.get("/v1/models", responses={401: errors[401]}, dependencies=key)(self._list_models)
        api.get("/health", responses={503: {"model": protocol.Health}})(self._get_health)
        api.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})(
            self._get_metrics
        )
        api.openapi = lambda: self._openapi_schema(api)
        return api

    def _openapi_schema(self, api: FastAPI) -> dict[str, Any]:
        """Returns FastAPI's schema with this server's model, levels and limits, and without the unused status 422."""
        schema = get_openapi(title=api.title, version="1", routes=api.routes)
        del schema["paths"][CHAT_PATH]["post"]["responses"]["422"]
        schemas = schema["components"]["schemas"]
        del schemas["HTTPValidationError"], schemas["ValidationError"]
        fields = schemas["ChatRequest"]["properties"]
        fields["model"]["enum"] = [self._name]
        fields["granularity"]["anyOf"][0]["enum"] = self._predictor.granularities
        for name in ("max_tokens", "max_completion_tokens"):
            fields[name]["anyOf"][0]["maximum"] = self._limits.max_tokens
        return schema

    async def _get_health(self, response: Response) -> protocol.Health:
        """Reports readiness: 503 while draining."""
        if self._gate.draining:
            response.status_code = 503
        return protocol.Health(status="draining" if self._gate.draining else "ready")

    async def _get_metrics(self) -> Response:
        """Returns the metrics in Prometheus' text format."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _list_models(self) -> protocol.ModelList:
        """Lists the model of this server."""
        model = protocol.Model(id=self._name, created=self._created, granularities=self._predictor.granularities)
        return protocol.ModelList(data=[model])

    async def _create_completion(self, chat: ChatRequest, request: Request) -> Response | dict[str, Any]:
        """Generates the next assistant message of a conversation."""
        state: RequestState = request.scope["request_state"]
        if chat.model != self._name:
            raise ApiError(404, "model_not_found", f"there is no such model; this server has {self._name}")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(state.deadline):
                prepared = await loop.run_in_executor(self._executor, self._prompt_builder.build, chat)
        except TimeoutError as error:
            raise self._timeout_error() from error
        job = state.job = Job(prepared, state.slot, state.deadline, self._timeout_error())
        watcher = asyncio.create_task(_fail_on_disconnect(request, job))
        self._batcher.submit(job)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._name}
        try:
            event = await job.events.get()
            if isinstance(event, list):
                self._metrics.first_token_seconds.observe(time.monotonic() - state.arrived)
            while isinstance(event, list) and not chat.stream:
                event = await job.events.get()
        finally:
            watcher.cancel()
        if isinstance(event, ApiError):
            raise event
        if chat.stream:
            return StreamingResponse(self._stream_events(chat, state, job, head, event), media_type="text/event-stream")
        assert isinstance(event, Answer), "the loop above skips tokens"
        self._metrics.count(event)
        choice = {"message": {"content": event.text}, "finish_reason": event.finish_reason}
        return {**head, **self._routing(event), "choices": [choice], "usage": _usage(event)}

    def _timeout_error(self) -> ApiError:
        return ApiError(504, "timeout", f"the answer was not complete within {self._limits.timeout} seconds")

    def _routing(self, answer: Answer) -> dict[str, Any]:
        names = [str(level) for level in self._predictor.granularities]
        rows = answer.router_probs
        probabilities = None if rows is None else [dict(zip(names, row, strict=True)) for row in rows]
        return {"granularity": list(answer.granularity), "router_probs": probabilities}

    async def _stream_events(
        self, chat: ChatRequest, state: RequestState, job: Job, head: dict[str, Any], event: Event
    ) -> AsyncIterator[str]:
        """Yields the server-sent events of one answer, from its first event on."""
        with_usage = chat.stream_options is not None and chat.stream_options.include_usage
        head = {**head, "object": "chat.completion.chunk"}
        no_usage = {"usage": None} if with_usage else {}

        def chunk(delta: dict[str, str], finish_reason: str | None = None, **fields: Any) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            return _sse({**head, "choices": [choice], **no_usage, **fields})

        deltas = TextDeltas(self._predictor.processor.tokenizer, job.prepared.decoding.stop)
        yield chunk({"role": "assistant", "content": ""})
        while isinstance(event, list):
            if text := deltas.add(event):
                yield chunk({"content": text})
            event = await job.events.get()
        if isinstance(event, ApiError):
            state.error_status = event.status
            yield _sse(event.content())
            return
        self._metrics.count(event)
        if text := deltas.rest(event.text):
            yield chunk({"content": text})
        yield chunk({}, event.finish_reason, **self._routing(event))
        if with_usage:
            yield _sse({**head, "choices": [], "usage": _usage(event)})
        yield "data: [DONE]\n\n"


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_new_tokens,
        "total_tokens": answer.num_prompt_tokens + answer.num_new_tokens,
        "prompt_tokens_details": {"visual_tokens": answer.num_visual_tokens},
    }


async def _fail_on_disconnect(request: Request, job: Job) -> None:
    """Fails a job when its client disconnects. Streaming responses handle that themselves."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
    job.fail(client_gone())


async def _on_error(_: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        error = invalid_request(_describe(error))
    elif isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        error = ApiError(error.status_code, code, str(error.detail), error.headers)
    elif not isinstance(error, ApiError):
        error = ApiError(500, "internal_error", "the server failed; see its log")
    return error.response()


def _describe(error: RequestValidationError) -> str:
    details = error.errors()
    # Pydantic reports an error for each type of a union; the deepest one belongs to the type that was meant.
    deepest = max(details, key=lambda detail: len(detail["loc"]))
    path = [str(key) for key in deepest["loc"][1:]]
    message = f"{'.'.join(path) or 'body'}: {deepest['msg']}"
    field = ChatRequest.model_fields.get(path[0]) if path else None
    if field is not None and field.description:
        message += f" ({field.description})"
    if len(details) > 1:
        message += f"; and {len(details) - 1} more"
    return message[:_MAX_MESSAGE_CHARACTERS]


class _GracefulServer(uvicorn.Server):
    """Uvicorn with two-step shutdown: the first signal drains the server, the second aborts open requests.

    Attributes:
        aborted: True if requests were aborted.
    """

    def __init__(self, server: Server) -> None:
        config = uvicorn.Config(
            server.app,
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
        )
        super().__init__(config)
        self._server = server
        self._is_draining = self.aborted = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until shutdown is complete."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal; it may interrupt the event loop's thread at any bytecode, so the work is scheduled."""
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)

    async def _shut_down(self) -> None:
        if self._is_draining:
            self.aborted |= self._server.abort()
        else:
            self._is_draining = True
            is_complete = await self._server.drain()
            self.aborted |= not is_complete
        self.should_exit = True


def serve(server: Server, host: str, port: int, on_start: Callable[[str], object]) -> bool:
    """Serves until SIGTERM or SIGINT.

    Args:
        port: 0 for any free port.
        on_start: Called with the server's URL once it accepts connections.

    Returns:
        True if every request was answered before shutdown.

    Raises:
        OSError: The address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=512)
    name = f"[{host}]" if ":" in host else host
    on_start(f"http://{name}:{listening.getsockname()[1]}")
    process = _GracefulServer(server)
    process.run([listening])
    return not process.aborted
