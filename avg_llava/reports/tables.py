"""The paper's tables from result files, with published and measured rows.

A measured row is one series (see `avg_llava.reports.series`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from avg_llava.evaluation.benchmarks import BENCHMARKS
from avg_llava.evaluation.published import Column, in_table_units, load_published, score_columns
from avg_llava.evaluation.results import Efficiency, Result, ResultError
from avg_llava.evaluation.statistics import NUM_RESAMPLES, Metric, UnitError, bootstrap_interval, paired_test
from avg_llava.reports.rendering import Cell, Row, Table
from avg_llava.reports.series import Measured, Series, SeriesResults

PARTIAL = "†"
INTERVALS = f"Measured figures carry 95% intervals (percentile bootstrap, {NUM_RESAMPLES:,} resamples)."
PARTIAL_NOTE = f"{PARTIAL} Not all questions of the benchmark were answered; the table of results says how many."
LABELS = ("model", "level chosen by", "protocol")


# ---- cells --------------------------------------------------------------------------------------------------------


def _figure(metric: Metric, value: float) -> str:
    return f"{in_table_units(metric, value):.1f}"


def is_partial(result: Result) -> bool:
    """True if questions of the benchmark are missing."""
    whole = BENCHMARKS[result.benchmark].num_questions
    return not result.complete or result.num_failed > 0 or result.dataset.num_questions != whole


def _score_cell(result: Result, metric: Metric) -> Cell:
    """A metric and its interval in the units of the tables, with a mark if questions are missing."""
    low, high = bootstrap_interval(metric.kind, metric.units)
    mark = PARTIAL if is_partial(result) else ""
    return Cell(_figure(metric, metric.value) + mark, (_figure(metric, low), _figure(metric, high)))


def _score_row(labels: tuple[str, ...], results: Mapping[str, Measured], columns: Sequence[Column]) -> Row:
    cells = []
    for column in columns:
        entry = results.get(column.benchmark)
        metric = entry.result.metrics.get(column.metric) if entry else None
        cells.append(_score_cell(entry.result, metric) if entry and metric else None)
    return Row(labels, tuple(cells))


def _number_cells(values: Iterable[float | None], form: str = "{:.1f}") -> tuple[Cell | None, ...]:
    return tuple(None if value is None else Cell(form.format(value)) for value in values)


def _notes(rows: Sequence[Row], *notes: str) -> tuple[str, ...]:
    """The notes, preceded by those on intervals and marks if rows have them."""
    cells = [cell for row in rows for cell in row.cells if cell is not None]
    return (
        *([INTERVALS] if any(cell.interval for cell in cells) else []),
        *([PARTIAL_NOTE] if any(PARTIAL in cell.text for cell in cells) else []),
        *notes,
    )


def _paper_table(
    number: str, labels: tuple[str, ...], published_rows: Sequence[Row], measured: Sequence[Row], *notes: str
) -> Table | None:
    """A table of the paper: published rows, then measured ones that have a figure; None if there are none of these."""
    published = load_published().tables[number]
    measured = [row for row in measured if any(row.cells)]
    if not measured:
        return None
    return Table(
        name=f"table{number}",
        title=f"{published.title} (table {number} of the paper)",
        labels=labels,
        columns=tuple(column.label for column in published.columns),
        rows=(*published_rows, *measured),
        notes=_notes(measured, *published.notes, *notes),
    )


# ---- tables -------------------------------------------------------------------------------------------------------


def score_table(number: str, grouped: SeriesResults) -> Table | None:
    """Table 1 or 2: a row per series, a column per benchmark; None if nothing of it was measured."""
    published = load_published().tables[number]
    rows = [Row((row.name, "", "published"), _number_cells(row.values), published=True) for row in published.rows]
    measured = [_score_row(series.labels, results, published.columns) for series, results in grouped.items()]
    sources = "; ".join(f"{row.name}: {row.source}" for row in published.rows)
    return _paper_table(number, LABELS, rows, measured, f"Published rows. {sources}.")


def other_scores_table(grouped: SeriesResults) -> Table | None:
    """Headline scores of benchmarks that are in no table of the paper; None if there are none."""
    others = set().union(*grouped.values()) - {column.benchmark for column in score_columns()}
    names = [name for name in BENCHMARKS if name in others]
    rows = []
    for series, results in grouped.items():
        entries = [results.get(name) for name in names]
        cells = tuple(_score_cell(entry.result, entry.result.headline) if entry else None for entry in entries)
        if any(cells):
            rows.append(Row(series.labels, cells))
    if not rows:
        return None
    return Table(
        name="other",
        title="Other benchmarks",
        labels=LABELS,
        columns=tuple(BENCHMARKS[name].title for name in names),
        rows=tuple(rows),
        notes=_notes(rows),
    )


QUANTITIES: dict[str, tuple[str, str, Callable[[Efficiency], float | None]]] = {
    "grid_share": ("tokens per grid", "{:.1f}%", lambda measured: 100 * measured.grid_share),
    "speedup_over_llava_next": (
        "speed-up, LLaVA-NeXT",
        "{:.2f}×",
        lambda measured: measured.speed.speedup_over_llava_next if measured.speed else None,
    ),
    "speedup_over_finest": (
        "speed-up, finest level",
        "{:.2f}×",
        lambda measured: measured.speed.speedup_over_finest if measured.speed else None,
    ),
    "mean_visual_tokens": ("visual tokens", "{:.0f}", lambda measured: measured.mean_visual_tokens),
    "time_to_first_token": ("first token, ms", "{:.0f}", lambda measured: measured.time_to_first_token_ms.median),
    "seconds_per_question": ("seconds", "{:.3f}", lambda measured: measured.seconds_per_question.median),
    "router_share": (
        "router's share",
        "{:.1f}%",
        lambda measured: None if measured.router_share is None else 100 * measured.router_share,
    ),
}
"""Key -> name and format in table 3, and function that reads the number; None if it was not measured."""


def efficiency_table(grouped: SeriesResults) -> Table | None:
    """Table 3: tokens and speed of routed series; None if there are none."""
    published = load_published().tables["3"]
    rows, measured = [], []
    for row in published.rows:
        assert row.key is not None
        quantity, form, _ = QUANTITIES[row.key]
        labels = (row.name, "router", "published", quantity)
        rows.append(Row(labels, _number_cells(row.values, form), published=True))
    for series, results in grouped.items():
        if series.is_routed:
            entries = [results.get(column.benchmark) for column in published.columns]
            for quantity, form, read in QUANTITIES.values():
                values = [read(entry.result.efficiency) if entry else None for entry in entries]
                measured.append(Row((*series.labels, quantity), _number_cells(values, form)))
    return _paper_table(
        "3",
        (*LABELS, "quantity"),
        rows,
        measured,
        "Speed-ups are over transformers' LLaVA-NeXT and over the same model at its finest level: ratios of medians of "
        "alternating runs on the same questions and machine. Visual tokens are means over questions, first token and "
        "seconds are medians; the router's share is of the time.",
    )


def ablation_letter(series: Series) -> str | None:
    """The row of table 4 that a series belongs to: `full`, a letter, or None."""
    changes = []
    if isinstance(series.granularity, int):
        changes.append("a")
    elif series.granularity == "random":
        changes.append("b")
    if len(series.granularities) == 3:  # of the paper's five
        changes.append("d")
    if series.ablation:
        changes.append(series.ablation)
    if series.token_cost or len(changes) > 1 or len(series.granularities) not in (3, 5):
        return None
    return changes[0] if changes else "full"


def ablation_table(grouped: SeriesResults) -> Table | None:
    """Table 4: ablations; None if none was measured."""
    published = load_published().tables["4"]
    rows, measured = [], []
    for row in published.rows:
        letter = "" if row.key == "full" else f"({row.key})"
        labels = (letter, row.name, "AVG-LLaVA", "", "published")
        rows.append(Row(labels, _number_cells(row.values), published=True))
        for series, results in grouped.items():
            if ablation_letter(series) == row.key:
                measured.append(_score_row((letter, row.name, *series.labels), results, published.columns))
    if not any(row.labels[0] and any(row.cells) for row in measured):
        return None
    return _paper_table("4", ("", "change", *LABELS), rows, measured)


def oracle_table(grouped: SeriesResults) -> Table | None:
    """The router against the best level of each question; None if it was not measured."""
    rows = []
    for series, results in grouped.items():
        for benchmark, entry in results.items():
            metric, oracle = entry.result.headline, entry.result.routing.oracle
            if oracle is None:
                continue
            cells = (
                _score_cell(entry.result, metric),
                Cell(_figure(metric, oracle.value)),
                Cell(_figure(metric, oracle.regret)),
                Cell(f"{100 * oracle.agreement:.1f}%"),
                Cell(f"{entry.result.efficiency.mean_visual_tokens:.0f}"),
                Cell(f"{oracle.mean_visual_tokens:.0f}"),
            )
            rows.append(Row((BENCHMARKS[benchmark].title, *series.labels), cells))
    if not rows:
        return None
    return Table(
        name="oracle",
        title="Router against oracle",
        labels=("benchmark", *LABELS),
        columns=("router", "oracle", "regret", "agreement", "tokens, router", "tokens, oracle"),
        rows=tuple(rows),
        notes=_notes(rows, "The oracle picks the best level of each question in hindsight."),
    )


def routing_table(grouped: SeriesResults) -> Table | None:
    """The paper's statements on figure 5 and the measured shares; None if no router with five levels ran."""
    rows = []
    for statement in load_published().routing:
        for series, results in grouped.items():
            if not series.is_routed or len(series.granularities) != 5:
                continue
            levels = [str(series.granularities[index]) for index in statement.levels]
            shares = []
            for benchmark in statement.benchmarks:
                measured = results[benchmark].result.routing.levels if benchmark in results else {}
                if measured:
                    share = sum(measured.get(level, 0.0) for level in levels)
                    shares.append(f"{BENCHMARKS[benchmark].title} {share:.0%}")
            if shares:
                text = f"at {' or '.join(levels)} tokens: {', '.join(shares)}"
                rows.append(Row((statement.statement, *series.labels, text), ()))
    if not rows:
        return None
    labels = ("the paper", *LABELS, "measured share of images")
    return Table("routing", "Where images are sent (figure 5 of the paper)", labels, (), tuple(rows))


