"""The mini world's report (see `avg_llava.mini`): its content, figures and page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from avg_llava.common.files import write_bytes, write_json
from avg_llava.common.settings import ConfigError, build
from avg_llava.common.tables import render_table
from avg_llava.evaluation.results import ResultError
from avg_llava.reports import rendering
from avg_llava.reports.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    encode_figure,
    make_grid,
    stack_levels,
    style_axes,
)
from avg_llava.reports.rendering import Cell, Picture, Section, Table, render_page

Report = Mapping[str, Any]
"""Contents of `report.json`; `check_report` says which."""


@dataclass(frozen=True)
class Row:
    """One way of choosing levels. Accuracies are between 0 and 1, tokens are visual tokens per question."""

    name: str
    """`llava-next`, `fixed-<tokens per crop>`, `random`, `random@router-tokens`, `router`, `router@<token_cost>` or
    `oracle`."""
    accuracy: float
    mean_visual_tokens: float
    token_cost: float | None
    """The router's price in nats per doubling of visual tokens; None if no router chose."""
    families: dict[str, float]
    """Accuracy per question family."""
    family_tokens: dict[str, float]
    kinds: dict[str, float]
    """Accuracy per kind, over all questions of that kind."""
    kind_tokens: dict[str, float]
    levels: dict[str, float]
    """Share of the questions at each level, coarse to fine."""
    family_levels: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, what was measured, and whether it held."""

    text: str
    measured: str
    held: bool


@dataclass(frozen=True)
class ReportContent:
    """Contents of `report.json`."""

    rows: tuple[Row, ...]
    families: dict[str, str]
    """Question family -> the detail that it needs: scene, object or fine."""
    claims: tuple[Claim, ...]
    token_cost: float
    """The price at which the router is judged."""
    token_cost_choice: str
    granularities: tuple[int, ...]
    num_questions: int
    num_verified: int
    """Answers that were generated again with the router in the loop."""
    stages: tuple[dict[str, Any], ...]
    machine: dict[str, Any]


def is_report(content: Any) -> bool:
    """True if the content has the fields that only a mini world's report has."""
    return isinstance(content, Mapping) and "claims" in content and "rows" in content


def check_report(content: Report, source: str) -> Report:
    """Checks the content of the `report.json` at `source` and returns it.

    Raises:
        ResultError: If a field is missing or of the wrong type, or a row lacks a family or a level.
    """
    try:
        report = build(ReportContent, content)
    except ConfigError as error:
        raise ResultError(f"{source}: {error}") from error
    if not report.rows:
        raise ResultError(f"{source}: rows is empty")
    families, kinds = set(report.families), set(report.rows[0].kinds)
    levels = set(map(str, report.granularities))
    for index, row in enumerate(report.rows):
        named: list[tuple[str, Mapping[str, Any], set[str]]] = [
            ("families", row.families, families),
            ("family_tokens", row.family_tokens, families),
            ("family_levels", row.family_levels, families),
            ("kinds", row.kinds, kinds),
            ("kind_tokens", row.kind_tokens, kinds),
            ("levels", row.levels, levels),
            *((f"family_levels.{family}", shares, levels) for family, shares in row.family_levels.items()),
        ]
        for field, found, names in named:
            if set(found) != names:
                raise ResultError(f"{source}: rows.{index}.{field} must name {', '.join(sorted(names))}")
    return content


def table_lines(report: Report) -> list[str]:
    """Renders the rows and claims as lines for a terminal."""
    kinds = _kinds(report)
    rows = [
        [
            row["name"],
            f"{row['accuracy']:.1%}",
            f"{row['mean_visual_tokens']:.1f}",
            *(f"{row['kinds'][kind]:.1%}" for kind in kinds),
        ]
        for row in report["rows"]
    ]
    claims = [
        f"{'held  ' if claim['held'] else 'FAILED'}  {claim['text']}: {claim['measured']}" for claim in report["claims"]
    ]
    return [*render_table(["", "accuracy", "tokens", *kinds], rows).splitlines(), "", *claims]


def write_report(report: Report, histories: Mapping[str, Sequence[Mapping[str, Any]]], output: Path) -> None:
    """Writes `report.json`, the figures as PNG and `index.html` (which embeds the figures) to a folder.

    `histories` maps a stage's name to the lines of its `log_history.jsonl`.
    """
    output.mkdir(parents=True, exist_ok=True)
    images = {f"{name}.png": encode_figure(figure, "png") for name, figure in draw(report).items()}
    if any(histories.values()):
        images["loss.png"] = encode_figure(draw_losses(histories), "png")
    for name, png in images.items():
        write_bytes(output / name, png)
    page = render_page("AVG-LLaVA in the mini world", lead(report), sections(report, images))
    write_bytes(output / "index.html", page.encode())
    write_json(output / "report.json", report)  # last: the other files exist if it does


