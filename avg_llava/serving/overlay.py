"""Draws an image's crops under the grid of their visual tokens.

Sizes are (height, width) in pixels. Shapes: P crops of one image (overview first, then tiles row-major), S crop side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from PIL import Image

from avg_llava.model.anyres import canvas_tiles, kept_window
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.processing import AvgLlavaImageProcessor

_TILE_BORDER = (255, 122, 0)
_GREY = 128
_LINE_STRENGTH, _DROPPED_STRENGTH = 0.6, 0.75
_STRIPE, _LARGE_CELL = 6, 24  # pixels
# Longest side, in pixels, up to which the small crops of small models are enlarged.
_LONGEST_CANVAS, _LONGEST_OVERVIEW = 768, 336


@dataclass(frozen=True)
class TokenGrid:
    """Pixel positions of a picture's visual tokens.

    Attributes:
        size: Size of the picture.
        tile: Side of a tile.
        cell: Size of one token; tokens at the lower and right edge of a tile may be smaller.
        kept: (top, bottom, left, right) of the tokens kept by unpadding, ends excluded; the others are padding.
    """

    size: tuple[int, int]
    tile: int
    cell: tuple[int, int]
    kept: tuple[int, int, int, int]


def tiles_grid(image_size: Sequence[int], granularity: int, config: AvgLlavaConfig) -> TokenGrid:
    """Returns the grid on an image's canvas of tiles, at `granularity` tokens per crop."""
    crop = config.crop_size
    tile_rows, tile_columns = canvas_tiles(image_size, config)
    rows, columns = config.ladder.grid(granularity)
    height, width = _cell(granularity, config)
    window = kept_window(image_size, granularity, config)

    def edge(index: int, cells: int, size: int) -> int:
        return index // cells * crop + min(index % cells * size, crop)

    top, bottom = edge(window.top, rows, height), edge(window.bottom, rows, height)
    left, right = edge(window.left, columns, width), edge(window.right, columns, width)
    return TokenGrid((crop * tile_rows, crop * tile_columns), crop, (height, width), (top, bottom, left, right))


def overview_grid(granularity: int, config: AvgLlavaConfig) -> TokenGrid:
    """Returns the grid on the overview crop; all its tokens are kept."""
    crop = config.crop_size
    return TokenGrid((crop, crop), crop, _cell(granularity, config), (0, crop, 0, crop))


def _cell(granularity: int, config: AvgLlavaConfig) -> tuple[int, int]:
    height, width = config.ladder.cell(granularity)
    return height * config.vision_config.patch_size, width * config.vision_config.patch_size


def denormalized_crops(image: Image.Image, image_processor: AvgLlavaImageProcessor) -> np.ndarray:
    """Returns the image processor's crops with the normalization undone, as (P, S, S, 3) uint8."""
    pixels = image_processor(image, return_tensors="np")["pixel_values"][0]  # (P, 3, S, S)
    colors = rearrange(pixels, "p c h w -> p h w c") * image_processor.image_std + image_processor.image_mean
    return np.rint(colors / image_processor.rescale_factor).clip(0, 255).astype(np.uint8)


def assemble_canvas(crops: np.ndarray, tile_columns: int) -> np.ndarray:
    """Joins the tiles of (P, S, S, 3) crops to the canvas (height, width, 3); the overview is left out."""
    return rearrange(crops[1:], "(r k) h w c -> (r h) (k w) c", k=tile_columns)


def draw_grid(picture: np.ndarray, grid: TokenGrid, factor: int = 1) -> np.ndarray:
    """Enlarges a picture and draws its token grid.

    Lines run along the first row and column of pixels of each token except at the edges, two pixels wide for large
    tokens; they are dark on bright pixels and bright on dark ones. Tile borders are orange and three pixels wide.
    Padding is striped.

    Args:
        picture: (height, width, 3) uint8.
        grid: The token grid of the picture before it is enlarged.
        factor: Integer factor by which the picture is enlarged; the width of lines does not depend on it.

    Raises:
        ValueError: The grid belongs to a picture of another size.
    """
    if picture.shape[:2] != grid.size:
        raise ValueError(f"the grid belongs to a picture of {grid.size} pixels, but this one has {picture.shape[:2]}")
    colors = picture.repeat(factor, axis=0).repeat(factor, axis=1).astype(np.float32)
    cell_height, cell_width, top, bottom, left, right = (factor * length for length in (*grid.cell, *grid.kept))
    y, x = np.ogrid[: len(colors), : len(colors[0])]
    kept = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    tile = factor * grid.tile
    lines = kept & (_is_line(y, cell_height, tile) | _is_line(x, cell_width, tile))
    contrast = np.where(colors.mean(axis=-1, keepdims=True) < _GREY, 255.0, 0.0)
    colors = np.where(lines[..., None], colors + (contrast - colors) * _LINE_STRENGTH, colors)
    stripes = np.where((x + y) // _STRIPE % 2, _GREY, _GREY + 40)[..., None]
    colors = np.where(kept[..., None], colors, colors + (stripes - colors) * _DROPPED_STRENGTH)
    for edge in range(tile, len(colors), tile):
        colors[edge - 1 : edge + 2] = _TILE_BORDER
    for edge in range(tile, len(colors[0]), tile):
        colors[:, edge - 1 : edge + 2] = _TILE_BORDER
    return np.rint(colors).astype(np.uint8)


def _is_line(position: np.ndarray, cell: int, tile: int) -> np.ndarray:
    return (position >= cell) & (position % tile % cell < (2 if cell >= _LARGE_CELL else 1))


class TokenPictures:
    """An RGB image's crops, processed once and drawn under the grid of any level."""

    def __init__(self, image: Image.Image, image_processor: AvgLlavaImageProcessor, config: AvgLlavaConfig) -> None:
        self._image_size, self._config = (image.height, image.width), config
        self._crops = denormalized_crops(image, image_processor)
        self._canvas = assemble_canvas(self._crops, canvas_tiles(self._image_size, config)[1])

    def tiles(self, granularity: int) -> Image.Image:
        """Draws the canvas of tiles at `granularity` tokens per crop."""
        return _draw(self._canvas, tiles_grid(self._image_size, granularity, self._config), _LONGEST_CANVAS)

    def overview(self, granularity: int) -> Image.Image:
        """Draws the overview crop, which is the whole image resized to a square."""
        return _draw(self._crops[0], overview_grid(granularity, self._config), _LONGEST_OVERVIEW)


def _draw(picture: np.ndarray, grid: TokenGrid, longest: int) -> Image.Image:
    return Image.fromarray(draw_grid(picture, grid, max(1, longest // max(grid.size))))
