"""Plain-text tables: alignment, and cells that are shown as they are."""

import pytest

from avg_llava.common.tables import render_table


def test_columns_are_aligned():
    lines = render_table(["name", "tokens", "share"], [["router", "36", "6.3%"], ["a longer name", "2880", "–"]])
    heading, rule, *rows = lines.splitlines()
    assert set(rule.strip()) == {"─"}
    assert [row.split() for row in rows] == [["router", "36", "6.3%"], ["a", "longer", "name", "2880", "–"]]
    assert len({len(line) for line in (heading, *rows)}) == 1
    assert heading.startswith("name ")
    assert heading.endswith(" share")


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "[1.0, 2.0]", "a" * 300, ":smile:"])
def test_cells_are_shown_as_they_are(text):
    assert text in render_table(["name", "value"], [["x", text]])


def test_without_headings_there_is_no_rule():
    assert render_table(["", ""], [["a", "1"], ["b", "22"]]).splitlines() == ["a   1", "b  22"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        render_table(["a", "b"], [["1"]])