def results_table(grouped: SeriesResults) -> Table:
    """Every result with its questions, weights, harness and machine."""
    rows = []
    for series, results in grouped.items():
        for benchmark, entry in results.items():
            result = entry.result
            whole = BENCHMARKS[benchmark].num_questions
            partial = result.dataset.num_questions != whole
            machine = [str(result.machine[key]) for key in ("processor", "GPU") if result.machine.get(key)]
            labels = (
                BENCHMARKS[benchmark].title,
                *series.labels,
                f"{result.dataset.num_questions:,}{f' of {whole:,}' if partial else ''}"
                f"{'' if result.complete else ', unfinished'}",
                f"{result.num_failed:,}",
                result.dataset.split,
                f"{result.harness.name} {result.harness.version}",
                f"{result.model.dtype}, {result.model.fingerprint[:8]}",
                ", ".join(machine),
                entry.path.name,
            )
            rows.append(Row(labels, ()))
    heads = ("questions", "failed", "split", "harness", "weights", "machine", "file")
    return Table("results", "Results", ("benchmark", *LABELS, *heads), (), tuple(rows))


def comparison_table(grouped: SeriesResults, against: SeriesResults) -> Table:
    """Paired tests against another run, for each benchmark and protocol that both have.

    Raises:
        ResultError: They have none in common, `against` holds one twice, or two results have no question in common.
    """
    others: dict[tuple[str, str], tuple[Series, Measured]] = {}
    for series, results in against.items():
        for benchmark, entry in results.items():
            known = others.setdefault((benchmark, series.protocol), (series, entry))
            if known[1] is not entry:
                raise ResultError(
                    f"--against names {benchmark} ({series.protocol}) twice: {known[1].path} and {entry.path}; "
                    "name one of them"
                )
    rows = []
    for series, results in grouped.items():
        for benchmark, entry in results.items():
            if (benchmark, series.protocol) not in others:
                continue
            other_series, other = others[benchmark, series.protocol]
            if other.path.resolve() != entry.path.resolve():  # a run does not differ from itself
                rows += _tests(entry, other, (*series.labels[:2], *other_series.labels[:2], series.protocol))
    if not rows:
        raise ResultError(
            "nothing can be compared: no benchmark and protocol is both among the results and in --against "
            f"({', '.join(f'{benchmark} ({protocol})' for benchmark, protocol in others)})"
        )
    return Table(
        name="tests",
        title="Paired tests",
        labels=("benchmark", "model", "level chosen by", "against", "level chosen by", "protocol"),
        columns=("difference", "p value", "units"),
        rows=tuple(rows),
        notes=(
            "Differences are in points of the tables, with 95% intervals (paired percentile bootstrap). p values are "
            f"two-sided, from approximate randomisation with {NUM_RESAMPLES:,} draws (Noreen, 1989), and not corrected "
            "for the number of tests. Units are questions, base questions (MMBench) or image pairs (MME) that both "
            "runs have.",
        ),
    )


