"""Published figures: the tables, the expected figures of each benchmark, and the comparison with measured ones."""

import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from avg_llava.evaluation import published
from avg_llava.evaluation.benchmarks import BENCHMARKS
from avg_llava.evaluation.results import ResultError, parse_result
from avg_llava.reports import tables
from tests.reports.fixture_results import make_metrics, make_result, write

BASE_QUESTIONS = {"mmbench": 1164, "mmbench_cn": 1164}  # each is asked in several rotations
PAPER = published.load_published()


def test_shape_of_the_papers_tables():
    assert set(PAPER.tables) == {"1", "2", "3", "4"}
    for table in PAPER.tables.values():
        assert all(len(row.values) == len(table.columns) for row in table.rows)
        assert all(row.source for row in table.rows)
    rows = {number: {row.key or row.name: row.values for row in table.rows} for number, table in PAPER.tables.items()}
    assert rows["1"]["AVG-LLaVA"] == (63.0, 71.1, 59.8, 67.1, 66.3, 74.6, None, 67.3)
    assert rows["2"]["AVG-LLaVA"] == (1557.4, 366.8, 69.9, 61.8, 87.4, 37.4)
    assert list(rows["4"]) == ["full", *"abcdefg"]
    assert {row.key for row in PAPER.tables["3"].rows} <= set(tables.QUANTITIES)


def test_a_benchmark_has_the_same_figure_in_every_table():
    full = dict(zip(_keys("4"), next(row for row in PAPER.tables["4"].rows if row.key == "full").values, strict=True))
    ours = {
        key: value
        for number in ("1", "2")
        for key, value in zip(_keys(number), PAPER.tables[number].rows[-1].values, strict=True)
    }
    assert {key: ours[key] for key in full} == full


def _keys(number):
    return [(column.benchmark, column.metric) for column in PAPER.tables[number].columns]


def test_columns_are_of_metrics_that_exist():
    from numpy.random import default_rng

    for column in (column for table in PAPER.tables.values() for column in table.columns):
        assert column.metric in make_metrics(column.benchmark, 0.5, 20, default_rng(0))
    assert {column.benchmark for column in published.score_columns()} == set(BENCHMARKS)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_expected_figures_are_the_published_ones(benchmark):
    expected = BENCHMARKS[benchmark].expected
    table = {
        (column.metric, number): value
        for number in ("1", "2")
        for column, value in zip(PAPER.tables[number].columns, PAPER.tables[number].rows[-1].values, strict=True)
        if column.benchmark == benchmark and value is not None
    }
    found = {(entry.metric, entry.source.rsplit("table ", 1)[1]): entry.published for entry in expected}
    assert found == table
    assert {(entry.benchmark, entry.protocol) for entry in expected} == {(benchmark, "paper")}


@pytest.mark.parametrize("benchmark", [name for name in BENCHMARKS if name != "mme"])
def test_tolerance_follows_from_the_number_of_questions(benchmark):
    (entry,) = BENCHMARKS[benchmark].expected
    num_units = BASE_QUESTIONS.get(benchmark, BENCHMARKS[benchmark].num_questions)
    assert f"{num_units:,}" in entry.note
    share = entry.published / 100
    half = 100 * 1.96 * math.sqrt(share * (1 - share) / num_units)
    assert half <= entry.tolerance <= half + 0.1


def test_expected_figures_are_published_or_from_a_file(tmp_path):
    figures = published.load_expected(Path("published"), ["gqa", "mme"])
    assert [(each.benchmark, each.published) for each in figures] == [("gqa", 63.0), ("mme", 1557.4), ("mme", 366.8)]
    path = write(tmp_path, "expected.json", [asdict(figures[0])])
    assert published.load_expected(path, ["gqa"]) == figures[:1]


def test_measured_beside_expected():
    result = parse_result(make_result("docvqa", protocol="paper"), "x")
    entry = BENCHMARKS["docvqa"].expected[0]
    measured = 100 * result.metrics["anls_binarised"].value
    (compared,) = published.compare_with_expected(result, [entry])
    assert compared.measured == measured
    assert compared.agrees == (abs(measured - 74.6) <= 1.2)
    assert published.Comparison(entry, 74.6 - 1.2).agrees
    assert not published.Comparison(entry, 74.6 - 1.3).agrees
    assert published.compare_with_expected(result, []) == []


def test_points_stay_points():
    result = parse_result(make_result("mme", protocol="paper"), "x")
    compared = published.compare_with_expected(result, BENCHMARKS["mme"].expected)
    assert [item.measured for item in compared] == [metric.value for metric in result.metrics.values()]


def test_incomparable_figures_are_refused(tmp_path):
    expected = BENCHMARKS["gqa"].expected
    with pytest.raises(ResultError, match=r"nothing is expected of gqa by the protocol current: .* gqa \(paper\)"):
        published.compare_with_expected(parse_result(make_result("gqa"), "x"), expected)
    strange = [published.Expected("gqa", "paper", "bleu", 1.0, 1.0, "s", "n")]
    with pytest.raises(ResultError, match="gqa has no metric bleu; it has exact_match"):
        published.compare_with_expected(parse_result(make_result("gqa", protocol="paper"), "x"), strange)
    path = write(tmp_path, "e.json", [{"benchmark": "gqa"}])
    with pytest.raises(ResultError, match=re.escape(f"{path}: 0.protocol is missing")):
        published.load_expected(path, ["gqa"])
    with pytest.raises(ResultError, match="must hold a list"):
        published.load_expected(write(tmp_path, "d.json", {}), ["gqa"])
