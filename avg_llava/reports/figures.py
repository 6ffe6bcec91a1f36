"""Figures of the paper from result files: routing per benchmark, score against time and tokens, price curve.

The helpers at the head are shared with the mini world's figures.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from avg_llava.evaluation.benchmarks import BENCHMARKS
from avg_llava.evaluation.published import in_table_units
from avg_llava.evaluation.results import Efficiency, Result
from avg_llava.evaluation.statistics import Metric, bootstrap_interval
from avg_llava.reports.series import Series, SeriesResults

FileType = Literal["png", "svg"]

BLUE, ORANGE, GREY, GREEN, PURPLE = "#2b6cb0", "#dd6b20", "#718096", "#2f855a", "#805ad5"
_COLORS = (BLUE, ORANGE, GREEN, PURPLE)
_PANEL = (3.1, 2.6)

Panels = Mapping[tuple[str, str], Mapping[Series, Result]]


def encode_figure(figure: Figure, file_type: FileType) -> bytes:
    """Renders a figure as the content of a file; the same figure gives the same bytes."""
    FigureCanvasAgg(figure)  # no display, no global state of pyplot
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "avg-llava"}):
        figure.savefig(buffer, format=file_type, dpi=130, metadata={"Date": None} if file_type == "svg" else None)
    return buffer.getvalue()


def make_grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Creates a figure with `count` panels of a size in inches, at most `columns` in a row."""
    columns = min(columns, count)
    num_rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * num_rows + 0.5), layout="constrained")
    panels = figure.subplots(num_rows, columns, squeeze=False).flatten().tolist()
    for empty in panels[count:]:
        empty.set_axis_off()
    return figure, panels[:count]


def style_axes(axes: Axes) -> None:
    """Draws a light grid and removes the frame at the top and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def stack_levels(axes: Axes, bars: Sequence[Mapping[str, float]], levels: Sequence[str]) -> None:
    """Draws one horizontal bar per mapping level -> share, from light (coarse) to dark (fine)."""
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


# ---- figures of results -----------------------------------------------------------------------------------------


def draw_figures(grouped: SeriesResults) -> dict[str, Figure]:
    """Draws all figures for which there are results: name -> figure."""
    drawn = {
        "routing": draw_routing(grouped),
        "time": draw_scores(
            grouped, "seconds per question (median)", lambda measured: measured.seconds_per_question.median
        ),
        "tokens": draw_scores(
            grouped, "visual tokens per question (mean)", lambda measured: measured.mean_visual_tokens
        ),
        "token_cost": draw_curve(grouped),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def draw_routing(grouped: SeriesResults) -> Figure | None:
    """Draws the share of images at each level (figure 5): a bar per benchmark, a panel per routed series."""
    shown = {
        series: {name: entry.result.routing.levels for name, entry in results.items() if entry.result.routing.levels}
        for series, results in grouped.items()
        if series.is_routed
    }
    shown = {series: bars for series, bars in shown.items() if bars}
    if not shown:
        return None
    num_bars = max(map(len, shown.values()))
    height = 0.3 * num_bars + 1.6
    figure, panels = make_grid(len(shown), 2, 5.2, height)
    for axes, (series, bars) in zip(panels, shown.items(), strict=True):
        stack_levels(axes, list(bars.values()), list(map(str, series.granularities)))
        axes.set_yticks(range(len(bars)), [BENCHMARKS[name].title for name in bars])
        axes.set_ylim(num_bars - 0.5, -0.5)  # equally thick bars in every panel, the first at the top
        axes.set_xlabel("share of images", fontsize=9)
        axes.set_title(", ".join(series.labels), fontsize=9)
        axes.legend(
            title="visual tokens per crop",
            loc="upper center",
            bbox_to_anchor=(0.5, -0.6 / (height - 1.2)),
            ncols=len(series.granularities),
            frameon=False,
            fontsize=8,
            title_fontsize=8,
        )
    return figure


def draw_scores(grouped: SeriesResults, label: str, cost: Callable[[Efficiency], float]) -> Figure | None:
    """Draws the headline score with its interval against a cost, a panel per benchmark and protocol."""
    panels = _by_benchmark(grouped)
    panels = {key: results for key, results in panels.items() if len(results) > 1}  # a single point shows no trade-off
    if not panels:
        return None
    colors = _model_colors(grouped)
    figure, grid = make_grid(len(panels), 4, *_PANEL)
    legend: dict[str, Any] = {}
    for axes, ((benchmark, protocol), results) in zip(grid, panels.items(), strict=True):
        legend |= _draw_results(axes, results, colors, cost)
        _label(axes, benchmark, protocol, next(iter(results.values())).headline)
        if label.startswith("visual"):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4))
    figure.supxlabel(label, fontsize=9)
    _add_legend(figure, legend, len(panels))
    return figure


def _draw_results(
    axes: Axes,
    results: Mapping[Series, Result],
    colors: Mapping[str, str | None],
    cost: Callable[[Efficiency], float],
) -> dict[str, Any]:
    """Draws fixed levels and the router's prices joined by lines, random levels as a mark; label -> legend handle."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for series, result in results.items():
        name = "fixed level" if isinstance(series.granularity, int) else "router" if series.is_routed else "random"
        groups.setdefault((series.model, name), []).append(result)
    handles = {}
    for (model, name), members in groups.items():
        points = np.array([_point(result, cost) for result in members])
        x, value, low, high = points[points[:, 0].argsort(kind="stable")].T
        handles[f"{model}, {name}"] = axes.errorbar(
            x,
            value,
            yerr=[value - low, high - value],
            fmt={"fixed level": "o-", "router": "^-", "random": "X"}[name],
            color=colors[model] or {"fixed level": GREY, "router": BLUE, "random": ORANGE}[name],
            alpha=0.9 if name != "fixed level" else 0.6,
            markersize=7 if name != "fixed level" else 4.5,
            linewidth=1,
            elinewidth=0.8,
            capsize=1.5,
            zorder=3 if name == "router" else 2,
        )
    return handles


