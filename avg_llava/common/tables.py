"""Tables of plain text for a terminal."""

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

MAX_WIDTH = 1000  # wider than any table, so that no cell is wrapped


def render_table(columns: Sequence[str], rows: Iterable[Sequence[str]], num_left: int = 1) -> str:
    """Renders a table as lines without colours, markup or trailing spaces.

    Args:
        columns: Column headings; no rule is drawn where all are empty.
        rows: Formatted cells, as many per row as there are columns.
        num_left: Number of leading columns that are left-aligned; the others are right-aligned.

    Raises:
        ValueError: A row has another number of cells.
    """
    has_heading = any(columns)
    table = Table(
        box=box.SIMPLE_HEAD if has_heading else None, pad_edge=False, show_edge=False, show_header=has_heading
    )
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index < num_left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for _, cell in zip(columns, row, strict=True)))
    output = io.StringIO()
    Console(file=output, width=MAX_WIDTH, color_system=None, force_terminal=False).print(table)
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)
