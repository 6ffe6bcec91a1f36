"""What a run is watched by: the figures of the log's lines, gathered without holding up the steps.

Between two lines, sums stay on the device where they arise; a line brings them to the host, those of all processes in
one exchange that every process takes part in. `docs/watching.md` explains the figures.

Shapes: B samples, K images whose level was chosen, S sources, G levels coarse to fine.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avg_llava.common.machine import known_peak, peak_memory
from avg_llava.data.dataset import ConversationDataset
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.training.config import TrainConfig
from avg_llava.training.flops import SampleShape, sequence_lengths, shapes_of, step_flops
from avg_llava.training.lora import AdapterShape
from avg_llava.training.losses import num_supervised
from avg_llava.training.objectives import ObjectiveOutput
from avg_llava.training.stages import STAGES, Part

# Figures of a line that are the machine's: those that a repeated run does not repeat.
MACHINE_METRICS = ("samples_per_second", "tokens_per_second", "tflops", "mfu", "data_wait_share", "memory_gib")


class Record(NamedTuple):
    """What one process has seen since the last line, as plain numbers.

    Attributes:
        metrics: Weighted sum and weight of each of the objective's metrics.
        choices: (S, G) how often each level was chosen for images of each source; empty where nothing is chosen.
        squares: Sum of the squared gradients of each part, as far as this process holds them, of the last step.
        samples: Samples.
        tokens: Text and visual tokens through the language model.
        flops: Operations of the passes.
        seconds: Wall time.
        waited: Seconds of it in which the next batch was waited for.
        memory: Peak in bytes, since the process began.
    """

    metrics: dict[str, tuple[float, int]]
    choices: list[list[int]]
    squares: dict[str, float]
    samples: int
    tokens: int
    flops: float
    seconds: float
    waited: float
    memory: int


class Monitor:
    """One process's view of a run.

    Args:
        config: the run's configuration.
        model_config: of the model.
        adapters: of LoRA, in the parts that are trained through them.
        dataset: says which source a sample comes from.
        device: where the run computes.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: AvgLlavaConfig,
        adapters: Mapping[Part, AdapterShape],
        dataset: ConversationDataset,
        device: torch.device,
    ):
        self.config = config
        self.model_config = model_config
        self.adapters = adapters
        self.dataset = dataset
        self.device = device
        self._since: float | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self._metrics: dict[str, tuple[Tensor, int]] = {}
        self._choices: Tensor | None = None
        self._squares: dict[str, Tensor] = {}
        self._counts: list[Tensor] = []
        self._image_sizes: list[Tensor] = []
        self._waited = 0.0

    def waiting_for(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same batches; the time until each comes is counted."""
        while True:
            start = time.perf_counter()
            if self._since is None:
                self._since = start
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def count(self, batches: Sequence[dict[str, Any]]) -> None:
        """Note what the micro-batches of a step are made of."""
        for batch in batches:
            is_image = (batch["input_ids"] == self.model_config.image_token_id) & batch["attention_mask"].bool()
            self._counts.append(
                torch.stack([is_image.sum(dim=1), batch["attention_mask"].sum(dim=1), num_supervised(batch["labels"])])
            )  # (3, B)
            if "image_sizes" in batch:
                self._image_sizes.append(batch["image_sizes"])

    def add(self, outputs: ObjectiveOutput, indices: Sequence[int]) -> None:
        """Note a micro-batch's metrics and choices.

        Args:
            outputs: what the objective gave.
            indices: (B,) positions of its samples in the data set.
        """
        num_items = outputs["num_items"]
        for name, value in outputs["metrics"].items():
            total, weight = self._metrics.get(name, (torch.zeros_like(value), 0))
            self._metrics[name] = (total + value * num_items, weight + num_items)
        if "chosen" in outputs:
            shape = (len(self.dataset.source_names), len(self.model_config.granularities))
            sources = torch.tensor([self.dataset.source_number(index) for index in indices]).to(self.device)  # (B,)
            cells = sources[outputs["owners"]] * shape[1] + outputs["chosen"]  # (K,)
            if self._choices is None:
                self._choices = torch.zeros(shape, dtype=torch.long, device=self.device)
            self._choices.view(-1).index_add_(0, cells, torch.ones_like(cells))

    def measure_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the size of each part's gradients, of as many as this process holds.

        To be called when the optimizer is about to step, with groups named as `optim.parameter_groups` does. DeepSpeed
        lets it step once for each group, on this process's share of the group's gradients.
        """
        for group in optimizer.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if gradients:
                part = group["name"].split("/")[0]
                square = torch.nn.utils.get_total_norm(gradients).float().square()
                self._squares[part] = self._squares[part] + square if part in self._squares else square

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what takes time and is no part of training."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - start

    def take(self) -> Record:
        """What was seen since the last call."""
        shapes = self._shapes()
        lengths, flops = self._work(shapes)
        metrics = _to_host({name: total for name, (total, _) in self._metrics.items()})
        squares = _to_host(self._squares)
        choices = [] if self._choices is None else self._choices.tolist()
        now = time.perf_counter()  # after the transfers, which wait for the device
        assert self._since is not None, "there was a step"
        record = Record(
            metrics={name: (total, self._metrics[name][1]) for name, total in metrics.items()},
            choices=choices,
            squares=squares,
            samples=sum(counts.shape[1] for counts in self._counts),
            tokens=sum(lengths),
            flops=flops,
            seconds=now - self._since,
            waited=self._waited,
            memory=peak_memory(),
        )
        self._start_anew()
        self._since = now
        return record

    def _shapes(self) -> list[SampleShape]:
        """Of all samples since the last line."""
        if not self._counts:
            return []
        sizes = iter(torch.cat(self._image_sizes).tolist() if self._image_sizes else [])
        shapes = []
        for num_images, num_seen, num_answer in torch.cat(self._counts, dim=1).T.tolist():
            own = [tuple(next(sizes)) for _ in range(num_images)]
            shapes += shapes_of(own, num_seen - num_images - num_answer, num_answer)
        return shapes

    def _work(self, shapes: list[SampleShape]) -> tuple[list[int], float]:
        """Lengths of all sequences through the language model, and operations of all passes.

        Both are unknown, hence empty and 0, if the objective samples levels.
        """
        passes = self.config.passes
        if passes.sampled:
            return [], 0.0
        flops = step_flops(STAGES[self.config.stage].trains, passes, shapes, self.model_config, adapters=self.adapters)
        return sequence_lengths(passes, shapes, self.model_config), flops.total

    def line(self, records: Sequence[Record], grad_norm: float | None) -> dict[str, float]:
        """What the records of all processes say together.

        Args:
            records: one of each process.
            grad_norm: norm of the whole gradient at the last step, before it was clipped.
        """
        seconds = max(record.seconds for record in records)
        tokens, flops = sum(record.tokens for record in records), sum(record.flops for record in records)
        figures = weighted_means([record.metrics for record in records])
        figures |= _shares_by_source(records, self.dataset.source_names, self.model_config.granularities)
        figures |= _norms_by_part(records, grad_norm)
        figures["samples_per_second"] = sum(record.samples for record in records) / seconds
        if tokens > 0:
            figures |= {"tokens": tokens, "tokens_per_second": tokens / seconds}
        if flops > 0:
            per_device, peak = flops / seconds / len(records), self._peak()
            figures["tflops"] = per_device / 1e12
            if peak is not None:
                figures["mfu"] = per_device / peak
        figures["data_wait_share"] = max(record.waited / record.seconds for record in records)
        figures["memory_gib"] = max(record.memory for record in records) / 2**30
        return figures

    def _peak(self) -> float | None:
        """Operations per second that a device could do; None where nobody has said."""
        if self.config.logging.peak_tflops is not None:
            return self.config.logging.peak_tflops * 1e12
        if self.device.type != "cuda":
            return None
        runtime = self.config.runtime
        return known_peak(torch.cuda.get_device_name(self.device), runtime.precision, runtime.tf32)


def weighted_means(records: Sequence[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """Means over all processes of metrics given as (weighted sum, weight); metrics without any weight are left out."""
    totals: dict[str, tuple[float, int]] = {}
    for record in records:
        for name, (total, weight) in record.items():
            earlier_total, earlier_weight = totals.get(name, (0.0, 0))
            totals[name] = (earlier_total + total, earlier_weight + weight)
    return {name: total / weight for name, (total, weight) in totals.items() if weight > 0}


def _shares_by_source(
    records: Sequence[Record], sources: Sequence[str], granularities: Sequence[int]
) -> dict[str, float]:
    """How often each level was chosen, of the images of each source, where there are several sources."""
    counts = {source: [0] * len(granularities) for source in sources}
    for record in records:
        for source, row in zip(sources, record.choices, strict=False):  # a process may have seen no image
            counts[source] = [count + more for count, more in zip(counts[source], row, strict=True)]
    return {
        f"share_{granularity}/{source}": count / sum(row)
        for source, row in counts.items()
        for granularity, count in zip(granularities, row, strict=True)
        if len(counts) > 1 and sum(row) > 0
    }


def _norms_by_part(records: Sequence[Record], grad_norm: float | None) -> dict[str, float]:
    """The norm of each part's gradient, from its share in the sum of squares.

    The share is the same whether each process holds a part of the gradients (ZeRO) or all of them, and whether they
    were clipped or not.
    """
    squares: dict[str, float] = {}
    for record in records:
        for part, square in record.squares.items():
            squares[part] = squares.get(part, 0.0) + square
    total = sum(squares.values())
    if grad_norm is None or not 0 < total < float("inf"):
        return {}
    return {f"grad_norm_{part}": grad_norm * (square / total) ** 0.5 for part, square in squares.items()}


def _to_host(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars of one device, in one transfer."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist(), strict=True))


__all__ = ["MACHINE_METRICS", "Monitor", "Record", "weighted_means"]
