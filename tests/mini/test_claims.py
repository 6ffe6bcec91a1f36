"""Rows and claims of the mini world against values computed by hand."""

import dataclasses

import numpy as np
import pytest

from avg_llava.mini import claims
from avg_llava.mini.claims import ClaimsError, EvalQuestion, Outcomes, choose_levels

# Four questions, three levels. Worked by hand:
#   sky-1   right at every level               sky-2   right at every level
#   code-1  right at 8 and 16                  code-2  right at 16 only
QUESTIONS = [
    EvalQuestion("sky-1", "background", "scene", "blue"),
    EvalQuestion("sky-2", "background", "scene", "red"),
    EvalQuestion("code-1", "code", "fine", "abab"),
    EvalQuestion("code-2", "code", "fine", "baba"),
]
CORRECT = np.array([[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1]], dtype=bool)
TOKENS = np.array([[10, 20, 40]] * 3 + [[14, 28, 56]], dtype=float)
# At price 0 the router takes 16, 4, 8, 16; log-probabilities are 0.5 nats apart, so at 1 nat per doubling: 4, 4, 4, 4.
LOG_PROBS = np.array([[-2.0, -1.5, -1.0], [-1.0, -1.5, -2.0], [-1.5, -1.0, -1.5], [-2.0, -1.5, -1.0]])
OUTCOMES = Outcomes(
    questions=QUESTIONS,
    granularities=(4, 8, 16),
    correct=CORRECT,
    tokens=TOKENS,
    router_log_probs=LOG_PROBS,
    baseline_correct=np.array([True, True, True, False]),
    baseline_tokens=TOKENS[:, 2],
)


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in claims.compute_rows(OUTCOMES, token_cost=0.25, token_costs=(0.25, 1.0))}


def test_rows_of_the_report(rows):
    assert list(rows) == [
        "llava-next",
        "fixed-4",
        "fixed-8",
        "fixed-16",
        "random",
        "random@router-tokens",
        "router",
        "router@0.25",
        "router@1",
        "oracle",
    ]
    assert [rows[name].token_cost for name in ("fixed-4", "router", "router@0.25", "oracle")] == [None, 0.0, 0.25, None]


@pytest.mark.parametrize(
    ("name", "accuracy", "tokens", "families"),
    [
        ("llava-next", 3 / 4, (40 * 3 + 56) / 4, {"background": 1, "code": 1 / 2}),
        ("fixed-4", 2 / 4, (10 * 3 + 14) / 4, {"background": 1, "code": 0}),
        ("fixed-8", 3 / 4, (20 * 3 + 28) / 4, {"background": 1, "code": 1 / 2}),
        ("fixed-16", 4 / 4, (40 * 3 + 56) / 4, {"background": 1, "code": 1}),
        ("random", (2 + 2 / 3 + 1 / 3) / 4, (3 * 70 + 98) / 12, {"background": 1, "code": 1 / 2}),
        ("router", 4 / 4, (40 + 10 + 20 + 56) / 4, {"background": 1, "code": 1}),
        ("router@1", 2 / 4, (10 * 3 + 14) / 4, {"background": 1, "code": 0}),
        ("oracle", 4 / 4, (10 + 10 + 20 + 56) / 4, {"background": 1, "code": 1}),
    ],
)
def test_row_against_hand_computation(rows, name, accuracy, tokens, families):
    assert rows[name].accuracy == pytest.approx(accuracy)
    assert rows[name].mean_visual_tokens == pytest.approx(tokens)
    assert rows[name].families == pytest.approx(families)


def test_shares_of_levels_and_tokens_per_family(rows):
    assert rows["router"].levels == {"4": 0.25, "8": 0.25, "16": 0.5}
    assert rows["router"].family_levels["code"] == {"4": 0, "8": 0.5, "16": 0.5}
    assert rows["router"].family_tokens == {"background": 25, "code": 38}
    assert rows["router"].kind_tokens == {"scene": 25, "fine": 38}


def test_price_is_per_doubling_of_tokens():
    # 0.5 nats apart per doubling: cheaper levels win just above a price of 0.5, and lose just below it.
    log_probs = np.array([[-2.0, -1.5, -1.0]])
    assert choose_levels(log_probs, (4, 8, 16), 0.49).tolist() == [2]
    assert choose_levels(log_probs, (4, 8, 16), 0.51).tolist() == [0]


def test_random_choice_has_the_router_s_mean_of_tokens(rows):
    blind, router = rows["random@router-tokens"], rows["router@0.25"]
    assert blind.mean_visual_tokens == pytest.approx(router.mean_visual_tokens, rel=1e-6)
    assert blind.family_levels["code"] == pytest.approx(blind.family_levels["background"])  # it does not look


