"""Results in the format of `avg-llava evaluate` with invented answers, for tests and for a look at the report."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np

from avg_llava.evaluation.results import Result, parse_result, read_json
from avg_llava.evaluation.statistics import compute_value

LEVELS = (36, 72, 144, 288, 576)
OUTCOMES = ("tp", "fp", "fn", "tn", "other")
MME = {"perception": ("existence", "count", "OCR"), "cognition": ("code_reasoning", "text_translation")}
NAMES = {
    "chartqa": ("relaxed_overall", "relaxed accuracy, overall"),
    "mmbench": ("circular_accuracy", "circular accuracy"),
    "mmbench_cn": ("circular_accuracy", "circular accuracy"),
    "mmmu": ("mmmu_acc", "accuracy"),
}
# Benchmark -> (share of right answers, share of images at each level): figures that look like the paper's.
SHAPES = {
    "gqa": (0.63, (0.15, 0.02, 0.1, 0.03, 0.7)),
    "scienceqa": (0.71, (0.7, 0.02, 0.15, 0.02, 0.11)),
    "vizwiz": (0.6, (0.35, 0.02, 0.13, 0.02, 0.48)),
    "textvqa": (0.67, (0.02, 0.01, 0.03, 0.02, 0.92)),
    "chartqa": (0.66, (0.0, 0.0, 0.01, 0.01, 0.98)),
    "docvqa": (0.75, (0.0, 0.0, 0.02, 0.01, 0.97)),
    "ai2d": (0.67, (0.8, 0.02, 0.1, 0.01, 0.07)),
    "mme": (0.78, (0.2, 0.03, 0.1, 0.03, 0.64)),
    "mmbench": (0.7, (0.65, 0.02, 0.12, 0.02, 0.19)),
    "mmbench_cn": (0.62, (0.62, 0.03, 0.12, 0.03, 0.2)),
    "pope": (0.87, (0.3, 0.02, 0.2, 0.03, 0.45)),
    "mmmu": (0.37, (0.66, 0.02, 0.11, 0.02, 0.19)),
}


def metric(kind: str, units: dict[str, Any], label: str, maximum: float = 1.0) -> dict[str, Any]:
    return {"value": compute_value(kind, units), "kind": kind, "maximum": maximum, "label": label, "units": units}


def make_metrics(benchmark: str, right: float, num_questions: int, rng: np.random.Generator) -> dict[str, Any]:
    """The benchmark's metrics over invented answers, a share `right` of which is right."""
    names = [f"{benchmark}-{index}" for index in range(num_questions)]
    scores = (rng.random(num_questions) < right).astype(float).tolist()
    if benchmark == "mme":
        made = {}
        for key, categories in MME.items():
            units = {
                f"{category}-{index}": [float(rng.choice([0, 50, 200], p=[0.05, 0.25, 0.7])), category]
                for category in categories
                for index in range(num_questions // 5)
            }
            made[f"mme_{key}_score"] = metric("stratum_sum", units, key, 200.0 * len(categories))
        return made
    if benchmark == "pope":
        drawn = rng.choice(OUTCOMES, size=num_questions, p=[0.42, 0.05, 0.07, 0.45, 0.01]).tolist()
        correct = {name: float(outcome in ("tp", "tn")) for name, outcome in zip(names, drawn, strict=True)}
        outcomes = dict(zip(names, drawn, strict=True))
        return {
            "pope_f1_score": metric("f1", outcomes, "F1"),
            "pope_accuracy": metric("mean", correct, "accuracy"),
            "pope_precision": metric("precision", outcomes, "precision"),
            "pope_recall": metric("recall", outcomes, "recall"),
        }
    if benchmark == "docvqa":
        anls = [float(score * rng.choice([1.0, 0.8, 0.62])) for score in scores]
        return {
            "anls": metric("mean", dict(zip(names, anls, strict=True)), "ANLS"),
            "anls_binarised": metric(
                "mean", dict(zip(names, scores, strict=True)), "share of answers with ANLS >= 0.5"
            ),
        }
    name, label = NAMES.get(benchmark, ("exact_match", "accuracy"))
    return {name: metric("mean", dict(zip(names, scores, strict=True)), label)}


def make_result(benchmark: str = "gqa", *, seed: int = 0, num_questions: int = 200, **changes: Any) -> dict[str, Any]:
    """The content of one result file.

    Args:
        benchmark: Its name.
        seed: Seed of the invented answers.
        num_questions: Number of questions.
        changes: Values that replace those of the file; `a__b` is the key b inside a.
    """
    right, shares = SHAPES[benchmark]
    rng = np.random.default_rng([seed, *benchmark.encode()])
    granularity = changes.get("granularity", "auto")
    if isinstance(granularity, int):
        shares = tuple(float(level == granularity) for level in LEVELS)
    elif granularity == "random":
        shares = (0.2,) * 5
    grid_share = sum(share * level for share, level in zip(shares, LEVELS, strict=True)) / LEVELS[-1]
    seconds = 0.1 + 0.3 * grid_share
    finest = 0.4 if granularity == "auto" else seconds
    content = {
        "format": 1,
        "benchmark": benchmark,
        "protocol": "current",
        "model": {
            "path": "runs/fixture/stage4",
            "fingerprint": "0" * 64,
            "dtype": "float32",
            "granularities": list(LEVELS),
        },
        "granularity": granularity,
        "token_cost": 0.0,
        "dataset": {
            "path": f"data/{benchmark}",
            "config": None,
            "split": "test",
            "num_questions": num_questions,
            "fingerprint": "1" * 64,
        },
        "harness": {"name": "lmms-eval", "version": "0.7.3", "task": benchmark},
        "generation": {"max_new_tokens": 16, "batch_size": 1},
        "prompt": "<image>\nWhat is it?\nAnswer the question using a single word or phrase.",
        "complete": True,
        "num_failed": 0,
        "failures": [],
        "metrics": make_metrics(benchmark, right, num_questions, rng),
        "efficiency": {
            "mean_visual_tokens": 2300 * grid_share,
            "token_share": grid_share,
            "grid_share": grid_share,
            "time_to_first_token_ms": {"median": 900 * seconds, "mean": 910 * seconds},
            "seconds_per_question": {"median": seconds, "mean": 1.02 * seconds},
            "router_share": 0.03 if granularity == "auto" else None,
            "speed": {
                "num_questions": 16,
                "routed_seconds": 16 * seconds,
                "finest_seconds": 16 * finest,
                "llava_next_seconds": 16 * 1.01 * finest,
                "speedup_over_finest": finest / seconds,
                "speedup_over_llava_next": 1.01 * finest / seconds,
            }
            if granularity == "auto"
            else None,
        },
        "routing": {
            "levels": {str(level): share for level, share in zip(LEVELS, shares, strict=True)},
            "oracle": None,
            "curve": None,
        },
        "machine": {"processor": "none: invented", "cores": 1, "GPU": "none", "torch": "0"},
        "answers": f"{benchmark}.answers.jsonl",
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        node = content
        for section in sections:
            node = node[section]
        node[name] = copy.deepcopy(value)
    return content


def write(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read_result(path: Path) -> Result:
    return parse_result(read_json(path), str(path))


def write_all(folder: Path, **changes: Any) -> list[Path]:
    """A result for each of the twelve benchmarks."""
    return [write(folder, f"{name}.json", make_result(name, **changes)) for name in SHAPES]
