"""`avg-llava report`: the paper's tables and figures from result files, as Markdown, LaTeX, images and an HTML page."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from avg_llava.common.files import write_bytes
from avg_llava.evaluation.published import load_published, score_columns
from avg_llava.evaluation.results import ResultError, parse_result, read_json
from avg_llava.reports import mini, tables
from avg_llava.reports.figures import FileType, draw_figures, encode_figure
from avg_llava.reports.rendering import Block, Note, Picture, Section, Table, render_page, to_latex, to_markdown
from avg_llava.reports.series import Measured, SeriesResults, group

TITLE = "AVG-LLaVA: measured and published"
FILE_TYPES: tuple[FileType, ...] = ("png", "svg")
FIGURE_TITLES = {
    "routing": "Where images are sent",
    "time": "Score against time",
    "tokens": "Score against visual tokens",
    "token_cost": "The router at rising prices",
}


@dataclass(frozen=True)
class PaperReport:
    """A report on disk."""

    tables: list[Table]
    mini_reports: dict[Path, mini.Report]
    """The mini world's reports among the inputs."""
    files: list[Path]
    """`index.html` first."""

    def to_text(self) -> str:
        """The tables in Markdown."""
        parts = [to_markdown(table) for table in self.tables]
        for path, report in self.mini_reports.items():
            parts.append("\n".join([f"**Mini world** ({path})", "", "```", *mini.table_lines(report), "```", ""]))
        return "\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The tables as JSON values."""
        return {
            "tables": [dataclasses.asdict(table) for table in self.tables],
            "mini": {str(path): report["rows"] for path, report in self.mini_reports.items()},
            "files": list(map(str, self.files)),
        }


def write_paper_report(paths: Sequence[Path], against: Sequence[Path], output: Path) -> PaperReport:
    """Writes tables, figures and `index.html` to the folder `output`.

    Args:
        paths: Result files of `avg-llava evaluate`, or `report.json` files of the mini world.
        against: Result files of another run for paired tests; may be empty.

    Raises:
        ResultError: A file is neither, two files hold the same series of a benchmark, or `against` has nothing in
            common with `paths`.
    """
    measured, mini_reports = read_inputs(paths)
    grouped = group(measured)
    made = make_tables(grouped)
    if against:
        others, other_reports = read_inputs(against)
        if other_reports:
            raise ResultError(f"{next(iter(other_reports))} holds no scores of single questions to compare with")
        made.insert(-1, tables.comparison_table(grouped, group(others)))  # before the list of results
    output.mkdir(parents=True, exist_ok=True)
    files = [output / "index.html"]

    def save(name: str, content: bytes) -> None:
        files.append(output / name)
        write_bytes(files[-1], content)

    def save_figure(name: str, figure: Figure) -> bytes:
        """Writes a figure in all file types; returns its SVG, which the page embeds."""
        content = {file_type: encode_figure(figure, file_type) for file_type in FILE_TYPES}
        for file_type, encoded in content.items():
            save(f"{name}.{file_type}", encoded)
        return content["svg"]

    for table in made:
        save(f"{table.name}.md", to_markdown(table).encode())
        save(f"{table.name}.tex", to_latex(table).encode())
    below_figures = {table.name: table for table in made if table.name in ("routing", "results")}
    sections = [Section(table.title, [table]) for table in made if table.name not in below_figures]
    for name, figure in draw_figures(grouped).items():
        blocks: list[Block] = [Picture(f"{name}.svg", save_figure(name, figure), FIGURE_TITLES[name])]
        if name in below_figures:
            blocks.append(below_figures.pop(name))
        sections.append(Section(FIGURE_TITLES[name], blocks))
    sections += [Section(table.title, [table]) for table in below_figures.values()]
    for number, (path, report) in enumerate(mini_reports.items(), start=1):
        suffix = "" if len(mini_reports) == 1 else str(number)
        images = {
            f"{name}.svg": save_figure(f"mini{suffix}-{name}", figure) for name, figure in mini.draw(report).items()
        }
        about = Markup("{path}. {lead}").format(path=path, lead=mini.lead(report))
        sections.append(Section(f"Mini world {suffix}".rstrip(), [Note(about)]))
        sections += mini.sections(report, images, level=3)
    write_bytes(files[0], render_page(TITLE, _lead(len(measured), len(mini_reports)), sections).encode())
    return PaperReport(made, mini_reports, files)


def read_inputs(paths: Sequence[Path]) -> tuple[list[Measured], dict[Path, mini.Report]]:
    """Reads result files, and the mini world's reports by file.

    Raises:
        ResultError: A file is neither, or named twice.
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
    return measured, mini_reports


def make_tables(grouped: SeriesResults) -> list[Table]:
    """Makes all tables for which there are results."""
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
    return list(filter(None, made))


def _lead(num_results: int, num_reports: int) -> str:
    counted = [f"{num_results} result{'s' * (num_results > 1)}"] if num_results else []
    if num_reports:
        counted.append(f"{num_reports} report{'s' * (num_reports > 1)} of the mini world")
    published = (
        f" Rows in italics are published figures ({load_published().source}); all others were measured."
        if num_results
        else ""
    )
    return f"Made from {' and '.join(counted)}.{published}"
