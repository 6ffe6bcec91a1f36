"""What the page says about levels, as HTML: the router's bars, an answer's costs, a card for each level."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image

from avg_llava.inference.answers import Answer
from avg_llava.inference.budget import Budget
from avg_llava.model.anyres import kept_window, num_visual_tokens
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.router import level_values
from avg_llava.model.scaler import token_grid

STYLE = """
#level label { padding: 5px 9px; }
#stats .html-container, #router .html-container, #levels .html-container, #pictures .html-container { padding: 0; }
#examples td, #examples th { padding: 3px 12px; text-align: left; }
#examples td div { margin: 0; }
#examples img, #examples td .container { width: 34px; height: 34px; }
.avg-stats { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; }
.avg-stats > div, .avg-card { border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 8px 12px;
  background: var(--block-background-fill); }
.avg-name, .avg-note { font-size: 12.5px; line-height: 1.4; opacity: 0.7; }
.avg-figure { font-size: 22px; font-weight: 600; line-height: 1.3; }
.avg-bars { display: grid; grid-template-columns: max-content 1fr max-content max-content; gap: 5px 12px;
  align-items: center; font-size: 14px; }
.avg-track { background: var(--border-color-primary); border-radius: 4px; height: 16px; overflow: hidden; }
.avg-track > div { background: #94a3b8; height: 100%; }
.avg-track.avg-chosen > div { background: #ea580c; }
.avg-right { text-align: right; font-variant-numeric: tabular-nums; }
.avg-cards { display: grid; gap: 10px; }
.avg-card.avg-chosen { border: 2px solid #ea580c; padding: 7px 11px; }
.avg-card img { width: 100%; max-height: 200px; object-fit: contain; margin: 6px 0; }
.avg-card .avg-answer { font-weight: 600; overflow-wrap: anywhere; min-height: 1.5em; margin: 4px 0; }
.avg-line { display: flex; justify-content: space-between; font-size: 13px; font-variant-numeric: tabular-nums; }
.avg-badge { float: right; background: #ea580c; color: white; font-size: 11px; border-radius: 4px; padding: 1px 7px; }
"""
INVITATION = "<div class='avg-note'>Choose an image, or an example below; type a question; press Ask.</div>"
PICTURES = (
    "<div class='avg-note'>What the vision tower gets: the tiles, between orange lines, and the overview crop. Each "
    "cell is one visual token; striped ones are padding and dropped.</div>"
)


@dataclass(frozen=True)
class LevelRow:
    """What is known of one level before anything is answered at it.

    Attributes:
        granularity: Visual tokens per crop.
        grid: Its (rows, columns) of tokens in each crop.
        num_visual_tokens: What the language model would see of this image, newlines included.
        probability: The router's; None where it was not asked.
        priced: The probability that is left when the level's price is paid, for the levels to sum to 1.
        is_allowed: Whether it is within the limit on visual tokens.
        is_chosen: Whether the image is answered at it.
    """

    granularity: int
    grid: tuple[int, int]
    num_visual_tokens: int
    probability: float | None
    priced: float | None
    is_allowed: bool
    is_chosen: bool


def level_rows(
    image_size: Sequence[int],
    config: AvgLlavaConfig,
    budget: Budget,
    probabilities: Sequence[float] | None,
    chosen: int,
) -> list[LevelRow]:
    """A row for each level, coarse to fine.

    Args:
        image_size: (height, width) in pixels.
        config: Of the model.
        budget: What the levels were chosen by.
        probabilities: (G) the router's; None where it was not asked.
        chosen: Visual tokens per crop of the level that was found.
    """
    levels = config.granularities
    priced: Sequence[float | None] = [None] * len(levels)
    if probabilities is not None:
        logits = torch.tensor([list(probabilities)]).log()
        priced = level_values(logits, levels, budget.token_cost).softmax(-1)[0].tolist()
    tokens = [num_visual_tokens(image_size, level, config) for level in levels]
    limit = max(tokens) if budget.max_visual_tokens is None else budget.max_visual_tokens
    return [
        LevelRow(
            granularity=level,
            grid=token_grid(config.num_patches_per_side, level),
            num_visual_tokens=count,
            probability=None if probabilities is None else probabilities[place],
            priced=priced[place],
            is_allowed=count <= limit,
            is_chosen=level == chosen,
        )
        for place, (level, count) in enumerate(zip(levels, tokens, strict=True))
    ]


def token_sum(image_size: Sequence[int], granularity: int, config: AvgLlavaConfig) -> str:
    """How an image's visual tokens come about."""
    window = kept_window(image_size, granularity, config)
    rows, columns = window.bottom - window.top, window.right - window.left
    return f"{granularity} of the overview + {rows} × {columns} of the tiles + {rows} newlines"


def router_html(rows: Sequence[LevelRow], token_cost: float) -> str:
    """The router's probabilities as bars, and what the price makes of them."""
    if all(row.probability is None for row in rows):
        return _note("The level was forced, so the router was not asked.")
    lines = ["<div class='avg-name'>tokens per crop</div>", "<div class='avg-name'>the router's probability</div>"]
    lines += ["<div class='avg-name avg-right'></div>", "<div class='avg-name avg-right'>visual tokens</div>"]
    largest = max(row.probability or 0.0 for row in rows)
    for row in rows:
        mark = " avg-chosen" if row.is_chosen else ""
        name = f"<b>{row.granularity}</b>" if row.is_chosen else str(row.granularity)
        share = row.probability or 0.0
        excess = "" if row.is_allowed else " (over the limit)"
        lines += [
            f"<div>{name} <span class='avg-name'>{row.grid[0]} × {row.grid[1]}</span></div>",
            f"<div class='avg-track{mark}'><div style='width: {share / largest:.1%}'></div></div>",
            f"<div class='avg-right'>{share:.1%}{_after_price(row, token_cost)}</div>",
            f"<div class='avg-right'>{row.num_visual_tokens}{excess}</div>",
        ]
    return f"<div class='avg-bars'>{''.join(lines)}</div>"


def _after_price(row: LevelRow, token_cost: float) -> str:
    return f" <span class='avg-name'>→ {row.priced:.1%} at this price</span>" if token_cost else ""


def stats_html(
    rows: Sequence[LevelRow], sizes: str, answer: Answer | None, first_ms: tuple[float, float] | None
) -> str:
    """An answer's level, tokens and time, beside those of the finest level.

    Args:
        rows: Of all levels.
        sizes: How the tokens come about.
        answer: None while it is written.
        first_ms: Milliseconds until the first token at this budget, and at the finest level without the router; None
            until they are measured.
    """
    chosen, most = next(row for row in rows if row.is_chosen), rows[-1].num_visual_tokens
    how = "chosen by the router" if chosen.probability is not None else "forced"
    cells = [
        ("Level", f"{chosen.granularity} per crop", f"{chosen.grid[0]} × {chosen.grid[1]} tokens, {how}"),
        (
            "Visual tokens",
            f"{chosen.num_visual_tokens} of {most}",
            f"{chosen.num_visual_tokens / most:.0%} of the finest level: {sizes}",
        ),
    ]
    first, whole = ("…", "being measured"), ("…", "being written")
    if first_ms is not None:
        own, finest = first_ms
        first = f"{own:.0f} ms", f"the finest level takes {finest:.0f} ms: speed-up {finest / own:.2f}"
    if answer is not None:
        times = answer.timings
        phases = f"encode {times.encode:.0f}, route {times.route:.0f}, prefill {times.prefill:.0f}"
        whole = (
            f"{times.first_token + times.decode:.0f} ms",
            f"{phases}, {answer.num_new_tokens} tokens {times.decode:.0f}",
        )
    cells += [("First token", *first), ("This answer", *whole)]
    return "<div class='avg-stats'>" + "".join(map(_stat, cells)) + "</div>"


def _stat(cell: tuple[str, str, str]) -> str:
    name, figure, note = map(html.escape, cell)
    return f"<div><div class='avg-name'>{name}</div><div class='avg-figure'>{figure}</div>{_note(note)}</div>"


def _note(text: str) -> str:
    return f"<div class='avg-note'>{text}</div>"


def cards_html(
    rows: Sequence[LevelRow],
    answers: Mapping[int, Answer],
    first_ms: Mapping[int, float],
    pictures: Mapping[int, Image.Image],
) -> str:
    """A card for each level, coarse to fine.

    Args:
        rows: Of all levels.
        answers: Those that are there, by level.
        first_ms: Milliseconds until the first token at each level, once they are measured.
        pictures: The image under the grid of each level; may come later.
    """
    finest = first_ms.get(rows[-1].granularity)
    cards = ""
    for row in rows:
        level = row.granularity
        cards += _card(row, answers.get(level), first_ms.get(level), finest, pictures.get(level))
    return f"<div class='avg-cards' style='grid-template-columns: repeat({len(rows)}, minmax(0, 1fr))'>{cards}</div>"


def _card(
    row: LevelRow, answer: Answer | None, first: float | None, finest: float | None, picture: Image.Image | None
) -> str:
    mark = " avg-chosen" if row.is_chosen else ""
    badge = "<span class='avg-badge'>router</span>" if row.is_chosen else ""
    head = f"{badge}<b>{row.granularity}</b> <span class='avg-name'>{row.grid[0]} × {row.grid[1]} per crop</span>"
    if answer is None:
        return f"<div class='avg-card{mark}'>{head}<div class='avg-answer'>…</div></div>"
    measured = {"first token": "…", "whole answer": "…", "speed-up": "…"}
    if first is not None and finest is not None:
        whole = first + answer.timings.decode
        measured = {
            "first token": f"{first:.0f} ms",
            "whole answer": f"{whole:.0f} ms",
            "speed-up": f"{finest / first:.2f}",
        }
    figures = {
        "visual tokens": f"{answer.num_visual_tokens}",
        **measured,
        "router's probability": f"{row.probability or 0.0:.1%}",
    }
    lines = "".join(
        f"<div class='avg-line'><span>{name}</span><span>{value}</span></div>" for name, value in figures.items()
    )
    image = "" if picture is None else _image(picture, row.granularity)
    return (
        f"<div class='avg-card{mark}' data-level='{row.granularity}'>{head}{image}"
        f"<div class='avg-answer'>{html.escape(answer.text)}</div>{lines}</div>"
    )


def _image(picture: Image.Image, granularity: int) -> str:
    content = BytesIO()
    picture.save(content, "PNG")
    source = base64.b64encode(content.getvalue()).decode()
    return f"<img alt='token grid at {granularity} tokens per crop' src='data:image/png;base64,{source}'>"


__all__ = [
    "INVITATION",
    "PICTURES",
    "STYLE",
    "LevelRow",
    "cards_html",
    "level_rows",
    "router_html",
    "stats_html",
    "token_sum",
]
