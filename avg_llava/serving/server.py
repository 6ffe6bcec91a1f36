"""The server: OpenAI-compatible chat completions over one model."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

import avg_llava.serving.protocol as protocol
from avg_llava.inference.answers import Answer
from avg_llava.inference.predictor import Predictor
from avg_llava.serving.batching import Batcher, Event, Job
from avg_llava.serving.deltas import Deltas
from avg_llava.serving.gate import CHAT_PATH, Gate, Visit, client_gone, shutting_down
from avg_llava.serving.limits import Limits
from avg_llava.serving.metrics import Metrics
from avg_llava.serving.prompts import Preparation
from avg_llava.serving.protocol import ApiError, ChatRequest

_PREPARING_THREADS = 4
_CLOSING_SECONDS = 5.0
_MAX_MESSAGE = 500


class Server:
    """One model behind an ASGI application.

    Args:
        predictor: Answers.
        name: What requests call the model.
        limits: What is granted.
        api_key: What requests must bring; None asks for nothing.

    Attributes:
        app: The application; its lifespan starts and stops the model's thread.
    """

    def __init__(self, predictor: Predictor, name: str, limits: Limits, api_key: str | None = None) -> None:
        self._predictor, self._name, self._limits = predictor, name, limits
        self._metrics = Metrics()
        self._batcher = Batcher(predictor, limits, self._metrics)
        self._preparation = Preparation(predictor, limits)
        self._threads = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="prepare")
        self._created = int(time.time())
        self._api = self._make_api(api_key is not None)
        self.app = self._gate = Gate(self._api, self._batcher, limits, self._metrics, api_key)

    async def drain(self) -> bool:
        """Takes no more requests, and waits for those that there are as long as the limits say.

        Returns:
            Whether all were answered.
        """
        self._gate.draining = True
        if await self._is_idle_within(self._limits.grace):
            return True
        self.cut_off()
        await self._is_idle_within(_CLOSING_SECONDS)
        return False

    def cut_off(self) -> bool:
        """Ends all requests that wait for the model or are being answered.

        Returns:
            Whether there were any, or such as were being read.
        """
        self._batcher.fail_all(shutting_down())
        return self._gate.num_open > 0

    async def _is_idle_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self._gate.num_open and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._gate.num_open

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(self._batcher.run())
        try:
            yield
        finally:
            running.cancel()
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _make_api(self, with_key: bool) -> FastAPI:
        errors: dict[int | str, dict[str, Any]] = {
            status: {"model": protocol.ErrorResponse, "description": text} for status, text in protocol.ERRORS.items()
        }
        api = FastAPI(title="AVG-LLaVA", docs_url=None, redoc_url=None, lifespan=self._lifespan)
        api.post(
            CHAT_PATH,
            response_model=protocol.ChatCompletion,
            responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **errors},
        )(self._chat)
        api.get("/v1/models", response_model=protocol.ModelList, responses={401: errors[401]})(self._models)
        api.get("/health", response_model=protocol.Health, responses={503: {"model": protocol.Health}})(self._health)
        api.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})(self._show)
        api.add_exception_handler(ApiError, _on_api_error)
        api.add_exception_handler(RequestValidationError, _on_invalid)
        api.add_exception_handler(HTTPException, _on_http_error)
        api.add_exception_handler(Exception, _on_failure)
        api.openapi = lambda: self._schema(api, with_key)
        return api

    def _schema(self, api: FastAPI, with_key: bool) -> dict[str, Any]:
        """FastAPI's OpenAPI schema with what only this server knows, and without a status that it never gives."""
        schema = get_openapi(title=api.title, version="1", routes=api.routes)
        for methods in schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        schemas = schema["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        fields = schemas["ChatRequest"]["properties"]
        fields["model"]["enum"] = [self._name]
        fields["granularity"]["anyOf"][0]["enum"] = self._predictor.granularities
        for name in ("max_tokens", "max_completion_tokens"):
            fields[name]["anyOf"][0]["maximum"] = self._limits.max_tokens
        if with_key:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in schema["paths"].items():
                if path.startswith("/v1/"):
                    for operation in methods.values():
                        operation["security"] = [{"key": []}]
        return schema

    async def _health(self) -> JSONResponse:
        """Whether the server takes requests."""
        draining = self._gate.draining
        return JSONResponse({"status": "draining" if draining else "ready"}, 503 if draining else 200)

    async def _show(self) -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _models(self) -> protocol.ModelList:
        """The one model."""
        granularities = self._predictor.granularities
        model = protocol.Model(id=self._name, created=self._created, granularities=granularities)
        return protocol.ModelList(data=[model])

    async def _chat(self, chat: ChatRequest, request: Request) -> Response:
        """Goes on with a conversation."""
        visit: Visit = request.scope["visit"]
        if chat.model != self._name:
            raise ApiError(404, "model_not_found", f"there is no model of this name; this server has {self._name}")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(visit.deadline):
                prepared = await loop.run_in_executor(self._threads, self._preparation.prepare, chat)
        except TimeoutError as error:
            raise self._timed_out() from error
        job = visit.job = Job(prepared, visit.place, visit.deadline, self._timed_out())
        watcher = asyncio.create_task(_watch(request, job))
        self._batcher.submit(job)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._name}
        try:
            event = await job.events.get()
            if isinstance(event, list):
                self._metrics.first_token_seconds.observe(time.monotonic() - visit.arrived)
            while isinstance(event, list) and not chat.stream:
                event = await job.events.get()
        finally:
            watcher.cancel()
        if isinstance(event, ApiError):
            raise event
        if chat.stream:
            return StreamingResponse(self._events(chat, visit, job, head, event), media_type="text/event-stream")
        assert isinstance(event, Answer), "tokens have been passed over"
        self._metrics.count(event)
        return JSONResponse(self._completion(head, event).model_dump())

    def _timed_out(self) -> ApiError:
        return ApiError(504, "timeout", f"there was no whole answer within {self._limits.timeout} seconds")

    def _completion(self, head: dict[str, Any], answer: Answer) -> protocol.ChatCompletion:
        return protocol.ChatCompletion(
            **head,
            **self._routing(answer),
            choices=[
                protocol.Choice(
                    message=protocol.AnswerMessage(content=answer.text), finish_reason=_finish_reason(answer)
                )
            ],
            usage=_usage(answer),
        )

    def _routing(self, answer: Answer) -> dict[str, Any]:
        names = [str(level) for level in self._predictor.granularities]
        rows = answer.router_probs
        probabilities = None if rows is None else [dict(zip(names, row, strict=True)) for row in rows]
        return {"granularity": list(answer.granularity), "router_probs": probabilities}

    async def _events(
        self, chat: ChatRequest, visit: Visit, job: Job, head: dict[str, Any], event: Event
    ) -> AsyncIterator[str]:
        """Server-sent events of one answer."""
        with_usage = chat.stream_options is not None and chat.stream_options.include_usage
        head = {**head, "object": "chat.completion.chunk"}
        missing = {"usage": None} if with_usage else {}

        def chunk(delta: dict[str, str], finish_reason: str | None = None, **fields: Any) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            return _sse({**head, "choices": [choice], **missing, **fields})

        deltas = Deltas(self._predictor.processor.tokenizer, job.prepared.decoding.stop)
        yield chunk({"role": "assistant", "content": ""})
        while isinstance(event, list):
            if text := deltas.add(event):
                yield chunk({"content": text})
            event = await job.events.get()
        if isinstance(event, ApiError):
            visit.status = event.status
            yield _sse(event.content())
            return
        self._metrics.count(event)
        if text := deltas.rest(event.text):
            yield chunk({"content": text})
        yield chunk({}, _finish_reason(event), **self._routing(event))
        if with_usage:
            yield _sse({**head, "choices": [], "usage": _usage(event).model_dump()})
        yield "data: [DONE]\n\n"


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _finish_reason(answer: Answer) -> protocol.FinishReason:
    return "stop" if answer.finish_reason == "stop" else "length"


