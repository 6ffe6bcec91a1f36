"""Scores of the current protocol against lmms-eval's functions, those of the paper's protocol against worked cases."""

import random
from collections import defaultdict

import pytest
from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

from avg_llava.evaluation.benchmarks import BENCHMARKS
from avg_llava.evaluation.evaluate import compute_metrics, score_answers
from avg_llava.evaluation.tasks import HarnessQuestions
from tests.evaluation.harness import load_task, outcome, total
from tests.evaluation.predictions import make_predictions

NAMES = {"circular_accuracy": "circular"}  # metric -> its name in the tests' harness


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_current_scores_are_those_of_lmms_eval(benchmark, data):
    """Every answer, and every metric of the whole data set, over 500 generated predictions."""
    questions, task = HarnessQuestions(benchmark, "current", data), load_task(benchmark, data)
    task.task_docs = list(task.dataset_no_image[task.config.test_split])
    by_row = defaultdict(list)
    for index, prediction in make_predictions(benchmark, task.task_docs, num=500):
        by_row[index].append(prediction)
        random.seed(len(by_row[index]))
        expected = outcome(task, task.task_docs[index], prediction)
        random.seed(len(by_row[index]))  # MMMU guesses
        found = questions.outcome(index, prediction)
        if benchmark == "mmmu":  # some numbers that it finds are not a number, which equals nothing
            expected, found = (evaluate_mmmu([each["mmmu_acc"]]) for each in (expected, found))
        assert found == expected
    rounds = min(map(len, by_row.values()))
    assert set(by_row) == set(range(len(questions)))
    assert rounds >= 10
    for number in range(rounds):
        answers = {index: by_row[index][number] for index in range(len(questions))}
        metrics = compute_metrics(questions, score_answers(questions, answers))
        random.seed(0)
        expected = total(benchmark, task, list(answers.values()))
        for name, metric in metrics.items():
            if name == "anls_binarised":
                continue
            # lmms-eval rounds MMMU's share to five decimals.
            tolerance = 1e-5 if benchmark == "mmmu" else 1e-12 * metric.maximum
            assert metric.value == pytest.approx(expected[NAMES.get(name, name)], abs=tolerance, rel=0), name


def _paper(benchmark, data, answer):
    """Metrics and scores per question of the paper's protocol; `answer(questions, index)` gives the answers."""
    questions = HarnessQuestions(benchmark, "paper", data)
    outcomes = score_answers(questions, {index: answer(questions, index) for index in range(len(questions))})
    return compute_metrics(questions, outcomes), [questions.benchmark.question_score(of) for of in outcomes.values()]


def test_paper_counts_a_docvqa_answer_that_is_half_right_as_right(data):
    """ "ABCD" against "ABXY" is an ANLS of exactly a half: 0.5 today, 1 in the paper's harness."""

    def answer(questions, index):
        truth = questions.docs[index]["answers"][-1]
        return truth[: (len(truth) + 1) // 2] + "#" * (len(truth) // 2)

    metrics, _ = _paper("docvqa", data, answer)
    assert list(metrics) == ["anls_binarised", "anls"]
    assert metrics["anls_binarised"].value == 1
    assert 0.5 <= metrics["anls"].value < 0.8


def test_paper_takes_no_small_letters_in_scienceqa(data):
    metrics, _ = _paper("scienceqa", data, lambda questions, index: questions.reference(index).lower())
    assert metrics["exact_match"].value == 0
    metrics, _ = _paper("scienceqa", data, lambda questions, index: f"{questions.reference(index)}. because")
    assert metrics["exact_match"].value == 1


def test_paper_takes_only_the_bare_letter_in_ai2d(data):
    metrics, _ = _paper("ai2d", data, lambda questions, index: f"{questions.reference(index)}. because")
    assert metrics["exact_match"].value == 0
    metrics, _ = _paper("ai2d", data, lambda questions, index: f"{questions.reference(index).lower()}.")
    assert metrics["exact_match"].value == 1  # case and punctuation do not matter


def test_paper_takes_no_single_letters_in_mme(data):
    metrics, scores = _paper("mme", data, lambda questions, index: questions.reference(index)[0])
    assert metrics["mme_perception_score"].value == metrics["mme_cognition_score"].value == 0
    assert set(scores) == {0}
    metrics, _ = _paper("mme", data, lambda questions, index: f"{questions.reference(index)}, I think.")
    assert metrics["mme_perception_score"].value == 200 * len(set(_categories(metrics["mme_perception_score"])))


def _categories(metric):
    return [category for _, category in metric.units.values()]


def test_mme_by_hand(data):
    """One of an image's two questions right: 50 points and none for both; of 13 images, one half wrong."""
    questions = HarnessQuestions("mme", "current", data)
    answers = {index: questions.reference(index) for index in range(len(questions))}
    answers[0] = "No" if answers[0] == "Yes" else "Yes"
    metrics = compute_metrics(questions, score_answers(questions, answers))
    first = questions.docs[0]["category"]
    alike = len({row["question_id"] for row in questions.docs if row["category"] == first})
    lost = 150 / alike
    full = {name: 200 * len(set(_categories(metric))) for name, metric in metrics.items()}
    assert sum(full.values()) - sum(metric.value for metric in metrics.values()) == pytest.approx(lost)


def test_paper_mmmu_prompt_has_images_at_their_positions(data):
    questions = HarnessQuestions("mmmu", "paper", data)
    for index, doc in enumerate(questions.docs):
        request = questions.request(index)
        assert "<image 1>" not in request.prompt
        assert request.prompt.count("<image>") == len(request.images) >= 1
        last = request.prompt.splitlines()[-1]
        wanted = "option letter" if doc["question_type"] == "multiple-choice" else "single word or phrase"
        assert wanted in last


def test_mmbench_needs_every_rotation(data):
    questions = HarnessQuestions("mmbench", "current", data)
    answers = {index: questions.reference(index) for index in range(len(questions))}
    assert compute_metrics(questions, score_answers(questions, answers))["circular_accuracy"].value == 1
    rotated = next(index for index, row in enumerate(questions.docs) if row["index"] >= 1_000_000)
    answers[rotated] = "none of them"
    metric = compute_metrics(questions, score_answers(questions, answers))["circular_accuracy"]
    bases = {row["index"] % 1_000_000 for row in questions.docs}
    assert metric.value == pytest.approx(1 - 1 / len(bases))
    assert metric.units[str(questions.docs[rotated]["index"] % 1_000_000)] == 0
