"""The pyramid, by brute force: a pooled token is the mean of exactly its pixels' patches."""

import pytest
import torch

from avg_llava.model.scaler import granularity_pyramid, pool_tokens, spread_tokens, token_grid


@pytest.mark.parametrize("side", [8, 24])
def test_pooled_token_is_the_mean_of_its_patches(side):
    tokens = torch.randn(2, side * side, 3, dtype=torch.float64)
    for granularity in granularity_pyramid(side, 5):
        rows, columns = token_grid(side, granularity)
        pooled = pool_tokens(tokens, side, granularity)
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


@pytest.mark.parametrize("granularity", granularity_pyramid(8, 5))
def test_spread_token_is_on_all_its_patches(granularity):
    tokens = torch.randn(2, granularity, 3)
    rows, columns = token_grid(8, granularity)
    spread = spread_tokens(tokens, 8)
    for patch in range(64):
        row, column = divmod(patch, 8)
        assert torch.equal(spread[:, patch], tokens[:, row * rows // 8 * columns + column * columns // 8])
    torch.testing.assert_close(pool_tokens(spread, 8, granularity), tokens)


def test_pyramid_halves_width_first():
    assert granularity_pyramid(24, 5) == [36, 72, 144, 288, 576]
    assert [token_grid(24, g) for g in (576, 288, 144, 72, 36)] == [(24, 24), (24, 12), (12, 12), (12, 6), (6, 6)]
    assert granularity_pyramid(8, 5) == [4, 8, 16, 32, 64]
    assert granularity_pyramid(6, 9) == [9, 18, 36]  # 3x3 cannot be halved


@pytest.mark.parametrize("granularity", [0, 1, 12, 100, 1152])
def test_levels_that_do_not_exist_are_refused(granularity):
    with pytest.raises(ValueError, match=f"granularity {granularity} is no level of a 24x24 grid"):
        token_grid(24, granularity)


def test_wrong_token_count_is_refused():
    with pytest.raises(ValueError, match="expected 64 tokens per crop"):
        pool_tokens(torch.zeros(1, 65, 2), 8, 16)
