"""Collected answers are resumed, deleted when stale and checked by routed generation; the report is complete."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from avg_llava.mini import claims, comparison
from avg_llava.mini.answers import (
    AnsweringJob,
    calibration_items,
    collect_answers,
    read_outcomes,
    read_questions,
    verify_routing,
)
from avg_llava.mini.claims import ClaimsError
from avg_llava.mini.world import WorldSize, write_world
from avg_llava.training.checkpoint import StageManifest, write_manifest
from tests.tiny import make_checkpoint

CONFIG = {
    "optim": {"lr": 1e-3, "vision_lr": None, "global_batch_size": 8},
    "runtime": {"deepspeed": None, "precision": "fp32"},
    "seed": 0,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A mini world of a few questions, and four finished stages with random weights."""
    folder = tmp_path_factory.mktemp("trained")
    write_world(folder / "data", size=WorldSize(num_captions=2, num_instruct=2, num_router=2, num_eval=8))
    first, second = make_checkpoint(folder / "a", seed=1), make_checkpoint(folder / "b", seed=2)
    for stage, checkpoint in enumerate((first, first, second, second), start=1):
        stage_folder = folder / "runs" / f"stage{stage}"
        shutil.copytree(checkpoint, stage_folder)
        lines = [{"step": step, "loss": 1 / step} for step in range(1, 30)]
        (stage_folder / "log_history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_manifest(stage_folder, StageManifest(stage, True, 29, {}, "data", CONFIG, 2))
    return folder


@pytest.fixture(scope="module")
def report(trained):
    return comparison.evaluate_claims(
        trained / "runs", trained / "data", trained / "report", token_cost=0.1, num_workers=1
    )


def job_of(trained: Path, answers: Path) -> AnsweringJob:
    return AnsweringJob(trained / "runs/stage2", trained / "runs/stage4", trained / "data", answers, num_workers=1)


def test_report_has_all_fields(trained, report):
    written = json.loads((trained / "report" / "report.json").read_text())
    assert written == report
    names = [row["name"] for row in report["rows"]]
    fixed = [f"fixed-{level}" for level in (1, 2, 4, 8, 16)]
    assert names[:8] == ["llava-next", *fixed, "random", "random@router-tokens"]
    assert names[-1] == "oracle"
    assert {"router", "router@0.1"} <= set(names)
    assert set(report["families"].values()) == {"scene", "object", "fine"}
    for row in report["rows"]:
        assert {"name", "accuracy", "mean_visual_tokens", "token_cost", "families"} <= set(row)
        assert set(row["families"]) == set(report["families"])
    assert report["num_verified"] == min(64, report["num_questions"])
    assert [stage["steps"] for stage in report["stages"]] == [29] * 4


def test_page_holds_all_figures(trained, report):
    page = (trained / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page.split("<body")[0]  # nothing is fetched from elsewhere
    for name in ("accuracy", "families", "routing", "loss"):
        assert (trained / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_is_resumed(trained, report, tmp_path):
    answers = tmp_path / "answers"
    shutil.copytree(trained / "runs" / "answers", answers)
    whole = (answers / "fixed-4.jsonl").read_text().splitlines(keepends=True)
    # A kill in the middle of a line, after half of one level was written.
    (answers / "fixed-4.jsonl").write_text("".join(whole[: len(whole) // 2]) + whole[-1][:20])
    items = read_questions(trained / "data")
    kept = (answers / "llava-next.jsonl").read_text()
    collect_answers(job_of(trained, answers), items)
    again = [json.loads(line) for line in (answers / "fixed-4.jsonl").read_text().splitlines()]
    by_id = lambda lines: sorted(lines, key=lambda line: line["id"])  # noqa: E731
    assert by_id(again) == by_id(map(json.loads, whole))
    assert (answers / "llava-next.jsonl").read_text() == kept  # existing answers are kept


def test_number_of_processes_does_not_change_answers(trained, report, tmp_path):
    items = read_questions(trained / "data")
    alone, together = trained / "runs" / "answers", tmp_path / "answers"
    collect_answers(dataclasses.replace(job_of(trained, together), num_workers=2), items)
    for name in ("llava-next", "fixed-1", "fixed-16"):
        lines = [[json.loads(line) for line in (folder / f"{name}.jsonl").open()] for folder in (alone, together)]
        one, two = ({line["id"]: line for line in of if line["id"].startswith("eval")} for of in lines)
        assert one == two


def test_answers_to_other_questions_are_deleted(trained, report, tmp_path):
    answers = tmp_path / "answers"
    shutil.copytree(trained / "runs" / "answers", answers)
    identity = json.loads((answers / "identity.json").read_text())
    (answers / "identity.json").write_text(json.dumps({**identity, "questions": "others"}))
    line = {"id": "strange", "prediction": "", "correct": True, "num_visual_tokens": 0}
    (answers / "fixed-1.jsonl").write_text(json.dumps(line) + "\n")
    items = read_questions(trained / "data")
    collect_answers(job_of(trained, answers), items)
    assert "strange" not in (answers / "fixed-1.jsonl").read_text()
    assert len((answers / "fixed-1.jsonl").read_text().splitlines()) == len(items)


def test_a_wrong_lookup_is_detected(trained, report, tmp_path):
    answers = tmp_path / "answers"
    shutil.copytree(trained / "runs" / "answers", answers)
    items = read_questions(trained / "data")
    questions = [item.question for item in items]
    job = job_of(trained, answers)
    outcomes = read_outcomes(answers, questions, (1, 2, 4, 8, 16))
    assert verify_routing(job, items, outcomes, 0.1) == min(64, len(items))
    for level in (1, 2, 4, 8, 16):
        path = answers / f"fixed-{level}.jsonl"
        lines = [{**json.loads(line), "prediction": "forged"} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ClaimsError, match=r"routed generation gives .* the forced level \d+ gave 'forged'"):
        verify_routing(job, items, outcomes, 0.1)


def test_outcomes_are_in_the_order_of_the_questions(trained, report):
    items = read_questions(trained / "data")
    questions = [item.question for item in items]
    answers = trained / "runs" / "answers"
    forward = read_outcomes(answers, questions, (1, 2, 4, 8, 16))
    backward = read_outcomes(answers, questions[::-1], (1, 2, 4, 8, 16))
    np.testing.assert_array_equal(forward.tokens, backward.tokens[::-1])
    assert (np.diff(forward.tokens, axis=1) > 0).all()
    with pytest.raises(ClaimsError, match=r"fixed-3\.jsonl lacks \d+ answers"):
        read_outcomes(answers, questions, (3,))


def test_price_is_chosen_on_questions_that_are_not_held_out(trained, report, tmp_path):
    held_out = {item.question.id for item in read_questions(trained / "data")}
    calibration = calibration_items(trained / "data")
    assert calibration
    assert not held_out & {item.question.id for item in calibration}
    chosen = comparison.evaluate_claims(trained / "runs", trained / "data", tmp_path / "report", num_workers=1)
    questions = [item.question for item in calibration]
    outcomes = read_outcomes(trained / "runs/answers", questions, (1, 2, 4, 8, 16), with_baseline=False)
    assert chosen["token_cost"] == claims.choose_token_cost(outcomes)
    assert chosen["token_cost_choice"].endswith("questions of router.json, none of them held out")
    assert report["token_cost_choice"] == "given by the user"


def test_a_record_without_family_is_an_error(trained, tmp_path):
    records = json.loads((trained / "data" / "eval.json").read_text())
    del records[1]["family"]
    (tmp_path / "eval.json").write_text(json.dumps(records))
    with pytest.raises(ClaimsError, match=rf"record {records[1]['id']} must have .*missing: family"):
        read_questions(tmp_path)


def test_unfinished_stages_are_refused(trained, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    write_manifest(tmp_path / "runs/stage3", StageManifest(3, False, 5, {}, "data", CONFIG, 2))
    with pytest.raises(ClaimsError, match="stage3 is not a finished stage 3"):
        comparison.evaluate_claims(tmp_path / "runs", trained / "data", tmp_path / "report")


def test_times_add_up_over_calls(tmp_path):
    (tmp_path / "times.tsv").write_text("stage1\t60\nstage2\t30\nstage1\t5\n")
    assert comparison.read_times(tmp_path) == {"stage1": 65, "stage2": 30}
