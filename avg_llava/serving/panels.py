"""HTML panels of the demo page: the router's probabilities, an answer's cost, and a card for each level."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import jinja2
import torch
from PIL import Image

from avg_llava.inference.answers import Answer
from avg_llava.inference.budget import Budget
from avg_llava.model.anyres import kept_window, num_visual_tokens
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.router import level_values

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
PLACEHOLDER = "<div class='avg-note'>Choose an image, or an example below; type a question; press Ask.</div>"
CROPS_CAPTION = (
    "<div class='avg-note'>The input of the vision tower: the tiles, separated by orange lines, and the overview crop. "
    "Each cell is one visual token; striped cells are padding and are dropped.</div>"
)

_ENVIRONMENT = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
)
_ENVIRONMENT.filters["percent"] = "{:.1%}".format

_ROUTER = _ENVIRONMENT.from_string("""
{% if largest is none %}
<div class='avg-note'>The level was forced; the router did not run.</div>
{% else %}
<div class='avg-bars'>
<div class='avg-name'>tokens per crop</div>
<div class='avg-name'>the router's probability</div>
<div></div>
<div class='avg-name avg-right'>visual tokens</div>
{% for row in rows %}
<div>
{% if row.is_chosen %}<b>{{ row.granularity }}</b>{% else %}{{ row.granularity }}{% endif %}
 <span class='avg-name'>{{ row.grid[0] }} × {{ row.grid[1] }}</span>
</div>
<div class='avg-track{{ " avg-chosen" if row.is_chosen }}'>
<div style='width: {{ (row.probability / largest) | percent }}'></div>
</div>
<div class='avg-right'>{{ row.probability | percent }}
{% if token_cost %}
<span class='avg-name'>→ {{ row.adjusted_probability | percent }} with the token cost</span>
{% endif %}
</div>
<div class='avg-right'>{{ row.num_visual_tokens }}{{ " (over the limit)" if not row.is_allowed }}</div>
{% endfor %}
</div>
{% endif %}
""")

_STATS = _ENVIRONMENT.from_string("""
<div class='avg-stats'>
{% for name, figure, note in cells %}
<div>
<div class='avg-name'>{{ name }}</div>
<div class='avg-figure'>{{ figure }}</div>
<div class='avg-note'>{{ note }}</div>
</div>
{% endfor %}
</div>
""")

_CARDS = _ENVIRONMENT.from_string("""
<div class='avg-cards' style='grid-template-columns: repeat({{ cards | length }}, minmax(0, 1fr))'>
{% for row, answer, picture, figures in cards %}
<div class='avg-card{{ " avg-chosen" if row.is_chosen }}'{% if answer %} data-level='{{ row.granularity }}'{% endif %}>
{% if row.is_chosen %}<span class='avg-badge'>router</span>{% endif %}
<b>{{ row.granularity }}</b> <span class='avg-name'>{{ row.grid[0] }} × {{ row.grid[1] }} per crop</span>
{% if picture %}
<img alt='token grid at {{ row.granularity }} tokens per crop' src='data:image/png;base64,{{ picture }}'>
{% endif %}
<div class='avg-answer'>{{ answer.text if answer else "…" }}</div>
{% for name, value in figures.items() %}
<div class='avg-line'><span>{{ name }}</span><span>{{ value }}</span></div>
{% endfor %}
</div>
{% endfor %}
</div>
""")


@dataclass(frozen=True)
class LevelRow:
    """One level of an image, before any answer.

    Attributes:
        granularity: Visual tokens per crop.
        grid: (rows, columns) of tokens per crop.
        num_visual_tokens: Visual tokens of the image, newline tokens included.
        probability: The router's probability; None if the router did not run.
        adjusted_probability: The probability after the token cost, normalized over the levels; None likewise.
        is_allowed: True if the level is within the limit on visual tokens.
        is_chosen: True for the level of the answer.
    """

    granularity: int
    grid: tuple[int, int]
    num_visual_tokens: int
    probability: float | None
    adjusted_probability: float | None
    is_allowed: bool
    is_chosen: bool


def level_rows(
    image_size: Sequence[int],
    config: AvgLlavaConfig,
    budget: Budget,
    probabilities: Sequence[float] | None,
    chosen: int,
) -> list[LevelRow]:
    """Returns one row per level, coarse to fine.

    Args:
        image_size: (height, width) in pixels.
        budget: The budget under which the level was chosen.
        probabilities: (G,) router probabilities; None if the router did not run.
        chosen: Granularity of the chosen level.
    """
    levels = config.granularities
    adjusted: Sequence[float | None] = [None] * len(levels)
    if probabilities is not None:
        logits = torch.tensor([list(probabilities)]).log()
        adjusted = level_values(logits, levels, budget.token_cost).softmax(-1)[0].tolist()
    tokens = [num_visual_tokens(image_size, level, config) for level in levels]
    limit = max(tokens) if budget.max_visual_tokens is None else budget.max_visual_tokens
    return [
        LevelRow(
            granularity=level,
            grid=config.ladder.grid(level),
            num_visual_tokens=count,
            probability=None if probabilities is None else probabilities[index],
            adjusted_probability=adjusted[index],
            is_allowed=count <= limit,
            is_chosen=level == chosen,
        )
        for index, (level, count) in enumerate(zip(levels, tokens, strict=True))
    ]


def describe_token_count(image_size: Sequence[int], granularity: int, config: AvgLlavaConfig) -> str:
    """Returns an image's number of visual tokens as a sum over overview, tiles and newlines."""
    window = kept_window(image_size, granularity, config)
    rows, columns = window.bottom - window.top, window.right - window.left
    return f"{granularity} of the overview + {rows} × {columns} of the tiles + {rows} newlines"