# ---- page ---------------------------------------------------------------------------------------------------------


def lead(report: Report) -> Markup:
    """The paragraph that says what was measured."""
    return Markup(
        "{questions:,} held-out questions, greedy answers, exact match. The router is judged at a token cost of "
        "{cost:g} nats per doubling of visual tokens (marked row; {choice}). Chance is taken in expectation: "
        "<i>random</i> picks every level equally often, <i>random@router-tokens</i> spends the router's mean number of "
        "tokens without looking. {verified} answers of the judged row were generated again with the router in the loop "
        "and are the same."
    ).format(
        questions=report["num_questions"],
        cost=report["token_cost"],
        choice=report["token_cost_choice"],
        verified=report["num_verified"],
    )


def sections(report: Report, images: Mapping[str, bytes], level: int = 2) -> list[Section]:
    """The sections of a page about one report, with headings of a level.

    `images` maps file names to the content of figures; a missing figure is left out.
    """

    def pictures(stem: str, alternative: str) -> list[Picture]:
        return [Picture(name, content, alternative) for name, content in images.items() if name.split(".")[0] == stem]

    def section(title: str, *blocks: Picture | Table) -> Section:
        return Section(title, blocks, level)

    facts = [rendering.Row((key, str(value))) for key, value in report["machine"].items()]
    return [
        section("Claims", _claims_table(report)),
        section(
            "Accuracy against visual tokens",
            *pictures("accuracy", "accuracy against visual tokens"),
            _rows_table(report),
        ),
        section("Question families", *pictures("families", "accuracy per question family"), _families_table(report)),
        section("Where the router sends questions", *pictures("routing", "share of levels per question family")),
        section("Training", *pictures("loss", "loss of the four stages"), _stages_table(report)),
        section("Machine and settings", _table(["", ""], [], facts)),
    ]


def _kinds(report: Report) -> list[str]:
    return list(report["rows"][0]["kinds"])


def _table(labels: Sequence[str], columns: Sequence[str], rows: Sequence[rendering.Row]) -> Table:
    return Table("", "", tuple(labels), tuple(columns), tuple(rows))


def _claims_table(report: Report) -> Table:
    rows = []
    for claim in report["claims"]:
        result = "held" if claim["held"] else "failed"
        rows.append(rendering.Row((claim["text"], claim["measured"]), (Cell(result, style=result),)))
    return _table(["claim", "measured"], [""], rows)


def _rows_table(report: Report) -> Table:
    kinds = _kinds(report)
    rows = []
    for row in report["rows"]:
        cost = "" if row["token_cost"] is None else f"{row['token_cost']:g}"
        texts = [f"{row['accuracy']:.1%}", f"{row['mean_visual_tokens']:.1f}", cost]
        texts += [f"{row['kinds'][kind]:.1%}" for kind in kinds]
        marked = row["token_cost"] == report["token_cost"]
        rows.append(rendering.Row((row["name"],), tuple(map(Cell, texts)), marked=marked))
    return _table([""], ["accuracy", "visual tokens", "token cost", *kinds], rows)


def _families_table(report: Report) -> Table:
    shown = [row for row in report["rows"] if "@" not in row["name"] or row["token_cost"] == report["token_cost"]]
    rows = [
        rendering.Row((family, kind), tuple(Cell(f"{row['families'][family]:.0%}") for row in shown))
        for family, kind in report["families"].items()
    ]
    return _table(["question family", "needs"], [row["name"] for row in shown], rows)


def _stages_table(report: Report) -> Table:
    columns = list(dict.fromkeys(key for stage in report["stages"] for key in stage))
    texts = [[str(stage.get(key, "")) for key in columns] for stage in report["stages"]]
    rows = [rendering.Row((first,), tuple(map(Cell, others))) for first, *others in texts]
    return _table(columns[:1], columns[1:], rows)


# ---- figures ------------------------------------------------------------------------------------------------------


def draw(report: Report) -> dict[str, Figure]:
    """Draws the figures of a report: name -> figure."""
    return {
        "accuracy": draw_accuracy(report),
        "families": draw_families(report),
        "routing": draw_routing(report),
    }


