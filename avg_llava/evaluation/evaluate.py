"""`avg-llava evaluate`: one benchmark, one setting, one result file.

Everything in the result but times and machine is a function of model, questions and setting: not of the number of
processes, nor of how often the run was killed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from avg_llava.checkpoints.weight_files import resolve_folder
from avg_llava.common.files import hash_file, hash_json
from avg_llava.common.jsonl import JsonLines
from avg_llava.common.machine import machine_facts
from avg_llava.evaluation.answering import ALL, AUTO, Setting, collect_answers, load_predictor, open_questions
from avg_llava.evaluation.questions import Questions
from avg_llava.evaluation.results import (
    FORMAT,
    CurvePoint,
    Efficiency,
    GenerationFacts,
    ModelFacts,
    Oracle,
    Result,
    Routing,
    Speed,
    Spread,
    write_result,
)
from avg_llava.evaluation.scoring import compute_metrics, score_answers
from avg_llava.evaluation.speed import measure_speed
from avg_llava.model.configuration import AvgLlavaConfig

Line = Mapping[str, Any]
TOKEN_COSTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)


def evaluate(setting: Setting, output: Path, num_workers: int | None, num_timed: int) -> Result:
    """Answers, scores and times one benchmark, and writes `<output>/<benchmark>.json` and its answers beside it.

    Args:
        setting: Who answers what.
        output: Folder of the result. Answers are kept in `<output>/store/<benchmark>`; a second call answers only what
            is missing.
        num_workers: Processes that answer; None takes one per GPU or core where there is enough to do.
        num_timed: Questions on which the model is timed against its finest level and against transformers' LLaVA-NeXT;
            0 leaves that out.

    Raises:
        BenchmarkError: the data set cannot be opened.
        ValueError: the model lacks the level that was asked for, or no question could be answered.
    """
    config = AvgLlavaConfig.from_pretrained(resolve_folder(setting.model))
    levels = list(config.granularities or ())
    if isinstance(setting.granularity, int) and setting.granularity not in levels:
        raise ValueError(f"granularity {setting.granularity} is none of the model's levels {levels}")
    questions = open_questions(setting)
    facts = _facts(setting, questions, levels)
    identity = _identity(setting, questions, facts)
    folder = output / "store" / setting.benchmark
    lines, failures = collect_answers(setting, questions, folder, identity, num_workers)

    chosen = {index: _chosen(line, setting) for index, line in lines.items()}
    outcomes = score_answers(questions, {index: answer["prediction"] for index, answer in chosen.items()})
    metrics = compute_metrics(questions, outcomes)
    answers = output / f"{setting.benchmark}.answers.jsonl"
    JsonLines(answers).write(
        {
            "id": str(index),
            "prompt": questions.prompt(index),
            "reference": questions.reference(index),
            **answer,
            "router_log_probs": lines[index]["router_log_probs"],
            "score": questions.benchmark.question_score(outcomes[index]),
        }
        for index, answer in chosen.items()
    )
    speed = None
    if num_timed:
        speed = measure_speed(load_predictor(setting, _device()), questions, list(lines)[:num_timed], setting)
    result = Result(
        format=FORMAT,
        benchmark=setting.benchmark,
        protocol=setting.protocol,
        granularity=setting.granularity,
        token_cost=setting.token_cost,
        prompt=questions.prompt(0),
        complete=len(lines) == len(questions),
        num_failed=len(failures),
        failures=tuple(failures),
        metrics=metrics,
        efficiency=_efficiency(lines, chosen, levels, speed),
        routing=_routing(lines, chosen, levels, setting, questions),
        machine=machine_facts(),
        answers=answers.name,
        **facts,
    )
    write_result(result, output / f"{setting.benchmark}.json")
    return result


# ---- what the result is about -------------------------------------------------------------------------------------


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _facts(setting: Setting, questions: Questions, levels: list[int]) -> dict[str, Any]:
    return {
        "model": ModelFacts(
            str(setting.model),
            model_fingerprint(resolve_folder(setting.model)),
            str(setting.dtype).removeprefix("torch."),
            tuple(levels),
        ),
        "dataset": questions.dataset,
        "harness": questions.harness,
        "generation": GenerationFacts(questions.max_new_tokens, setting.batch_size),
    }


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over the names and hashes of a checkpoint's weights and its configuration."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"), folder / "config.json"])
    return hash_json([(path.name, hash_file(path)) for path in files])


def _identity(setting: Setting, questions: Questions, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the stored answers depend on. A price does not, where every level is answered anyway."""
    return {
        "model": facts["model"].fingerprint,
        "dtype": facts["model"].dtype,
        "questions": facts["dataset"].fingerprint,
        "prompt": questions.prompt(0),
        "protocol": setting.protocol,
        "harness": facts["harness"].version,
        "granularity": setting.granularity,
        "token_cost": setting.token_cost,
        "batch_size": setting.batch_size,
    }


