"""Anyres geometry against transformers' functions, and by brute force on pixels."""

import math

import pytest
import torch
from transformers import LlavaNextImageProcessorPil, SiglipVisionConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from avg_llava import AvgLlavaConfig
from avg_llava.checkpoints.formats import KNOWN_TOWERS
from avg_llava.model.anyres import canvas_tiles, kept_window, num_crops, num_visual_tokens, select_canvas
from avg_llava.model.scaler import WidthFirstLadder

CLIP_L = KNOWN_TOWERS["openai/clip-vit-large-patch14-336"]
TEXT = {"model_type": "llama"}
LEVELS = [36, 72, 144, 288, 576]
SIZES = [(672, 672), (480, 640), (640, 480), (720, 1280), (333, 500), (336, 336), (2200, 1700), (10, 3000), (1, 1)]
SIZES += [(1408, 792), (792, 1408)]  # transformers' rounding keeps two rows more than truncation


def config(behavior="paper") -> AvgLlavaConfig:
    return AvgLlavaConfig(vision_config=CLIP_L, text_config=TEXT, behavior=behavior)


@pytest.mark.parametrize("step", [7, 61])
def test_canvas_is_transformers_choice(step):
    pinpoints = config().image_grid_pinpoints
    for height in range(1, 1500, step * 7):
        for width in range(1, 1500, step):
            assert select_canvas((height, width), pinpoints) == select_best_resolution((height, width), pinpoints)


def test_ties_of_small_images_depend_on_the_behavior():
    """An image no larger than a crop fits 1x2 and 2x1 tiles equally: transformers takes 1x2, the original code 2x1."""
    assert canvas_tiles((300, 200), config("paper")) == (1, 2)
    assert canvas_tiles((300, 200), config("released")) == (2, 1)
    assert canvas_tiles((336, 337), config("paper")) == canvas_tiles((336, 337), config("released"))


def test_token_counts_of_672x672():
    assert [num_visual_tokens((672, 672), level, config()) for level in LEVELS] == [192, 384, 744, 1488, 2928]
    assert [num_visual_tokens((672, 672), level, config("released")) for level in LEVELS] == [192, 228, 744, 888, 2928]


RELEASED_COUNTS = {  # (height, width): tokens at each level, from the original code's rule
    (480, 640): [166, 202, 594, 738, 2340],
    (640, 480): [168, 280, 600, 1088, 2352],
    (720, 1280): [114, 150, 494, 638, 1948],
    (333, 500): [102, 176, 372, 688, 1464],
    (336, 336): [78, 114, 300, 444, 1176],
    (2200, 1700): [168, 280, 600, 1088, 2448],
}


@pytest.mark.parametrize(("size", "counts"), RELEASED_COUNTS.items())
def test_released_token_counts(size, counts):
    assert [num_visual_tokens(size, level, config("released")) for level in LEVELS] == counts


@pytest.mark.parametrize("size", SIZES)
def test_finest_window_is_transformers(size):
    """Paper behaviour unpads the finest level with transformers' rule and rounding."""
    rows, columns = canvas_tiles(size, config())
    index = torch.arange(rows * 24 * columns * 24).view(1, rows * 24, columns * 24)
    window = kept_window(size, 576, config())
    kept = index[:, window.top : window.bottom, window.left : window.right]
    assert torch.equal(kept, unpad_image(index, size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_coarse_windows_keep_the_region_of_the_finest(size, level):
    """Brute force: a coarse token is kept if and only if one of its patches is kept at the finest level."""
    settings = config()
    rows, columns = canvas_tiles(size, settings)
    fine = torch.zeros(rows * 24, columns * 24, dtype=torch.bool)
    window = kept_window(size, 576, settings)
    fine[window.top : window.bottom, window.left : window.right] = True
    cell_rows, cell_columns = (24 // side for side in WidthFirstLadder(24).grid(level))
    expected = fine.unflatten(0, (-1, cell_rows)).unflatten(2, (-1, cell_columns)).any(3).any(1)
    window = kept_window(size, level, settings)
    kept = torch.zeros_like(expected)
    kept[window.top : window.bottom, window.left : window.right] = True
    assert torch.equal(kept, expected)
    assert num_visual_tokens(size, level, settings) == level + int(expected.sum()) + int(expected.any(1).sum())


@pytest.mark.parametrize("size", SIZES)
def test_cells_of_unequal_size_are_dropped_if_all_of_their_patches_are(size):
    """Brute force on 27 patches per side, where 14 rows are thirteen of two patches and one of one, in every tile."""
    settings = AvgLlavaConfig(vision_config=SiglipVisionConfig(image_size=384, patch_size=14), text_config=TEXT)
    assert settings.granularities == [49, 98, 196, 378, 729]
    assert settings.image_grid_pinpoints == [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]]
    tile_rows, tile_columns = canvas_tiles(size, settings)
    fine = torch.zeros(tile_rows * 27, tile_columns * 27)
    index = torch.arange(fine.numel()).view(1, *fine.shape)
    fine.view(-1)[unpad_image(index, size).flatten()] = 1
    for level in settings.granularities:
        tiles = fine.view(tile_rows, 27, tile_columns, 27).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        expected = settings.ladder.pool(tiles[..., None], level)[..., 0] > 0  # a mean of which one patch is kept
        rows, columns = settings.ladder.grid(level)
        expected = expected.view(tile_rows, tile_columns, rows, columns).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        window = kept_window(size, level, settings)
        kept = torch.zeros_like(expected)
        kept[window.top : window.bottom, window.left : window.right] = True
        assert torch.equal(kept, expected), level


def test_released_behavior_needs_cells_of_equal_size():
    tower = SiglipVisionConfig(image_size=384, patch_size=14)
    with pytest.raises(Exception, match="granularity 49 has cells of unequal size on 27 patches per side"):
        AvgLlavaConfig(vision_config=tower, text_config=TEXT, behavior="released")
    assert AvgLlavaConfig(vision_config=tower, text_config=TEXT, behavior="released", granularities=[729])


@pytest.mark.parametrize("size", [(480, 640), (720, 1280), (2200, 1700), (333, 500), (90, 1000)])
@pytest.mark.parametrize("level", LEVELS)
def test_no_image_content_is_unpadded_away(size, level):
    """A white image on the black canvas: outside the kept window at most a sliver of one patch is not black."""
    settings = config()
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=settings.image_grid_pinpoints,
        do_normalize=False,
    )
    white = torch.full((3, *size), 255, dtype=torch.uint8)
    crops = torch.tensor(processor(white, return_tensors="np")["pixel_values"][0])
    assert len(crops) == num_crops(size, settings)
    rows, columns = canvas_tiles(size, settings)
    canvas = crops[1:, 0].unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    cell_height, cell_width = (336 // side for side in WidthFirstLadder(24).grid(level))
    window = kept_window(size, level, settings)
    outside = canvas > 0.5
    top, left = window.top * cell_height, window.left * cell_width
    outside[top : window.bottom * cell_height, left : window.right * cell_width] = False
    lost_rows, lost_columns = outside.any(1).sum().item(), outside.any(0).sum().item()
    assert min(lost_rows, lost_columns) < math.ceil(336 / 24)  # the original rounding may cost less than a patch


def test_bad_sizes_and_pinpoints_are_refused():
    with pytest.raises(ValueError, match="must be positive"):
        num_crops((0, 10), config())
    with pytest.raises(ValueError, match="multiples of 336"):
        AvgLlavaConfig(vision_config=CLIP_L, image_grid_pinpoints=[[336, 500]])
