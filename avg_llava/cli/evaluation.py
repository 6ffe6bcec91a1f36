"""Commands that measure."""

import argparse
from pathlib import Path
from typing import Any

from avg_llava.cli.options import FAILED, FINE, JSON, add_command, at_least_one, hide_bars_from_files, tell


def evaluate(arguments: argparse.Namespace) -> int:
    """Scores a model on a benchmark; the same command continues a killed run."""
    import dataclasses

    import torch

    from avg_llava.evaluation.answering import Setting
    from avg_llava.evaluation.benchmarks import BENCHMARKS
    from avg_llava.evaluation.evaluate import evaluate as evaluate_benchmark
    from avg_llava.evaluation.published import compare_with_expected, load_expected

    hide_bars_from_files()
    names = list(BENCHMARKS) if arguments.benchmark == "all" else [arguments.benchmark]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no benchmark; there are {', '.join(BENCHMARKS)}, and all")
    expected = load_expected(arguments.check, names) if arguments.check else []
    results, lines, differences, failures = [], [], [], []
    for name in names:
        setting = Setting(
            benchmark=name,
            model=arguments.model,
            protocol=arguments.protocol,
            granularity=arguments.granularity,
            token_cost=arguments.token_cost,
            data=arguments.data,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            dtype=getattr(torch, arguments.dtype),
        )
        result = evaluate_benchmark(setting, arguments.output, arguments.workers, arguments.timed)
        results.append(result)
        failures += [f"failed: {failure.error}" for failure in result.failures]
        compared = {item.expected.metric: item for item in compare_with_expected(result, expected)} if expected else {}
        differences += [f"{name} {metric}" for metric, item in compared.items() if not item.agrees]
        lines += _lines(result, compared)
    text = "\n".join([_HEAD, *lines, *failures, *(f"differs from what is expected: {name}" for name in differences)])
    tell(arguments, [dataclasses.asdict(result) for result in results], text)
    return FAILED if failures or differences else FINE


_HEAD = (
    f"{'benchmark':12s}{'metric':36s}{'measured':>9s}{'expected':>9s}{'questions':>10s}{'failed':>7s}{'tokens':>8s}"
    f"{'s':>8s}"
)


def _lines(result: Any, compared: Any) -> list[str]:
    """One line per metric: value in percent or points, and for the benchmark: share of tokens, seconds per question."""
    from avg_llava.evaluation.published import in_table_units

    lines = []
    for name, metric in result.metrics.items():
        measured = in_table_units(metric.value, metric.kind, metric.maximum)
        wanted = f"{compared[name].expected.published:9.1f}" if name in compared else " " * 9
        lines.append(
            f"{result.benchmark:12s}{metric.label:36s}{measured:9.1f}{wanted}{result.dataset.num_questions:10d}"
            f"{result.num_failed:7d}{result.efficiency.token_share:8.1%}"
            f"{result.efficiency.seconds_per_question.median:8.3f}"
        )
    return lines


def _granularity(text: str) -> str | int:
    if text in ("auto", "random", "all"):
        return text
    if text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of auto, random, all, and no number of visual tokens per crop")


def add_evaluation(commands: Any) -> None:
    """Adds the commands of this module."""
    add_command(
        commands,
        "evaluate",
        evaluate,
        "avg-llava evaluate --benchmark textvqa --model checkpoints/avg-llava-7b --output runs/eval",
        [
            (("--benchmark",), {"required": True, "metavar": "NAME", "help": "one of the paper's twelve, or all"}),
            (("--model",), {"required": True, "type": Path, "metavar": "DIR", "help": "checkpoint folder"}),
            (
                ("--output",),
                {"type": Path, "default": Path("runs/eval"), "metavar": "DIR", "help": "results (runs/eval)"},
            ),
            (
                ("--data",),
                {"type": Path, "metavar": "DIR", "help": "folder with copies of the data sets (default: the hub)"},
            ),
            (
                ("--protocol",),
                {
                    "choices": ["current", "paper"],
                    "default": "current",
                    "help": "today's lmms-eval (default), or prompts and metrics of the paper's harness",
                },
            ),
            (
                ("--granularity",),
                {
                    "type": _granularity,
                    "default": "auto",
                    "metavar": "N|auto|random|all",
                    "help": "visual tokens per crop; auto: the router (default); all: the router and every level, for "
                    "the oracle and the curve over token_cost",
                },
            ),
            (
                ("--token-cost",),
                {
                    "type": float,
                    "default": 0.0,
                    "metavar": "X",
                    "help": "the router's price in nats per doubling of visual tokens (default 0, the paper)",
                },
            ),
            (("--limit",), {"type": at_least_one, "metavar": "N", "help": "only the first N questions"}),
            (
                ("--batch-size",),
                {"type": at_least_one, "default": 1, "metavar": "N", "help": "questions at once (1)"},
            ),
            (
                ("--workers",),
                {"type": at_least_one, "metavar": "N", "help": "processes (default: one per GPU, or per core)"},
            ),
            (
                ("--timed",),
                {
                    "type": int,
                    "default": 16,
                    "metavar": "N",
                    "help": "questions on which speed is compared with the finest level and LLaVA-NeXT (16; 0: none)",
                },
            ),
            (
                ("--dtype",),
                {"choices": ["float32", "bfloat16", "float16"], "default": "float32", "help": "of weights (float32)"},
            ),
            (
                ("--check",),
                {
                    "type": Path,
                    "metavar": "FILE",
                    "help": "expected figures, or `published` for the paper's; fail if a measured one differs",
                },
            ),
            JSON,
        ],
    )
