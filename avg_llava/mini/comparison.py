"""The comparisons of `avg-llava mini claims` and `avg-llava mini routers`.

Both answer every question once per level and look up the answer at the level that a router chooses, since the answer at
a level does not depend on how the level was chosen.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from avg_llava.checkpoints.checkpoint import ROUTER_KEYS
from avg_llava.checkpoints.formats import open_checkpoint
from avg_llava.checkpoints.weight_files import fingerprint
from avg_llava.common.jsonl import JsonLines
from avg_llava.common.machine import machine_facts
from avg_llava.common.workers import default_workers, map_batches
from avg_llava.mini import claims
from avg_llava.mini.answers import (
    CALIBRATION,
    AnsweringJob,
    Item,
    Predictors,
    batch_by_length,
    calibration_items,
    collect_answers,
    read_outcomes,
    read_questions,
    start_worker,
    verify_routing,
)
from avg_llava.mini.claims import ClaimsError
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.reports.mini import Row, write_report
from avg_llava.training.checkpoint import StageManifest, read_manifest
from avg_llava.training.monitor import LOG_NAME

STAGES = (1, 2, 3, 4)


def evaluate_claims(
    runs: Path, data: Path, output: Path, token_cost: float | None = None, num_workers: int | None = None
) -> dict[str, Any]:
    """Compares LLaVA-NeXT, fixed levels, random choice, the router and the oracle on the held-out questions.

    Args:
        runs: Folder with the checkpoints `stage1` to `stage4`; answers are kept in `<runs>/answers`.
        token_cost: Price, in nats per doubling of visual tokens, at which the router is judged. None chooses it on
            stage 4's training data.
        num_workers: Number of processes; None takes `default_workers`.

    Returns:
        The report, as written to `report.json`.

    Raises:
        ValueError: The token cost is negative.
        ClaimsError: A stage is not finished, or answers are inconsistent.
    """
    if token_cost is not None and token_cost < 0:
        raise ValueError(f"the token cost is a price and cannot be {token_cost:g}; give 0 or more")
    job = AnsweringJob(
        baseline=runs / "stage2",
        final=runs / "stage4",
        data=data,
        answers=runs / "answers",
        num_workers=num_workers or default_workers(),
    )
    manifests = {stage: _finished(runs / f"stage{stage}", stage) for stage in STAGES}
    items = read_questions(data)
    questions = [item.question for item in items]
    families = claims.family_kinds(questions)
    calibration = calibration_items(data) if token_cost is None else []
    granularities = collect_answers(job, items, calibration)
    token_cost_choice = "given by the user"
    if token_cost is None:
        others = [item.question for item in calibration]
        token_cost = claims.choose_token_cost(read_outcomes(job.answers, others, granularities, with_baseline=False))
        token_cost_choice = (
            f"the lowest that keeps to {claims.TOKEN_BUDGET:.0%} of the best fixed level's visual tokens on "
            f"{len(others)} questions of {CALIBRATION}, none of them held out"
        )
    outcomes = read_outcomes(job.answers, questions, granularities)
    num_verified = verify_routing(job, items, outcomes, token_cost)
    rows = claims.compute_rows(outcomes, token_cost)
    judged = claims.check_claims(rows, token_cost, len(questions))

    histories = {f"stage {stage}": JsonLines(runs / f"stage{stage}" / LOG_NAME).read() for stage in STAGES}
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
        raise ClaimsError(
            f"{folder} is not a finished stage {stage}; run `bash scripts/train_stage{stage}.sh "
            f"configs/mini/stage{stage}.yaml` first"
        )
    return manifest


def read_times(runs: Path) -> dict[str, float]:
    """Seconds of each quickstart step, summed over its completed calls."""
    path = runs / "times.tsv"
    if not path.is_file():
        return {}
    times: dict[str, float] = defaultdict(float)
    for line in path.read_text(encoding="utf-8").splitlines():
        name, seconds = line.split("\t")
        times[name] += float(seconds)
    return times


def stage_facts(
    stage: int, manifest: StageManifest, history: Sequence[Mapping[str, Any]], times: Mapping[str, float]
) -> dict[str, Any]:
    """A stage's entry in the report."""
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