@pytest.mark.parametrize("mean", [10.0, 12.5, 70 / 3, 33.0, 40.0])
def test_budgeted_mixture_meets_its_budget(mean):
    levels = np.array([10.0, 20.0, 40.0])
    weights = claims.budgeted_mixture(levels, mean)
    assert weights @ levels == pytest.approx(mean, rel=1e-3)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    if mean == 70 / 3:
        assert weights == pytest.approx(np.full(3, 1 / 3), abs=1e-6)  # the most even mixture of all


def test_oracle_takes_the_coarsest_correct_level_or_the_coarsest():
    correct = np.array([[0, 1, 1], [0, 0, 0], [1, 0, 1]], dtype=bool)
    assert claims.oracle_choice(correct).tolist() == [1, 0, 0]


def test_claims_hold_and_fail(rows):
    judged = claims.check_claims(list(rows.values()), token_cost=0.25, num_questions=4)
    # Router at 0.25: levels 16, 4, 8, 16 as at price 0, all right, 31.5 of 44 tokens.
    # Blind choice at 31.5 tokens: fine families below 1 - 0.1. Too few questions, and too many tokens.
    assert [claim.held for claim in judged] == [False, True, True, True, True, False, True]
    assert judged[5].measured == "71.6%"
    assert "token_cost 0.25" in judged[5].text


def test_a_claim_holds_at_its_boundary():
    fixed = [
        claims.find_row(claims.compute_rows(OUTCOMES, 0.0, ()), name) for name in ("fixed-4", "fixed-8", "fixed-16")
    ]
    coarse = dataclasses.replace(fixed[0], kinds={"scene": 0.9, "fine": 0.95 - 0.25})
    finest = dataclasses.replace(fixed[2], accuracy=0.9, kinds={"scene": 1.0, "fine": 0.95})
    others = [row for row in claims.compute_rows(OUTCOMES, 0.0, ()) if not row.name.startswith("fixed")]
    held = [claim.held for claim in claims.check_claims([coarse, fixed[1], finest, *others], 0.0, 1000)]
    assert held[:4] == [True, True, True, True]


def test_families_of_two_kinds_are_refused():
    with pytest.raises(ClaimsError, match=r"question sky-3: family 'background' is 'fine' here and 'scene' elsewhere"):
        claims.family_kinds([*QUESTIONS, EvalQuestion("sky-3", "background", "fine", "red")])
    with pytest.raises(ClaimsError, match="kind 'tiny' is none of scene, object, fine"):
        claims.family_kinds([EvalQuestion("x", "code", "tiny", "a")])


def test_kinds_go_from_scene_to_fine():
    assert claims.family_kinds(list(reversed(QUESTIONS))) == {"background": "scene", "code": "fine"}
    assert list(claims.family_kinds(list(reversed(QUESTIONS)))) == ["background", "code"]


def test_arrays_of_the_wrong_shape_are_refused():
    with pytest.raises(ClaimsError, match=r"tokens has shape \(4, 2\), but \(4, 3\) are needed"):
        dataclasses.replace(OUTCOMES, tokens=TOKENS[:, :2])
    with pytest.raises(ClaimsError, match="from coarse to fine"):
        dataclasses.replace(OUTCOMES, granularities=(16, 8, 4))


def test_price_is_the_lowest_within_the_budget():
    # Router at each price, worked by hand: 0 and 0.4 take 16, 4, 8, 16, which is 126 tokens of level 16's 176 (72%);
    # from 0.6 on all take level 4: 44 tokens (25%).
    prices = (0.0, 0.4, 0.6, 0.8)
    assert claims.choose_token_cost(OUTCOMES, prices, budget=126 / 176) == 0
    assert claims.choose_token_cost(OUTCOMES, prices, budget=0.71) == 0.6
    assert claims.choose_token_cost(OUTCOMES, prices, budget=0.25) == 0.6
    assert claims.choose_token_cost(OUTCOMES, prices, budget=0.1) == 0.8  # none keeps to it


def test_no_row_of_llava_next_without_its_answers():
    with pytest.raises(ClaimsError, match="answers of LLaVA-NeXT are missing"):
        claims.compute_rows(dataclasses.replace(OUTCOMES, baseline_correct=None), 0.0)


def test_unknown_row_is_named():
    with pytest.raises(ClaimsError, match="no row is named 'router@3'; there are llava-next"):
        claims.find_row(claims.compute_rows(OUTCOMES, 0.0, ()), "router@3")
