"""Token grids at pixel positions computed by hand, on the pixels of the vision tower's input."""

import numpy as np
import pytest
from PIL import Image
from transformers import SiglipVisionConfig

from avg_llava import AvgLlavaConfig
from avg_llava.checkpoints.formats import KNOWN_TOWERS
from avg_llava.model.processing import AvgLlavaImageProcessor
from avg_llava.serving.overlay import (
    TokenGrid,
    TokenPictures,
    assemble_canvas,
    denormalized_crops,
    draw_grid,
    overview_grid,
    tiles_grid,
)

CLIP_L = KNOWN_TOWERS["openai/clip-vit-large-patch14-336"]
TEXT = {"model_type": "llama"}
WHOLE = (0, 672, 0, 672)
ORANGE = [255, 122, 0]


@pytest.fixture(scope="module")
def config():
    return AvgLlavaConfig(vision_config=CLIP_L, text_config=TEXT)


@pytest.fixture(scope="module")
def image_processor(config):
    return AvgLlavaImageProcessor(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )


# (height, width), level: canvas, cell, kept (top, bottom, left, right). 1280x720 fills 672x378 of a 672x672 canvas,
# from row 147 on: at the finest level 28 rows of 14 pixels cover that, at the coarsest 8 rows of 56. A picture of 1x1
# becomes 336x336 in the middle of the first canvas. Of 3000x10 less than a column of tokens is left, as in
# transformers: none.
GRIDS = {
    ((672, 672), 36): ((672, 672), (56, 56), WHOLE),
    ((672, 672), 72): ((672, 672), (28, 56), WHOLE),
    ((672, 672), 144): ((672, 672), (28, 28), WHOLE),
    ((672, 672), 288): ((672, 672), (14, 28), WHOLE),
    ((672, 672), 576): ((672, 672), (14, 14), WHOLE),
    ((720, 1280), 576): ((672, 672), (14, 14), (140, 532, 0, 672)),
    ((720, 1280), 288): ((672, 672), (14, 28), (140, 532, 0, 672)),
    ((720, 1280), 72): ((672, 672), (28, 56), (140, 532, 0, 672)),
    ((720, 1280), 36): ((672, 672), (56, 56), (112, 560, 0, 672)),
    ((10, 20), 144): ((336, 672), (28, 28), (0, 336, 0, 672)),
    ((1, 1), 576): ((336, 672), (14, 14), (0, 336, 168, 504)),
    ((1, 1), 36): ((336, 672), (56, 56), (0, 336, 168, 504)),
    ((3000, 10), 36): ((1008, 336), (56, 56), (0, 1008, 168, 168)),
}


@pytest.mark.parametrize(("image_size", "level"), GRIDS)
def test_grid_of_tiles(config, image_size, level):
    canvas, cell, kept = GRIDS[image_size, level]
    assert tiles_grid(image_size, level, config) == TokenGrid(canvas, 336, cell, kept)


def test_grid_of_cells_of_unequal_size():
    """27 patches of 14 pixels in 384: the last of 7 cells begins at 336, and the canvas of 2 x 2 tiles has 768."""
    config = AvgLlavaConfig(vision_config=SiglipVisionConfig(image_size=384, patch_size=14), text_config=TEXT)
    assert tiles_grid((768, 768), 49, config) == TokenGrid((768, 768), 384, (56, 56), (0, 768, 0, 768))
    # 1366 x 768 covers 30 of the 54 rows of patches. The 12 above are three cells of 4, the 12 below cells of 3, 4, 4.
    grid = tiles_grid((768, 1366), 49, config)
    assert grid.kept == (168, 384 + 224, 0, 768)
    drawn = draw_grid(np.full((768, 768, 3), 255, np.uint8), grid)
    assert (drawn[300, [56, 336, 384 + 56, 384 + 336]] < 200).all()
    assert (drawn[300, [30, 360, 400]] == 255).all()


def test_grid_of_the_overview(config):
    assert overview_grid(72, config) == TokenGrid((336, 336), 336, (28, 56), (0, 336, 0, 336))


