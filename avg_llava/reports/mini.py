"""The mini world's report (see `avg_llava.mini`): what it holds, its figures and its self-contained page."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from avg_llava.common.files import write_json
from avg_llava.common.settings import ConfigError, build
from avg_llava.evaluation.results import ResultError
from avg_llava.reports import mini_figures as figures
from avg_llava.reports.rendering import html_table, page, picture

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table. Accuracies are shares between 0 and 1.

    Attributes:
        name: `llava-next`, `fixed-<tokens per crop>`, `random`, `random@router-tokens`, `router`, `router@<token_cost>`
            or `oracle`.
        accuracy: Over all questions.
        mean_visual_tokens: Visual tokens per question.
        token_cost: The router's price in nats per doubling of visual tokens; None where no router chose.
        families: Accuracy per question family.
        family_tokens: Visual tokens per question of each family.
        kinds: Accuracy per kind, over all questions of that kind.
        kind_tokens: Visual tokens per question of each kind.
        levels: Share of the questions at each level, coarse to fine.
        family_levels: The same per question family.
    """

    name: str
    accuracy: float
    mean_visual_tokens: float
    token_cost: float | None
    families: dict[str, float]
    family_tokens: dict[str, float]
    kinds: dict[str, float]
    kind_tokens: dict[str, float]
    levels: dict[str, float]
    family_levels: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, with what was measured and what was asked for."""

    text: str
    measured: str
    held: bool


@dataclass(frozen=True)
class ReportContent:
    """Contents of `report.json`."""

    rows: tuple[Row, ...]
    families: dict[str, str]
    """Question family -> what it needs to see: scene, object or fine."""
    claims: tuple[Claim, ...]
    token_cost: float
    """The price at which the router is judged."""
    token_cost_choice: str
    granularities: tuple[int, ...]
    num_questions: int
    num_verified: int
    """Answers that were generated anew with the router in the loop."""
    stages: tuple[dict[str, Any], ...]
    machine: dict[str, Any]


def is_report(content: Any) -> bool:
    """Whether this is, or was meant to be, a mini world's report."""
    return isinstance(content, Mapping) and "claims" in content and "rows" in content


def check_report(content: Report, source: str) -> Report:
    """The content of a `report.json`, if all of it is there.

    Args:
        content: What the JSON holds.
        source: The file's name, for messages.

    Raises:
        ResultError: If a field is missing or of the wrong type, or a row lacks a family or a level.
    """
    try:
        report = build(ReportContent, content)
    except ConfigError as error:
        raise ResultError(f"{source}: {error}") from error
    if not report.rows:
        raise ResultError(f"{source}: rows is empty")
    kinds, levels = set(report.rows[0].kinds), {str(level) for level in report.granularities}
    for index, row in enumerate(report.rows):
        expected = {
            "families": set(report.families),
            "family_tokens": set(report.families),
            "family_levels": set(report.families),
            "kinds": kinds,
            "kind_tokens": kinds,
            "levels": levels,
            **{f"family_levels.{family}": levels for family in row.family_levels},
        }
        for field, names in expected.items():
            group, _, family = field.partition(".")
            found = getattr(row, group)[family] if family else getattr(row, group)
            if set(found) != names:
                raise ResultError(f"{source}: rows.{index}.{field} must name {', '.join(sorted(names))}")
    return content


def table_lines(report: Report) -> list[str]:
    """The rows as lines of plain text, for a terminal."""
    kinds = _kinds(report)
    head = f"{'':<22}{'accuracy':>9}{'tokens':>9}" + "".join(f"{kind:>9}" for kind in kinds)
    lines = [head, "-" * len(head)]
    for row in report["rows"]:
        cells = "".join(f"{row['kinds'][kind]:>9.1%}" for kind in kinds)
        lines.append(f"{row['name']:<22}{row['accuracy']:>9.1%}{row['mean_visual_tokens']:>9.1f}{cells}")
    lines.append("")
    for claim in report["claims"]:
        lines.append(f"{'held  ' if claim['held'] else 'FAILED'}  {claim['text']}: {claim['measured']}")
    return lines


