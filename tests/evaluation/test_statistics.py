"""Scores, intervals and paired tests against hand computation, full enumeration and numbers from textbooks."""

import itertools
import math

import numpy as np
import pytest

from avg_llava.evaluation import statistics
from avg_llava.evaluation.statistics import UnitError, bootstrap_interval, compute_value, paired_test

# Darwin's maize, crossed minus self-fertilised, eighths of an inch; Fisher, The Design of Experiments, section 21:
# of the 32,768 ways to give signs, 1,726 have a sum at least as far from 0 as the observed 314.
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
FISHER = 1726 / 32768

OUTCOMES = ["tp", "tp", "tp", "fp", "fn", "fn", "tn", "other"]
PAIRS = {"a": [200.0, "count"], "b": [50.0, "count"], "c": [0.0, "OCR"], "d": [200.0, "OCR"], "e": [50.0, "OCR"]}


def named(units):
    return {f"q{index}": unit for index, unit in enumerate(units)}


def all_resamples(units):
    """Every sample of as many units with replacement."""
    return [named(drawn) for drawn in itertools.product(units, repeat=len(units))]


@pytest.mark.parametrize(
    ("kind", "units", "value"),
    [
        ("mean", [1.0, 0.0, 0.5, 1], 0.625),
        ("stratum_sum", PAIRS.values(), 125 + 250 / 3),
        ("precision", OUTCOMES, 3 / 4),
        ("recall", OUTCOMES, 3 / 5),
        ("f1", OUTCOMES, 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)),
        ("f1", ["tn", "other"], 0.0),
        ("precision", ["tn"], 0.0),
    ],
)
def test_value_against_hand_computation(kind, units, value):
    assert compute_value(kind, named(units)) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "units"),
    [("mean", [0.0, 0.13, 0.4, 0.77, 1.0, 0.9]), ("f1", ["tp", "tp", "fn", "fp", "tn", "other"])],
)
def test_interval_against_every_resample(kind, units):
    exact = np.quantile([compute_value(kind, drawn) for drawn in all_resamples(units)], [0.025, 0.975])
    interval = bootstrap_interval(kind, named(units), num_resamples=40_000)
    assert interval == pytest.approx(exact, abs=0.012)


def test_interval_keeps_the_strata():
    # Two units in one category, three in the other: 2^2 x 3^3 resamples, all equally likely.
    sums = [
        np.mean(first) + np.mean(second)
        for first in itertools.product([200, 50], repeat=2)
        for second in itertools.product([0, 200, 50], repeat=3)
    ]
    interval = bootstrap_interval("stratum_sum", PAIRS, num_resamples=40_000)
    assert interval == pytest.approx(np.quantile(sums, [0.025, 0.975]), abs=1e-9)


def test_interval_against_the_normal_approximation():
    units = named([1.0] * 900 + [0.0] * 2100)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 3000)
    assert bootstrap_interval("mean", units) == pytest.approx((0.3 - half, 0.3 + half), abs=half / 20)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(400):
        low, high = bootstrap_interval("mean", named(rng.beta(2, 1, 60).round(2).tolist()), seed, num_resamples=800)
        covered += low <= 2 / 3 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_interval_depends_on_the_seed_alone(monkeypatch):
    units = named([0.1, 0.9, 0.4, 0.4, 1.0, 0.0])
    interval = bootstrap_interval("mean", units, seed=3)
    assert bootstrap_interval("mean", dict(reversed(units.items())), seed=3) == interval
    monkeypatch.setattr(statistics, "CHUNK", 64)  # many small chunks
    assert bootstrap_interval("mean", units, seed=3) == interval
    assert bootstrap_interval("mean", {"q": 1.0}) == (1.0, 1.0)


def test_p_value_of_fishers_example():
    sums = np.array(list(itertools.product([-1, 1], repeat=len(DARWIN)))) @ DARWIN
    assert (abs(sums) >= sum(DARWIN)).mean() == FISHER
    first, second = named([max(height, 0) for height in DARWIN]), named([max(-height, 0) for height in DARWIN])
    test = paired_test("mean", first, second, num_resamples=40_000)
    assert test.difference == pytest.approx(314 / 15)
    assert test.p_value == pytest.approx(FISHER, abs=4 * math.sqrt(FISHER / 40_000))


