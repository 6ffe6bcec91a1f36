"""Refuses what the demo page never sends: bodies without limit, and files that the server would have to fetch.

Gradio limits the size of each uploaded file, but neither that of a request nor the number of its files, and downloads a
file whose path is an address.
"""

import json
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse

from avg_llava.serving.asgi import Receive, Scope, Send, replayed

MAX_EVENT_BYTES = 2**16
"""Of a press of a button: a question, the controls, and the name of an upload."""
_FORM_BYTES = 2**12  # what an upload's form adds to its file


class PageGuard:
    """ASGI middleware.

    Args:
        app: The page.
        max_upload_bytes: Size of an upload.
    """

    def __init__(self, app: Any, max_upload_bytes: int) -> None:
        self._app, self._max_upload_bytes = app, max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or refuses it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        is_upload = scope["path"].endswith("/upload")
        limit = self._max_upload_bytes + _FORM_BYTES if is_upload else MAX_EVENT_BYTES
        length = request.headers.get("content-length")
        if length is None or not length.isdecimal():
            await PlainTextResponse("the request must tell the length of its body", 411)(scope, receive, send)
        elif int(length) > limit:
            message = f"the request is larger than the maximum allowed size of {limit} bytes"
            await PlainTextResponse(message, 413)(scope, receive, send)
        elif is_upload:
            await self._app(scope, receive, send)
        else:
            body = await request.body()
            if any(path.lower().startswith(("http:", "https:")) for path in _paths(body)):
                await PlainTextResponse("files are not fetched from addresses: upload them", 400)(scope, receive, send)
            else:
                await self._app(scope, replayed(body, receive), send)


def _paths(body: bytes) -> Iterator[str]:
    """Paths of files in a body, of whatever depth; a body that is no JSON names none."""
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):
        return
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
            if isinstance(value.get("path"), str):
                yield value["path"].strip()
        elif isinstance(value, list):
            waiting += value


__all__ = ["MAX_EVENT_BYTES", "PageGuard"]
