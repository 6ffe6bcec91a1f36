"""Records and images with every fault known from training data, and some valid ones."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.tiny import record, write_records

SOUND = "images/sound.png"
# Ids of records left out from the start, of unreadable samples, and of samples that are used but logged.
MALFORMED = ("dots", "roles out of order", "placeholders")
UNREADABLE = ("truncated JPEG", "0 bytes", "bomb", "link", "missing")
USED = ("over-long", "masked")
WITHOUT_FAULT = ("sound", "text", "GIF named .jpg")


def huge_png(side: int = 30_000) -> bytes:
    """A valid black image of side x side pixels, one bit each: a few hundred bytes for every million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = bytes(1 + (side + 7) // 8)
    compressor = zlib.compressobj(1)
    pixels = b"".join(compressor.compress(row * 1000) for _ in range(side // 1000)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def write_faults(folder: Path, outside: Path) -> Path:
    """Writes `data.json` and its images, one of which is a link into the folder `outside`.

    A record's id is its fault. Over-long ones have hundreds of words: more than 600 tokens of any tokenizer.
    """
    images = folder / "images"
    images.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(folder / SOUND)
    picture.save(images / "cut.jpg")
    content = (images / "cut.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(content[: len(content) // 2])
    (images / "empty.jpg").write_bytes(b"")
    picture.save(images / "gif.jpg", format="GIF")
    (images / "bomb.png").write_bytes(huge_png())
    picture.save(outside / "picture.png")
    os.symlink(outside / "picture.png", images / "link.png")
    out_of_order = record("roles out of order", "<image>\nWhat?", "A car.", SOUND)
    out_of_order["conversations"].append(out_of_order["conversations"][1])
    return write_records(
        folder,
        record("sound", "<image>\nWhat?", "A car.", SOUND),
        record("text", "Hi", "Yes"),
        record("truncated JPEG", "<image>\nWhat?", "A car.", "images/cut.jpg"),
        record("0 bytes", "<image>\nWhat?", "A car.", "images/empty.jpg"),
        record("GIF named .jpg", "<image>\nWhat?", "A car.", "images/gif.jpg"),
        record("bomb", "<image>\nWhat?", "A car.", "images/bomb.png"),
        record("link", "<image>\nWhat?", "A car.", "images/link.png"),
        record("dots", "<image>\nWhat?", "A car.", "../wide.png"),
        out_of_order,
        record("placeholders", "<image> <image>\nWhat?", "A car.", SOUND),
        record("over-long", "<image>\nWhat?", "A car. " * 300, SOUND),
        record("masked", "<image>\nWhat? " + "Now? " * 300, "A car.", SOUND),
        record("missing", "<image>\nWhat?", "A car.", "images/nowhere.png"),
    )
