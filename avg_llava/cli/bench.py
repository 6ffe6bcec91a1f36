"""Commands that measure speed and memory on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from avg_llava.cli.options import Count, Group, Outcome, ReportingCommand, command


@dataclass(frozen=True, kw_only=True)
class PresetCommand(ReportingCommand):
    """A measurement of a model made for it."""

    preset: Literal["mini", "proportioned", "7b"] = "proportioned"
    """Size of the model: mini takes seconds; proportioned, with the 7B model's ratios of operations, takes minutes on a
    CPU; 7b needs a GPU."""


@command("avg-llava bench train --stage 3 --preset proportioned --json")
class BenchTrain(PresetCommand):
    """Measures a training step against a plain training loop: speed, memory, and the limit set by the operations."""

    stage: Literal[1, 2, 3, 4]
    """Training stage."""
    repeats: Count = 3
    """Timed steps per implementation; the median is reported."""
    stored_feedback: bool = False
    """Measure stage 4 with a feedback store, that is without a language model in memory."""

    def compute(self) -> Outcome:
        from avg_llava.bench import training as bench

        result = bench.bench_train(self.stage, self.preset, self.repeats, self.stored_feedback)
        return Outcome(result, "\n".join(bench.table_lines(result)))


@command("avg-llava bench inference --preset proportioned --json")
class BenchInference(PresetCommand):
    """Measures answers at every level, forced and routed, against transformers' LLaVA-NeXT on the same weights."""

    batch_size: Count = 1
    """Images per batch."""
    new_tokens: Count = 1
    """Generated tokens per answer."""
    repeats: Count = 10
    """Timed answers per setting; the median is reported."""
    static_cache: bool = False
    """Use a KV cache of fixed size for decoding, which is compiled on a GPU."""

    def compute(self) -> Outcome:
        from avg_llava.bench import inference as bench

        result = bench.bench_inference(
            self.preset, self.batch_size, self.new_tokens, repeats=self.repeats, static_cache=self.static_cache
        )
        return Outcome(result, "\n".join(bench.table_lines(result)))


@command("avg-llava bench data --json")
class BenchData(ReportingCommand):
    """Measures decoding and anyres of 1 to 12 megapixel JPEGs against transformers' image processor, on one core."""

    repeats: Count = 7
    """Timed rounds per image size; the median is reported."""

    def compute(self) -> Outcome:
        from avg_llava.bench import data as bench

        result = bench.bench_data(repeats=self.repeats)
        return Outcome(result, "\n".join(bench.table_lines(result)))


@command("avg-llava bench serve --model avg_llava/mini/checkpoint --clients 64 --seconds 120 --json")
class BenchServe(ReportingCommand):
    """Loads a server started on this machine with many concurrent clients, and checks every answer."""

    model: Path
    """Checkpoint folder of a model of the mini world."""
    clients: Count = 64
    """Concurrent clients."""
    seconds: Count = 120
    """Duration in seconds."""

    def compute(self) -> Outcome:
        from avg_llava.bench import serving as bench

        result = bench.bench_serve(str(self.model), self.clients, self.seconds)
        return Outcome(result, "\n".join(bench.table_lines(result)), failed=not bench.is_fine(result))


BENCH = Group(
    "Measurements of speed and memory on this machine.",
    "avg-llava bench train --stage 3",
    {"train": BenchTrain, "inference": BenchInference, "data": BenchData, "serve": BenchServe},
)
