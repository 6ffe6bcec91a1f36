"""Tables as Markdown, LaTeX and HTML, and self-contained HTML pages.

HTML is made by the templates in `templates/`.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

ABSENT = "–"

_MEDIA_TYPES = {"png": "image/png", "svg": "image/svg+xml"}
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


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: A number with its unit and marks.
        interval: Lower and upper end of its confidence interval; None if it has none.
        style: CSS class in HTML: `held`, `failed` or none.
    """

    text: str
    interval: tuple[str, str] | None = None
    style: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table: labels, then one cell per column, None for a missing number.

    Attributes:
        labels: Text cells.
        cells: Other cells.
        published: The row is published, not measured; set in italics.
        marked: The row has a coloured background in HTML.
    """

    labels: tuple[str, ...]
    cells: tuple[Cell | None, ...] = ()
    published: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: Stem of its files, such as `table1`.
        title: Its caption.
        labels: Headings of the label columns, which are left-aligned.
        columns: Headings of the other columns, which are right-aligned.
        rows: Published rows first.
        notes: Sentences below the table.
    """

    template: ClassVar[str] = "table.html.j2"

    name: str
    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """An image that is embedded in a page; the suffix of its name gives its media type."""

    template: ClassVar[str] = "picture.html.j2"

    name: str
    content: bytes
    alternative: str
    """Text for readers who cannot see the image."""

    @property
    def address(self) -> str:
        """The image as a `data:` address."""
        media_type = _MEDIA_TYPES[self.name.rsplit(".", 1)[1]]
        return f"data:{media_type};base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Note:
    """A paragraph in small type."""

    template: ClassVar[str] = "note.html.j2"

    text: str | Markup


Block = Table | Picture | Note


@dataclass(frozen=True)
class Section:
    """A section of a page; one without blocks is left out.

    Attributes:
        title: Its heading.
        blocks: Its content, in order.
        level: Level of the heading, 2 or 3.
    """

    title: str
    blocks: Sequence[Block]
    level: int = 2


def to_markdown(table: Table) -> str:
    """Renders a table in Markdown; published rows are italic."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def text(content: str, row: Row) -> str:
        escaped = content.replace("|", "\\|").replace("\n", " ")
        return f"*{escaped}*" if row.published and content not in ("", ABSENT) else escaped

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
        lines.append(line([text(content, row) for content in (*row.labels, *cells)]))
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)]) + "\n"


def to_latex(table: Table) -> str:
    """Renders a table in LaTeX with booktabs; published rows are italic, intervals are in tiny type."""

    def number(cell: Cell | None) -> str:
        if cell is None:
            return "--"
        if cell.interval is None:
            return escape_latex(cell.text)
        low, high = map(escape_latex, cell.interval)
        return f"{escape_latex(cell.text)}\\,{{\\tiny[{low}, {high}]}}"

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
        cells = [*map(escape_latex, row.labels), *map(number, row.cells)]
        lines.append(line([f"\\textit{{{cell}}}" if row.published and cell else cell for cell in cells]))
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if table.notes:
        lines += [r"\par\smallskip\footnotesize\raggedright", *map(escape_latex, table.notes)]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def to_html(table: Table) -> str:
    """Renders a table and its notes in HTML; published rows have the class `published`."""
    return _ENVIRONMENT.get_template(table.template).render(block=table)


def render_page(title: str, lead: str | Markup, sections: Sequence[Section]) -> str:
    """Renders an HTML page that needs no other file.

    Args:
        title: Title and heading.
        lead: Paragraph below the heading.
        sections: Content.
    """
    return _ENVIRONMENT.get_template("page.html.j2").render(title=title, lead=lead, sections=sections)


def escape_latex(text: str) -> str:
    """Escapes the characters that LaTeX reads as commands."""
    return "".join(_LATEX.get(character, character) for character in text)


_ENVIRONMENT = Environment(
    loader=PackageLoader("avg_llava.reports"),
    autoescape=select_autoescape(["html.j2"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals["ABSENT"] = ABSENT
