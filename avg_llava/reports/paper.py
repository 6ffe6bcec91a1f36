"""`avg-llava report`: the paper's tables and figures from result files, as Markdown, LaTeX, images and one page."""

import dataclasses
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avg_llava.evaluation.published import load_published, score_columns
from avg_llava.evaluation.results import ResultError, parse_result, read_json
from avg_llava.reports import mini, tables
from avg_llava.reports.figures import draw_charts
from avg_llava.reports.mini_figures import FileType, encode
from avg_llava.reports.rendering import Table, page, picture, to_html, to_latex, to_markdown
from avg_llava.reports.series import Measured, SeriesResults, group

TITLE = "AVG-LLaVA: measured and published"
FILE_TYPES: tuple[FileType, ...] = ("png", "svg")
CHARTS = {
    "routing": "Where images are sent",
    "time": "Score against time",
    "tokens": "Score against visual tokens",
    "token_cost": "The router at rising prices",
}


@dataclass(frozen=True)
class Inputs:
    """What a report is made from: results of benchmarks, and reports of the mini world by file."""

    measured: list[Measured]
    mini_reports: dict[Path, mini.Report]


@dataclass(frozen=True)
class PaperReport:
    """A report that was written.

    Attributes:
        tables: The tables of results and comparisons.
        mini_reports: The mini world's reports among the inputs, by file.
        files: What was written, `index.html` first.
    """

    tables: list[Table]
    mini_reports: dict[Path, mini.Report]
    files: list[Path]

    def as_text(self) -> str:
        """The tables in Markdown."""
        parts = [to_markdown(table) for table in self.tables]
        for path, report in self.mini_reports.items():
            parts.append("\n".join([f"**Mini world** ({path})", "", "```", *mini.table_lines(report), "```", ""]))
        return "\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "tables": [dataclasses.asdict(table) for table in self.tables],
            "mini": {str(path): report["rows"] for path, report in self.mini_reports.items()},
            "files": list(map(str, self.files)),
        }


def write_paper_report(paths: Sequence[Path], against: Sequence[Path], output: Path) -> PaperReport:
    """Writes tables, figures and `index.html` to a folder.

    Args:
        paths: Result files of `avg-llava evaluate`, or `report.json` files of the mini world.
        against: Result files of another run, for paired tests; may be empty.
        output: The folder.

    Raises:
        ResultError: If a file is none of these, two hold the same, or nothing can be compared with `against`.
    """
    inputs = read_inputs(paths)
    grouped = group(inputs.measured)
    made = make_tables(grouped)
    if against:
        others = read_inputs(against)
        if others.mini_reports:
            raise ResultError(f"{next(iter(others.mini_reports))} holds no scores of single questions to compare with")
        made.insert(-1, tables.comparison_table(grouped, group(others.measured)))  # before the list of results
    output.mkdir(parents=True, exist_ok=True)
    files = [output / "index.html"]

    def save(name: str, content: bytes) -> bytes:
        files.append(output / name)
        files[-1].write_bytes(content)
        return content

    for table in made:
        save(f"{table.name}.md", to_markdown(table).encode())
        save(f"{table.name}.tex", to_latex(table).encode())
    sections = {table.title: to_html(table) for table in made if table.name not in ("routing", "results")}
    later = {table.name: table for table in made if table.name in ("routing", "results")}
    for name, figure in draw_charts(grouped).items():
        drawn = {file_type: save(f"{name}.{file_type}", encode(figure, file_type)) for file_type in FILE_TYPES}
        below = to_html(later.pop(name)) if name in later else ""
        sections[CHARTS[name]] = picture(f"{name}.svg", drawn["svg"], CHARTS[name]) + below
    sections |= {table.title: to_html(table) for table in later.values()}
    for number, (path, report) in enumerate(inputs.mini_reports.items(), start=1):
        prefix = "mini" if len(inputs.mini_reports) == 1 else f"mini{number}"
        pictures = {}
        for name, figure in mini.draw(report).items():
            for file_type in FILE_TYPES:
                file_name = f"{name}.{file_type}"
                pictures[file_name] = save(f"{prefix}-{file_name}", encode(figure, file_type))
        shown = {name: content for name, content in pictures.items() if name.endswith(".svg")}
        about = f"<p class=note>{html.escape(str(path))}. {mini.lead(report)}</p>\n"
        parts = mini.sections(report, shown)
        sections[f"Mini world{'' if prefix == 'mini' else f' {number}'}"] = about + "".join(
            f"<h3>{head}</h3>\n{content}" for head, content in parts.items() if content
        )
    files[0].write_text(page(TITLE, _lead(inputs), sections), encoding="utf-8")
    return PaperReport(made, inputs.mini_reports, files)


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Reads result files and the mini world's reports.

    Raises:
        ResultError: If a file is neither, or named twice.
    """
    measured, mini_reports = [], {}
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ResultError(f"{path} is named twice")
        seen.add(path.resolve())
        content = read_json(path)
        if mini.is_report(content):
            mini_reports[path] = mini.check_report(content, str(path))
        else:
            result = parse_result(content, str(path))
            known = [column.metric for column in score_columns() if column.benchmark == result.benchmark]
            if known and not set(known) & set(result.metrics):
                raise ResultError(
                    f"{path}: metrics has none of {', '.join(known)}, which tables of {result.benchmark} show"
                )
            measured.append(Measured(path, result))
    return Inputs(measured, mini_reports)


def make_tables(grouped: SeriesResults) -> list[Table]:
    """All tables for which there are results."""
    made = [
        tables.score_table("1", grouped),
        tables.score_table("2", grouped),
        tables.other_scores_table(grouped),
        tables.efficiency_table(grouped),
        tables.ablation_table(grouped),
        tables.oracle_table(grouped),
        tables.routing_table(grouped),
        tables.results_table(grouped) if grouped else None,
    ]
    return [table for table in made if table is not None]


def _lead(inputs: Inputs) -> str:
    num_results, num_reports = len(inputs.measured), len(inputs.mini_reports)
    counted = [f"{num_results} result{'s' * (num_results > 1)}"] if num_results else []
    if num_reports:
        counted.append(f"{num_reports} report{'s' * (num_reports > 1)} of the mini world")
    marked = (
        f" Rows in italics are published figures ({html.escape(load_published().source)}); all others were measured."
        if num_results
        else ""
    )
    return f"Made from {' and '.join(counted)}.{marked}"
