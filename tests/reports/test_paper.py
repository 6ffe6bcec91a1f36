"""`avg-llava report`: rows, tables, figures and page from result files, and refusals."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from avg_llava import cli
from avg_llava.evaluation.published import load_published
from avg_llava.evaluation.results import ResultError, parse_result
from avg_llava.evaluation.statistics import paired_test
from avg_llava.reports import figures, tables
from avg_llava.reports.series import Measured, group
from tests.reports.fixture_results import LEVELS, make_result, write, write_all

ORACLE = {"value": 0.75, "regret": 0.1, "agreement": 0.5, "mean_visual_tokens": 400.0}
CURVE = [
    {"token_cost": cost, "value": 0.7 - cost / 10, "token_share": 1 / (1 + cost), "mean_visual_tokens": 100}
    for cost in (0.0, 0.5, 1.0)
]
MINI_ROW = {
    "accuracy": 0.5,
    "mean_visual_tokens": 30.0,
    "families": {"sky": 0.5},
    "family_tokens": {"sky": 30.0},
    "kinds": {"scene": 0.5},
    "kind_tokens": {"scene": 30.0},
    "levels": {"4": 0.5, "8": 0.5},
    "family_levels": {"sky": {"4": 0.5, "8": 0.5}},
}
MINI = {
    "rows": [
        {"name": name, "token_cost": cost, **MINI_ROW}
        for name, cost in (
            ("llava-next", None),
            ("fixed-4", None),
            ("fixed-8", None),
            ("router", 0.0),
            ("oracle", None),
        )
    ],
    "families": {"sky": "scene"},
    "claims": [{"text": "it holds", "measured": "yes", "held": True}],
    "token_cost": 0.0,
    "token_cost_choice": "given by the user",
    "granularities": [4, 8],
    "num_questions": 10,
    "num_verified": 3,
    "stages": [{"stage": 1, "steps": 5}],
    "machine": {"processor": "none"},
}


def grouped(*contents, folder="results"):
    return group(
        [Measured(Path(folder, f"{index}.json"), parse_result(content, "x")) for index, content in enumerate(contents)]
    )


def rows_of(table, **labels):
    """The rows whose labels have these values, by heading."""
    columns = {head: table.labels.index(head.replace("_", " ")) for head in labels}
    return [row for row in table.rows if all(row.labels[columns[head]] == value for head, value in labels.items())]


def cells(table, row):
    return dict(zip(table.columns, row.cells, strict=True))


class TestSeries:
    def test_protocols_models_and_ways_of_choosing_are_separate_rows(self):
        table = tables.score_table(
            "1",
            grouped(
                make_result("gqa"),
                make_result("gqa", protocol="paper"),
                make_result("gqa", granularity="random"),
                make_result("gqa", token_cost=0.2),
                make_result("gqa", granularity=576),
                make_result("gqa", granularity=36),
                make_result("gqa", model__path="runs/other/stage4", model__fingerprint="2" * 64),
                make_result("ai2d"),
            ),
        )
        labels = [row.labels for row in table.rows if not row.published]
        assert labels == [
            ("fixture/stage4", "fixed, 36", "current"),
            ("fixture/stage4", "fixed, 576", "current"),
            ("fixture/stage4", "random", "current"),
            ("fixture/stage4", "router", "current"),
            ("fixture/stage4", "router, cost 0.2", "current"),
            ("fixture/stage4", "router", "paper"),
            ("other/stage4", "router", "current"),
        ]
        (both,) = rows_of(table, model="fixture/stage4", level_chosen_by="router", protocol="current")
        assert [name for name, cell in cells(table, both).items() if cell] == ["GQA", "AI2D"]

    def test_two_results_of_the_same_are_refused(self):
        with pytest.raises(
            ResultError, match=r"results/1\.json and results/0\.json both hold gqa of fixture/stage4, router, current"
        ):
            grouped(make_result("gqa"), make_result("gqa", seed=3))

    def test_models_of_one_name_are_distinguished(self):
        first, second = (make_result("gqa", model__fingerprint=sign * 64) for sign in "ab")
        names = {series.model for series in grouped(first, second)}
        assert names == {"runs/fixture/stage4 float32 aaaaaaaa", "runs/fixture/stage4 float32 bbbbbbbb"}
        third = make_result("gqa", model__fingerprint="c" * 64, model__path="elsewhere/fixture/stage4")
        assert {series.model for series in grouped(first, third)} == {"runs/fixture/stage4", "elsewhere/fixture/stage4"}
        half = make_result("gqa", model__dtype="bfloat16")
        assert len(grouped(make_result("gqa"), half)) == 2


class TestTables:
    def test_measured_scores_have_intervals_and_marks(self):
        content = make_result("gqa", num_questions=12578)
        table = tables.score_table("1", grouped(content))
        (row,) = [row for row in table.rows if not row.published]
        cell = cells(table, row)["GQA"]
        value = content["metrics"]["exact_match"]["value"]
        half = 1.96 * np.sqrt(value * (1 - value) / 12578)
        assert cell.text == f"{100 * value:.1f}"  # all questions: no mark
        assert np.array(cell.interval, dtype=float) == pytest.approx(
            [100 * (value - half), 100 * (value + half)], abs=0.11
        )
        for changes in ({"num_questions": 200}, {"complete": False}, {"num_failed": 1}):
            partial = tables.score_table("1", grouped(make_result("gqa", **{"num_questions": 12578, **changes})))
            assert partial.rows[-1].cells[0].text.endswith(tables.PARTIAL)
            assert tables.PARTIAL_NOTE in partial.notes
        assert tables.PARTIAL_NOTE not in table.notes

    @pytest.mark.parametrize("number", ["1", "2"])
    def test_published_rows_come_first_and_are_marked(self, number):
        table = tables.score_table(number, grouped(make_result("gqa"), make_result("pope")))
        published = load_published().tables[number]
        rows = table.rows[: len(published.rows)]
        assert all(row.published and row.labels[-1] == "published" for row in rows)
        assert not any(row.published for row in table.rows[len(rows) :])
        figures = [tuple(cell and float(cell.text) for cell in row.cells) for row in rows]
        assert figures == [row.values for row in published.rows]

    def test_both_figures_of_docvqa_are_there(self):
        content = make_result("docvqa")
        table = tables.score_table("1", grouped(content))
        measured = cells(table, table.rows[-1])
        for head, name in (("DocVQA (ANLS)", "anls"), ("DocVQA (ANLS ≥ 0.5)", "anls_binarised")):
            assert measured[head].text == f"{100 * content['metrics'][name]['value']:.1f}{tables.PARTIAL}"

    def test_mme_is_in_points(self):
        content = make_result("mme")
        table = tables.score_table("2", grouped(content))
        assert cells(table, table.rows[-1])["MME (perc.)"].text.startswith(
            f"{content['metrics']['mme_perception_score']['value']:.1f}"
        )

    def test_efficiency(self):
        table = tables.efficiency_table(grouped(make_result("ai2d"), make_result("ai2d", granularity=576)))
        measured = {row.labels[-1]: cells(table, row)["AI2D"].text for row in table.rows if not row.published}
        share = make_result("ai2d")["efficiency"]["grid_share"]
        assert measured["tokens per grid"] == f"{100 * share:.1f}%"
        assert measured["speed-up, LLaVA-NeXT"] == f"{1.01 * 0.4 / (0.1 + 0.3 * share):.2f}×"
        assert measured["router's share"] == "3.0%"
        assert rows_of(table, quantity="speed-up, LLaVA-NeXT")[0].cells[0].text == "1.14×"
        assert not rows_of(table, level_chosen_by="fixed, 576")
        untimed = make_result("ai2d", efficiency__speed=None)
        quantities = {row.labels[-1] for row in tables.efficiency_table(grouped(untimed)).rows if not row.published}
        assert "seconds" in quantities
        assert "speed-up, finest level" not in quantities

    @pytest.mark.parametrize(
        ("changes", "letter"),
        [
            ({}, "full"),
            ({"granularity": "all"}, "full"),
            ({"granularity": 576}, "a"),
            ({"granularity": "random"}, "b"),
            ({"model__ablation": "c"}, "c"),
            ({"model__granularities": [36, 144, 576], "routing__levels": {"36": 1.0}}, "d"),
            ({"model__ablation": "g"}, "g"),
            ({"model__ablation": "g", "granularity": 576}, None),
            ({"token_cost": 0.1}, None),
            ({"model__granularities": [576], "routing__levels": {}}, None),
        ],
    )
    def test_ablations_are_recognised(self, changes, letter):
        (series,) = grouped(make_result("mme", **changes))
        assert tables.ablation_letter(series) == letter

    def test_ablations_stand_beside_the_papers(self):
        full, fixed = make_result("chartqa"), make_result("chartqa", granularity=576)
        assert tables.ablation_table(grouped(full)) is None
        table = tables.ablation_table(grouped(full, fixed, make_result("gqa", granularity="random")))
        assert [row.labels[0] for row in table.rows] == ["", *(f"({letter})" for letter in "abcdefg"), "", "(a)"]
        assert table.rows[-1].labels[1] == "fixed granularity instead of adaptive"

    def test_oracle_and_routing(self):
        contents = [
            make_result(name, granularity="all", routing__oracle=ORACLE) for name in ("ai2d", "textvqa", "docvqa")
        ]
        (row, *_) = rows_of(tables.oracle_table(grouped(*contents)), benchmark="AI2D")
        assert [cell.text for cell in row.cells[1:4]] == ["75.0", "10.0", "50.0%"]
        said = {row.labels[0]: row.labels[-1] for row in tables.routing_table(grouped(*contents)).rows}
        finest = next(text for statement, text in said.items() if "finest" in statement)
        assert finest == "at 576 tokens: TextVQA 92%, DocVQA 97%"
        assert next(text for statement, text in said.items() if "coarse" in statement) == "at 36 or 72 tokens: AI2D 82%"
        assert tables.oracle_table(grouped(make_result("gqa"))) is None
        assert tables.routing_table(grouped(make_result("gqa", granularity=36))) is None

    def test_every_result_is_listed(self):
        table = tables.results_table(grouped(make_result("gqa", complete=False, num_failed=2)))
        assert "200 of 12,578, unfinished" in table.rows[0].labels
        assert table.rows[0].labels[-1] == "0.json"


class TestComparison:
    def test_paired_tests_of_common_benchmarks(self):
        first = [make_result("gqa", seed=1), make_result("mme", seed=1), make_result("pope", protocol="paper")]
        second = [make_result("gqa", seed=2), make_result("mme", seed=2), make_result("pope", granularity=576)]
        table = tables.comparison_table(grouped(*first), grouped(*second, folder="other"))
        assert [row.labels[0] for row in table.rows] == ["GQA, accuracy", "MME, perception", "MME, cognition"]
        test = paired_test("mean", *(content["metrics"]["exact_match"]["units"] for content in (first[0], second[0])))
        difference, p_value, units = table.rows[0].cells
        signed = [f"{100 * value:+.1f}".replace("-", "−") for value in (test.difference, test.low, test.high)]
        assert [difference.text, *difference.interval] == signed
        assert p_value.text == f"{test.p_value:.4f}"
        assert units.text == "200"

    def test_a_tiny_p_value_is_a_bound(self):
        right = {f"q{index}": 1.0 for index in range(100)}
        contents = [
            make_result(
                "gqa", metrics__exact_match={**make_result()["metrics"]["exact_match"], "value": value, "units": units}
            )
            for value, units in ((1.0, right), (0.0, dict.fromkeys(right, 0.0)))
        ]
        table = tables.comparison_table(grouped(contents[0]), grouped(contents[1], folder="other"))
        assert [cell.text for cell in table.rows[0].cells] == ["+100.0", "<0.0001", "100"]

    def test_incomparable_results_are_refused(self):
        with pytest.raises(ResultError, match=r"nothing can be compared: .* \(gqa \(paper\)\)"):
            tables.comparison_table(grouped(make_result("gqa")), grouped(make_result("gqa", protocol="paper")))
        with pytest.raises(ResultError, match="nothing can be compared"):
            tables.comparison_table(grouped(make_result("gqa")), grouped(make_result("gqa")))  # the same file
        with pytest.raises(
            ResultError, match=r"--against names gqa \(current\) twice: results/1\.json and results/0\.json"
        ):
            tables.comparison_table(
                grouped(make_result("gqa")), grouped(make_result("gqa"), make_result("gqa", granularity=36))
            )
        others = make_result("gqa")
        metric = others["metrics"]["exact_match"]
        metric["units"] = {f"other-{name}": unit for name, unit in metric["units"].items()}
        with pytest.raises(ResultError, match=r"metrics\.exact_match: the two runs have no unit in common"):
            tables.comparison_table(grouped(make_result("gqa")), grouped(others, folder="other"))


class TestFigures:
    def test_bars_add_up_and_are_in_the_benchmarks_order(self):
        figure = figures.draw_routing(grouped(make_result("mmmu"), make_result("gqa")))
        (axes,) = [axes for axes in figure.axes if axes.axison]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["GQA", "MMMU"]
        widths = np.array([[bar.get_width() for bar in bars] for bars in axes.containers])
        np.testing.assert_allclose(widths.sum(axis=0), 1)
        np.testing.assert_allclose(widths[:, 0], list(make_result("gqa")["routing"]["levels"].values()))

    def test_points_are_the_results(self):
        contents = [make_result("gqa", granularity=level) for level in LEVELS] + [make_result("gqa")]
        drawn = figures.draw_figures(grouped(*contents))
        assert set(drawn) == {"routing", "time", "tokens"}
        for name, read in (
            ("tokens", lambda content: content["efficiency"]["mean_visual_tokens"]),
            ("time", lambda content: content["efficiency"]["seconds_per_question"]["median"]),
        ):
            (axes,) = [axes for axes in drawn[name].axes if axes.axison]
            points = np.concatenate([np.stack(bar.lines[0].get_data()).T for bar in axes.containers])
            expected = [[read(content), 100 * content["metrics"]["exact_match"]["value"]] for content in contents]
            np.testing.assert_allclose(points.astype(float), expected)

    def test_protocols_have_separate_panels(self):
        contents = [
            make_result("gqa", granularity=level, protocol=protocol)
            for level in (36, 576)
            for protocol in ("current", "paper")
        ]
        figure = figures.draw_figures(grouped(*contents))["tokens"]
        assert [axes.get_title() for axes in figure.axes if axes.axison] == ["GQA (current)", "GQA (paper)"]

    def test_curve(self):
        figure = figures.draw_curve(grouped(make_result("gqa", granularity="all", routing__curve=CURVE[::-1])))
        (line,) = figure.axes[0].lines
        np.testing.assert_allclose(np.stack(line.get_data()).T, [[1, 70], [1 / 1.5, 65], [0.5, 60]])
        assert [text.get_text() for text in figure.axes[0].texts] == ["0", "0.5", "1"]


class TestCommand:
    def run(self, capsys, *arguments):
        code = cli.main(["report", *map(str, arguments)])
        return code, *capsys.readouterr()

    def test_writes_everything(self, capsys, tmp_path):
        paths = write_all(tmp_path / "auto")
        paths += [
            write(
                tmp_path,
                "all.json",
                make_result("gqa", granularity="all", routing__oracle=ORACLE, routing__curve=CURVE),
            )
        ]
        paths += [write(tmp_path, f"{level}.json", make_result("mme", granularity=level)) for level in LEVELS]
        mini = write(tmp_path, "report.json", MINI)
        output = tmp_path / "out"
        code, text, errors = self.run(capsys, *paths, mini, "--against", tmp_path / "576.json", "--output", output)
        assert (code, errors) == (0, "")
        named = ["tests", "table1", "table2", "table3", "table4", "oracle", "routing", "results"]
        drawn = ["routing", "time", "tokens", "token_cost", "mini-accuracy", "mini-families", "mini-routing"]
        wanted = {"index.html", *(f"{name}.{end}" for name in named for end in ("md", "tex"))}
        wanted |= {f"{name}.{end}" for name in drawn for end in ("png", "svg")}
        assert {path.name for path in output.iterdir()} == wanted
        for name in drawn:
            assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert ElementTree.parse(output / f"{name}.svg").getroot().tag.endswith("svg")
        for name in named:
            assert (output / f"{name}.md").read_text() in text
        assert "**Mini world**" in text
        assert text.rstrip().endswith(f"report: {output / 'index.html'}")
        page = (output / "index.html").read_text()
        assert page.count("data:image/svg+xml;base64,") == len(drawn)
        assert set(re.findall(r"(?:src|href)=[\"']?(.{5})", page)) == {"data:"}  # nothing is fetched from elsewhere
        for name in ("arXiv 2410.02745v1", "Paired tests", "Mini world", ["router", " current"][0]):
            assert name in page

    def test_answers_a_program(self, capsys, tmp_path):
        path = write(tmp_path, "a.json", make_result("gqa"))
        code, text, _ = self.run(capsys, path, "--output", tmp_path / "out", "--json")
        answer = json.loads(text)
        assert code == 0
        assert set(answer) == {"tables", "mini", "files"}
        assert answer["files"][0] == str(tmp_path / "out/index.html")
        assert all(Path(name).is_file() for name in answer["files"])

    def test_the_same_results_give_the_same_files(self, capsys, tmp_path):
        path = write(tmp_path, "a.json", make_result("gqa"))
        for name in ("one", "two"):
            assert self.run(capsys, path, "--output", tmp_path / name)[0] == 0
        for file in (tmp_path / "one").iterdir():
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name

    def test_the_mini_world_alone(self, capsys, tmp_path):
        code, text, _ = self.run(capsys, write(tmp_path, "report.json", MINI), "--output", tmp_path / "out")
        assert code == 0
        assert "held" in text
        page = (tmp_path / "out/index.html").read_text()
        assert "it holds" in page
        assert "Made from 1 report of the mini world.</p>" in page

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (make_result(protocol="both"), "protocol must be one of"),
            (make_result(metrics={"bleu": make_result()["metrics"]["exact_match"]}), "metrics has none of exact_match"),
            ({**MINI, "families": 3}, "families must be a mapping"),
            ({**MINI, "rows": []}, "rows is empty"),
            ({**MINI, "rows": [{**MINI["rows"][0], "levels": {"4": 1.0}}]}, "rows.0.levels must name 4, 8"),
            ({key: value for key, value in MINI.items() if key != "machine"}, "machine is missing"),
            ({"loss": 1}, "format is None"),
        ],
    )
    def test_malformed_files_are_named(self, capsys, tmp_path, content, message):
        path = write(tmp_path, "wrong.json", content)
        code, text, errors = self.run(capsys, path, "--output", tmp_path / "out")
        assert (code, text) == (1, "")
        assert errors.startswith(f"avg-llava: {path}: {message}")
        assert len(errors.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()

    def test_the_same_file_twice_and_mini_against_are_refused(self, capsys, tmp_path):
        path, mini = write(tmp_path, "a.json", make_result()), write(tmp_path, "report.json", MINI)
        assert "is named twice" in self.run(capsys, path, path)[2]
        assert "no scores of single questions" in self.run(capsys, path, "--against", mini, "--output", tmp_path)[2]

    def test_wrong_usage_is_2(self, capsys):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["report"])
        assert exit_.value.code == 2
