"""A server as a process: its socket, and its end."""

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from avg_llava.serving.server import Server

_CLOSE_SECONDS = 2


class _Process(uvicorn.Server):
    """Uvicorn, except for what a signal does: the first lets requests end, the second ends them.

    Attributes:
        cut_short: Whether requests were ended before they were answered.
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
        self._avg_llava = server
        self._draining: asyncio.Task[None] | None = None
        self.cut_short = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until it is told to stop and has nothing left to do."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal, between any two steps of the event loop's thread."""
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
            return
        self.cut_short |= self._avg_llava.cut_off()
        self.should_exit = True

    async def _drain(self) -> None:
        if not await self._avg_llava.drain():
            self.cut_short = True
        self.should_exit = True


def serve(server: Server, host: str, port: int, announce: Callable[[str], object]) -> bool:
    """Serves until SIGTERM or SIGINT.

    Args:
        server: What is served.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        announce: Told the server's address, once connections to it are taken.

    Returns:
        Whether all requests were answered when it was told to stop.

    Raises:
        OSError: The address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=512)
    name = f"[{host}]" if ":" in host else host
    announce(f"http://{name}:{listening.getsockname()[1]}")
    process = _Process(server)
    process.run([listening])
    return not process.cut_short


__all__ = ["serve"]