def _usage(answer: Answer) -> protocol.Usage:
    return protocol.Usage(
        prompt_tokens=answer.num_prompt_tokens,
        completion_tokens=answer.num_new_tokens,
        total_tokens=answer.num_prompt_tokens + answer.num_new_tokens,
        prompt_tokens_details=protocol.PromptTokensDetails(visual_tokens=answer.num_visual_tokens),
    )


async def _watch(request: Request, job: Job) -> None:
    """Ends a job whose client leaves. A streaming response does so by itself."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
    job.fail(client_gone())


async def _on_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.content(), error.status, error.headers)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    deepest = max(found, key=lambda own: len(own["loc"]))  # of the kinds that content can have, the one that was meant
    places = [str(place) for place in deepest["loc"][1:]]
    message = f"{'.'.join(places) or 'body'}: {deepest['msg']}"
    field = ChatRequest.model_fields.get(places[0]) if places else None
    if field is not None and field.description:
        message += f" ({field.description})"
    if len(found) > 1:
        message += f"; and {len(found) - 1} more"
    return await _on_api_error(request, ApiError(400, "invalid_request", message[:_MAX_MESSAGE]))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return await _on_api_error(request, ApiError(error.status_code, code, str(error.detail), error.headers))


async def _on_failure(request: Request, error: Exception) -> JSONResponse:
    return await _on_api_error(request, ApiError(500, "internal_error", "the server failed; its log says how"))


__all__ = ["Server"]
