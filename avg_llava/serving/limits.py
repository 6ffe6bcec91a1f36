"""Limits of `avg-llava serve`.

Imports only the standard library: the command line reads the defaults for `--help`, without torch or fastapi.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Limits of a server; together they bound its memory and its response times.

    Attributes:
        max_batch: Maximum number of requests per batch.
        batch_wait_ms: Milliseconds an idle model waits for more requests before it starts a batch.
        max_queue: Maximum number of requests being received or waiting for the model; further ones get status 429.
        timeout: Seconds from a request's arrival to its last token; after that it fails with status 504.
        grace: Seconds that open requests have to finish after SIGTERM.
        max_body_mib: Maximum size of a request body in MiB; larger ones get status 413.
        max_images: Maximum number of images per request, over all turns.
        max_pixels: Maximum number of pixels per request, over all its images; checked before images are decoded.
        max_tokens: Maximum number of generated tokens, and the default for requests that do not set one.
        remote_images: Fetch images from public http(s) URLs.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and value < 1:
                raise ValueError(f"--{field.name.replace('_', '-')} must be at least 1, got {value}")
