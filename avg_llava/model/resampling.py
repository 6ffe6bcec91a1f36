"""Resizing of images: bit for bit the pixels of Pillow, bicubic in a third of its time.

Pillow resizes one axis after the other. In each pass, an output pixel is the sum of input pixels times integer weights
(the filter with `PRECISION` fractional bits), rounded to 8 bits. Integer sums do not depend on the order of summation.
Here the pass over the width transposes `ROWS` rows at a time and sums them together, and both sizes that anyres needs
of an image are computed from the same transposed rows.
"""

import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

try:
    import numba
except ModuleNotFoundError:  # of a published model that is used without this package: Pillow computes the same pixels
    numba = None

PRECISION = 22
"""Fractional bits of the weights; of 32 bits, 8 are for the pixel and 2 for sums that exceed its range."""
ROWS = 64
"""Rows that are transposed together; the fastest number on an x86-64 machine."""

# Numba caches compiled code beside this file if the folder is writable.
_options = {"cache": os.access(os.path.dirname(__file__), os.W_OK), "nogil": True}
_compiled = numba.njit(**_options) if numba else lambda function: function


def resize(image: Image.Image, sizes: Sequence[tuple[int, int]], resample: int) -> list[np.ndarray]:
    """Resizes an RGB image to several sizes.

    Pillow rounds to 8 bits between its two passes, so their order changes the pixels, by up to 12 of 255 levels in tall
    images. Up to Pillow 12, the width comes first; from Pillow 13, the height comes first if it shrinks by more than
    twice as many pixels as the width. The reference pixels were recorded with the latter rule, which is implemented
    here, so that pixels do not depend on the installed version.

    Args:
        image: The image.
        sizes: (height, width) of each result.
        resample: One of Pillow's filters; bicubic is the fast one.

    Returns:
        A (height, width, 3) uint8 array for each size.
    """
    if resample != Image.Resampling.BICUBIC or numba is None:
        return [_by_pillow(image, size, resample) for size in sizes]
    width_first = [size for size in sizes if not _height_comes_first(image, size)]
    narrowed = dict(zip(width_first, _to_widths(image, [width for _, width in width_first]), strict=True))
    for size in set(sizes) - set(width_first):
        flattened = Image.fromarray(_to_height(np.asarray(image), size[0]))
        (narrowed[size],) = _to_widths(flattened, [size[1]])
    return [_to_height(narrowed[size], size[0]) for size in sizes]


def _height_comes_first(image: Image.Image, size: tuple[int, int]) -> bool:
    return image.height - size[0] > max(0, 2 * (image.width - size[1]))


def _by_pillow(image: Image.Image, size: tuple[int, int], resample: int) -> np.ndarray:
    height, width = size
    if _height_comes_first(image, size):
        image = image.resize((image.width, height), resample)
    return np.asarray(image.resize((width, height), resample))


@lru_cache(maxsize=256)
def bicubic_weights(length: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the input pixels in each output pixel of an axis: Pillow's `precompute_coeffs`, bicubic.

    Args:
        length: Input pixels of the axis.
        target: Output pixels of the axis.

    Returns:
        (target,) index of the first input pixel of each output pixel, and (target, K) int32 weights of K input pixels
        from there on, in units of 2**-PRECISION, zero beyond the filter's support.
    """
    scale = length / target
    stretch = max(scale, 1.0)  # the support is 4 pixels of the coarser grid
    centers = (np.arange(target) + 0.5) * scale
    first = np.maximum((centers - 2.0 * stretch + 0.5).astype(np.int64), 0)
    counts = np.minimum((centers + 2.0 * stretch + 0.5).astype(np.int64), length) - first
    taps = np.arange(counts.max())
    distance = np.abs((taps + first[:, None] - centers[:, None] + 0.5) * (1.0 / stretch))
    inner = (1.5 * distance - 2.5) * distance * distance + 1.0
    outer = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
    values = np.where(distance < 1.0, inner, np.where(distance < 2.0, outer, 0.0))
    values[taps >= counts[:, None]] = 0.0
    values /= np.add.accumulate(values, axis=1)[:, -1:]  # sequential summation, as in Pillow
    return first, np.trunc(values * 2**PRECISION + np.copysign(0.5, values)).astype(np.int32)


def _to_widths(image: Image.Image, widths: Sequence[int]) -> list[np.ndarray]:
    """Resizes an image to several widths."""
    passes = [(*bicubic_weights(image.width, width), np.empty((image.height, width, 3), np.uint8)) for width in widths]
    transposed = np.zeros((image.width, 3 * ROWS), np.uint8)
    for top in range(0, image.height if widths else 0, ROWS):
        strip = np.asarray(image.crop((0, top, image.width, min(top + ROWS, image.height))))
        _transpose(strip, transposed)
        for first, weights, result in passes:
            _sum_columns(transposed, first, weights, result[top : top + ROWS])
    return [result for _, _, result in passes]


def _to_height(pixels: np.ndarray, height: int) -> np.ndarray:
    """Resizes (H, W, 3) pixels to another height."""
    if len(pixels) == height:
        return pixels
    result = np.empty((height, *pixels.shape[1:]), np.uint8)
    _sum_rows(pixels.reshape(len(pixels), -1), *bicubic_weights(len(pixels), height), result.reshape(height, -1))
    return result


@_compiled
def _transpose(strip: np.ndarray, transposed: np.ndarray) -> None:
    """(R, W, 3) to (W, 3 ROWS), channel after channel."""
    for x in range(strip.shape[1]):
        for y in range(len(strip)):
            transposed[x, y] = strip[y, x, 0]
            transposed[x, ROWS + y] = strip[y, x, 1]
            transposed[x, 2 * ROWS + y] = strip[y, x, 2]


@_compiled
def _sum_columns(transposed: np.ndarray, first: np.ndarray, weights: np.ndarray, result: np.ndarray) -> None:
    """Pass over the width: (W, 3 ROWS) to (R, target, 3)."""
    sums = np.empty(3 * ROWS, np.int32)
    for x in range(len(first)):
        sums[:] = 1 << (PRECISION - 1)
        start = first[x]
        for tap in range(min(weights.shape[1], len(transposed) - start)):
            weight = weights[x, tap]
            for lane in range(3 * ROWS):
                sums[lane] += weight * np.int32(transposed[start + tap, lane])
        for y in range(len(result)):
            for channel in range(3):
                result[y, x, channel] = min(max(sums[channel * ROWS + y] >> PRECISION, 0), 255)


@_compiled
def _sum_rows(pixels: np.ndarray, first: np.ndarray, weights: np.ndarray, result: np.ndarray) -> None:
    """Pass over the height: (H, N) to (target, N)."""
    sums = np.empty(pixels.shape[1], np.int32)
    for y in range(len(first)):
        sums[:] = 1 << (PRECISION - 1)
        start = first[y]
        for tap in range(min(weights.shape[1], len(pixels) - start)):
            weight = weights[y, tap]
            for x in range(pixels.shape[1]):
                sums[x] += weight * np.int32(pixels[start + tap, x])
        for x in range(pixels.shape[1]):
            result[y, x] = min(max(sums[x] >> PRECISION, 0), 255)
