"""ASGI middleware of the demo page, and the replay of a buffered request body, which the API server uses too.

Gradio limits the size of an uploaded file, but neither the size of a request nor its number of files, and it downloads
files whose path is a URL. `PageGuard` rejects such requests.
"""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_EVENT_BYTES = 2**16
"""Maximum body size of a page event: a question, the controls and the name of an upload."""
_FORM_BYTES = 2**12  # multipart overhead of an upload


def replay_body(body: bytes, receive: Receive) -> Receive:
    """Wraps `receive` for an application behind middleware that has read the whole body."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


class PageGuard:
    """Rejects requests with oversized bodies or with files given by URL."""

    def __init__(self, app: ASGIApp, max_upload_bytes: int) -> None:
        self._app, self._max_upload_bytes = app, max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        is_upload = scope["path"].endswith("/upload")
        limit = self._max_upload_bytes + _FORM_BYTES if is_upload else MAX_EVENT_BYTES
        length = request.headers.get("content-length")
        if length is None or not length.isdecimal():
            await PlainTextResponse("a Content-Length header is required", 411)(scope, receive, send)
        elif int(length) > limit:
            message = f"the request is larger than the maximum allowed size of {limit} bytes"
            await PlainTextResponse(message, 413)(scope, receive, send)
        elif is_upload:
            await self._app(scope, receive, send)
        else:
            body = await request.body()
            if _has_remote_file(body):
                await PlainTextResponse("files are not fetched from URLs: upload them", 400)(scope, receive, send)
            else:
                await self._app(scope, replay_body(body, receive), send)


def _has_remote_file(body: bytes) -> bool:
    """Returns True if an object at any depth of a JSON body has a URL as its `path`; False if the body is not JSON."""
    paths: list[str] = []

    def collect(fields: dict[str, Any]) -> None:
        paths.append(str(fields.get("path")).strip().lower())

    try:
        json.loads(body, object_hook=collect)
    except (ValueError, RecursionError):
        return False
    return any(path.startswith(("http:", "https:")) for path in paths)
