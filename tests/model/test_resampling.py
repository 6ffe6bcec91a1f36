"""Pixels equal Pillow's, at any size and in either order of its passes."""

import numpy as np
import pytest
from PIL import Image

from avg_llava.model import resampling
from avg_llava.model.resampling import ROWS, resize

BICUBIC = Image.Resampling.BICUBIC


def picture(width, height, seed=0, extreme=False):
    """Noise, or noise of 0 and 255 only, whose sums exceed the range of a pixel."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray((pixels // 128 * 255).astype(np.uint8) if extreme else pixels)


def by_pillow(image, size, resample=BICUBIC, height_first=False):
    between = (image.width, size[0]) if height_first else (size[1], image.height)
    return np.asarray(image.resize(between, resample).resize((size[1], size[0]), resample))


def sides():
    """Sides of two images and of two sizes: single pixels, whole strips and one row more, and others."""
    special = [1, 2, 3, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS]
    generator = np.random.default_rng(0)
    drawn = generator.choice(special, (30, 4)).tolist() + generator.integers(1, 400, (60, 4)).tolist()
    return [(width, height, (target_height, target_width)) for width, height, target_height, target_width in drawn]


@pytest.mark.parametrize("extreme", [False, True])
def test_pixels_are_pillow_s(extreme):
    num_height_first = 0
    for width, height, size in sides():
        image = picture(width, height, extreme=extreme)
        height_first = height - size[0] > max(0, 2 * (width - size[1]))
        num_height_first += height_first
        (found,) = resize(image, [size], BICUBIC)
        assert (found.dtype, found.shape) == (np.uint8, (*size, 3))
        expected = by_pillow(image, size, height_first=height_first)
        assert np.array_equal(found, expected), (width, height, size)
    assert 10 < num_height_first < 80


def test_photograph_sizes():
    image = picture(1632, 1224)
    for size, found in zip([(336, 336), (504, 672)], resize(image, [(336, 336), (504, 672)], BICUBIC), strict=True):
        assert np.array_equal(found, by_pillow(image, size))


def test_several_sizes_and_orders_at_once():
    image = picture(60, 200)
    sizes = [(30, 30), (200, 60), (190, 20), (30, 30), (400, 7), (100, 60)]
    alone = [resize(image, [size], BICUBIC)[0] for size in sizes]
    for found, expected in zip(resize(image, sizes, BICUBIC), alone, strict=True):
        assert np.array_equal(found, expected)
    assert np.array_equal(alone[1], np.asarray(image))


@pytest.mark.parametrize(
    ("width", "height", "target", "height_first"),
    [
        (40, 90, (30, 30), True),  # 60 rows fewer, 10 columns fewer
        (40, 50, (30, 30), False),  # 20 rows fewer is not more than twice 10
        (40, 51, (30, 30), True),
        (40, 90, (95, 10), False),  # taller
        (20, 90, (80, 40), True),  # wider, and less tall
    ],
)
def test_order_of_passes(width, height, target, height_first):
    """Width first unless the height shrinks by more than twice as many pixels: the rule of the golden pixels."""
    image = picture(width, height)
    for resample in (BICUBIC, Image.Resampling.BILINEAR):
        (found,) = resize(image, [target], resample)
        assert np.array_equal(found, by_pillow(image, target, resample, height_first))
        assert not np.array_equal(found, by_pillow(image, target, resample, not height_first))


def test_weights():
    """They add up to one; if the length does not change, each output pixel has one input pixel."""
    for length, target in ((400, 33), (33, 400), (7, 1), (1, 9)):
        first, weights = resampling.bicubic_weights(length, target)
        assert np.abs(weights.sum(1) - 2**resampling.PRECISION).max() <= weights.shape[1]
        assert first.min() >= 0
        assert (first + np.count_nonzero(weights, axis=1)).max() <= length
    first, weights = resampling.bicubic_weights(5, 5)
    assert sorted(np.unique(weights)) == [0, 2**resampling.PRECISION]


def test_compiled_code_equals_python(monkeypatch):
    """The compiled loops against the same functions without compilation."""
    image, size = picture(37, 21), (9, 11)
    (compiled,) = resize(image, [size], BICUBIC)
    for name in ("_transpose", "_sum_columns", "_sum_rows"):
        monkeypatch.setattr(resampling, name, getattr(resampling, name).py_func)
    assert np.array_equal(resize(image, [size], BICUBIC)[0], compiled)


def test_without_numba(monkeypatch):
    """A published model runs without it, on the same pixels."""
    sizes = [(30, 30), (190, 20), (400, 7)]
    compiled = resize(picture(60, 200), sizes, BICUBIC)
    monkeypatch.setattr(resampling, "numba", None)
    monkeypatch.delattr(resampling, "_sum_rows")
    for found, expected in zip(resize(picture(60, 200), sizes, BICUBIC), compiled, strict=True):
        assert np.array_equal(found, expected)
