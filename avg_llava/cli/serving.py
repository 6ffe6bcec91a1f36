"""Commands that serve a model to programs."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from avg_llava.cli.options import FAILED, FINE, MODEL, add_command, at_least_one, load_pipeline
from avg_llava.serving.limits import Limits


def serve(arguments: argparse.Namespace) -> int:
    """Serves a model to OpenAI's clients: /v1/chat/completions, /v1/models, /health, /metrics."""
    from avg_llava.serving import server as serving

    api_key = None
    if arguments.api_key_file is not None:
        api_key = arguments.api_key_file.read_text("utf-8").strip()
        if not api_key or not api_key.isascii():
            raise ValueError(f"{arguments.api_key_file} must hold one line, the key, in ASCII")
    pipeline = load_pipeline(arguments)
    limits = Limits(**{field.name: getattr(arguments, field.name) for field in fields(Limits)})
    server = serving.Server(pipeline.predictor, arguments.name or Path(arguments.model).resolve().name, limits, api_key)

    def announce(address: str) -> None:
        print(f"{arguments.model} at {address}", flush=True)

    return FINE if serving.serve(server, arguments.host, arguments.port, announce) else FAILED


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")
    return int(text)


def _limit(flag: str, default: int, help_: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    return (flag,), {"type": at_least_one, "default": default, "metavar": "N", "help": f"{help_} ({default})"}


def add_serving(commands: Any) -> None:
    """Adds the commands of this module."""
    limits = Limits()
    add_command(
        commands,
        "serve",
        serve,
        "avg-llava serve --model runs/mini/stage4 --port 8000",
        [
            *MODEL,
            (("--name",), {"metavar": "NAME", "help": "what requests call the model (default: the folder's name)"}),
            (("--host",), {"default": "127.0.0.1", "help": "address to listen on (default 127.0.0.1: this machine)"}),
            (("--port",), {"type": _port, "default": 8000, "metavar": "N", "help": "port, 0 for a free one (8000)"}),
            (
                ("--api-key-file",),
                {"type": Path, "metavar": "FILE", "help": "file with the key that clients must send"},
            ),
            _limit("--max-batch", limits.max_batch, "requests answered together"),
            _limit("--batch-wait-ms", limits.batch_wait_ms, "milliseconds that an idle model waits for more requests"),
            _limit("--max-queue", limits.max_queue, "waiting requests; further ones get status 429"),
            _limit("--timeout", limits.timeout, "seconds from a request's arrival to its last token"),
            _limit("--grace", limits.grace, "seconds that requests have to end after SIGTERM"),
            _limit("--max-body-mib", limits.max_body_mib, "size of a request in MiB"),
            _limit("--max-images", limits.max_images, "images of one request"),
            _limit("--max-pixels", limits.max_pixels, "pixels of one request's images together"),
            _limit("--max-tokens", limits.max_tokens, "longest answer in tokens"),
            (
                ("--remote-images",),
                {"action": "store_true", "help": "fetch images from public addresses that requests name"},
            ),
        ],
    )


__all__ = ["add_serving"]