def write_report(report: Report, histories: Mapping[str, Sequence[Mapping[str, Any]]], output: Path) -> None:
    """Writes `report.json`, the figures as PNG and `index.html` (which holds the figures) to a folder.

    Args:
        report: What was measured: `rows`, `families`, `claims`, `token_cost`, `granularities`, `stages`, `machine`.
        histories: Stage name -> the lines of its `log_history.jsonl`.
        output: The folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    drawn = {f"{name}.png": figures.encode(figure, "png") for name, figure in draw(report).items()}
    if any(histories.values()):
        drawn["loss.png"] = figures.encode(figures.draw_losses(histories), "png")
    for name, png in drawn.items():
        (output / name).write_bytes(png)
    content = page("AVG-LLaVA in the mini world", lead(report), sections(report, drawn))
    (output / "index.html").write_text(content, encoding="utf-8")
    # Written last: whoever finds it finds the rest.
    write_json(output / "report.json", report)


def draw(report: Report) -> dict[str, Figure]:
    """Name -> figure, of all that the report itself holds."""
    return {
        "accuracy": figures.draw_accuracy(report),
        "families": figures.draw_families(report),
        "routing": figures.draw_routing(report),
    }


def _kinds(report: Report) -> list[str]:
    return list(report["rows"][0]["kinds"])


def _claims(report: Report) -> str:
    rows = [
        [
            html.escape(claim["text"]),
            html.escape(claim["measured"]),
            "<span class=held>held</span>" if claim["held"] else "<span class=failed>failed</span>",
        ]
        for claim in report["claims"]
    ]
    return html_table(["claim", "measured", ""], rows)


def _rows(report: Report) -> str:
    kinds = _kinds(report)
    cells, classes = [], []
    for row in report["rows"]:
        classes.append("chosen" if row["token_cost"] == report["token_cost"] else "")
        cost = "" if row["token_cost"] is None else f"{row['token_cost']:g}"
        numbers = [f"{row['accuracy']:.1%}", f"{row['mean_visual_tokens']:.1f}", cost]
        cells.append([html.escape(row["name"]), *numbers, *(f"{row['kinds'][kind]:.1%}" for kind in kinds)])
    return html_table(["", "accuracy", "visual tokens", "token cost", *kinds], cells, classes)


def _families(report: Report) -> str:
    names = [
        row["name"] for row in report["rows"] if "@" not in row["name"] or row["token_cost"] == report["token_cost"]
    ]
    rows = {row["name"]: row for row in report["rows"]}
    body = [
        [html.escape(family), kind, *(f"{rows[name]['families'][family]:.0%}" for name in names)]
        for family, kind in report["families"].items()
    ]
    return html_table(["question family", "needs", *map(html.escape, names)], body, num_text=2)


def _facts(facts: Mapping[str, Any]) -> str:
    return html_table(
        ["", ""], [[html.escape(str(key)), html.escape(str(value))] for key, value in facts.items()], num_text=2
    )


def _stages(report: Report) -> str:
    head = list(dict.fromkeys(key for stage in report["stages"] for key in stage))
    rows = [[html.escape(str(stage.get(key, ""))) for key in head] for stage in report["stages"]]
    return html_table(head, rows)


def sections(report: Report, drawn: Mapping[str, bytes]) -> dict[str, str]:
    """Head -> HTML of the parts of a page about one report.

    Args:
        report: The report.
        drawn: File name -> content of its figures; a part without its figure shows the rest.
    """

    def shown(stem: str, alternative: str) -> str:
        return "".join(
            picture(name, content, alternative) for name, content in drawn.items() if name.split(".")[0] == stem
        )

    return {
        "Claims": _claims(report),
        "Accuracy against visual tokens": shown("accuracy", "accuracy against visual tokens") + _rows(report),
        "Question families": shown("families", "accuracy per question family") + _families(report),
        "Where the router sends questions": shown("routing", "share of levels per question family"),
        "Training": shown("loss", "loss of the four stages") + _stages(report),
        "Machine and settings": _facts(report["machine"]),
    }


def lead(report: Report) -> str:
    """The paragraph that says what was measured, as HTML."""
    return (
        f"{report['num_questions']:,} held-out questions, greedy answers, exact match. The router is judged at a token "
        f"cost of {report['token_cost']:g} nats per doubling of visual tokens (marked row; "
        f"{html.escape(report['token_cost_choice'])}). Chance is taken in expectation: <i>random</i> picks every level "
        "equally often, <i>random@router-tokens</i> spends the router's mean number of tokens blindly. "
        f"{report['num_verified']} answers of the judged row were generated anew with the router in the loop and are "
        "the same."
    )
