"""`avg-llava mini claims`: measures the trained mini models, judges the claims and writes the report."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avg_llava.common.machine import machine_facts
from avg_llava.common.workers import default_workers
from avg_llava.mini import answers as measure
from avg_llava.mini import claims
from avg_llava.reports.mini import write_report
from avg_llava.training.checkpoint import StageManifest, read_manifest

STAGES = (1, 2, 3, 4)


def compare(
    runs: Path, data: Path, output: Path, token_cost: float | None = None, num_workers: int | None = None
) -> dict[str, Any]:
    """Compares LLaVA-NeXT, fixed levels, chance, the router and the oracle on the held-out questions.

    Args:
        runs: Folder with the checkpoints `stage1` to `stage4`.
        data: Folder of the mini world.
        output: Folder that the report is written to; the answers go beside it, to `<runs>/answers`.
        token_cost: The router's price, in nats per doubling of visual tokens, at which the claims are judged. None
            chooses it on questions of stage 4's data, without a look at the held-out ones.
        num_workers: Processes that answer; None takes one per core, or one where there is a GPU.

    Returns:
        The report, as written to `report.json`.
    """
    if token_cost is not None and token_cost < 0:
        raise ValueError(f"the token cost is a price and cannot be {token_cost:g}; give 0 or more")
    measurement = measure.Measurement(
        baseline=runs / "stage2",
        final=runs / "stage4",
        data=data,
        answers=runs / "answers",
        num_workers=num_workers or default_workers(),
    )
    manifests = {stage: _finished(runs / f"stage{stage}", stage) for stage in STAGES}
    items = measure.read_questions(data)
    questions = [item.question for item in items]
    families = claims.family_kinds(questions)
    calibration = measure.calibration_items(data) if token_cost is None else []
    granularities = measure.collect_answers(measurement, items, calibration)
    token_cost_choice = "given by the user"
    if token_cost is None:
        others = [item.question for item in calibration]
        token_cost = claims.choose_token_cost(
            measure.read_outcomes(measurement.answers, others, granularities, with_baseline=False)
        )
        token_cost_choice = (
            f"the lowest that keeps to {claims.TOKEN_BUDGET:.0%} of the best fixed level's visual tokens on "
            f"{len(others)} questions of {measure.CALIBRATION}, none of them held out"
        )
    outcomes = measure.read_outcomes(measurement.answers, questions, granularities)
    num_verified = measure.verify_routing(measurement, items, outcomes, token_cost)
    rows = claims.compute_rows(outcomes, token_cost)
    judged = claims.check_claims(rows, token_cost, len(questions))

    histories = {f"stage {stage}": read_history(runs / f"stage{stage}") for stage in STAGES}
    report = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "families": families,
        "claims": [dataclasses.asdict(claim) for claim in judged],
        "token_cost": token_cost,
        "token_cost_choice": token_cost_choice,
        "granularities": list(granularities),
        "num_questions": len(questions),
        "num_verified": num_verified,
        "stages": [
            stage_facts(stage, manifests[stage], histories[f"stage {stage}"], read_times(runs)) for stage in STAGES
        ],
        "machine": machine_facts() | {"trained": manifests[STAGES[-1]].created},
    }
    write_report(report, histories, output)
    return report


def _finished(folder: Path, stage: int) -> StageManifest:
    manifest = read_manifest(folder)
    if manifest is None or not manifest.finished or manifest.stage != stage:
        raise claims.ClaimsError(
            f"{folder} is not a finished stage {stage}; run `bash scripts/train_stage{stage}.sh "
            f"configs/mini/stage{stage}.yaml` first"
        )
    return manifest


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's `log_history.jsonl`; none if there is no such file."""
    path = folder / "log_history.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_times(runs: Path) -> dict[str, float]:
    """Step of the quickstart -> seconds, over the calls that came to their end."""
    path = runs / "times.tsv"
    if not path.is_file():
        return {}
    times: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, seconds = line.split("\t")
        times[name] = times.get(name, 0.0) + float(seconds)
    return times


def stage_facts(
    stage: int, manifest: StageManifest, history: Sequence[Mapping[str, Any]], times: Mapping[str, float]
) -> dict[str, Any]:
    """One line of the report's table of stages."""
    losses = [line["loss"] for line in history if "loss" in line]
    tail = losses[-max(1, len(losses) // 20) :]
    seconds = times.get(f"stage{stage}")
    optim = manifest.config["optim"]
    return {
        "stage": stage,
        "time": "" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}",
        "steps": manifest.step,
        "batch": optim["global_batch_size"],
        "processes": manifest.world_size,
        "first loss": f"{losses[0]:.3f}" if losses else "",
        "last loss": f"{sum(tail) / len(tail):.3f}" if losses else "",
        "lr": f"{optim['lr']:g}",
        "lr (vision)": "" if optim["vision_lr"] is None else f"{optim['vision_lr']:g}",
        "DeepSpeed": manifest.config["runtime"]["deepspeed"] or "none",
        "precision": manifest.config["runtime"]["precision"],
        "seed": manifest.config["seed"],
    }