def _chosen(line: Line, setting: Setting) -> dict[str, Any]:
    """The answer that counts: the router's where there is one, or the only one."""
    answers = line["answers"]
    return dict(answers[AUTO] if AUTO in answers else next(iter(answers.values())))


# ---- tokens, times, levels ----------------------------------------------------------------------------------------


def _efficiency(
    lines: Mapping[int, Line], chosen: Mapping[int, Line], levels: Sequence[int], speed: Speed | None
) -> Efficiency:
    times = [answer["milliseconds"] for answer in chosen.values()]
    first = [time["encode"] + time["route"] + time["prefill"] for time in times]
    totals = [sum(time.values()) for time in times]
    routed = sum(time["route"] for time in times)
    seen = [index for index, line in lines.items() if line["finest_visual_tokens"]]
    return Efficiency(
        mean_visual_tokens=fmean(answer["num_visual_tokens"] for answer in chosen.values()),
        token_share=fmean(chosen[i]["num_visual_tokens"] / lines[i]["finest_visual_tokens"] for i in seen),
        grid_share=fmean(fmean(chosen[i]["granularity"]) / levels[-1] for i in seen),
        time_to_first_token_ms=Spread(median(first), fmean(first)),
        seconds_per_question=Spread(median(totals) / 1000, fmean(totals) / 1000),
        router_share=routed / sum(totals) if routed else None,
        speed=speed,
    )


def _routing(
    lines: Mapping[int, Line],
    chosen: Mapping[int, Line],
    levels: Sequence[int],
    setting: Setting,
    questions: Questions,
) -> Routing:
    counts = Counter(level for answer in chosen.values() for level in answer["granularity"])
    shares = {str(level): counts[level] / counts.total() for level in levels} if counts else {}
    if setting.granularity != ALL:
        return Routing(shares, None, None)
    return Routing(shares, *_hindsight(lines, chosen, levels, questions))


def _hindsight(
    lines: Mapping[int, Line], chosen: Mapping[int, Line], levels: Sequence[int], questions: Questions
) -> tuple[Oracle, tuple[CurvePoint, ...]]:
    """The per-question best level and the router at other prices, looked up among the answers at every level."""
    seen = {index: line for index, line in lines.items() if line["router_log_probs"]}
    answers = [{index: line["answers"][str(level)] for index, line in seen.items()} for level in levels]
    texts = {index: answer["prediction"] for index, answer in chosen.items()}
    by_level = [score_answers(questions, {i: answer["prediction"] for i, answer in of.items()}) for of in answers]
    unseen = score_answers(questions, {index: text for index, text in texts.items() if index not in seen})
    router = compute_metrics(questions, score_answers(questions, texts))

    def outcome(choice: Mapping[int, int]) -> tuple[float, list[Line]]:
        """The headline's value and the answers, with level number `choice[i]` for question i."""
        picked = {index: by_level[level][index] for index, level in choice.items()}
        headline = next(iter(compute_metrics(questions, dict(sorted((unseen | picked).items()))).values()))
        return headline.value, [answers[level][index] for index, level in choice.items()]

    score = questions.benchmark.question_score
    best = {index: int(np.argmax([score(outcomes[index]) for outcomes in by_level])) for index in seen}
    value, picked = outcome(best)
    oracle = Oracle(
        value=value,
        regret=value - next(iter(router.values())).value,
        agreement=fmean(set(chosen[index]["granularity"]) == {levels[level]} for index, level in best.items()),
        mean_visual_tokens=fmean(answer["num_visual_tokens"] for answer in picked),
    )
    doublings = np.log2(np.asarray(levels) / levels[0])
    curve = []
    for cost in TOKEN_COSTS:
        choice = {
            index: int(np.argmax(np.mean(line["router_log_probs"], axis=0) - cost * doublings))
            for index, line in seen.items()
        }
        value, picked = outcome(choice)
        shares = [
            answer["num_visual_tokens"] / line["finest_visual_tokens"]
            for answer, line in zip(picked, seen.values(), strict=True)
        ]
        curve.append(CurvePoint(cost, value, fmean(shares), fmean(answer["num_visual_tokens"] for answer in picked)))
    return oracle, tuple(curve)


__all__ = ["evaluate"]