def test_the_canvas_is_the_letterboxed_image(image_processor):
    crops = denormalized_crops(Image.new("RGB", (1280, 720), (250, 100, 3)), image_processor)
    assert crops.shape == (5, 336, 336, 3)
    assert (crops[0] == (250, 100, 3)).all()  # the overview is all image
    canvas = assemble_canvas(crops, 2)
    assert canvas.shape == (672, 672, 3)
    assert (canvas[147:525] == (250, 100, 3)).all()
    assert (canvas[:147] == 0).all()
    assert (canvas[525:] == 0).all()


def test_crops_have_the_images_own_pixels(image_processor):
    pixels = np.random.default_rng(0).integers(0, 256, (672, 672, 3), dtype=np.uint8)  # needs no resizing
    crops = denormalized_crops(Image.fromarray(pixels), image_processor)
    assert (crops[2] == pixels[:336, 336:]).all()
    assert (assemble_canvas(crops, 2) == pixels).all()


def lines_of(pixels, value):
    """Indices of the pixels of a row or column that have this value in every channel."""
    return np.flatnonzero((pixels == value).all(axis=-1)).tolist()


def test_lines_on_black(config):
    drawn = draw_grid(np.zeros((672, 672, 3), np.uint8), tiles_grid((672, 672), 36, config))
    twice = [56, 57, 112, 113, 168, 169, 224, 225, 280, 281, 392, 393, 448, 449, 504, 505, 560, 561, 616, 617]
    assert lines_of(drawn[:, 10], 153) == lines_of(drawn[10], 153) == twice
    assert lines_of(drawn[:, 10], ORANGE) == lines_of(drawn[10], ORANGE) == [335, 336, 337]
    assert (drawn[:335, 10].sum(axis=-1) > 0).sum() == 10  # nothing else is drawn


def test_lines_on_white(config):
    drawn = draw_grid(np.full((672, 672, 3), 255, np.uint8), tiles_grid((672, 672), 288, config))
    assert lines_of(drawn[:336, 5], 102) == list(range(14, 335, 14))  # 14 pixels high: one pixel thin
    assert lines_of(drawn[5, :336], 102) == sorted([*range(28, 335, 28), *range(29, 335, 28)])  # 28 wide: two


def test_dropped_tokens_are_striped(config):
    drawn = draw_grid(np.zeros((672, 672, 3), np.uint8), tiles_grid((720, 1280), 36, config))
    for dropped in (drawn[:112, :335], drawn[560:, :335]):
        assert sorted(np.unique(dropped)) == [96, 126]
    assert lines_of(drawn[112:560, 10], 0) == [y for y in range(448) if y % 56 > 1 and y not in (223, 224, 225)]
    assert lines_of(drawn[112:560, 10], 153)[:2] == [0, 1]  # the border of the kept part


def test_enlarged(config):
    picture = np.random.default_rng(0).integers(0, 256, (336, 672, 3), dtype=np.uint8)
    drawn = draw_grid(picture, tiles_grid((10, 20), 36, config), 3)
    assert drawn.shape == (1008, 2016, 3)
    assert (drawn[2:167, 2:167] == picture[2 // 3 : 167, :167].repeat(3, 0).repeat(3, 1)[2:167, 2:167]).all()
    assert (drawn[168:170, 5] != picture[56, 1]).any()
    assert lines_of(drawn[100], ORANGE) == [1007, 1008, 1009]


def test_wrong_picture(config):
    with pytest.raises(ValueError, match=r"a picture of \(672, 672\) pixels, but this one has \(336, 336\)"):
        draw_grid(np.zeros((336, 336, 3), np.uint8), tiles_grid((672, 672), 36, config))


def test_pictures_of_an_image(config, image_processor):
    pictures = TokenPictures(Image.new("RGB", (1, 1), "white"), image_processor, config)
    tiles, overview = pictures.tiles(576), pictures.overview(36)
    assert tiles.size == (672 * 1, 336)
    assert overview.size == (336, 336)
    assert np.asarray(tiles)[5, 170].tolist() == [255, 255, 255]
    assert np.asarray(tiles)[5, 160].tolist() != [0, 0, 0]  # padding, striped
    assert lines_of(np.asarray(overview)[5], 102) == [56, 57, 112, 113, 168, 169, 224, 225, 280, 281]
