"""Image files into RGB images, or an error that names the file."""

import contextlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

MAX_IMAGE_PIXELS = 89_478_485
"""Images with more pixels than this are refused unread: Pillow's own limit against decompression bombs."""


class DataError(ValueError):
    """A file, record or image that cannot be used; the message names it and says what to do."""


class MissingImageError(DataError):
    """There is no such image file."""


class OversizedImageError(DataError):
    """An image has more pixels than are allowed; it was not decoded."""


# What Pillow's readers raise on damaged files, apart from OSError and ValueError.
_DECODING_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombWarning,
)  # fmt: skip


def load_image(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Reads an image file as RGB; of an animation, the first frame.

    The EXIF orientation is left alone, as in the original code, so that published results can be met.

    Args:
        path: The file. Its name's ending does not matter.
        max_pixels: Larger images are refused before they are decoded. Above twice Pillow's own limit,
            `PIL.Image.MAX_IMAGE_PIXELS` must be raised as well.

    Raises:
        DataError: The file is missing, no image, damaged, cut off, or too large.
    """
    with _opened(Path(path), str(path), max_pixels) as image:
        return to_rgb(image)


def read_image_size(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """(height, width) of an image file from its header, nothing decoded; arguments and errors as of `load_image`."""
    with _opened(Path(path), str(path), max_pixels) as image:
        return image.height, image.width


def decode_image(content: bytes, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """As `load_image`, of the bytes of a file; `name` is what an error calls it."""
    with _opened(BytesIO(content), name, max_pixels) as image:
        return to_rgb(image)


@contextlib.contextmanager
def _whole_images_only() -> Iterator[None]:
    """Some libraries tell Pillow, for the whole process, to take what is left of a truncated image for the image."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextlib.contextmanager
def _opened(file: Path | BytesIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header is read; errors of its header, and of what is done with it, become ones that name it."""
    try:
        with warnings.catch_warnings(), _whole_images_only():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise OversizedImageError(
                        f"{name}: image of {width}x{height} pixels is above the limit of {max_pixels} pixels; make it "
                        "smaller or raise the limit"
                    )
                yield image
    except FileNotFoundError as error:
        raise MissingImageError(f"{name}: image file not found; check image_root and the record's path") from error
    except DataError:
        raise
    except Image.DecompressionBombError as error:  # above twice Pillow's own limit, which comes first
        raise OversizedImageError(f"{name}: far above the limit of {max_pixels} pixels ({error})") from error
    except UnidentifiedImageError as error:  # whose own message shows the object that was read
        raise DataError(f"{name}: cannot be read as an image (of no format that Pillow knows)") from error
    except _DECODING_ERRORS as error:
        raise DataError(f"{name}: cannot be read as an image ({type(error).__name__}: {error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight-bit RGB of an image of any mode.

    Transparency is dropped, not blended, as in the original code. Sixteen-bit greyscale is scaled to eight bits, which
    Pillow's own conversion would clip to white.

    Raises:
        ValueError: Colour mode LAB, or pixels that are not finite.
    """
    if image.mode == "RGB" and image.info.get("transparency") is None:
        image.load()
        return image
    if image.mode.startswith(("I", "F")):
        return _wide_to_rgb(image)
    if image.mode == "LAB":
        raise ValueError("colour mode LAB is not supported; save the image as RGB")
    converted = (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")
    converted.info.pop("transparency", None)  # of greyscale and RGB, one colour is: the image processor would blend it
    return converted


def _wide_to_rgb(image: Image.Image) -> Image.Image:
    """Greyscale of more than eight bits per pixel: 16-bit modes, 32-bit integers, and floats in [0, 1] or [0, 255]."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("some pixels are not finite numbers")
    values = values.astype(np.float64)
    top = values.max(initial=0)
    if image.mode == "F":
        scale = 255.0 if top <= 1 else 1.0
    else:
        # Mode I is also how older files hold 8 bits; anything beyond is taken as 16.
        scale = 1 / 257 if image.mode != "I" or top > 255 else 1.0
    grey = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
