"""The paper's ladder by brute force: a pooled token is the mean of exactly the patches of its cell."""

import pytest
import torch

from avg_llava.model.scaler import Ladder, WidthFirstLadder

SIDES = [8, 13, 16, 24, 27, 37]


def cells_of(side: int, count: int) -> list[list[int]]:
    """Patches of `count` cells along one axis, as many in each, but for the last, as make `count` cells."""
    sizes = [size for size in range(1, side + 1) if len(range(0, side, size)) == count]
    return [list(range(first, min(first + sizes[0], side))) for first in range(0, side, sizes[0])]


@pytest.mark.parametrize("side", SIDES)
def test_pooled_token_is_the_mean_of_its_patches(side):
    tokens = torch.randn(2, side * side, 3, dtype=torch.float64)
    ladder = WidthFirstLadder(side)
    for granularity in ladder.granularities[-7:]:
        rows, columns = ladder.grid(granularity)
        pooled = ladder.pool(tokens, granularity)
        assert pooled.shape == (2, granularity, 3)
        cells = [
            [row * side + column for row in high for column in wide]
            for high in cells_of(side, rows)
            for wide in cells_of(side, columns)
        ]
        assert sorted(patch for cell in cells for patch in cell) == list(range(side * side))
        for token, cell in enumerate(cells):
            torch.testing.assert_close(pooled[:, token], tokens[:, cell].mean(1))


@pytest.mark.parametrize("side", SIDES)
def test_spread_tokens_cover_their_cells(side):
    ladder = WidthFirstLadder(side)
    crops = torch.randn(2, side * side, 3, dtype=torch.float64)
    for granularity in ladder.granularities:
        tokens = torch.randn(2, granularity, 3, dtype=torch.float64)
        rows, columns = ladder.grid(granularity)
        spread = ladder.spread(tokens).unflatten(1, (side, side))
        for row, high in enumerate(cells_of(side, rows)):
            for column, wide in enumerate(cells_of(side, columns)):
                expected = tokens[:, row * columns + column, None, None]
                assert (spread[:, high][:, :, wide] == expected).all()
        torch.testing.assert_close(ladder.pool(spread.flatten(1, 2), granularity), tokens)
        moved = ladder.pool(crops + spread.flatten(1, 2), granularity)  # the Gumbel objective relies on this
        torch.testing.assert_close(moved, ladder.pool(crops, granularity) + tokens)


def test_width_is_halved_first():
    assert WidthFirstLadder(24).granularities[-5:] == [36, 72, 144, 288, 576]
    assert [WidthFirstLadder(24).grid(g) for g in (576, 288, 144, 72, 36)] == [
        (24, 24),
        (24, 12),
        (12, 12),
        (12, 6),
        (6, 6),
    ]
    assert WidthFirstLadder(8).granularities[-5:] == [4, 8, 16, 32, 64]


def test_halves_are_rounded_up():
    """SigLIP-so400m/14 at 384 px has 27 patches per side."""
    assert WidthFirstLadder(27).granularities[-5:] == [49, 98, 196, 378, 729]
    assert [WidthFirstLadder(27).grid(g) for g in (378, 196, 98, 49)] == [(27, 14), (14, 14), (14, 7), (7, 7)]
    assert [len(cell) for cell in cells_of(27, 14)] == [2] * 13 + [1]
    assert [len(cell) for cell in cells_of(27, 7)] == [4] * 6 + [3]
    assert WidthFirstLadder(6).granularities == [1, 2, 4, 6, 9, 18, 36]
    assert WidthFirstLadder(1).granularities == [1]


def test_grids_that_no_cell_gives_are_refused():
    """Cells of 2 give 14 rows on 27 patches, cells of 3 give 9; no cell gives 13."""

    class Odd(Ladder):
        def grids(self) -> list[tuple[int, int]]:
            return [(27, 27), (13, 13)]

    with pytest.raises(ValueError, match=r"rows and columns among \[1, 2, 3, 4, 5, 6, 7, 9, 14, 27\] for 27 patches"):
        Odd(27)


@pytest.mark.parametrize("granularity", [0, 7, 12, 100, 1152])
def test_levels_that_do_not_exist_are_refused(granularity):
    with pytest.raises(ValueError, match=f"granularity {granularity} is no level of a 24x24 grid"):
        WidthFirstLadder(24).grid(granularity)


def test_wrong_token_count_is_refused():
    with pytest.raises(ValueError, match="expected 64 tokens per crop"):
        WidthFirstLadder(8).pool(torch.zeros(1, 65, 2), 16)