def router_html(rows: Sequence[LevelRow], token_cost: float) -> str:
    """Renders the router's probabilities as bars, with the probabilities after the token cost if there is one."""
    probabilities = [row.probability for row in rows if row.probability is not None]
    return _ROUTER.render(rows=rows, token_cost=token_cost, largest=max(probabilities, default=None))


def stats_html(
    rows: Sequence[LevelRow], token_count: str, answer: Answer | None, first_token_ms: tuple[float, float] | None
) -> str:
    """Renders an answer's level, tokens and times, compared with the finest level.

    Args:
        rows: All levels.
        token_count: From `describe_token_count`.
        answer: None while it is being generated.
        first_token_ms: Milliseconds to the first token under the budget and at the finest level without the router;
            None before they are measured.
    """
    chosen, finest_tokens = next(row for row in rows if row.is_chosen), rows[-1].num_visual_tokens
    grid = f"{chosen.grid[0]} × {chosen.grid[1]} tokens"
    origin = "forced" if chosen.probability is None else "chosen by the router"
    share = f"{chosen.num_visual_tokens / finest_tokens:.0%} of the finest level"
    first_token, total = ("…", "being measured"), ("…", "being generated")
    if first_token_ms is not None:
        first, finest = first_token_ms
        first_token = f"{first:.0f} ms", f"finest level: {finest:.0f} ms, speed-up {finest / first:.2f}"
    if answer is not None:
        times = answer.timings
        phases = f"encode {times.encode:.0f}, route {times.route:.0f}, prefill {times.prefill:.0f}"
        decode = f"{answer.num_new_tokens} tokens {times.decode:.0f}"
        total = f"{times.first_token + times.decode:.0f} ms", f"{phases}, {decode}"
    cells = [
        ("Level", f"{chosen.granularity} per crop", f"{grid}, {origin}"),
        ("Visual tokens", f"{chosen.num_visual_tokens} of {finest_tokens}", f"{share}: {token_count}"),
        ("First token", *first_token),
        ("This answer", *total),
    ]
    return _STATS.render(cells=cells)


def cards_html(
    rows: Sequence[LevelRow],
    answers: Mapping[int, Answer],
    first_token_ms: Mapping[int, float],
    pictures: Mapping[int, Image.Image],
) -> str:
    """Renders a card for each level. The mappings are by granularity and may be incomplete; pictures show its grid."""
    finest = first_token_ms.get(rows[-1].granularity)
    cards = []
    for row in rows:
        answer, picture = answers.get(row.granularity), pictures.get(row.granularity)
        figures = {} if answer is None else _card_figures(row, answer, first_token_ms.get(row.granularity), finest)
        cards.append((row, answer, None if picture is None else _base64_png(picture), figures))
    return _CARDS.render(cards=cards)


def _card_figures(row: LevelRow, answer: Answer, first: float | None, finest: float | None) -> dict[str, str]:
    times = {"first token": "…", "whole answer": "…", "speed-up": "…"}
    if first is not None and finest is not None:
        times = {
            "first token": f"{first:.0f} ms",
            "whole answer": f"{first + answer.timings.decode:.0f} ms",
            "speed-up": f"{finest / first:.2f}",
        }
    return {
        "visual tokens": f"{answer.num_visual_tokens}",
        **times,
        "router's probability": f"{row.probability or 0.0:.1%}",
    }


def _base64_png(picture: Image.Image) -> str:
    content = BytesIO()
    picture.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()