def draw_accuracy(report: Report) -> Figure:
    """Draws accuracy against visual tokens, over all questions and for each kind of family."""
    kinds = _kinds(report)
    figure, panels = make_grid(1 + len(kinds), 2, 5.4, 3.7)
    _trade_off(panels[0], report, "accuracy", "mean_visual_tokens")
    panels[0].set_title("all questions")
    for axes, kind in zip(panels[1:], kinds, strict=True):
        _trade_off(axes, report, "kinds", "kind_tokens", kind)
        axes.set_title(f"{kind} families")
    figure.supxlabel("visual tokens per question")
    figure.supylabel("accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def draw_families(report: Report) -> Figure:
    """Draws accuracy against visual tokens, a small panel per question family."""
    figure, panels = make_grid(len(report["families"]), 4, 2.9, 2.5)
    for axes, (family, kind) in zip(panels, report["families"].items(), strict=True):
        _trade_off(axes, report, "families", "family_tokens", family)
        axes.set_title(f"{family} ({kind})", fontsize=10)
        axes.tick_params(labelsize=8)
    figure.supxlabel("visual tokens per question")
    figure.supylabel("accuracy")
    return figure


def draw_routing(report: Report) -> Figure:
    """Draws the share of each level per question family, at token cost 0 and at the judged one."""
    shown = [row for row in report["rows"] if row["token_cost"] in (0, report["token_cost"])]
    shown += [row for row in report["rows"] if row["name"] == "oracle"]
    families = list(report["families"])
    levels = [str(level) for level in report["granularities"]]
    figure = Figure(figsize=(4.0 * len(shown) + 1.2, 0.34 * len(families) + 1.6), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, row in zip(panels, shown, strict=True):
        stack_levels(axes, [row["family_levels"][family] for family in families], levels)
        axes.set_title(row["name"], fontsize=11)
    panels[0].set_yticks(range(len(families)), [f"{family} ({report['families'][family]})" for family in families])
    panels[0].invert_yaxis()  # scene families at the top
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, title="visual tokens per crop", loc="outside lower center", ncols=len(labels), frameon=False
    )
    return figure


def draw_losses(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draws the training loss per optimiser step, a panel per stage: logged values and their running mean."""
    figure, panels = make_grid(len(histories), 2, 5.4, 2.6)
    for axes, (stage, history) in zip(panels, histories.items(), strict=True):
        logged = [(line["step"], line["loss"]) for line in history if "loss" in line and "step" in line]
        axes.set_title(stage)
        style_axes(axes)
        if not logged:
            continue
        steps, losses = (np.array(column, dtype=float) for column in zip(*logged, strict=True))
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.8)
        window = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        middle = (window - 1) // 2  # at the middle of its window, the mean does not lag
        axes.plot(steps[middle : middle + len(smooth)], smooth, color=BLUE, linewidth=1.6)
        axes.set_ylim(bottom=0)
    figure.supxlabel("step")
    figure.supylabel("loss")
    return figure


def _trade_off(axes: Axes, report: Report, accuracy: str, tokens: str, name: str | None = None) -> None:
    """Draws accuracy against visual tokens: fixed levels and the router's curve as lines, other rows as marks.

    `accuracy` and `tokens` are fields of rows; `name` is the family or kind if these fields have one value per name.
    """
    rows = report["rows"]

    def points(chosen: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        return [[row[field] if name is None else row[field][name] for row in chosen] for field in (tokens, accuracy)]

    fixed = [row for row in rows if row["name"].startswith("fixed-")]
    routers = [row for row in rows if row["token_cost"] is not None]
    axes.plot(*points(fixed), "o-", color=GREY, markersize=5, label="fixed level")
    axes.plot(*points(routers), ".-", color=BLUE, markersize=6, linewidth=1.2, label="router, rising token cost")
    marks = {
        "router": ("^", BLUE, "router, token cost 0"),
        "random": ("X", ORANGE, "random"),
        "random@router-tokens": ("P", ORANGE, "random at the router's tokens"),
        "llava-next": ("s", PURPLE, "LLaVA-NeXT (stage 2)"),
        "oracle": ("*", GREEN, "oracle"),
    }
    for row in rows:
        if row["name"] in marks:
            marker, color, label = marks[row["name"]]
            axes.plot(*points([row]), marker, color=color, markersize=9, linestyle="none", label=label, alpha=0.9)
        if row["token_cost"] == report["token_cost"]:
            label = f"router, token cost {row['token_cost']:g} (judged)"
            axes.plot(*points([row]), "o", color=BLUE, markersize=12, fillstyle="none", markeredgewidth=2, label=label)
    ticks = sorted({round(tokens) for tokens in points(fixed)[0]})
    axes.set_xscale("log", base=2)
    axes.margins(x=0.08)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(-0.03, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    style_axes(axes)
