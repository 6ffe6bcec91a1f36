"""Result files: a round trip, and errors that name file and field."""

import dataclasses
import json

import pytest

from avg_llava.evaluation import results
from avg_llava.evaluation.benchmarks import BENCHMARKS
from avg_llava.evaluation.results import ResultError, parse_result, write_result
from tests.reports.fixture_results import SHAPES, make_result, read_result, write


@pytest.mark.parametrize("benchmark", SHAPES)
@pytest.mark.parametrize("granularity", ["auto", 288])
def test_round_trip(tmp_path, benchmark, granularity):
    content = make_result(benchmark, num_questions=20, granularity=granularity)
    result = parse_result(content, "x")
    assert result.granularity == granularity
    path = tmp_path / "result.json"
    write_result(result, path)
    assert read_result(path) == result
    written = json.loads(path.read_text())
    assert written.pop("model") == {**content.pop("model"), "ablation": None}
    assert written == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_every_benchmark_has_a_fixture():
    assert set(SHAPES) == set(BENCHMARKS)


def test_oracle_curve_and_order_of_metrics():
    oracle = {"value": 0.8, "regret": 0.1, "agreement": 0.5, "mean_visual_tokens": 300.0}
    curve = [{"token_cost": 0.1, "value": 0.7, "token_share": 0.5, "mean_visual_tokens": 1000}]
    result = parse_result(make_result("pope", routing__oracle=oracle, routing__curve=curve, granularity="all"), "x")
    assert result.routing.oracle == results.Oracle(0.8, 0.1, 0.5, 300)
    assert result.routing.curve == (results.CurvePoint(0.1, 0.7, 0.5, 1000),)
    assert result.headline.label == "F1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format is 2, and this version reads 1"),
        ({"protocol": "both"}, "protocol must be one of current, paper; got 'both'"),
        ({"granularity": "often"}, "granularity must be one of auto, random, all; got 'often'.*a whole number"),
        ({"granularity": 100}, "granularity 100 is none of the model's levels"),
        ({"token_cost": -1}, "token_cost is a price"),
        ({"speed": 1}, "unknown key speed"),
        ({"model": "runs/x"}, "model must be a mapping of path, fingerprint"),
        ({"model__granularities": [576, 36]}, "model.granularities must go from coarse to fine"),
        ({"dataset__num_questions": "many"}, "dataset.num_questions must be a whole number, got 'many'"),
        ({"dataset__num_questions": 0}, "dataset.num_questions must be at least 1"),
        ({"num_failed": 0, "failures": [{"id": "a", "error": "e"}]}, "num_failed is 0, but failures names 1"),
        ({"metrics": {}}, "metrics is empty"),
        ({"metrics": []}, "metrics must be a mapping"),
        ({"metrics__exact_match__value": 0.9}, r"metrics.exact_match.value is 0.9, but its units give 0\.\d+"),
        ({"metrics__exact_match__value": float("nan")}, "metrics.exact_match.value must be a finite number, got nan"),
        ({"metrics__exact_match__kind": "median"}, "metrics.exact_match.kind must be one of mean"),
        ({"metrics__exact_match__units": {"q1": "right"}}, "metrics.exact_match.units: unit 'q1' must be a finite"),
        ({"metrics__exact_match__units": {}}, "metrics.exact_match.units: there is none"),
        ({"metrics__exact_match__maximum": 0}, "metrics.exact_match.maximum must be above 0"),
        ({"metrics__exact_match__maximum": 0.1}, "is not between 0 and the maximum 0.1"),
        ({"efficiency__token_share": float("inf")}, "efficiency.token_share must be a finite number, got inf"),
        ({"efficiency__speed__finest_seconds": None}, "efficiency.speed.finest_seconds must be a number"),
        ({"routing__levels": {"100": 1.0}}, "routing.levels: '100' is none of the model's levels"),
        ({"routing__levels": {"36": 0.3}}, "routing.levels: shares must be 0 or more and add up to 1, got 0.3"),
        ({"routing__curve": [{"token_cost": 0.0}]}, "routing.curve.0.value is missing"),
    ],
)
def test_invalid_fields_are_named(tmp_path, changes, message):
    path = write(tmp_path, "wrong.json", make_result(**changes))
    with pytest.raises(ResultError, match=message) as error:
        read_result(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(results.Result)])
def test_missing_fields_are_named(field):
    content = make_result()
    del content[field]
    with pytest.raises(ResultError, match=f"x: {field} is"):
        parse_result(content, "x")


def test_unknown_benchmark_is_named():
    with pytest.raises(ResultError, match=r"x: benchmark must be one of .*; got 'gqq' - did you mean 'gqa'"):
        parse_result({**make_result(), "benchmark": "gqq"}, "x")


def test_files_that_are_no_results_are_named(tmp_path):
    with pytest.raises(ResultError, match=r"gone\.json is no file"):
        read_result(tmp_path / "gone.json")
    with pytest.raises(ResultError, match="is no file"):
        read_result(tmp_path)
    (tmp_path / "cut.json").write_text('{"format": 1, "bench')
    with pytest.raises(ResultError, match=r"cut\.json is not valid JSON .*evaluate again"):
        read_result(tmp_path / "cut.json")
    with pytest.raises(ResultError, match="holds list, not a result"):
        read_result(write(tmp_path, "list.json", [1]))
    with pytest.raises(ResultError, match=r"other\.json: format is None"):
        read_result(write(tmp_path, "other.json", {"loss": 1}))