def test_p_value_of_right_and_wrong_answers_is_mcnemars():
    # 8 questions only the first run has right, 2 only the second: 2 (1 + 10 + 45) / 2^10 by the binomial distribution.
    first = named([1.0] * 8 + [0.0] * 2 + [1.0] * 30 + [0.0] * 20)
    second = named([0.0] * 8 + [1.0] * 2 + [1.0] * 30 + [0.0] * 20)
    test = paired_test("mean", first, second, num_resamples=40_000)
    assert test.difference == pytest.approx(6 / 60)
    assert test.p_value == pytest.approx(112 / 1024, abs=0.007)
    # The interval of the difference: its standard error is sqrt(b + c - (b - c)^2 / n) / n.
    half = 1.96 * math.sqrt(10 - 36 / 60) / 60
    assert (test.low, test.high) == pytest.approx((0.1 - half, 0.1 + half), abs=half / 6)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("f1", ["tp", "tp", "tp", "fp", "tn", "other"], ["fn", "tp", "fn", "tn", "fp", "fn"]),
        ("stratum_sum", PAIRS.values(), [[0, "count"], [50, "count"], [0, "OCR"], [50, "OCR"], [50, "OCR"]]),
    ],
)
def test_p_value_against_every_exchange(kind, first, second):
    pairs = list(zip(first, second, strict=True))
    observed = compute_value(kind, named(first)) - compute_value(kind, named(second))
    far = [
        abs(
            compute_value(kind, named([pair[swap] for pair, swap in zip(pairs, swaps, strict=True)]))
            - compute_value(kind, named([pair[1 - swap] for pair, swap in zip(pairs, swaps, strict=True)]))
        )
        >= abs(observed) - 1e-9
        for swaps in itertools.product([0, 1], repeat=len(pairs))
    ]
    test = paired_test(kind, named(first), named(second), num_resamples=40_000)
    assert test.difference == pytest.approx(observed)
    assert 0.05 < np.mean(far) < 1  # else the case would show nothing
    assert test.p_value == pytest.approx(np.mean(far), abs=0.01)


def test_interval_of_a_difference_against_every_resample():
    pairs = [(1.0, 0.2), (0.4, 0.5), (0.9, 0.1), (0.0, 0.3), (0.7, 0.7)]
    exact = np.quantile(
        [np.mean([one - two for one, two in drawn]) for drawn in itertools.product(pairs, repeat=5)], [0.025, 0.975]
    )
    first, second = (named([pair[side] for pair in pairs]) for side in (0, 1))
    test = paired_test("mean", first, second, num_resamples=40_000)
    assert (test.low, test.high) == pytest.approx(exact, abs=0.01)


def test_a_run_does_not_differ_from_itself():
    test = paired_test("f1", named(OUTCOMES), named(OUTCOMES))
    assert (test.difference, test.low, test.high, test.p_value) == (0, 0, 0, 1)


def test_order_of_the_runs_turns_the_sign():
    first, second = named([1.0, 0.2, 0.9, 0.3]), named([0.0, 0.5, 0.1, 0.3])
    there, back = paired_test("mean", first, second), paired_test("mean", second, first)
    assert there.difference == -back.difference
    assert there.p_value == pytest.approx(back.p_value, abs=0.03)


def test_only_shared_units_are_compared():
    test = paired_test("mean", {"a": 1.0, "b": 0.0, "c": 1.0}, {"b": 1.0, "c": 1.0, "d": 0.0, "e": 0.0})
    assert (test.difference, test.num_units, test.num_left_out) == (-0.5, 2, 3)
    with pytest.raises(UnitError, match="no unit in common"):
        paired_test("mean", {"a": 1.0}, {"b": 1.0})
    with pytest.raises(UnitError, match="unit 'a' is of 'count' in one run and of 'OCR' in the other"):
        paired_test("stratum_sum", {"a": [1, "count"]}, {"a": [1, "OCR"]})


@pytest.mark.parametrize(
    ("kind", "units", "message"),
    [
        ("mean", {}, "there is none"),
        ("mean", {"a": "1"}, "unit 'a' must be a finite number, got '1'"),
        ("mean", {"a": True}, "finite number"),
        ("mean", {"a": float("nan")}, "finite number, got nan"),
        ("stratum_sum", {"a": 200}, r"unit 'a' must be \[number, stratum\], got 200"),
        ("stratum_sum", {"a": ["x", "OCR"]}, "unit 'a' must be a finite number, got 'x'"),
        ("f1", {"a": "yes"}, "unit 'a' must be one of tp, fp, fn, tn, other, got 'yes'"),
        ("f1", {"a": ["tp"]}, "must be one of"),
    ],
)
def test_units_of_another_kind_are_named(kind, units, message):
    with pytest.raises(UnitError, match=message):
        compute_value(kind, units)
