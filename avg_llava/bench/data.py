"""`avg-llava bench data`: from JPEG files to crops, against transformers' LLaVA-NeXT image processor.

One process, one thread; the ways take turns, so that what else the machine does meets all of them. Times are of the
processor, not of the clock. Decoding alone, which both do in the same way, stands beside them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, features
from tqdm import tqdm
from transformers import LlavaNextImageProcessorPil

from avg_llava.model.images import decode_image
from avg_llava.model.processing import AvgLlavaImageProcessor

SIZES = ((1152, 864), (1632, 1224), (2304, 1728), (3264, 2448), (4000, 3000))
"""(width, height) of the photographs: 1 to 12 megapixels, 4:3 as cameras give them."""

CROP = 336
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
QUALITY = 90
WAYS = ("ours", "baseline", "decode")


def photograph(width: int, height: int) -> bytes:
    """A JPEG file of shapes under noise, which weighs what a photograph of its size does; the same at every call."""
    generator = np.random.default_rng(0)
    shapes = Image.fromarray(generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    noise = generator.normal(0, 6, (height, width, 3))
    pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC)) + noise
    file = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def make_ways(content: bytes) -> dict[str, Callable[[], Any]]:
    """The ways to time, by name: each from the bytes of a JPEG file."""
    arguments: dict[str, Any] = {
        "size": {"shortest_edge": CROP},
        "crop_size": {"height": CROP, "width": CROP},
        "image_grid_pinpoints": PINPOINTS,
    }
    ours, theirs = AvgLlavaImageProcessor(**arguments), LlavaNextImageProcessorPil(**arguments)
    return {
        "ours": lambda: ours([decode_image(content, "photograph")], return_tensors="pt")["pixel_values"],
        "baseline": lambda: theirs([Image.open(BytesIO(content))], return_tensors="pt")["pixel_values"],
        "decode": lambda: decode_image(content, "photograph"),
    }


def bench_data(sizes: Sequence[tuple[int, int]] = SIZES, repeats: int = 7) -> dict[str, Any]:
    """Measures decoding and anyres of one photograph of each size.

    Args:
        sizes: (width, height) in pixels.
        repeats: Timed rounds, after one that is not timed; medians count.

    Returns:
        `rows`, one for each size: images per second of one core of ours, of transformers' (`baseline`) and of decoding
        alone; `ratio` of ours to transformers', and `bound`, that of decoding alone. `ratio` and `bound` of all sizes
        together, one image of each; `max_pixel_difference` of the normalised pixels; settings.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tqdm(total=len(sizes) * (repeats + 1), desc="bench data", unit="round", disable=None) as bar:
            rows = [_row(size, repeats, bar) for size in sizes]
    finally:
        torch.set_num_threads(threads)
    seconds = {way: sum(1 / row[f"{way}_images_per_s"] for row in rows) for way in WAYS}
    return {
        "rows": rows,
        "ratio": seconds["baseline"] / seconds["ours"],
        "bound": seconds["baseline"] / seconds["decode"],
        "max_pixel_difference": max(row["max_pixel_difference"] for row in rows),
        "settings": {
            "repeats": repeats,
            "crop": CROP,
            "pinpoints": PINPOINTS,
            "jpeg_quality": QUALITY,
            "pillow": PIL.__version__,
            "libjpeg": features.version("libjpeg_turbo") or features.version("jpg"),
        },
        "measured_at": time.strftime("%Y-%m-%d"),
    }


def _row(size: tuple[int, int], repeats: int, bar: Any) -> dict[str, Any]:
    content = photograph(*size)
    ways = make_ways(content)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    pixels: dict[str, torch.Tensor] = {}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            result = way()
            seconds[name].append(time.process_time() - began)
            if name in ("ours", "baseline"):
                pixels[name] = result
        bar.update()
    speeds = {name: 1 / statistics.median(values[1:]) for name, values in seconds.items()}
    return {
        "megapixels": size[0] * size[1] / 1e6,
        "width": size[0],
        "height": size[1],
        "bytes": len(content),
        "crops": pixels["ours"].shape[1],
        **{f"{name}_images_per_s": speed for name, speed in speeds.items()},
        "ratio": speeds["ours"] / speeds["baseline"],
        "bound": speeds["decode"] / speeds["baseline"],
        "max_pixel_difference": (pixels["ours"] - pixels["baseline"]).abs().max().item(),
    }


def table_lines(result: dict[str, Any]) -> list[str]:
    """A result for people."""
    titles = ("megapixels", "ours", "transformers", "decode only", "ratio", "bound")
    lines = ["images per second of one core, JPEG file to crops", "".join(f"{title:>13}" for title in titles)]
    for row in result["rows"]:
        speeds = "".join(f"{row[f'{way}_images_per_s']:>13.1f}" for way in WAYS)
        lines.append(f"{row['megapixels']:>13.1f}{speeds}{row['ratio']:>12.2f}x{row['bound']:>12.2f}x")
    return [
        *lines,
        f"all sizes: {result['ratio']:.2f}x (bound {result['bound']:.2f}x); pixels differ by at most "
        f"{result['max_pixel_difference']:.1e}",
    ]


__all__ = ["bench_data", "table_lines"]
