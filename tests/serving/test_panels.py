"""The page's panels, with numbers computed by hand."""

import math
import re

import pytest
from PIL import Image

from avg_llava import AvgLlavaConfig
from avg_llava.checkpoints.formats import KNOWN_TOWERS
from avg_llava.inference.answers import Answer, PhaseTimes
from avg_llava.inference.budget import Budget
from avg_llava.serving.panels import cards_html, describe_token_count, level_rows, router_html, stats_html

CONFIG = AvgLlavaConfig(
    vision_config=KNOWN_TOWERS["openai/clip-vit-large-patch14-336"], text_config={"model_type": "llama"}
)
SQUARE = (672, 672)
EQUAL = [0.2] * 5


def an_answer(text="a cat"):
    return Answer(text, (36,), None, 192, 240, 3, "stop", PhaseTimes(20.0, 10.0, 70.0, 50.0))


def rows_at(chosen, budget=Budget(), probabilities=EQUAL):
    return level_rows(SQUARE, CONFIG, budget, probabilities, chosen)


def texts(html):
    return [part.strip() for part in re.sub(r"<[^>]*>", "\n", html).split("\n") if part.strip()]


def test_rows():
    rows = rows_at(144, Budget(max_visual_tokens=744))
    assert [row.granularity for row in rows] == [36, 72, 144, 288, 576]
    assert [row.grid for row in rows] == [(6, 6), (12, 6), (12, 12), (24, 12), (24, 24)]
    assert [row.num_visual_tokens for row in rows] == [192, 384, 744, 1488, 2928]
    assert [row.is_allowed for row in rows] == [True, True, True, False, False]
    assert [row.is_chosen for row in rows] == [False, False, True, False, False]
    assert all(row.is_allowed for row in rows_at(36))


def test_token_cost_scales_probabilities():
    """ln 2 nats per doubling halve a level's probability for each doubling of its tokens."""
    rows = rows_at(36, Budget(token_cost=math.log(2)))
    assert [row.probability for row in rows] == EQUAL
    assert [row.adjusted_probability for row in rows] == pytest.approx(
        [16 / 31, 8 / 31, 4 / 31, 2 / 31, 1 / 31], abs=1e-6
    )
    assert [row.adjusted_probability for row in rows_at(36)] == pytest.approx(EQUAL)
    assert rows_at(36, probabilities=None)[0].adjusted_probability is None


def test_certain_router():
    rows = rows_at(36, Budget(token_cost=0.5), [1.0, 0.0, 0.0, 0.0, 0.0])
    assert [row.adjusted_probability for row in rows] == [1, 0, 0, 0, 0]


def test_description_of_token_counts():
    assert describe_token_count(SQUARE, 36, CONFIG) == "36 of the overview + 12 × 12 of the tiles + 12 newlines"
    assert describe_token_count((720, 1280), 36, CONFIG) == "36 of the overview + 8 × 12 of the tiles + 8 newlines"


def test_router_bars():
    html = router_html(rows_at(72, Budget(max_visual_tokens=744), [0.1, 0.4, 0.2, 0.2, 0.1]), 0.0)
    assert re.findall(r"width: ([\d.]+)%", html) == ["25.0", "100.0", "50.0", "50.0", "25.0"]
    assert texts(html)[3:7] == ["36", "6 × 6", "10.0%", "192"]
    assert html.count("over the limit") == 2
    assert "<b>72</b>" in html
    assert html.count("avg-chosen") == 1
    assert "with the token cost" not in html
    assert "→ 51.6% with the token cost" in router_html(rows_at(36, Budget(token_cost=math.log(2))), math.log(2))
    assert texts(router_html(rows_at(36, probabilities=None), 0.0)) == ["The level was forced; the router did not run."]


def test_stats():
    rows = rows_at(36)
    assert texts(stats_html(rows, "all of them", None, None))[:6] == [
        "Level", "36 per crop", "6 × 6 tokens, chosen by the router",
        "Visual tokens", "192 of 2928", "7% of the finest level: all of them",
    ]  # fmt: skip
    waiting = texts(stats_html(rows, "", an_answer(), None))
    assert waiting[6:9] == ["First token", "…", "being measured"]
    assert waiting[9:] == ["This answer", "150 ms", "encode 20, route 10, prefill 70, 3 tokens 50"]
    done = texts(stats_html(rows, "", an_answer(), (100.0, 250.0)))
    assert done[6:9] == ["First token", "100 ms", "finest level: 250 ms, speed-up 2.50"]
    assert "forced" in stats_html(rows_at(36, probabilities=None), "", None, None)


def test_cards():
    rows = rows_at(36)
    answers, picture = {36: an_answer("<b>cat</b> & dog")}, Image.new("RGB", (2, 2))
    html = cards_html(rows, answers, {}, {})
    assert html.count("data-level") == 1
    assert html.count(">…<") == 4 + 3  # empty cards, and unmeasured times
    assert texts(html)[:4] == ["router", "36", "6 × 6 per crop", "&lt;b&gt;cat&lt;/b&gt; &amp; dog"]
    assert "<img" not in html
    answers[576] = an_answer()
    html = cards_html(rows, answers, {36: 100.0, 576: 200.0}, {36: picture, 576: picture})
    assert texts(html)[4:10] == ["visual tokens", "192", "first token", "100 ms", "whole answer", "150 ms"]
    assert [texts(html).count(speedup) for speedup in ("2.00", "1.00")] == [1, 1]
    assert html.count("src='data:image/png;base64,iVBOR") == 2
