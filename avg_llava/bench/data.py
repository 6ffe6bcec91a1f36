"""`avg-llava bench data`: from JPEG files to crops, against transformers' LLaVA-NeXT image processor.

Runs on one thread and measures CPU time. Decoding alone, which is the same in both, is the upper bound.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, features
from transformers import LlavaNextImageProcessorPil

from avg_llava.bench.timing import alternate, environment
from avg_llava.common.tables import render_table
from avg_llava.model.images import decode_image
from avg_llava.model.processing import AvgLlavaImageProcessor

SIZES = ((1152, 864), (1632, 1224), (2304, 1728), (3264, 2448), (4000, 3000))
"""(width, height) of the photographs: 1 to 12 megapixels at 4:3, the aspect ratio of most cameras."""

CROP = 336
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
QUALITY = 90
VARIANTS = ("ours", "baseline", "decode")


def photograph(width: int, height: int) -> bytes:
    """A deterministic JPEG file of shapes under noise, with about as many bytes as a photograph of its size."""
    generator = np.random.default_rng(0)
    shapes = Image.fromarray(generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    noise = generator.normal(0, 6, (height, width, 3))
    pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC)) + noise
    file = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def make_variants(content: bytes) -> dict[str, Callable[[], Any]]:
    """The functions to time, by name; each starts from the bytes of a JPEG file."""
    arguments: dict[str, Any] = {
        "size": {"shortest_edge": CROP},
        "crop_size": {"height": CROP, "width": CROP},
        "image_grid_pinpoints": PINPOINTS,
    }
    ours, baseline = AvgLlavaImageProcessor(**arguments), LlavaNextImageProcessorPil(**arguments)
    return {
        "ours": lambda: ours([decode_image(content, "photograph")], return_tensors="pt")["pixel_values"],
        "baseline": lambda: baseline([Image.open(BytesIO(content))], return_tensors="pt")["pixel_values"],
        "decode": lambda: decode_image(content, "photograph"),
    }


def bench_data(sizes: Sequence[tuple[int, int]] = SIZES, repeats: int = 7) -> dict[str, Any]:
    """Measures decoding and anyres preprocessing of one photograph of each size.

    Args:
        sizes: (width, height) in pixels.
        repeats: Measured rounds, after a warm-up; the median counts.

    Returns:
        `rows`, one per size: images per second of one core for ours, transformers' (`baseline`) and decoding alone,
        `ratio` of ours to transformers' and its upper `bound`. `ratio` and `bound` over one image of every size;
        `max_pixel_difference` of the normalised pixels; settings and machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [_row(size, repeats) for size in sizes]
        measured_on = environment()
    finally:
        torch.set_num_threads(threads)
    seconds = {name: sum(1 / row[f"{name}_images_per_s"] for row in rows) for name in VARIANTS}
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
        **measured_on,
    }


def _row(size: tuple[int, int], repeats: int) -> dict[str, Any]:
    content = photograph(*size)
    megapixels = size[0] * size[1] / 1e6
    variants = make_variants(content)
    ours, baseline = variants["ours"](), variants["baseline"]()
    timed = {name: partial(_cpu_seconds, run) for name, run in variants.items()}
    measured = alternate(timed, repeats, f"bench data, {megapixels:.0f} megapixels")
    speeds = {name: 1 / statistics.median(seconds[1:]) for name, seconds in measured.items()}
    return {
        "megapixels": megapixels,
        "width": size[0],
        "height": size[1],
        "bytes": len(content),
        "crops": ours.shape[1],
        **{f"{name}_images_per_s": speed for name, speed in speeds.items()},
        "ratio": speeds["ours"] / speeds["baseline"],
        "bound": speeds["decode"] / speeds["baseline"],
        "max_pixel_difference": (ours - baseline).abs().max().item(),
    }


def _cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def table_lines(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    rows = [
        (
            f"{row['megapixels']:.1f}",
            *(f"{row[f'{name}_images_per_s']:.1f}" for name in VARIANTS),
            f"{row['ratio']:.2f}x",
            f"{row['bound']:.2f}x",
        )
        for row in result["rows"]
    ]
    columns = ("megapixels", "ours", "transformers", "decode only", "ratio", "bound")
    return [
        "images per second of one core, JPEG file to crops",
        *render_table(columns, rows, num_left=0).splitlines(),
        f"all sizes: {result['ratio']:.2f}x (bound {result['bound']:.2f}x); pixels differ by at most "
        f"{result['max_pixel_difference']:.1e}",
    ]
