"""Images at other sizes: Pillow's pixels bit for bit, bicubic ones in a third of its time.

Pillow resizes one axis after the other. A pixel of a pass is a sum of input pixels times whole numbers, the filter's
values with 22 binary places, rounded to 8 bits. Whole numbers add up to the same in any order, so here many rows take
the pass over the width together, turned on their side; both sizes that anyres needs of an image are made from rows that
were turned once.
"""

import os
from collections.abc import Sequence
from functools import lru_cache

import numba
import numpy as np
from PIL import Image

PLACES = 22
"""Binary places of weights: 8 bits of a pixel and 2 of sums beyond them are left in 32."""
ROWS = 64
"""Rows that are turned together; fewer or more were slower on an x86-64 machine."""

# Compiled code is kept beside this file, for later processes, where that can be written.
_compiled = numba.njit(cache=os.access(os.path.dirname(__file__), os.W_OK), nogil=True)


def resize(image: Image.Image, sizes: Sequence[tuple[int, int]], resample: int) -> list[np.ndarray]:
    """An RGB image at several sizes.

    Pillow rounds to whole levels between its two passes, so their order shows: by up to 12 of 255 levels in tall
    images. Up to Pillow 12 the width always came first; Pillow 13 begins with the height where that shrinks by more
    than twice as many pixels as the width. That rule, under which the reference pixels were recorded, is spelled out
    here, so that pixels do not depend on the installed version.

    Args:
        image: The image.
        sizes: (height, width) each.
        resample: One of Pillow's filters; bicubic is the fast one.

    Returns:
        For each size (height, width, 3) uint8.
    """
    if resample != Image.Resampling.BICUBIC:
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
    """What each pixel of a resized axis is made of: Pillow's `precompute_coeffs` for its bicubic filter.

    Args:
        length: Pixels of the axis.
        target: Pixels that it is resized to.

    Returns:
        (target,) the first input pixel of each, and (target, K) int32 weights of it and those after it; in units of
        2**-PLACES, zero where there is nothing left to weigh.
    """
    scale = length / target
    stretch = max(scale, 1.0)  # the filter covers 4 pixels of the coarser of the two grids
    centers = (np.arange(target) + 0.5) * scale
    first = np.maximum((centers - 2.0 * stretch + 0.5).astype(np.int64), 0)
    counts = np.minimum((centers + 2.0 * stretch + 0.5).astype(np.int64), length) - first
    taps = np.arange(counts.max())
    distance = np.abs((taps + first[:, None] - centers[:, None] + 0.5) * (1.0 / stretch))
    inner = (1.5 * distance - 2.5) * distance * distance + 1.0
    outer = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
    values = np.where(distance < 1.0, inner, np.where(distance < 2.0, outer, 0.0))
    values[taps >= counts[:, None]] = 0.0
    values /= np.add.accumulate(values, axis=1)[:, -1:]  # one after the other, as Pillow adds
    return first, np.trunc(values * 2**PLACES + np.copysign(0.5, values)).astype(np.int32)


def _to_widths(image: Image.Image, widths: Sequence[int]) -> list[np.ndarray]:
    """An image at several widths, its height as it was."""
    passes = [(*bicubic_weights(image.width, width), np.empty((image.height, width, 3), np.uint8)) for width in widths]
    turned = np.zeros((image.width, 3 * ROWS), np.uint8)
    for top in range(0, image.height if widths else 0, ROWS):
        strip = np.asarray(image.crop((0, top, image.width, min(top + ROWS, image.height))))
        _turn(strip, turned)
        for first, weights, result in passes:
            _sum_columns(turned, first, weights, result[top : top + ROWS])
    return [result for _, _, result in passes]


def _to_height(pixels: np.ndarray, height: int) -> np.ndarray:
    """(H, W, 3) at another height."""
    if len(pixels) == height:
        return pixels
    result = np.empty((height, *pixels.shape[1:]), np.uint8)
    _sum_rows(pixels.reshape(len(pixels), -1), *bicubic_weights(len(pixels), height), result.reshape(height, -1))
    return result


@_compiled
def _turn(strip: np.ndarray, turned: np.ndarray) -> None:
    """(R, W, 3) -> (W, 3 ROWS), channel after channel."""
    for x in range(strip.shape[1]):
        for y in range(len(strip)):
            turned[x, y] = strip[y, x, 0]
            turned[x, ROWS + y] = strip[y, x, 1]
            turned[x, 2 * ROWS + y] = strip[y, x, 2]


@_compiled
def _sum_columns(turned: np.ndarray, first: np.ndarray, weights: np.ndarray, result: np.ndarray) -> None:
    """(W, 3 ROWS) -> (R, target, 3)."""
    sums = np.empty(3 * ROWS, np.int32)
    for x in range(len(first)):
        sums[:] = 1 << (PLACES - 1)
        start = first[x]
        for tap in range(min(weights.shape[1], len(turned) - start)):
            weight = weights[x, tap]
            for lane in range(3 * ROWS):
                sums[lane] += weight * np.int32(turned[start + tap, lane])
        for y in range(len(result)):
            for channel in range(3):
                result[y, x, channel] = min(max(sums[channel * ROWS + y] >> PLACES, 0), 255)


@_compiled
def _sum_rows(pixels: np.ndarray, first: np.ndarray, weights: np.ndarray, result: np.ndarray) -> None:
    """(H, N) -> (target, N)."""
    sums = np.empty(pixels.shape[1], np.int32)
    for y in range(len(first)):
        sums[:] = 1 << (PLACES - 1)
        start = first[y]
        for tap in range(min(weights.shape[1], len(pixels) - start)):
            weight = weights[y, tap]
            for x in range(pixels.shape[1]):
                sums[x] += weight * np.int32(pixels[start + tap, x])
        for x in range(pixels.shape[1]):
            result[y, x] = min(max(sums[x] >> PLACES, 0), 255)
