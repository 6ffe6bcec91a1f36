"""Tables in three formats: published rows are marked, special characters are escaped."""

import re
from html.parser import HTMLParser

import pytest
from markupsafe import Markup

from avg_llava.reports.rendering import (
    Cell,
    Note,
    Picture,
    Row,
    Section,
    Table,
    escape_latex,
    render_page,
    to_latex,
    to_markdown,
)

TABLE = Table(
    "table9",
    "50% of A & B",
    ("model", "level"),
    ("F_1", "B|C"),
    (
        Row(("Old_1", ""), (Cell("62.0"), None), published=True),
        Row(("<new>", "router"), (Cell("63.0†", ("61.5", "64.5")), Cell("1.20×"))),
    ),
    ("A note: 5% < 6%.",),
)


def to_html(table):
    return render_page("", "", [Section("", [table])])


class Texts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.classes = [], []

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
            self.classes.append(dict(attributes).get("class"))
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data


def test_markdown():
    assert to_markdown(TABLE).splitlines() == [
        "**50% of A & B**",
        "",
        "| model | level | F_1 | B\\|C |",
        "| --- | --- | --: | --: |",
        "| *Old_1* |  | *62.0* | – |",
        "| <new> | router | 63.0† [61.5, 64.5] | 1.20× |",
        "",
        "A note: 5% < 6%.",
    ]


def test_html():
    parser = Texts()
    parser.feed(to_html(TABLE))
    assert parser.rows[:2] == [["model", "level", "F_1", "B|C"], ["Old_1", "", "62.0", "–"]]
    assert parser.rows[2][:3] == ["<new>", "router", "63.0†61.5 to 64.5"]
    assert parser.classes == [None, "published", "first"]
    assert "5% &lt; 6%" in to_html(TABLE)


def test_latex():
    lines = to_latex(TABLE).splitlines()
    assert r"\begin{tabular}{llrr}" in lines
    assert r"\textit{Old\_1} &  & \textit{62.0} & \textit{--} \\" in lines
    assert r"\textless{}new\textgreater{} & router & 63.0$^\dagger$\,{\tiny[61.5, 64.5]} & 1.20$\times$ \\" in lines
    assert r"\caption{50\% of A \& B.}" in lines
    # Published and measured rows are parted by a rule; every row has as many cells as the head.
    rules = [line for line in lines if line in (r"\toprule", r"\midrule", r"\bottomrule")]
    assert rules == [r"\toprule", r"\midrule", r"\midrule", r"\bottomrule"]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines if line.endswith(r"\\")} == {3}
    text = re.sub(r"\\[{}]", "", to_latex(TABLE))
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize("sign", ["&", "%", "$", "#", "_", "{", "}"])
def test_latex_signs_are_escaped(sign):
    assert escape_latex(f"a{sign}") == f"a\\{sign}"


def test_latex_backslash_is_text():
    assert escape_latex("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"


def test_cells_of_a_style_and_marked_rows():
    html = to_html(Table("", "", ("claim",), ("",), (Row(("a",), (Cell("held", style="held"),), marked=True),)))
    assert '<tr class="chosen">' in html
    assert '<td class="held">held</td>' in html


def test_pages_need_no_other_file():
    sections = [
        Section("One & two", [Picture("a.svg", b"<svg/>", 'say "x"'), Note(Markup("<i>a</i> {}").format("<b>"))]),
        Section("three", [Note("1 < 2")], level=3),
        Section("empty", []),
    ]
    content = render_page("A <b>", "lead <i>", sections)
    assert "<title>A &lt;b&gt;</title>" in content
    assert "lead &lt;i&gt;" in content
    assert "<h2>One &amp; two</h2>" in content
    assert "<h3>three</h3>" in content
    assert "<i>a</i> &lt;b&gt;</p>" in content
    assert "1 &lt; 2" in content
    assert "empty" not in content
    assert 'alt="say &#34;x&#34;" src="data:image/svg+xml;base64,PHN2Zy8+"' in content
    assert "http" not in content
