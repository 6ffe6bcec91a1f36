"""Tables as Markdown, LaTeX and HTML, and self-contained HTML pages, by the templates in `templates/`."""

import base64
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

_LATEX = str.maketrans(
    {
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
)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a number with its unit and marks, and its confidence interval.

    Attributes:
        style: CSS class in HTML: `held`, `failed` or none.
    """

    text: str
    interval: tuple[str, str] | None = None
    style: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table: labels, then one cell per column, None for a missing number.

    Attributes:
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
        media_type, _ = mimetypes.guess_type(self.name)
        return f"data:{media_type};base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Note:
    """A paragraph in small type."""

    template: ClassVar[str] = "note.html.j2"

    text: str | Markup


Block = Table | Picture | Note


@dataclass(frozen=True)
class Section:
    """A section of a page; one without blocks is left out. The heading is of level 2 or 3."""

    title: str
    blocks: Sequence[Block]
    level: int = 2


def to_markdown(table: Table) -> str:
    """Renders a table in Markdown; published rows are italic."""
    return _ENVIRONMENT.get_template("table.md.j2").render(block=table)


def to_latex(table: Table) -> str:
    """Renders a table in LaTeX with booktabs; published rows are italic, intervals are in tiny type."""
    return _LATEX_ENVIRONMENT.get_template("table.tex.j2").render(block=table)


def render_page(title: str, lead: str | Markup, sections: Sequence[Section]) -> str:
    """Renders an HTML page that needs no other file; `lead` is the paragraph below the title."""
    return _ENVIRONMENT.get_template("page.html.j2").render(title=title, lead=lead, sections=sections)


def escape_latex(text: str) -> str:
    """Escapes the characters that LaTeX reads as commands."""
    return text.translate(_LATEX)


def _escape_markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_ENVIRONMENT = Environment(
    loader=PackageLoader("avg_llava.reports"),
    autoescape=select_autoescape(["html.j2"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals["ABSENT"] = "–"
_ENVIRONMENT.filters |= {"latex": escape_latex, "markdown": _escape_markdown}
_LATEX_ENVIRONMENT = _ENVIRONMENT.overlay(
    block_start_string="<%",
    block_end_string="%>",
    variable_start_string="<<",
    variable_end_string=">>",
    comment_start_string="<#",
    comment_end_string="#>",
    keep_trailing_newline=True,
)
