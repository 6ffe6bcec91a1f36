"""Commands that train, and that prepare training."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avg_llava.cli.options import FAILED, FINE, JSON, add_command, at_least_one, hide_bars_from_files, tell

if TYPE_CHECKING:
    from avg_llava.data.verify import Verification

MAX_LISTED = 20  # samples that are named where there is no file to list them in, and folders of a source


def train(arguments: argparse.Namespace) -> int:
    """Trains one stage, in this process or as one rank of a launcher's."""
    command = [str(arguments.config), *arguments.overrides]
    if "--dry-run" in command:
        from avg_llava.planning import dry_run

        return dry_run.main(command)
    from avg_llava.training import run

    return run.main(command)


def feedback(arguments: argparse.Namespace) -> int:
    """Collects the language model's feedback that stage 4 learns from, once for any number of runs."""
    from avg_llava.training.config import load_config
    from avg_llava.training.feedback import collect

    hide_bars_from_files()
    collection = collect(load_config(arguments.config), arguments.output, arguments.num_processes)
    counts = ", ".join(f"{count} {status}" for status, count in collection.counts.items())
    text = f"the feedback on {collection.num_samples} samples is in {arguments.output}: {counts}"
    if collection.num_missing_shards:
        text = (
            f"this machine's share of the feedback is in {arguments.output}: {counts}; {collection.num_missing_shards} "
            f"of {collection.num_shards} shards are left to other machines"
        )
    tell(arguments, {"output": str(arguments.output), **asdict(collection)}, text)
    return FINE


def verify_data(arguments: argparse.Namespace) -> int:
    """Looks at every sample of a configuration's data: missing, unreadable, malformed, over-long, fully masked."""
    from tqdm import tqdm

    from avg_llava.common.machine import num_cores
    from avg_llava.data.verify import verify
    from avg_llava.training.assembly import build_dataset, load_processor
    from avg_llava.training.config import load_config

    config = load_config(arguments.config)
    # All records that a weight could draw from, and not only those that this seed draws.
    sources = tuple(replace(source, weight=1.0) for source in config.data.sources)
    data = replace(config.data, sources=sources, on_bad_sample="skip", skip_list=None)
    try:
        processor, model_config = load_processor(load_config(arguments.model_of or arguments.config))
    except ValueError as error:
        raise ValueError(f"{error}; if model.start is not trained yet, name stage 1's file with --model-of") from error
    model_config.max_sequence_length = config.model.max_length or model_config.max_sequence_length
    dataset = build_dataset(replace(config, data=data), processor, model_config)
    with tqdm(desc="verifying", unit="sample", dynamic_ncols=True, disable=not config.logging.progress_bar) as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done - progress.n)

        verification = verify(dataset, arguments.num_processes or num_cores(), arguments.output, show)
    expected = [source.expected or {} for source in config.data.sources]
    facts = {
        "sources": [
            vars(source) | {"expected": counts, "unexpected": source.unexpected(counts)}
            for source, counts in zip(verification.sources, expected, strict=True)
        ],
        "num_skipped": verification.num_skipped,
        "skip_list": None if arguments.output is None else str(arguments.output),
    }
    tell(arguments, facts, "\n".join(_verification_lines(verification, expected, arguments.output)))
    return FAILED if verification.num_skipped and arguments.output is None else FINE


def _verification_lines(
    verification: "Verification", expected: Sequence[Mapping[str, int]], output: Path | None
) -> Iterator[str]:
    for source, counts in zip(verification.sources, expected, strict=True):
        yield f"{source.path}: {source.num_records:,} records"
        for group, count in source.groups.most_common(MAX_LISTED):
            yield f"  {group:<28} {count:>12,}"
        if len(source.groups) > MAX_LISTED:
            yield f"  and {len(source.groups) - MAX_LISTED} more folders"
        for name, count in source.unexpected(counts).items():
            yield f"  unlike expected: {name:<11} {count:>12,} instead of about {counts[name]:,}"
        for problem, count in source.problems.most_common():
            yield f"  problem: {problem:<19} {count:>12,}"
    if output is not None:
        yield f"{verification.num_skipped} records to skip are listed in {output}; train with --data.skip_list {output}"
        return
    reasons = [
        f"{records.path}, position {position}: {reason}"
        for records in verification.skip_list.files.values()
        for position, reason in records.skip.items()
    ]
    yield from reasons[:MAX_LISTED]
    if len(reasons) > MAX_LISTED:
        yield f"and {len(reasons) - MAX_LISTED} more"
    if reasons:
        yield "write a skip list with --output, or correct these records"


def add_training(commands: Any) -> None:
    """Adds the commands of this module."""
    add_command(
        commands,
        "train",
        train,
        "avg-llava train configs/mini/stage1.yaml --optim.lr 5e-4",
        [
            (("config",), {"type": Path, "help": "YAML file of the stage"}),
            (
                ("overrides",),
                {
                    "nargs": argparse.REMAINDER,
                    "metavar": "--key.subkey value ...",
                    "help": "over values of the YAML file; --dry-run looks for what could go wrong, without training",
                },
            ),
        ],
    )
    processes = (
        ("--num-processes",),
        {"type": at_least_one, "metavar": "N", "help": "processes (default: one per GPU or, without, per core)"},
    )
    add_command(
        commands,
        "feedback",
        feedback,
        "avg-llava feedback --config configs/vicuna-7b/stage4.yaml --output runs/vicuna-7b/feedback --num-processes 8",
        [
            (("--config",), {"type": Path, "required": True, "metavar": "FILE", "help": "YAML file of stage 4"}),
            (
                ("--output",),
                {
                    "type": Path,
                    "required": True,
                    "metavar": "DIR",
                    "help": "folder of the store; one that was begun is continued",
                },
            ),
            processes,
            JSON,
        ],
    )
    add_command(
        commands,
        "verify-data",
        verify_data,
        "avg-llava verify-data --config configs/vicuna-7b/stage2.yaml --output skip.json",
        [
            (("--config",), {"type": Path, "required": True, "metavar": "FILE", "help": "YAML file of any stage"}),
            (
                ("--output",),
                {"type": Path, "metavar": "FILE", "help": "skip list to write, for data.skip_list of a configuration"},
            ),
            (
                ("--model-of",),
                {
                    "type": Path,
                    "metavar": "FILE",
                    "help": "YAML file to take tokenizer and image settings from: stage 1's, where model.start is not "
                    "trained yet",
                },
            ),
            (
                ("--num-processes",),
                {"type": at_least_one, "metavar": "N", "help": "processes (default: one per core)"},
            ),
            JSON,
        ],
    )
