"""The paper's claims in the mini world: accuracy and visual tokens of policies that choose a level per question.

The greedy answer at a level does not depend on how the level was chosen. So every question is answered once per level,
and a policy (a fixed level, chance, the router at a price, the oracle) is a matrix (Q, G) of weights over the answers.
This module only computes; `avg_llava.mini.answers` collects the answers.

Shapes: Q questions, G levels coarse to fine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from avg_llava.model.router import level_values
from avg_llava.reports.mini import Claim, Row

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

KINDS = ("scene", "object", "fine")
TOKEN_COSTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0, 1.5, 2.0)
MIN_QUESTIONS = 1000
TOKEN_BUDGET = 0.45
"""Share of the best fixed level's visual tokens; below the claimed half, since other questions may need more."""


class ClaimsError(ValueError):
    """Answers that the comparison needs are missing or inconsistent."""


@dataclass(frozen=True)
class EvalQuestion:
    """One question of `eval.json` or `router.json`.

    Attributes:
        family: The record's `question_type`, such as `letter_small`; a family of the report.
        kind: The record's `family`, one of `KINDS`: what a question of this type needs to see.
    """

    id: str
    family: str
    kind: str
    answer: str


@dataclass(frozen=True)
class Outcomes:
    """Answers of the models to all questions, as arrays.

    Attributes:
        granularities: The G levels in visual tokens per crop, coarse to fine.
        correct: (Q, G) true where the final model's answer at the forced level is correct.
        tokens: (Q, G) visual tokens in the language model's input.
        router_log_probs: (Q, G) the router's log-probabilities.
        baseline_correct: (Q,) true where LLaVA-NeXT (the stage-2 model at the finest level) is correct; None for
            questions that only the final model answers, such as those by which the price is chosen.
        baseline_tokens: (Q,) visual tokens of LLaVA-NeXT, or None.
    """

    questions: Sequence[EvalQuestion]
    granularities: tuple[int, ...]
    correct: BoolArray
    tokens: FloatArray
    router_log_probs: FloatArray
    baseline_correct: BoolArray | None = None
    baseline_tokens: FloatArray | None = None

    def __post_init__(self) -> None:
        shape = (len(self.questions), len(self.granularities))
        for name in ("correct", "tokens", "router_log_probs"):
            if getattr(self, name).shape != shape:
                raise ClaimsError(f"{name} has shape {getattr(self, name).shape}, but {shape} are needed")
        for name in ("baseline_correct", "baseline_tokens"):
            if getattr(self, name) is not None and getattr(self, name).shape != shape[:1]:
                raise ClaimsError(f"{name} has shape {getattr(self, name).shape}, but {shape[:1]} are needed")
        if list(self.granularities) != sorted(set(self.granularities)):
            raise ClaimsError(f"levels must go from coarse to fine, not {self.granularities}")


def family_kinds(questions: Sequence[EvalQuestion]) -> dict[str, str]:
    """Maps each question family to its kind: scene, object or fine.

    Raises:
        ClaimsError: A family has an unknown kind or two kinds.
    """
    kinds: dict[str, str] = {}
    for question in questions:
        if question.kind not in KINDS:
            raise ClaimsError(f"question {question.id}: kind {question.kind!r} is none of {', '.join(KINDS)}")
        if kinds.setdefault(question.family, question.kind) != question.kind:
            raise ClaimsError(
                f"question {question.id}: family {question.family!r} is {question.kind!r} here "
                f"and {kinds[question.family]!r} elsewhere"
            )
    return dict(sorted(kinds.items(), key=lambda item: (KINDS.index(item[1]), item[0])))


def choose_levels(log_probs: FloatArray, granularities: Sequence[int], token_cost: float) -> NDArray[np.int64]:
    """Index (Q,) of the level that the router chooses at a price, from its log-probabilities (Q, G)."""
    return level_values(torch.from_numpy(log_probs), granularities, token_cost).argmax(-1).numpy()


def oracle_choice(correct: BoolArray) -> NDArray[np.int64]:
    """Index (Q,) of the coarsest level with a correct answer, or of the coarsest level if no answer is correct."""
    return np.argmax(correct, axis=1)


