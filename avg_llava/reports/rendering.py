"""Tables as Markdown, HTML and LaTeX, and self-contained HTML pages."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: #53606e; margin-top: .3rem; } p.note { color: #53606e; font-size: .85rem; margin: .25rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e3e7ec; text-align: right; }
th { border-bottom: 2px solid #c3cad3; } th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; } tr.chosen { background: #fff4dd; } .wide { overflow-x: auto; }
tr.published td { color: #66727f; font-style: italic; } tr.first td { border-top: 2px solid #c3cad3; }
.interval { display: block; font-size: .75em; color: #66727f; white-space: nowrap; }
.held { color: #1a7f4b; font-weight: 600; } .failed { color: #b3261e; font-weight: 600; }
img { max-width: 100%; display: block; margin: .6rem 0; }
"""

_TYPES = {"png": "image/png", "svg": "image/svg+xml"}
_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "†": r"$^\dagger$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "−": r"$-$",
    "–": "--",
}
ABSENT = "–"


@dataclass(frozen=True)
class Cell:
    """A figure in a table.

    Attributes:
        text: The figure, with its unit and marks.
        interval: Lower and upper end of its confidence interval; None where it has none.
    """

    text: str
    interval: tuple[str, str] | None = None


@dataclass(frozen=True)
class Row:
    """A row: labels, then one cell per column, None where there is no figure."""

    labels: tuple[str, ...]
    cells: tuple[Cell | None, ...]
    published: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: Of its files, such as `table1`.
        title: What it shows.
        labels: Heads of the label columns.
        columns: Heads of the other columns.
        rows: Published rows first.
        notes: Sentences below the table.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def to_markdown(table: Table) -> str:
    """The table in Markdown; published rows are italic."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def mark(text: str, row: Row) -> str:
        escaped = text.replace("|", "\\|").replace("\n", " ")
        return f"*{escaped}*" if row.published and text not in ("", ABSENT) else escaped

    lines = [
        f"**{table.title}**",
        "",
        line([name.replace("|", "\\|") for name in (*table.labels, *table.columns)]),
        line(["---"] * len(table.labels) + ["--:"] * len(table.columns)),
    ]
    for row in table.rows:
        cells = [
            ABSENT if cell is None else cell.text + (f" [{', '.join(cell.interval)}]" if cell.interval else "")
            for cell in row.cells
        ]
        lines.append(line([mark(text, row) for text in (*row.labels, *cells)]))
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)]) + "\n"


def to_html(table: Table) -> str:
    """The table and its notes in HTML; published rows have a class of their own."""

    def cell(content: Cell | None) -> str:
        if content is None:
            return ABSENT
        ends = "" if content.interval is None else f"<span class=interval>{' to '.join(content.interval)}</span>"
        return html.escape(content.text) + ends

    rows = [[*map(html.escape, row.labels), *map(cell, row.cells)] for row in table.rows]
    classes = []
    for index, row in enumerate(table.rows):
        is_first_measured = index > 0 and table.rows[index - 1].published and not row.published
        classes.append("published" if row.published else "first" if is_first_measured else "")
    head = [html.escape(name) for name in (*table.labels, *table.columns)]
    notes = "".join(f"<p class=note>{html.escape(note)}</p>\n" for note in table.notes)
    return html_table(head, rows, classes, len(table.labels)) + notes


def to_latex(table: Table) -> str:
    """The table in LaTeX with booktabs; published rows are italic, intervals are small figures."""

    def cell(content: Cell | None) -> str:
        if content is None:
            return "--"
        if content.interval is None:
            return escape_latex(content.text)
        low, high = map(escape_latex, content.interval)
        return f"{escape_latex(content.text)}\\,{{\\tiny[{low}, {high}]}}"

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    lines = [
        "% needs \\usepackage{booktabs} and \\usepackage{graphicx}",
        r"\begin{table*}[t]",
        r"\centering",
        f"\\caption{{{escape_latex(table.title)}.}}",
        f"\\label{{tab:avg-llava-{table.name}}}",
        r"\resizebox{\linewidth}{!}{%",
        f"\\begin{{tabular}}{{{'l' * len(table.labels)}{'r' * len(table.columns)}}}",
        r"\toprule",
        line([escape_latex(name) for name in (*table.labels, *table.columns)]),
        r"\midrule",
    ]
    for index, row in enumerate(table.rows):
        if index and table.rows[index - 1].published and not row.published:
            lines.append(r"\midrule")
        cells = [*map(escape_latex, row.labels), *map(cell, row.cells)]
        lines.append(line([f"\\textit{{{text}}}" if row.published and text else text for text in cells]))
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if table.notes:
        lines += [r"\par\smallskip\footnotesize\raggedright", *map(escape_latex, table.notes)]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def escape_latex(text: str) -> str:
    """Text in which no character commands LaTeX."""
    return "".join(_LATEX.get(character, character) for character in text)


def html_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] | None = None, num_text: int = 1
) -> str:
    """An HTML table from escaped cells.

    Args:
        head: Heads of the columns.
        rows: The cells.
        classes: CSS class of each row, empty for none.
        num_text: The first so many columns are set left.
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if index < num_text else ''}>{cell}</{tag}>" for index, cell in enumerate(row)
        )

    body = "".join(
        f"<tr{f' class={name}' if name else ''}>{cells('td', row)}</tr>\n"
        for name, row in zip(classes or [""] * len(rows), rows, strict=True)
    )
    return f"<div class=wide><table>\n<tr>{cells('th', head)}</tr>\n{body}</table></div>\n"


def picture(name: str, content: bytes, alternative: str) -> str:
    """An image that lies within the page; its type follows from the file's name."""
    media_type = _TYPES[name.rsplit(".", 1)[1]]
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:{media_type};base64,{data}">\n'


def page(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """A page that needs no other file.

    Args:
        title: Its title, as plain text.
        lead: A paragraph below it, as HTML.
        sections: Head of each section, as plain text -> its HTML; an empty one is left out.
    """
    body = "".join(f"<h2>{html.escape(head)}</h2>\n{content}" for head, content in sections.items() if content)
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>\n"
        f"<meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>\n"
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n<p class=lead>{lead}</p>\n{body}</html>\n"
    )
