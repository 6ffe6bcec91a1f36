import numpy as np
import pytest
from PIL import Image, ImageFile

from avg_llava.model.images import DataError, load_image
from avg_llava.model.processing import AvgLlavaImageProcessor

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def save_and_load(path, image, **options):
    image.save(path, **options)
    return np.asarray(load_image(path))


def test_rgb_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    read = save_and_load(tmp_path / "a.png", Image.fromarray(pixels))
    assert np.array_equal(read, pixels)


def test_greyscale_and_transparency(tmp_path):
    grey = np.stack([RAMP] * 3, -1)
    assert np.array_equal(save_and_load(tmp_path / "a.png", Image.fromarray(RAMP)), grey)
    rgba = np.dstack([grey, np.zeros_like(RAMP)])
    # Dropped, not blended: fully transparent pixels keep their colour.
    assert np.array_equal(save_and_load(tmp_path / "b.png", Image.fromarray(rgba)), grey)
    assert np.array_equal(
        save_and_load(tmp_path / "c.png", Image.fromarray(rgba[..., 2:])), grey
    )  # greyscale and alpha


def test_palette_with_transparency(tmp_path, recwarn):
    image = Image.fromarray(RAMP % 3, mode=None).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    read = save_and_load(tmp_path / "a.png", image, transparency=b"\x00\x80\xff")
    assert np.array_equal(read, np.eye(3, dtype=np.uint8)[RAMP % 3] * 255)
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_is_dropped(tmp_path, mode):
    grey = np.stack([RAMP] * 3, -1)
    image = Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "a.png", transparency=7 if mode == "L" else (7, 7, 7))
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.info["transparency"] is not None
        blended = np.asarray(AvgLlavaImageProcessor().process_image(opened))
        assert (blended[RAMP == 7] == 255).all()  # the processor blends it, so the test shows something
    read = load_image(tmp_path / "a.png")
    assert np.array_equal(np.asarray(AvgLlavaImageProcessor().process_image(read)), grey)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    wide = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert np.array_equal(save_and_load(tmp_path / "a.png", wide), np.stack([RAMP] * 3, -1))
    whole = Image.fromarray(RAMP.astype(np.int32) * 257)
    assert np.array_equal(save_and_load(tmp_path / "a.tiff", whole), np.stack([RAMP] * 3, -1))
    small = Image.fromarray(RAMP.astype(np.int32))
    assert np.array_equal(save_and_load(tmp_path / "b.tiff", small), np.stack([RAMP] * 3, -1))


def test_floats(tmp_path):
    shares = Image.fromarray(RAMP.astype(np.float32) / 255)
    assert np.array_equal(save_and_load(tmp_path / "a.tiff", shares), np.stack([RAMP] * 3, -1))
    with pytest.raises(DataError, match=r"b\.tiff: .*finite"):
        save_and_load(tmp_path / "b.tiff", Image.fromarray(np.full((4, 4), np.nan, np.float32)))


def test_lab_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"a\.tiff: .*colour mode LAB"):
        save_and_load(tmp_path / "a.tiff", Image.new("LAB", (4, 4)))


def test_cmyk_and_bilevel(tmp_path):
    red = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert np.array_equal(save_and_load(tmp_path / "a.tiff", red), np.full((4, 4, 3), (255, 0, 0)))
    assert save_and_load(tmp_path / "b.png", Image.new("1", (4, 4), 1)).min() == 255


def test_the_first_frame_of_an_animation_under_a_wrong_name(tmp_path):
    """OCR-VQA holds GIF files that are named .jpg."""
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    (tmp_path / "a.gif").rename(tmp_path / "a.jpg")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.jpg")), np.full((4, 4, 3), (255, 0, 0)))


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (8, 4)


def damaged_files() -> list:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    kinds = ("png", "jpeg", "gif", "webp", "tiff", "bmp")
    return [pytest.param(image, kind, share, id=f"{kind}-{share}") for kind in kinds for share in (0.05, 0.5, 0.9)]


@pytest.mark.parametrize(("image", "kind", "share"), damaged_files())
@pytest.mark.parametrize("lenient", [False, True])
def test_truncated_files_are_refused(tmp_path, monkeypatch, image, kind, share, lenient):
    """Also if another library has made Pillow accept truncated images."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    path = tmp_path / "a"
    image.save(path, format=kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"/a: cannot be read as an image"):
        load_image(path)
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"GIF89a"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png"):
        load_image(tmp_path / "a.png")


def test_any_damaged_byte_gives_an_image_or_a_data_error(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RAMP).save(path)
    content = path.read_bytes()
    messages = []
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            load_image(path)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > len(content) / 2
    assert all(str(path) in message for message in messages)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.png: image file not found"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match="cannot be read"):
        load_image(tmp_path)


def test_large_images_are_refused_before_decoding(tmp_path):
    Image.new("1", (400, 300)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"400x300 pixels is above the limit of 119999"):
        load_image(tmp_path / "a.png", max_pixels=119_999)
    assert load_image(tmp_path / "a.png", max_pixels=120_000).size == (400, 300)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match=r"bomb.png"):
        load_image(tmp_path / "bomb.png")
