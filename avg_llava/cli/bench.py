"""Commands that measure this machine."""

import argparse
from typing import Any

from avg_llava.cli.options import (
    FAILED,
    FINE,
    JSON,
    STATIC_CACHE,
    add_command,
    add_group,
    at_least_one,
    hide_bars_from_files,
    tell,
)


def bench_train(arguments: argparse.Namespace) -> int:
    """Measures a training step against the plain loop's: speed, memory, and what the operations allow."""
    from avg_llava.bench import training as bench

    result = bench.bench_train(arguments.stage, arguments.preset, arguments.repeats, arguments.stored_feedback)
    tell(arguments, result, "\n".join(bench.table_lines(result)))
    return FINE


def bench_inference(arguments: argparse.Namespace) -> int:
    """Measures answers at every level, forced and routed, against transformers' LLaVA-NeXT on the same weights."""
    from avg_llava.bench import inference as bench

    result = bench.bench_inference(
        arguments.preset,
        arguments.batch_size,
        arguments.new_tokens,
        repeats=arguments.repeats,
        static_cache=arguments.static_cache,
    )
    tell(arguments, result, "\n".join(bench.table_lines(result)))
    return FINE


def bench_data(arguments: argparse.Namespace) -> int:
    """Measures decoding and anyres of 1 to 12 megapixel JPEGs against transformers' image processor, on one core."""
    from avg_llava.bench import data as bench
    from avg_llava.common.machine import machine_facts

    result = bench.bench_data(repeats=arguments.repeats)
    tell(arguments, result | {"machine": machine_facts()}, "\n".join(bench.table_lines(result)))
    return FINE


def bench_serve(arguments: argparse.Namespace) -> int:
    """Asks a server, started for it on this machine, by many clients at once, and compares every answer."""
    from avg_llava.bench import serving as stress

    hide_bars_from_files()
    result = stress.bench_serve(arguments.model, arguments.clients, arguments.seconds)
    tell(arguments, result, "\n".join(stress.table_lines(result)))
    return FINE if stress.is_fine(result) else FAILED


_PRESET = (
    ("--preset",),
    {
        "choices": ("mini", "proportioned", "7b"),
        "default": "proportioned",
        "help": "size of the model: mini takes seconds; proportioned (the default) divides its work as the "
        "7B model and takes minutes on a CPU; 7b needs a GPU",
    },
)


def add_bench(commands: Any) -> None:
    """Adds the commands of this module."""
    bench = add_group(
        commands, "bench", "Measurements of speed and memory on this machine.", "avg-llava bench train --stage 3"
    )
    add_command(
        bench,
        "train",
        bench_train,
        "avg-llava bench train --stage 3 --preset proportioned --json",
        [
            (("--stage",), {"type": int, "required": True, "choices": (1, 2, 3, 4), "help": "training stage"}),
            _PRESET,
            (
                ("--repeats",),
                {
                    "type": at_least_one,
                    "default": 3,
                    "metavar": "N",
                    "help": "timed steps of each way, of which the median counts (default 3)",
                },
            ),
            (
                ("--stored-feedback",),
                {"action": "store_true", "help": "stage 4 as from a feedback store, with no language model in memory"},
            ),
            JSON,
        ],
    )
    add_command(
        bench,
        "inference",
        bench_inference,
        "avg-llava bench inference --preset proportioned --json",
        [
            _PRESET,
            (("--batch-size",), {"type": at_least_one, "default": 1, "metavar": "N", "help": "images at once (1)"}),
            (("--new-tokens",), {"type": at_least_one, "default": 1, "metavar": "N", "help": "length of answers (1)"}),
            (
                ("--repeats",),
                {
                    "type": at_least_one,
                    "default": 10,
                    "metavar": "N",
                    "help": "timed answers of each way, of which the median counts (default 10)",
                },
            ),
            STATIC_CACHE,
            JSON,
        ],
    )
    add_command(
        bench,
        "data",
        bench_data,
        "avg-llava bench data --json",
        [
            (
                ("--repeats",),
                {
                    "type": at_least_one,
                    "default": 7,
                    "metavar": "N",
                    "help": "timed rounds of each size, of which the median counts (default 7)",
                },
            ),
            JSON,
        ],
    )
    add_command(
        bench,
        "serve",
        bench_serve,
        "avg-llava bench serve --model avg_llava/mini/checkpoint --clients 64 --seconds 120 --json",
        [
            (("--model",), {"required": True, "metavar": "DIR", "help": "checkpoint that knows the mini world"}),
            (("--clients",), {"type": at_least_one, "default": 64, "metavar": "N", "help": "at once (64)"}),
            (("--seconds",), {"type": at_least_one, "default": 120, "metavar": "N", "help": "of asking (120)"}),
            JSON,
        ],
    )
