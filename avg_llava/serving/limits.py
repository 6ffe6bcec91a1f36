"""What one server grants: the limits of `avg-llava serve`, each declared once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server; memory and waiting times are bounded by them.

    Attributes:
        max_batch: Requests that are answered together.
        batch_wait_ms: Milliseconds that an idle model waits for more requests to answer together.
        max_queue: Requests that are being read or wait for the model; further ones get status 429.
        timeout: Seconds from a request's arrival to its last token; then it ends with status 504.
        grace: Seconds that a server which was told to stop gives the requests it has.
        max_body_mib: Size of a request's body in MiB; larger ones get status 413.
        max_images: Images of one request, all turns together.
        max_pixels: Pixels of one request's images together; they are not decoded if they have more.
        max_tokens: Longest answer in tokens, and the length of answers whose request names none.
        remote_images: Whether images are fetched from public addresses that requests name.
    """

    max_batch: int = 16
    batch_wait_ms: int = 5
    max_queue: int = 64
    timeout: int = 120
    grace: int = 30
    max_body_mib: int = 32
    max_images: int = 8
    max_pixels: int = 2**24
    max_tokens: int = 512
    remote_images: bool = False


__all__ = ["Limits"]
