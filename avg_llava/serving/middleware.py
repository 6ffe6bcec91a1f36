"""ASGI middleware of the demo page, and the replay of a buffered request body, which the API server uses too.

Gradio limits the size of an uploaded file, but neither the size of a request nor its number of files, and it downloads
files whose path is a URL. `PageGuard` rejects such requests.
"""

import json
from collections.abc import Iterator

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
    """Rejects requests with oversized bodies or with files given by URL.

    Args:
        app: The wrapped application.
        max_upload_bytes: Maximum size of an upload.
    """

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
            if any(path.lower().startswith(("http:", "https:")) for path in _file_paths(body)):
                await PlainTextResponse("files are not fetched from URLs: upload them", 400)(scope, receive, send)
            else:
                await self._app(scope, replay_body(body, receive), send)


def _file_paths(body: bytes) -> Iterator[str]:
    """File paths at any depth of a JSON body; none if the body is not JSON."""
    try:
        pending = [json.loads(body)]
    except (ValueError, RecursionError):
        return
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
            if isinstance(value.get("path"), str):
                yield value["path"].strip()
        elif isinstance(value, list):
            pending += value