def _point(result: Result, cost: Callable[[Efficiency], float]) -> tuple[float, ...]:
    """Returns a result's cost, headline score, and the ends of the score's interval."""
    metric = result.headline
    values = (metric.value, *bootstrap_interval(metric.kind, metric.units))
    return cost(result.efficiency), *(in_table_units(metric, value) for value in values)


def draw_curve(grouped: SeriesResults) -> Figure | None:
    """Draws the headline score against the share of tokens for rising prices, a panel per benchmark and protocol."""
    panels = _by_benchmark(grouped, lambda result: bool(result.routing.curve))
    if not panels:
        return None
    colors = _model_colors(grouped)
    figure, grid = make_grid(len(panels), 4, *_PANEL)
    for axes, ((benchmark, protocol), results) in zip(grid, panels.items(), strict=True):
        for series, result in results.items():
            metric, curve = result.headline, sorted(result.routing.curve or (), key=lambda point: point.token_cost)
            shares = [point.token_share for point in curve]
            values = [in_table_units(metric, point.value) for point in curve]
            axes.plot(shares, values, "o-", color=colors[series.model] or BLUE, markersize=4, label=series.model)
            for index in sorted({0, len(curve) // 2, len(curve) - 1}):  # label the first, middle and last price
                axes.annotate(
                    f"{curve[index].token_cost:g}",
                    (shares[index], values[index]),
                    xytext=(5, -7),
                    textcoords="offset points",
                    fontsize=7,
                )
        _label(axes, benchmark, protocol, next(iter(results.values())).headline)
        axes.set_xlim(0, 1.08)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    figure.supxlabel("share of the finest level's visual tokens\n(small figures: token cost)", fontsize=9)
    if len(colors) > 1:
        handles, labels = grid[0].get_legend_handles_labels()
        _add_legend(figure, dict(zip(labels, handles, strict=True)), len(panels))
    return figure


def _add_legend(figure: Figure, handles: Mapping[str, Any], num_panels: int) -> None:
    """Adds a legend of labels and their handles above the panels, no wider than these."""
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=min(4, len(handles), num_panels),
        frameon=False,
        fontsize=8,
    )


def _by_benchmark(grouped: SeriesResults, is_shown: Callable[[Result], bool] = lambda result: True) -> Panels:
    panels: dict[tuple[str, str], dict[Series, Result]] = {}
    for series, results in grouped.items():
        for benchmark, entry in results.items():
            if is_shown(entry.result):
                panels.setdefault((benchmark, series.protocol), {})[series] = entry.result
    names = list(BENCHMARKS)
    return dict(sorted(panels.items(), key=lambda item: (item[0][1], names.index(item[0][0]))))


def _model_colors(grouped: SeriesResults) -> dict[str, str | None]:
    """One colour per model; None for a single model, whose colours show who chose the level."""
    models = dict.fromkeys(series.model for series in grouped)
    if len(models) == 1:
        return dict.fromkeys(models)
    return {model: _COLORS[index % len(_COLORS)] for index, model in enumerate(models)}


def _label(axes: Axes, benchmark: str, protocol: str, metric: Metric) -> None:
    style_axes(axes)
    axes.set_title(f"{BENCHMARKS[benchmark].title} ({protocol})", fontsize=9)
    axes.set_ylabel(metric.label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.12, y=0.15)