def _tests(entry: Measured, other: Measured, labels: tuple[str, ...]) -> list[Row]:
    """One row per metric that the tables show of the benchmark."""
    result = entry.result
    shown = {column.metric for column in score_columns() if column.benchmark == result.benchmark}
    shown = shown or set(result.metrics)  # no table of the paper has the benchmark
    rows = []
    for name, metric in result.metrics.items():
        second = other.result.metrics.get(name)
        if name not in shown or second is None:
            continue
        try:
            test = paired_test(metric.kind, metric.units, second.units)
        except UnitError as error:
            raise ResultError(f"{entry.path} and {other.path}: metrics.{name}: {error}") from error
        points = [
            f"{in_table_units(metric, value):+.1f}".replace("-", "−")
            for value in (test.difference, test.low, test.high)
        ]
        smallest = 1 / (1 + NUM_RESAMPLES)
        p_value = f"{test.p_value:.4f}" if test.p_value > smallest else f"<{1.0001 / NUM_RESAMPLES:.4f}"
        left_out = f" ({test.num_left_out:,} left out)" if test.num_left_out else ""
        cells = (Cell(points[0], (points[1], points[2])), Cell(p_value), Cell(f"{test.num_units:,}{left_out}"))
        rows.append(Row((f"{BENCHMARKS[result.benchmark].title}, {metric.label}", *labels), cells))
    return rows
