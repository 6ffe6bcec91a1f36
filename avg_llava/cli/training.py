"""Commands that train, prepare training and estimate its cost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from avg_llava.cli.options import (
    COUNT,
    NUMBER,
    Count,
    NumWorkers,
    Outcome,
    ReportingCommand,
    StageCommand,
    command,
    parsed_by,
    unset,
)

if TYPE_CHECKING:
    from avg_llava.data.verify import Verification

MAX_LISTED = 20
"""Samples listed without a skip list to write them to, and folders listed per source."""


def _image_size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` as (height, width)."""
    width, times, height = text.partition("x")
    if not times or not width.isdigit() or not height.isdigit() or int(width) < 1 or int(height) < 1:
        raise ValueError(f"expected WIDTHxHEIGHT such as 640x480, got {text!r}")
    return int(height), int(width)


Gpu = Literal["a100", "a100-40gb", "h100", "h200", "l40s", "rtx4090"]
Zero = Literal["none", "0", "1", "2", "3", "3-offload"]


@command("avg-llava train configs/mini/stage1.yaml --optim.lr 5e-4")
class Train(StageCommand):
    """Trains one stage, in this process or as one rank of a launcher's."""

    config: Annotated[Path, Positional, arg(metavar="CONFIG")]
    """YAML file of the stage."""
    dry_run: bool = False
    """Check configuration, weights, data and disk without training."""
    force_start: bool = False
    """Accept a start that is not a finished run of the parent stage."""

    def run(self) -> int:
        words = [str(self.config), *self.overrides, *(["--force-start"] if self.force_start else [])]
        if self.dry_run:
            from avg_llava.planning import dry_run

            return dry_run.main(words)
        from avg_llava.training import run

        return run.main(words)


@command("avg-llava feedback --config configs/vicuna-7b/stage4.yaml --output runs/vicuna-7b/feedback --num-processes 8")
class Feedback(StageCommand, ReportingCommand):
    """Collects the language model's feedback for stage 4 once, for any number of runs."""

    config: Path
    """YAML file of stage 4."""
    output: Path
    """Folder of the feedback store; an incomplete one is continued."""
    num_processes: NumWorkers = None
    """Number of processes."""

    def compute(self) -> Outcome:
        from avg_llava.training.config import load_config
        from avg_llava.training.feedback import collect

        collection = collect(load_config(self.config, self.overrides), self.output, self.num_processes)
        counts = ", ".join(f"{count} {status}" for status, count in collection.counts.items())
        text = f"the feedback on {collection.num_samples} samples is in {self.output}: {counts}"
        if collection.num_missing_shards:
            text = (
                f"this machine's share of the feedback is in {self.output}: {counts}; {collection.num_missing_shards} "
                f"of {collection.num_shards} shards are left to other machines"
            )
        return Outcome({"output": str(self.output), **asdict(collection)}, text)


@command("avg-llava verify-data --config configs/vicuna-7b/stage2.yaml --output skip.json")
class VerifyData(StageCommand, ReportingCommand):
    """Checks every sample of a configuration: missing, unreadable, malformed, too long, no supervised token."""

    config: Path
    """YAML file of any stage."""
    output: Annotated[Path | None, unset("none")] = None
    """Skip list to write, for data.skip_list of a configuration."""
    model_of: Annotated[Path | None, unset("--config")] = None
    """YAML file that names the tokenizer and the image settings: that of stage 1, while model.start is not trained."""
    num_processes: Annotated[int | None, COUNT, unset("one per core")] = None
    """Number of processes."""

    def compute(self) -> Outcome:
        from tqdm import tqdm

        from avg_llava.common.machine import num_cores
        from avg_llava.data.verify import verify
        from avg_llava.training.assembly import build_dataset, load_processor
        from avg_llava.training.config import load_config

        config = load_config(self.config, self.overrides)
        # Verify all records that a weight could sample from, whatever the seed.
        sources = tuple(replace(source, weight=1.0) for source in config.data.sources)
        data = replace(config.data, sources=sources, on_bad_sample="skip", skip_list=None)
        try:
            processor, model_config = load_processor(config if self.model_of is None else load_config(self.model_of))
        except ValueError as error:
            raise ValueError(
                f"{error}; if model.start is not trained yet, name stage 1's file with --model-of"
            ) from error
        model_config.max_sequence_length = config.model.max_length or model_config.max_sequence_length
        dataset = build_dataset(replace(config, data=data), processor, model_config)
        hidden = not config.logging.progress_bar
        with tqdm(desc="verifying", unit="sample", dynamic_ncols=True, disable=hidden) as progress:

            def update(done: int, total: int) -> None:
                progress.total = total
                progress.update(done - progress.n)

            verification = verify(dataset, self.num_processes or num_cores(), self.output, update)
        expected = [source.expected or {} for source in config.data.sources]
        facts = {
            "sources": [
                vars(source) | {"expected": counts, "unexpected": source.unexpected(counts)}
                for source, counts in zip(verification.sources, expected, strict=True)
            ],
            "num_skipped": verification.num_skipped,
            "skip_list": None if self.output is None else str(self.output),
        }
        text = "\n".join(_verification_lines(verification, expected, self.output))
        return Outcome(facts, text, failed=verification.num_skipped > 0 and self.output is None)


@command("avg-llava estimate --config configs/vicuna-7b/stage3.yaml --gpus 8 --gpu h100")
class Estimate(StageCommand, ReportingCommand):
    """Estimates memory per GPU, operations and hours of a training run, without loading weights."""

    config: Path
    """YAML file of any stage."""
    gpus: Count = 8
    """Number of GPUs."""
    gpu: Gpu = "h100"
    """GPU model."""
    zero: Annotated[Zero | None, unset("that of the configuration")] = None
    """ZeRO stage named in the heading."""
    mfu: Annotated[float, NUMBER] = 0.4
    """Model FLOPs utilization, for the hours."""
    num_samples: Annotated[int | None, COUNT, unset("counted, or known by file name")] = None
    """Samples per epoch."""
    image_size: Annotated[tuple[int, int] | None, parsed_by(_image_size, "WIDTHxHEIGHT"), unset("from the data")] = None
    """Size of every image."""
    prompt_tokens: Annotated[int | None, COUNT, unset("from the data")] = None
    """Text tokens per prompt."""
    answer_tokens: Annotated[int | None, COUNT, unset("from the data")] = None
    """Tokens per answer."""
    model_of: Annotated[Path | None, unset("found by its output.dir in the folders around the configuration")] = None
    """YAML file of the stage that produces model.start, or of stage 1, while model.start does not exist."""

    def compute(self) -> Outcome:
        from avg_llava.planning.estimate import Request, estimate, table_lines

        request = Request(
            num_gpus=self.gpus,
            gpu=self.gpu,
            zero=self.zero,
            mfu=self.mfu,
            num_samples=self.num_samples,
            image_size=self.image_size,
            num_prompt_tokens=self.prompt_tokens,
            num_answer_tokens=self.answer_tokens,
            model_of=self.model_of,
        )
        result = estimate(self.config, request, self.overrides)
        return Outcome(result, "\n".join(table_lines(result)))


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
