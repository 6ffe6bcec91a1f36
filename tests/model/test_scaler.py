"""The paper's ladder by brute force: a pooled token is the mean of exactly the patches of its cell."""

import pytest
import torch

from avg_llava.model.scaler import WidthFirstLadder


@pytest.mark.parametrize("side", [8, 24])
def test_pooled_token_is_the_mean_of_its_patches(side):
    tokens = torch.randn(2, side * side, 3, dtype=torch.float64)
    ladder = WidthFirstLadder(side)
    for granularity in ladder.granularities[-5:]:
        rows, columns = ladder.grid(granularity)
        pooled = ladder.pool(tokens, granularity)
        assert pooled.shape == (2, granularity, 3)
        for token in range(granularity):
            row, column = divmod(token, columns)
            patches = [
                tokens[:, r * side + c]
                for r in range(side)
                for c in range(side)
                if r * rows // side == row and c * columns // side == column
            ]
            assert len(patches) == side * side // granularity
            torch.testing.assert_close(pooled[:, token], torch.stack(patches).mean(0))


@pytest.mark.parametrize("granularity", WidthFirstLadder(8).granularities)
def test_spread_tokens_cover_their_cells(granularity):
    tokens = torch.randn(2, granularity, 3)
    rows, columns = WidthFirstLadder(8).grid(granularity)
    spread = WidthFirstLadder(8).spread(tokens)
    for patch in range(64):
        row, column = divmod(patch, 8)
        assert torch.equal(spread[:, patch], tokens[:, row * rows // 8 * columns + column * columns // 8])
    torch.testing.assert_close(WidthFirstLadder(8).pool(spread, granularity), tokens)


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
    assert WidthFirstLadder(6).granularities == [9, 18, 36]  # 3x3 cannot be halved


@pytest.mark.parametrize("granularity", [0, 1, 12, 100, 1152])
def test_levels_that_do_not_exist_are_refused(granularity):
    with pytest.raises(ValueError, match=f"granularity {granularity} is no level of a 24x24 grid"):
        WidthFirstLadder(24).grid(granularity)


def test_wrong_token_count_is_refused():
    with pytest.raises(ValueError, match="expected 64 tokens per crop"):
        WidthFirstLadder(8).pool(torch.zeros(1, 65, 2), 16)
