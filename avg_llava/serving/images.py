"""Images of chat requests: data URLs and, where allowed, files on public hosts.

Both come from untrusted clients. Remote files are fetched without access to private networks: a host name is resolved
once, all its addresses must be public, and the connection goes to the checked address, so that a DNS answer that
changes between check and use (DNS rebinding) has no effect. Each redirect is checked in the same way.
"""

import base64
import binascii
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from io import BytesIO
from urllib.parse import urljoin, urlsplit

from PIL import Image, UnidentifiedImageError

from avg_llava.model.images import DataError, decode_image
from avg_llava.serving.limits import Limits
from avg_llava.serving.protocol import ApiError, invalid_request

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted formats. Pillow reads more, some of them by starting other programs."""
FETCH_SECONDS = 15.0
MAX_REDIRECTS = 3
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[^,;]+)*;base64,")
_REDIRECTS = (301, 302, 303, 307, 308)
_UNICAST = ipaddress.ip_network("2000::/3")


def read_images(urls: Sequence[str], limits: Limits) -> list[Image.Image]:
    """Reads the images of one request from data URLs, or http(s) URLs if `limits.remote_images` is set.

    No image is decoded before the total number of pixels has been checked against the headers.

    Raises:
        ApiError: An image cannot be read, or the images exceed a limit.
    """
    if len(urls) > limits.max_images:
        raise invalid_request(f"{len(urls)} images are more than this server's limit of {limits.max_images}")
    contents = []
    num_pixels = 0
    for number, url in enumerate(urls, 1):
        try:
            content = _read_url(url, limits)
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                num_pixels += image.width * image.height
        except UnidentifiedImageError as error:
            message = f"image {number} is damaged, or its format is not one of {', '.join(FORMATS)}"
            raise invalid_request(message) from error
        except DataError as error:
            raise invalid_request(f"image {number} {error}") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise invalid_request(f"image {number} cannot be read ({error})") from error
        contents.append(content)
    if num_pixels > limits.max_pixels:
        raise ApiError(
            400,
            "image_too_large",
            f"the images have {num_pixels} pixels in total, above this server's limit of {limits.max_pixels}; "
            "downscale them",
        )
    try:
        return [decode_image(content, f"image {number}") for number, content in enumerate(contents, 1)]
    except DataError as error:
        raise invalid_request(str(error)) from error


def _read_url(url: str, limits: Limits) -> bytes:
    if url.startswith(("http://", "https://")):
        if not limits.remote_images:
            raise DataError("is on a remote host, and this server fetches no images: send a data URL")
        return fetch(url, limits.max_body_mib * 2**20, FETCH_SECONDS)
    prefix = _DATA_URL.match(url)
    if prefix is None:
        raise DataError("is not a data URL: data:image/png;base64,...")
    try:
        return base64.b64decode(url[prefix.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"is not valid base64 ({error})") from error


def is_public(address: str) -> bool:
    """Returns True for global unicast IP addresses that are not tunnels (6to4, Teredo) to another address."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return ip in _UNICAST and ip.is_global and ip.sixtofour is None and ip.teredo is None
        ip = ip.ipv4_mapped
    return ip.is_global and not ip.is_multicast


def fetch(url: str, max_bytes: int, seconds: float) -> bytes:
    """Downloads a file from a public host.

    Args:
        url: http(s) URL without credentials.
        seconds: Time limit, redirects included.

    Raises:
        DataError: The host is not public, or the file cannot be fetched within the limits.
    """
    sockets: list[socket.socket] = []
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        for connected in sockets:
            with contextlib.suppress(OSError):  # already closed
                connected.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, expire)  # a socket's timeout is per read: a slow sender never reaches it
    timer.start()
    try:
        content = _follow(url, max_bytes, seconds, sockets)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = f"timeout after {seconds:g} seconds" if expired.is_set() else str(error) or type(error).__name__
        raise DataError(f"cannot be fetched ({reason})") from error
    finally:
        timer.cancel()
    if expired.is_set():
        raise DataError(f"cannot be fetched (timeout after {seconds:g} seconds)")
    return content


def _follow(url: str, max_bytes: int, seconds: float, sockets: list[socket.socket]) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        with _get(url, seconds, sockets) as response:
            if response.status in _REDIRECTS and response.headers.get("Location"):
                url = urljoin(url, response.headers["Location"])
                continue
            if response.status != 200:
                raise DataError(f"cannot be fetched (its host responds with status {response.status})")
            content = response.read(max_bytes + 1)
            if len(content) > max_bytes:
                raise DataError(f"is larger than {max_bytes} bytes")
            return content
    raise DataError(f"cannot be fetched (more than {MAX_REDIRECTS} redirects)")


@contextlib.contextmanager
def _get(url: str, seconds: float, sockets: list[socket.socket]) -> Iterator[http.client.HTTPResponse]:
    """Sends a GET request to a checked address; the sockets it opens are appended to `sockets`."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise DataError(f"has an invalid URL ({error})") from error
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
        raise DataError("must have a URL that begins with http:// or https:// and names a host")
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
    resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in resolved]
    if not all(map(is_public, addresses)):
        raise DataError("is on a host that is not public")
    return socket.create_connection((addresses[0], port), timeout=seconds)
