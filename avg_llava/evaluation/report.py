"""Turns a report (see `avg_llava.mini`) into figures and one self-contained page."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avg_llava.evaluation import figures

Report = Mapping[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: #53606e; margin-top: .3rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e3e7ec; text-align: right; }
th { border-bottom: 2px solid #c3cad3; } th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; } tr.chosen { background: #fff4dd; } .wide { overflow-x: auto; }
.held { color: #1a7f4b; font-weight: 600; } .failed { color: #b3261e; font-weight: 600; }
img { max-width: 100%; display: block; margin: .6rem 0; }
"""


def table_lines(report: Report) -> list[str]:
    """The rows as lines of plain text, for a terminal."""
    kinds = _kinds(report)
    head = f"{'':<22}{'accuracy':>9}{'tokens':>9}" + "".join(f"{kind:>9}" for kind in kinds)
    lines = [head, "-" * len(head)]
    for row in report["rows"]:
        cells = "".join(f"{row['kinds'][kind]:>9.1%}" for kind in kinds)
        lines.append(f"{row['name']:<22}{row['accuracy']:>9.1%}{row['mean_visual_tokens']:>9.1f}{cells}")
    lines.append("")
    for claim in report["claims"]:
        lines.append(f"{'held  ' if claim['held'] else 'FAILED'}  {claim['text']}: {claim['measured']}")
    return lines


def write_report(report: Report, histories: Mapping[str, Sequence[Mapping[str, Any]]], output: Path) -> None:
    """Writes `report.json`, the figures as PNG and `index.html` (which holds the figures) to a folder.

    Args:
        report: What was measured: `rows`, `families`, `claims`, `token_cost`, `granularities`, `stages`, `machine`.
        histories: Stage name -> the lines of its `log_history.jsonl`.
        output: The folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    drawn = {
        "accuracy.png": figures.draw_accuracy(report),
        "families.png": figures.draw_families(report),
        "routing.png": figures.draw_routing(report),
    }
    if any(histories.values()):
        drawn["loss.png"] = figures.draw_losses(histories)
    for name, png in drawn.items():
        (output / name).write_bytes(png)
    (output / "index.html").write_text(_page(report, drawn), encoding="utf-8")
    # Written last: whoever finds it finds the rest.
    partial = output / "report.json.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.replace(output / "report.json")


def _kinds(report: Report) -> list[str]:
    return list(report["rows"][0]["kinds"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], chosen: int | None = None, text: int = 1) -> str:
    """An HTML table from escaped cells; the first `text` columns are set left."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if index < text else ''}>{cell}</{tag}>" for index, cell in enumerate(row)
        )

    body = "".join(
        f"<tr{' class=chosen' if index == chosen else ''}>{cells('td', row)}</tr>\n" for index, row in enumerate(rows)
    )
    return f"<div class=wide><table>\n<tr>{cells('th', head)}</tr>\n{body}</table></div>\n"


def _claims(report: Report) -> str:
    rows = [
        [
            html.escape(claim["text"]),
            html.escape(claim["measured"]),
            "<span class=held>held</span>" if claim["held"] else "<span class=failed>failed</span>",
        ]
        for claim in report["claims"]
    ]
    return _table(["claim", "measured", ""], rows, text=1)


def _rows(report: Report) -> str:
    kinds = _kinds(report)
    chosen = None
    cells = []
    for index, row in enumerate(report["rows"]):
        if row["token_cost"] == report["token_cost"]:
            chosen = index
        cost = "" if row["token_cost"] is None else f"{row['token_cost']:g}"
        numbers = [f"{row['accuracy']:.1%}", f"{row['mean_visual_tokens']:.1f}", cost]
        cells.append([html.escape(row["name"]), *numbers, *(f"{row['kinds'][kind]:.1%}" for kind in kinds)])
    return _table(["", "accuracy", "visual tokens", "token cost", *kinds], cells, chosen)


def _families(report: Report) -> str:
    names = [
        row["name"] for row in report["rows"] if "@" not in row["name"] or row["token_cost"] == report["token_cost"]
    ]
    rows = {row["name"]: row for row in report["rows"]}
    body = [
        [html.escape(family), kind, *(f"{rows[name]['families'][family]:.0%}" for name in names)]
        for family, kind in report["families"].items()
    ]
    return _table(["question family", "needs", *map(html.escape, names)], body, text=2)


def _facts(facts: Mapping[str, Any]) -> str:
    return _table(["", ""], [[html.escape(str(key)), html.escape(str(value))] for key, value in facts.items()], text=2)


def _stages(report: Report) -> str:
    head = list(dict.fromkeys(key for stage in report["stages"] for key in stage))
    rows = [[html.escape(str(stage.get(key, ""))) for key in head] for stage in report["stages"]]
    return _table(head, rows)


def _page(report: Report, drawn: Mapping[str, bytes]) -> str:
    def picture(name: str, alt: str) -> str:
        if name not in drawn:
            return ""
        return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(drawn[name]).decode()}">\n'

    cost = f"{report['token_cost']:g}"
    sections = [
        ("Claims", _claims(report)),
        ("Accuracy against visual tokens", picture("accuracy.png", "accuracy against visual tokens") + _rows(report)),
        ("Question families", picture("families.png", "accuracy per question family") + _families(report)),
        ("Where the router sends questions", picture("routing.png", "share of levels per question family")),
        ("Training", picture("loss.png", "loss of the four stages") + _stages(report)),
        ("Machine and settings", _facts(report["machine"])),
    ]
    body = "".join(f"<h2>{title}</h2>\n{content}" for title, content in sections if content)
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>\n"
        "<meta name=viewport content='width=device-width'><title>AVG-LLaVA in the mini world</title>\n"
        f"<style>{_STYLE}</style>\n<h1>AVG-LLaVA in the mini world</h1>\n"
        f"<p class=lead>{report['num_questions']:,} held-out questions, greedy answers, exact match. The router is "
        f"judged at a token cost of {cost} nats per doubling of visual tokens (marked row; "
        f"{html.escape(report['token_cost_choice'])}). Chance is taken in expectation: <i>random</i> picks every level "
        "equally often, <i>random@router-tokens</i> spends the router's mean number of tokens blindly. "
        f"{report['num_verified']} answers of the judged row were generated anew with the router in the loop and are "
        "the same.</p>\n"
        f"{body}</html>\n"
    )