def compare_routers(
    model: Path, routers: Sequence[Path], data: Path, answers: Path, num_workers: int | None = None
) -> list[Row]:
    """Compares routers of one model, such as those of ablations of router training.

    Args:
        model: Checkpoint that answers at all of its levels.
        routers: Checkpoints that differ from `model` only in the router, which may choose among fewer levels.
        num_workers: Number of processes; None takes `default_workers`.

    Returns:
        The rows of all fixed levels, of random choice, of each router at price 0 (named after its folder) and of the
        oracle.

    Raises:
        ClaimsError: Two folders have the same name, or a router belongs to another model.
    """
    named = {folder.name: folder for folder in routers}
    if len(named) != len(routers):
        raise ClaimsError("two routers' folders have the same name, after which rows are named")
    num_workers = num_workers or default_workers()
    items = read_questions(data)
    _check_same_model(model, routers)
    levels = collect_answers(AnsweringJob(None, model, data, answers, num_workers), items)
    outcomes = read_outcomes(answers, [item.question for item in items], levels, with_baseline=False)
    choices = _route(named, items, num_workers)
    rows = claims.rows_without_router(outcomes)
    for name, folder in named.items():
        granularities = AvgLlavaConfig.from_pretrained(folder).granularities
        indices = [levels.index(level) for level in granularities]
        of_router = dataclasses.replace(
            outcomes,
            granularities=tuple(granularities),
            correct=outcomes.correct[:, indices],
            tokens=outcomes.tokens[:, indices],
            router_log_probs=np.array([choices[name][item.question.id] for item in items]),
        )
        rows.append(claims.router_row(name, of_router, token_cost=0.0))
    return [*rows, claims.oracle_row(outcomes)]


def _check_same_model(model: Path, routers: Sequence[Path]) -> None:
    """Raises `ClaimsError` for routers with other weights or other levels than the model's."""
    levels, weights = AvgLlavaConfig.from_pretrained(model).granularities, _weights(model)
    for folder in routers:
        if _weights(folder) != weights:
            raise ClaimsError(
                f"{folder} and {model} differ in more than the router, so the answers of one are not those of the "
                "other; compare them with `avg-llava mini claims`"
            )
        granularities = AvgLlavaConfig.from_pretrained(folder).granularities
        if not set(granularities) <= set(levels):
            raise ClaimsError(
                f"{folder} chooses among {granularities}, not all of which are levels of {model}, {levels}"
            )


def _weights(folder: Path) -> str:
    tensors = open_checkpoint(folder).stored()
    return fingerprint({name: tensor for name, tensor in tensors.items() if not name.startswith(ROUTER_KEYS)})


def _route(routers: dict[str, Path], items: Sequence[Item], num_workers: int) -> dict[str, dict[str, list[float]]]:
    """Log-probabilities of each router's levels by question id."""
    choices: dict[str, dict[str, list[float]]] = {name: {} for name in routers}
    config = AvgLlavaConfig.from_pretrained(next(iter(routers.values())))
    batches = [(name, batch) for batch in batch_by_length(items, config) for name in routers]
    start = partial(start_worker, _route_batch, routers)
    with tqdm(total=len(routers) * len(items), desc="routing", unit="question", dynamic_ncols=True) as progress:
        for name, chosen in map_batches(start, batches, num_workers):
            choices[name] |= chosen
            progress.update(len(chosen))
    return choices


def _route_batch(predictors: Predictors, batch: tuple[str, list[Item]]) -> tuple[str, dict[str, list[float]]]:
    """Runs in a worker: a router's name, and its log-probabilities for a batch by question id."""
    name, items = batch
    predictor = predictors[name]
    choice = predictor.choose(predictor.encode([item.request for item in items]))
    assert choice.log_probs is not None, "the router ran"
    return name, {item.question.id: row for item, row in zip(items, choice.log_probs.tolist(), strict=True)}
