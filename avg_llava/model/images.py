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
"""Images with more pixels are refused before they are decoded: Pillow's limit against decompression bombs."""


class DataError(ValueError):
    """A file, record or image cannot be used; the message names it and the remedy."""


class MissingImageError(DataError):
    """The image file does not exist."""


class OversizedImageError(DataError):
    """The image has too many pixels; it is not decoded."""


# Exceptions that Pillow's readers raise on damaged files.
_DECODING_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombWarning,
)  # fmt: skip


def load_image(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Reads an image file as RGB; of an animation, the first frame.

    The EXIF orientation is ignored, as in the original code, on which published results depend.

    Args:
        path: The file. The suffix of its name is ignored.
        max_pixels: Larger images are refused before they are decoded. For a limit above twice Pillow's,
            `PIL.Image.MAX_IMAGE_PIXELS` must be raised as well.

    Raises:
        DataError: The file is missing, no image, damaged, cut off, or too large.
    """
    with _opened(Path(path), str(path), max_pixels) as image:
        return to_rgb(image)


def read_image_size(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """(height, width) of an image file, from its header; arguments and errors as of :func:`load_image`."""
    with _opened(Path(path), str(path), max_pixels) as image:
        return image.height, image.width


def decode_image(content: bytes, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """As :func:`load_image`, from the bytes of a file; errors call it `name`."""
    with _opened(BytesIO(content), name, max_pixels) as image:
        return to_rgb(image)


@contextlib.contextmanager
def _whole_images_only() -> Iterator[None]:
    """Makes Pillow refuse truncated images; some libraries make it accept them, for the whole process."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextlib.contextmanager
def _opened(file: Path | BytesIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Opens an image and reads its header; errors there and in the block become errors that name the image."""
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
    except Image.DecompressionBombError as error:  # raised by Pillow above twice its limit
        raise OversizedImageError(f"{name}: far above the limit of {max_pixels} pixels ({error})") from error
    except UnidentifiedImageError as error:  # its message shows the object, not the name
        raise DataError(f"{name}: cannot be read as an image (of no format that Pillow knows)") from error
    except _DECODING_ERRORS as error:
        raise DataError(f"{name}: cannot be read as an image ({type(error).__name__}: {error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB.

    Transparency is dropped, not blended, as in the original code. 16-bit greyscale is scaled to 8 bits; Pillow's
    conversion would clip it to white.

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
    converted.info.pop("transparency", None)  # or the image processor blends that colour
    return converted


def _wide_to_rgb(image: Image.Image) -> Image.Image:
    """Converts greyscale of more than 8 bits: 16-bit modes, 32-bit integers, and floats in [0, 1] or [0, 255]."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("some pixels are not finite numbers")
    values = values.astype(np.float64)
    top = values.max(initial=0)
    if image.mode == "F":
        scale = 255.0 if top <= 1 else 1.0
    else:
        # Mode I also stands for 8 bits in older files; values above 255 mean 16 bits.
        scale = 1 / 257 if image.mode != "I" or top > 255 else 1.0
    grey = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
