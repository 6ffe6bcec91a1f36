import itertools
import math

import pytest
import torch

from avg_llava.bench.plain_loop import sums_over_logits
from avg_llava.training.losses import (
    answer_log_prob,
    best_level,
    num_supervised,
    ranking_loss,
    router_cross_entropy,
    settle_ties,
)
from tests.parity.golden import golden

F, F_JSON = golden("F_stage4")


def _random(batch: int, levels: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, levels, generator=generator, dtype=torch.float64)
    return logits, -3 * torch.rand(batch, levels, generator=generator, dtype=torch.float64)


def _paper(logits: torch.Tensor, log_probs: torch.Tensor) -> float:
    """Sum over pairs i < j of max(0, s_j - s_i + l_i - l_j), batch mean; in plain Python."""
    totals = []
    for row, feedback in zip(logits.tolist(), log_probs.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(x) for x in row))
        ranked = sorted(zip(feedback, row, strict=True), key=lambda pair: -pair[0])
        totals.append(
            sum(
                max(0.0, (s_j - log_sum) - (s_i - log_sum) + (l_i - l_j))
                for (l_i, s_i), (l_j, s_j) in itertools.combinations(ranked, 2)
            )
        )
    return sum(totals) / len(totals)


def _released(logits: torch.Tensor, log_probs: torch.Tensor) -> float:
    """Sum over gaps d of the mean over batch and pairs of max(0, s_{i+d} - s_i + d (l_i - l_{i+d})); plain Python."""
    rows = []
    for row, feedback in zip(logits.tolist(), log_probs.tolist(), strict=True):
        rows.append(sorted(zip(feedback, row, strict=True), key=lambda pair: -pair[0]))
    total = 0.0
    for gap in range(1, len(rows[0])):
        terms = [
            max(0.0, row[i + gap][1] - row[i][1] + gap * (row[i][0] - row[i + gap][0]))
            for row in rows
            for i in range(len(row) - gap)
        ]
        total += sum(terms) / len(terms)
    return total


@pytest.mark.parametrize(("variant", "reference"), [("paper", _paper), ("released", _released)])
@pytest.mark.parametrize(("batch", "levels"), [(1, 2), (3, 3), (4, 5)])
def test_ranking_loss_is_the_formula(variant, reference, batch, levels):
    logits, log_probs = _random(batch, levels)
    assert ranking_loss(logits, log_probs, variant).item() == pytest.approx(reference(logits, log_probs), rel=1e-12)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_ranking_loss_gradient_by_finite_difference(variant):
    logits, log_probs = _random(3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ranking_loss(x, log_probs, variant), (logits,), eps=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(ranking_loss(logits, log_probs, variant), logits)
    assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_ranking_loss_depends_on_levels_as_pairs_only(variant):
    """The loss is invariant under a permutation of the levels of logits and feedback."""
    logits, log_probs = _random(4)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(
        ranking_loss(logits, log_probs, variant), ranking_loss(logits[:, order], log_probs[:, order], variant)
    )


def test_ranking_loss_is_zero_where_the_router_agrees_by_margin():
    log_probs = torch.tensor([[-0.1, -0.2, -0.3, -0.4, -0.5]])
    assert ranking_loss(log_probs * 20, log_probs, "paper").item() == 0
    assert ranking_loss(-log_probs, log_probs, "paper").item() > 0


def test_no_gradient_flows_into_the_feedback():
    logits, log_probs = _random(2)
    log_probs.requires_grad_()
    loss = ranking_loss(logits.requires_grad_(), log_probs, "paper")
    loss.backward()
    assert log_probs.grad is None


@pytest.mark.parametrize("case", ["batch2", "mixed_textonly", "all_textonly"])
def test_router_losses_of_the_released_code(case):
    logits, log_probs = F[f"{case}/router_logits"], -F[f"{case}/llm_loss"]
    rank, cross_entropy = ranking_loss(logits, log_probs, "released"), router_cross_entropy(logits, log_probs)
    torch.testing.assert_close(rank, F[f"{case}/rank"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross_entropy, F[f"{case}/ce"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rank + 0.1 * cross_entropy, F[f"{case}/total"], rtol=1e-5, atol=1e-5)
    paper = F_JSON[case]["REFERENCE_paper_sum_over_pairs_mean_over_batch"]
    assert ranking_loss(logits, log_probs, "paper").item() == pytest.approx(paper, rel=1e-5)


def test_adaptive_rank_loss_of_the_released_code():
    loss = ranking_loss(F["unit/logits_sorted"], -F["unit/llm_loss_sorted"], "released")
    torch.testing.assert_close(loss, F["unit/adaptive_rank_loss_margin1.0"], rtol=1e-6, atol=0)


def test_equal_levels_are_settled_for_the_coarser():
    log_probs = torch.tensor([[-1.0, -0.5, -0.5, -0.5, -2.0], [-0.7] * 5])
    assert best_level(log_probs).tolist() == [1, 0]


def test_settle_ties():
    log_probs = torch.tensor([[-0.52, -0.9, -0.5, -0.51, -0.6]])
    assert torch.equal(settle_ties(log_probs, 0.0), log_probs)
    settled = settle_ties(log_probs, 0.03)
    assert settled.tolist() == [pytest.approx([-0.5, -0.9, -0.5, -0.5, -0.6])]
    assert best_level(settled).tolist() == [0]
    with pytest.raises(ValueError, match="at least 0"):
        settle_ties(log_probs, -0.1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_answer_log_prob_is_the_loop(reduction):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :4] = labels[1, 2:5] = -100
    labels[2] = -100
    expected = []
    for row, targets in zip(logits, labels.tolist(), strict=True):
        terms = [row[i - 1].log_softmax(-1)[target].item() for i, target in enumerate(targets) if i and target != -100]
        expected.append(sum(terms) / (len(terms) or 1 if reduction == "mean" else 1))
    sums, counts = sums_over_logits(logits, labels)
    assert answer_log_prob(sums, counts, reduction).tolist() == pytest.approx(expected, abs=1e-5)
    assert counts.tolist() == num_supervised(labels).tolist() == [3, 3, 0]


def test_without_anything_to_learn_losses_are_zero_and_connected():
    for variant in ("paper", "released"):
        router_logits = torch.randn(3, 5, requires_grad=True)
        empty = router_logits[torch.tensor([], dtype=torch.long)]
        loss = ranking_loss(empty, torch.zeros(0, 5), variant) + router_cross_entropy(empty, torch.zeros(0, 5))
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(router_logits.grad, torch.zeros_like(router_logits))


def test_wrong_inputs_are_refused():
    logits, log_probs = _random(2)
    with pytest.raises(ValueError, match="paper, released; got 'papr'"):
        ranking_loss(logits, log_probs, "papr")
    with pytest.raises(ValueError, match=r"\(B, G\), got \(2, 5\) and \(2, 4\)"):
        ranking_loss(logits, log_probs[:, :4])
    with pytest.raises(ValueError, match=r"\(B, G\)"):
        router_cross_entropy(logits[0], log_probs[0])
    with pytest.raises(ValueError, match="mean, sum; got 'max'"):
        answer_log_prob(torch.zeros(2), torch.ones(2), "max")
