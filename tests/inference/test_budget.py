"""Selection of levels under a budget, compared with an enumeration of all choices."""

import itertools
import random

import pytest
import torch

from avg_llava.inference.budget import Budget, BudgetError, best_levels
from avg_llava.model.router import level_values


@pytest.mark.parametrize("seed", range(40))
def test_best_levels_equal_an_enumeration(seed):
    rng = random.Random(seed)
    num_images, num_levels = rng.randint(1, 4), rng.randint(1, 5)
    values = [[rng.uniform(-5, 0) for _ in range(num_levels)] for _ in range(num_images)]
    tokens = [sorted(rng.sample(range(1, 300), num_levels)) for _ in range(num_images)]
    limit = rng.randint(sum(row[0] for row in tokens), sum(row[-1] for row in tokens))
    found = best_levels(values, tokens, limit)

    def value_of(choice):
        return sum(row[level] for row, level in zip(values, choice, strict=True))

    def tokens_of(choice):
        return sum(row[level] for row, level in zip(tokens, choice, strict=True))

    fitting = [
        choice for choice in itertools.product(range(num_levels), repeat=num_images) if tokens_of(choice) <= limit
    ]
    assert tokens_of(found) <= limit
    assert value_of(found) == pytest.approx(max(map(value_of, fitting)))


def test_equally_good_choices_take_fewest_tokens():
    assert best_levels([[0.0, 0.0], [0.0, 0.0]], [[5, 9], [5, 9]], 100) == [0, 0]


def test_too_low_a_limit():
    with pytest.raises(BudgetError, match="max_visual_tokens 9 is too low: at the coarsest level the images take 10"):
        best_levels([[0.0, 1.0]] * 2, [[5, 9]] * 2, 9)


def test_values_are_log_probabilities_less_prices():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    expected = torch.log_softmax(logits, -1) - torch.tensor([[0.1], [2.0]]) * torch.tensor([0.0, 3.0, 4.0])
    torch.testing.assert_close(level_values(logits, [1, 8, 16], torch.tensor([0.1, 2.0])), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_cost": -0.1}, "token_cost is a price"),
        ({"token_cost": float("nan")}, "token_cost is a price"),
        ({"max_visual_tokens": 0}, "at least 1"),
        ({"granularity": 36, "token_cost": 0.1}, "forces a level"),
    ],
)
def test_wrong_budgets(fields, message):
    with pytest.raises(BudgetError, match=message):
        Budget(**fields)
