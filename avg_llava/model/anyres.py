"""Anyres geometry: the canvas that an image is fitted to, its crops, and the tokens that remain after unpadding.

Sizes are (height, width) in pixels. The crops of an image are one overview and the tiles of its canvas. At a level with
R x K tokens per crop, a canvas of (rows, columns) tiles is a map of (`rows * R`, `columns * K`) tokens. Unpadding keeps
a window of the map, and one newline token follows every row of the window. Pure functions.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from avg_llava.model.configuration import AvgLlavaConfig


class Window(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of a token map or of an image."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the window, with one newline token per row."""
        return (self.bottom - self.top) * (self.right - self.left + 1)


def select_canvas(image_size: Sequence[int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Selects the (height, width) of `pinpoints` with the most image pixels, and of these the one with least padding.

    Of equally good ones the first is taken, as in LLaVA's `select_best_resolution`. The original code and transformers
    list the pinpoints in different orders, which matters for images no larger than one crop (see `AvgLlavaConfig`).
    """
    height, width = image_size
    if height < 1 or width < 1:
        raise ValueError(f"image size must be positive, got {height}x{width} (height x width)")

    def kept_and_wasted(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    best = max(pinpoints, key=kept_and_wasted)  # max keeps the first of equals
    return best[0], best[1]


def image_window(image_size: Sequence[int], canvas: Sequence[int]) -> Window:
    """Pixels of a canvas (height, width) that the image covers: it is resized to fit and centred."""
    height, width = image_size
    by_width, by_height = canvas[1] / width, canvas[0] / height
    if by_width < by_height:
        fitted = min(math.ceil(height * by_width), canvas[0]), canvas[1]
    else:
        fitted = canvas[0], min(math.ceil(width * by_height), canvas[1])
    top, left = (canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2
    return Window(top, top + fitted[0], left, left + fitted[1])


def canvas_tiles(image_size: Sequence[int], config: AvgLlavaConfig) -> tuple[int, int]:
    """(rows, columns) of tiles of an image."""
    crop = config.crop_size
    height, width = select_canvas(image_size, config.image_grid_pinpoints)
    return height // crop, width // crop


def num_crops(image_size: Sequence[int], config: AvgLlavaConfig) -> int:
    """Crops of an image: the overview and its tiles."""
    rows, columns = canvas_tiles(image_size, config)
    return 1 + rows * columns


def kept_window(image_size: Sequence[int], granularity: int, config: AvgLlavaConfig) -> Window:
    """The window of the tiles' token map that remains when the padding around the image is removed.

    With behaviour "paper" the padding is measured on the finest map, with transformers' rounding, so that the finest
    level equals transformers' LLaVA-NeXT. At coarser levels only tokens that are entirely padding are dropped: every
    level keeps the image content that the finest level keeps.
    With "released" the padding of each map follows from its aspect ratio and the image's, as in the training of the
    published weights. Maps with cells of half width (288 and 72 tokens) lose image content.
    """
    side = config.num_patches_per_side
    tile_rows, tile_columns = canvas_tiles(image_size, config)
    rows, columns = config.ladder.grid(granularity)
    map_rows, map_columns = tile_rows * rows, tile_columns * columns
    if config.behavior == "released":
        pad_rows, pad_columns = _padding(image_size, map_rows, map_columns, ndigits=None)
        return Window(pad_rows, map_rows - pad_rows, pad_columns, map_columns - pad_columns)
    fine_rows, fine_columns = _padding(image_size, tile_rows * side, tile_columns * side, ndigits=7)
    top, bottom = _whole_cells(fine_rows, side, rows)
    left, right = _whole_cells(fine_columns, side, columns)
    return Window(top, map_rows - bottom, left, map_columns - right)


def num_visual_tokens(image_size: Sequence[int], granularity: int, config: AvgLlavaConfig) -> int:
    """Visual tokens of an image, newlines included, at `granularity` tokens per crop."""
    return granularity + kept_window(image_size, granularity, config).num_tokens


def _whole_cells(padding: int, side: int, cells: int) -> tuple[int, int]:
    """Cells that lie wholly within the first, and within the last `padding` patches of a row of tiles.

    A tile has `side` patches in `cells` cells of equal size, but for the last, which has what is left of them.
    """
    size = -(-side // cells)
    tiles, rest = divmod(padding, side)
    last = side - size * (cells - 1)
    return tiles * cells + rest // size, tiles * cells + (rest - last + size) // size


def _padding(image_size: Sequence[int], map_rows: int, map_columns: int, ndigits: int | None) -> tuple[int, int]:
    """Padding rows at top and bottom each, and columns left and right each, of a token map with square cells.

    `ndigits` is the rounding before truncation: None as in the original code, 7 as in transformers, which keeps a row
    where the float is just below an integer (1408x792, for example).
    """
    height, width = image_size

    def truncated(value: float) -> int:
        return int(value if ndigits is None else round(value, ndigits))

    if width / height > map_columns / map_rows:
        return (map_rows - truncated(height * (map_columns / width))) // 2, 0
    return 0, (map_columns - truncated(width * (map_rows / height))) // 2
