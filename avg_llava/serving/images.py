"""Images from addresses that strangers name: only public hosts, little, and not for long.

A name is resolved once and its addresses are judged; the connection goes to the judged address, so that a name which
resolves differently the next moment gains nothing. Redirections are judged like the address that they come from.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from urllib.parse import urljoin, urlsplit

MAX_REDIRECTIONS = 3
_REDIRECTIONS = (301, 302, 303, 307, 308)
_UNICAST = ipaddress.ip_network("2000::/3")


class RemoteImageError(ValueError):
    """An image that cannot be fetched, or must not be."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, by itself and not through a tunnel to another one."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return ip in _UNICAST and ip.is_global and ip.sixtofour is None and ip.teredo is None
        ip = ip.ipv4_mapped
    return ip.is_global and not ip.is_multicast


def fetch(url: str, max_bytes: int, seconds: float) -> bytes:
    """Downloads a file from a public host.

    Args:
        url: http or https, without credentials.
        max_bytes: Larger files are refused.
        seconds: For all of it, redirections included.

    Raises:
        RemoteImageError: It cannot be had within the limits, or its host is not public.
    """
    sockets: list[socket.socket] = []
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        for connected in sockets:
            with contextlib.suppress(OSError):  # closed already
                connected.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, expire)  # a server that sends a byte now and then meets no socket's time-out
    timer.start()
    try:
        content = _follow(url, max_bytes, seconds, sockets)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = f"not there within {seconds:g} seconds" if expired.is_set() else str(error) or type(error).__name__
        raise RemoteImageError(f"cannot be fetched ({reason})") from error
    finally:
        timer.cancel()
    if expired.is_set():
        raise RemoteImageError(f"cannot be fetched (not there within {seconds:g} seconds)")
    return content


def _follow(url: str, max_bytes: int, seconds: float, sockets: list[socket.socket]) -> bytes:
    for _ in range(MAX_REDIRECTIONS + 1):
        with _get(url, seconds, sockets) as response:
            if response.status in _REDIRECTIONS and response.headers.get("Location"):
                url = urljoin(url, response.headers["Location"])
                continue
            if response.status != 200:
                raise RemoteImageError(f"cannot be fetched (its server answers with status {response.status})")
            content = response.read(max_bytes + 1)
            if len(content) > max_bytes:
                raise RemoteImageError(f"is larger than {max_bytes} bytes")
            return content
    raise RemoteImageError(f"cannot be fetched (more than {MAX_REDIRECTIONS} redirections)")


@contextlib.contextmanager
def _get(url: str, seconds: float, sockets: list[socket.socket]) -> Iterator[http.client.HTTPResponse]:
    """The response to a GET request, over a connection to an address that was judged."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise RemoteImageError(f"has no valid address ({error})") from error
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
        raise RemoteImageError("must have an address that begins with http:// or https:// and names a host")
    port = port or (443 if parts.scheme == "https" else 80)
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    connected = _connect(host, port, seconds)
    sockets.append(connected)
    try:
        if parts.scheme == "https":
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
            sockets.append(connected)
        connection.sock = connected
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        yield connection.getresponse()
    finally:
        connection.close()
        connected.close()


def _connect(host: str, port: int, seconds: float) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not all(map(is_public, addresses)):
        raise RemoteImageError("is on a host that is not public")
    return socket.create_connection((addresses[0], port), timeout=seconds)


__all__ = ["RemoteImageError", "fetch", "is_public"]