def budgeted_mixture(level_tokens: FloatArray, mean_tokens: float) -> FloatArray:
    """Random choice at a given budget: the maximum-entropy distribution (G,) over levels with that mean of tokens.

    It has the form p_g ~ exp(tilt * tokens_g), with the tilt found by bisection; tilt 0 is the uniform distribution.

    Args:
        level_tokens: (G,) mean visual tokens of each level.
        mean_tokens: The required mean; outside the levels' range all weight is on the nearest level.
    """
    scaled = (level_tokens - level_tokens.min()) / np.ptp(level_tokens)
    target = (mean_tokens - level_tokens.min()) / np.ptp(level_tokens)

    def weights(tilt: float) -> FloatArray:
        exponent = tilt * scaled
        unnormalised: FloatArray = np.exp(exponent - exponent.max())
        return unnormalised / unnormalised.sum()

    low, high = -1e4, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        if weights(middle) @ scaled < target:
            low = middle
        else:
            high = middle
    return weights((low + high) / 2)


def _row(name: str, outcomes: Outcomes, weights: FloatArray, token_cost: float | None = None) -> Row:
    """The row of a policy, given as weights (Q, G), or (G,) for all questions alike, that sum to 1."""
    weights = np.broadcast_to(weights, outcomes.correct.shape)
    correct = (weights * outcomes.correct).sum(axis=1)  # (Q,)
    tokens = (weights * outcomes.tokens).sum(axis=1)  # (Q,)
    families = np.array([question.family for question in outcomes.questions])
    kinds = np.array([question.kind for question in outcomes.questions])
    names = list(family_kinds(outcomes.questions))

    def mean_by(groups: NDArray[np.str_], of: FloatArray, order: Sequence[str]) -> dict[str, float]:
        return {group: float(of[groups == group].mean()) for group in order if (groups == group).any()}

    def shares(of: FloatArray) -> dict[str, float]:
        return {str(level): float(share) for level, share in zip(outcomes.granularities, of.mean(axis=0), strict=True)}

    return Row(
        name=name,
        accuracy=float(correct.mean()),
        mean_visual_tokens=float(tokens.mean()),
        token_cost=token_cost,
        families=mean_by(families, correct, names),
        family_tokens=mean_by(families, tokens, names),
        kinds=mean_by(kinds, correct, KINDS),
        kind_tokens=mean_by(kinds, tokens, KINDS),
        levels=shares(weights),
        family_levels={family: shares(weights[families == family]) for family in names},
    )


def _baseline_row(outcomes: Outcomes) -> Row:
    """The row of LLaVA-NeXT, counted at the finest level."""
    if outcomes.baseline_correct is None or outcomes.baseline_tokens is None:
        raise ClaimsError("the answers of LLaVA-NeXT are missing, so its row cannot be computed")
    num_levels = len(outcomes.granularities)
    baseline = replace(
        outcomes,
        correct=np.repeat(outcomes.baseline_correct[:, None], num_levels, axis=1),
        tokens=np.repeat(outcomes.baseline_tokens[:, None], num_levels, axis=1),
    )
    return _row("llava-next", baseline, np.eye(num_levels)[-1])


def choose_token_cost(
    outcomes: Outcomes, token_costs: Sequence[float] = TOKEN_COSTS, budget: float = TOKEN_BUDGET
) -> float:
    """The lowest price at which the router stays within a budget of visual tokens, or the highest if none does.

    Args:
        outcomes: Answers to calibration questions, which must not be those that the claims are judged on.
        token_costs: Candidate prices.
        budget: Visual tokens as a share of the best fixed level's.
    """
    best = max(range(len(outcomes.granularities)), key=lambda level: (outcomes.correct[:, level].mean(), -level))
    allowed = budget * outcomes.tokens[:, best].mean()

    def tokens(cost: float) -> float:
        choice = choose_levels(outcomes.router_log_probs, outcomes.granularities, cost)
        return float(outcomes.tokens[np.arange(len(choice)), choice].mean())

    return min((cost for cost in token_costs if tokens(cost) <= allowed), default=max(token_costs))


def router_name(token_cost: float) -> str:
    """`router` at price 0, else `router@<token_cost>`."""
    return "router" if token_cost == 0 else f"router@{token_cost:g}"


