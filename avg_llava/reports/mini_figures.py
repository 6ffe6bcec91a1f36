"""The figures of the mini world's report, and what all figures share. Rows are those of `report.json`."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

Row = Mapping[str, Any]
FileType = Literal["png", "svg"]

BLUE, ORANGE, GREY, GREEN, PURPLE = "#2b6cb0", "#dd6b20", "#718096", "#2f855a", "#805ad5"


def encode(figure: Figure, file_type: FileType) -> bytes:
    """The figure as the content of a file; the same figure gives the same bytes."""
    FigureCanvasAgg(figure)  # no display, no global state of pyplot
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "avg-llava"}):
        figure.savefig(buffer, format=file_type, dpi=130, metadata={"Date": None} if file_type == "svg" else None)
    return buffer.getvalue()


def grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, and the panels; unused places of the last line stay empty."""
    columns = min(columns, count)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * lines + 0.5), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for empty in panels[count:]:
        empty.set_axis_off()
    return figure, panels[:count]


def tidy(axes: Axes) -> None:
    """A light grid, and no frame on the sides that carry no numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def stack_levels(axes: Axes, bars: Sequence[Mapping[str, float]], levels: Sequence[str]) -> None:
    """A horizontal bar for each mapping level -> share, its levels from light (coarse) to dark (fine)."""
    left = np.zeros(len(bars))
    for level, step in zip(levels, np.linspace(0, 1, len(levels)), strict=True):
        share = np.array([shares.get(level, 0.0) for shares in bars])
        color = (0.86 - 0.7 * step, 0.91 - 0.5 * step, 0.97 - 0.3 * step)
        axes.barh(range(len(bars)), share, left=left, color=color, label=level, height=0.74)
        left += share
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _value(row: Row, group: str, name: str | None) -> tuple[float, float]:
    """(visual tokens, accuracy) of a row: overall, or of one family or kind."""
    if name is None:
        return row["mean_visual_tokens"], row["accuracy"]
    tokens = {"families": "family_tokens", "kinds": "kind_tokens"}[group]
    return row[tokens][name], row[group][name]


def _trade_off(axes: Axes, report: Mapping[str, Any], group: str = "", name: str | None = None) -> None:
    """Accuracy against visual tokens for all rows: fixed levels and the router's curve as lines, others as marks."""
    rows = report["rows"]

    def points(chosen: Sequence[Row]) -> tuple[list[float], list[float]]:
        pairs = [_value(row, group, name) for row in chosen]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

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
    tidy(axes)


def draw_accuracy(report: Mapping[str, Any]) -> Figure:
    """Accuracy against visual tokens, over all questions and for each kind of family."""
    kinds = list(report["rows"][0]["kinds"])
    figure, panels = grid(1 + len(kinds), 2, 5.4, 3.7)
    _trade_off(panels[0], report)
    panels[0].set_title("all questions")
    for axes, kind in zip(panels[1:], kinds, strict=True):
        _trade_off(axes, report, "kinds", kind)
        axes.set_title(f"{kind} families")
    figure.supxlabel("visual tokens per question")
    figure.supylabel("accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def draw_families(report: Mapping[str, Any]) -> Figure:
    """Accuracy against visual tokens, a small panel per question family."""
    figure, panels = grid(len(report["families"]), 4, 2.9, 2.5)
    for axes, (family, kind) in zip(panels, report["families"].items(), strict=True):
        _trade_off(axes, report, "families", family)
        axes.set_title(f"{family} ({kind})", fontsize=10)
        axes.tick_params(labelsize=8)
    figure.supxlabel("visual tokens per question")
    figure.supylabel("accuracy")
    return figure


def draw_routing(report: Mapping[str, Any]) -> Figure:
    """Share of each level per question family, at token cost 0 and at the one that is judged."""
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
    """Training loss against the optimiser's step, a panel per stage: each logged value, and a running mean."""
    figure, panels = grid(len(histories), 2, 5.4, 2.6)
    for axes, (stage, history) in zip(panels, histories.items(), strict=True):
        logged = [(line["step"], line["loss"]) for line in history if "loss" in line and "step" in line]
        axes.set_title(stage)
        tidy(axes)
        if not logged:
            continue
        steps, losses = (np.array(column, dtype=float) for column in zip(*logged, strict=True))
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.8)
        window = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        middle = (window - 1) // 2  # the mean stands in the middle of its window, so that it does not lag
        axes.plot(steps[middle : middle + len(smooth)], smooth, color=BLUE, linewidth=1.6)
        axes.set_ylim(bottom=0)
    figure.supxlabel("step")
    figure.supylabel("loss")
    return figure
