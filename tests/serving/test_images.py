"""Remote images: public hosts only, within size and time limits, redirects included."""

import contextlib
import http.server
import socket
import threading
import time

import pytest

from avg_llava.model.images import DataError
from avg_llava.serving import images
from avg_llava.serving.images import fetch, is_public

SECONDS = 5.0


class Pages(http.server.BaseHTTPRequestHandler):
    """The files and redirects of the test site."""

    def do_GET(self):
        port = self.server.server_address[1]
        if self.path == "/image?x=1":
            self.reply(200, b"content")
        elif self.path == "/big":
            self.reply(200, b"x" * 5000)
        elif self.path == "/there":
            self.reply(302, b"", "image?x=1")
        elif self.path == "/round":
            self.reply(302, b"", "/round")
        elif self.path == "/inward":
            self.reply(302, b"", f"http://127.0.0.2:{port}/image?x=1")
        elif self.path == "/file":
            self.reply(302, b"", "file:///etc/hosts")
        elif self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        else:
            self.reply(404, b"no")

    def reply(self, status, content, location=None):
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        return


@pytest.fixture(scope="module")
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def public(monkeypatch):
    """Treats 127.0.0.1, and no other loopback address, as public."""
    monkeypatch.setattr(images, "is_public", lambda address: address == "127.0.0.1")
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, *_, **kwargs: resolve(host, port, socket.AF_INET))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.5.5", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "::1", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "ff02::1", "::", "64:ff9b::7f00:1",
     "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2"],
)  # fmt: skip
def test_non_public_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


def test_loopback_hosts_are_rejected(site):
    for url in (
        f"{site}/image?x=1",
        site.replace("localhost", "127.0.0.1"),
        site.replace("localhost", "[::ffff:7f00:1]"),
    ):
        with pytest.raises(DataError, match="is on a host that is not public"):
            fetch(url, 1000, SECONDS)


def test_fetch(site, public):
    assert fetch(f"{site}/image?x=1", 1000, SECONDS) == b"content"
    assert fetch(f"{site}/there", 1000, SECONDS) == b"content"
    assert fetch(f"{site}/big", 5000, SECONDS) == b"x" * 5000


def test_size_redirect_and_time_limits(site, public):
    with pytest.raises(DataError, match="is larger than 4999 bytes"):
        fetch(f"{site}/big", 4999, SECONDS)
    with pytest.raises(DataError, match="more than 3 redirects"):
        fetch(f"{site}/round", 1000, SECONDS)
    with pytest.raises(DataError, match="status 404"):
        fetch(f"{site}/absent", 1000, SECONDS)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"timeout after 0\.5 seconds"):
        fetch(f"{site}/drip", 1000, 0.5)
    assert time.monotonic() - began < 8  # ten seconds of drops


def test_redirects_are_checked(site, public):
    with pytest.raises(DataError, match="is on a host that is not public"):
        fetch(f"{site}/inward", 1000, SECONDS)
    with pytest.raises(DataError, match="must have a URL that begins with http"):
        fetch(f"{site}/file", 1000, SECONDS)


def test_connection_goes_to_the_checked_address(site, monkeypatch):
    """DNS rebinding: the name resolves to a public address first, then to the loopback address."""
    port = int(site.rsplit(":", 1)[1])
    answers = iter(["203.0.113.9", "127.0.0.1"])
    asked = []

    def resolve(host, *_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers) if host == "two.faced" else host, port))]

    def connect(address, timeout):
        asked.append(address)
        raise OSError("nobody there")

    monkeypatch.setattr(images, "is_public", lambda address: address == "203.0.113.9")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(DataError, match="nobody there"):
        fetch(f"http://two.faced:{port}/image?x=1", 1000, SECONDS)
    assert asked == [("203.0.113.9", port)]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/x",
        "http://",
        "http://user:secret@host/",
        "http://host:99999/",
        "http://[::1/",
        "https:///x",
        "http://a b/",
    ],
)
def test_invalid_urls(url):
    with pytest.raises(DataError):
        fetch(url, 1000, SECONDS)


def test_unreachable_hosts(public):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch(f"http://localhost:{port}/", 1000, SECONDS)
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch("http://no-such-host.invalid/", 1000, SECONDS)