def compute_rows(outcomes: Outcomes, token_cost: float, token_costs: Sequence[float] = TOKEN_COSTS) -> list[Row]:
    """All rows of the report.

    Rows of random choice are expectations over the choice, so that sampling adds no noise.

    Args:
        token_cost: Price at which the claims are judged; also sets the budget of `random@router-tokens`.
        token_costs: Prices of the curve.
    """
    routers = [router_row(router_name(cost), outcomes, cost) for cost in sorted({0.0, token_cost, *token_costs})]
    budget = find_row(routers, router_name(token_cost)).mean_visual_tokens
    return [
        _baseline_row(outcomes),
        *rows_without_router(outcomes),
        _row("random@router-tokens", outcomes, budgeted_mixture(outcomes.tokens.mean(axis=0), budget)),
        *routers,
        oracle_row(outcomes),
    ]


def rows_without_router(outcomes: Outcomes) -> list[Row]:
    """The rows of the fixed levels, coarse to fine, and of uniform random choice."""
    num_levels = len(outcomes.granularities)
    levels = zip(outcomes.granularities, np.eye(num_levels), strict=True)
    fixed = [_row(f"fixed-{granularity}", outcomes, weights) for granularity, weights in levels]
    return [*fixed, _row("random", outcomes, np.full(num_levels, 1 / num_levels))]


def router_row(name: str, outcomes: Outcomes, token_cost: float) -> Row:
    """The row of the router at a price."""
    choice = choose_levels(outcomes.router_log_probs, outcomes.granularities, token_cost)
    return _row(name, outcomes, np.eye(len(outcomes.granularities))[choice], token_cost)


def oracle_row(outcomes: Outcomes) -> Row:
    """The row of the oracle: for each question the coarsest level with a correct answer."""
    return _row("oracle", outcomes, np.eye(len(outcomes.granularities))[oracle_choice(outcomes.correct)])


def find_row(rows: Sequence[Row], name: str) -> Row:
    """The row of this name.

    Raises:
        ClaimsError: There is no such row.
    """
    for row in rows:
        if row.name == name:
            return row
    raise ClaimsError(f"no row is named {name!r}; there are {', '.join(row.name for row in rows)}")


def check_claims(rows: Sequence[Row], token_cost: float, num_questions: int) -> list[Claim]:
    """The claims about the rows of `compute_rows`, judged at a price of the router."""
    fixed = [row for row in rows if row.name.startswith("fixed-")]
    coarsest, finest = fixed[0], fixed[-1]
    best = max(fixed, key=lambda row: (row.accuracy, -row.mean_visual_tokens))
    router, random = find_row(rows, router_name(token_cost)), find_row(rows, "random@router-tokens")

    fine_gap = finest.kinds.get("fine", 0.0) - coarsest.kinds.get("fine", 0.0)
    router_gap = router.accuracy - best.accuracy
    share = router.mean_visual_tokens / best.mean_visual_tokens
    over_random = router.kinds.get("fine", 0.0) - random.kinds.get("fine", 0.0)
    coarse_scene = coarsest.kinds.get("scene", 0.0)
    at = f"token_cost {token_cost:g}"
    # Rounding: a difference of 25.0 points must not fail as 24.99999999.
    slack = 1e-9
    return [
        Claim(f"at least {MIN_QUESTIONS:,} held-out questions", f"{num_questions:,}", num_questions >= MIN_QUESTIONS),
        Claim(
            f"the finest level ({finest.name}) answers at least 90% overall",
            f"{finest.accuracy:.1%}",
            finest.accuracy >= 0.9 - slack,
        ),
        Claim(
            f"the coarsest level ({coarsest.name}) is at least 25 points lower on fine families",
            f"{100 * fine_gap:.1f} points",
            fine_gap >= 0.25 - slack,
        ),
        Claim(
            f"the coarsest level ({coarsest.name}) answers at least 90% on whole-scene families",
            f"{coarse_scene:.1%}",
            coarse_scene >= 0.9 - slack,
        ),
        Claim(
            f"the router ({at}) is within 1 point of the best fixed level ({best.name})",
            f"{100 * router_gap:+.1f} points",
            router_gap >= -0.01 - slack,
        ),
        Claim(
            f"the router ({at}) uses at most half of the visual tokens of the best fixed level ({best.name})",
            f"{share:.1%}",
            share <= 0.5 + slack,
        ),
        Claim(
            f"the router ({at}) is at least 10 points above random choice at equal mean tokens on fine families",
            f"{100 * over_random:+.1f} points",
            over_random >= 0.1 - slack,
        ),
    ]
