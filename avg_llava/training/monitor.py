"""Logging of a run: the metrics of each line of the log, the log file, the progress bar and warnings.

Between two lines, sums stay on the device; a line transfers them to the host and gathers those of all processes in one
collective. `docs/watching.md` explains the metrics.

Shapes: B samples, K images with a chosen level, S sources, G levels coarse to fine.
"""

import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from avg_llava.common.jsonl import JsonLines
from avg_llava.common.machine import known_peak, peak_memory
from avg_llava.data.dataset import ConversationDataset
from avg_llava.data.sampler import MicroBatches
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.training.config import TrainConfig
from avg_llava.training.flops import SampleShape, sequence_lengths, shapes_of, step_flops
from avg_llava.training.lora import AdapterShape
from avg_llava.training.losses import num_supervised
from avg_llava.training.objectives import ObjectiveOutput
from avg_llava.training.stages import STAGES, Part

logger = logging.getLogger(__name__)

LOG_NAME = "log_history.jsonl"
# Metrics that depend on the machine and differ between repeated runs.
MACHINE_METRICS = ("samples_per_second", "tokens_per_second", "tflops", "mfu", "data_wait_share", "memory_gib")
COLLAPSE_LINES = 20  # lines of the log over which a collapse is detected
COLLAPSE_SHARE = 0.98  # share of their images with the same level

# ---- metrics ------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """Measurements of one process since the last line of the log, as Python numbers.

    Attributes:
        metrics: Weighted sum and weight of each metric of the objective.
        choices: (S, G) counts of chosen levels for the images of each source; empty if nothing is chosen.
        squares: Sum of squared gradients of each part at the last step, over this process's shard.
        tokens: Text and visual tokens through the language model.
        waited: Seconds spent waiting for batches.
        memory: Peak in bytes since the process started.
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
    """Collects the measurements of one process; the data set maps samples to their sources."""

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
        self._reset()

    def _reset(self) -> None:
        self._metrics: dict[str, tuple[Tensor, int]] = {}
        self._choices: Tensor | None = None
        self._squares: dict[str, Tensor] = {}
        self._counts: list[Tensor] = []
        self._image_sizes: list[Tensor] = []
        self._waited = 0.0

    def waiting_for(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields the same batches, and measures the time spent waiting for them."""
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
        """Records the numbers of images and tokens of a step's micro-batches."""
        for batch in batches:
            is_image = (batch["input_ids"] == self.model_config.image_token_id) & batch["attention_mask"].bool()
            self._counts.append(
                torch.stack([is_image.sum(dim=1), batch["attention_mask"].sum(dim=1), num_supervised(batch["labels"])])
            )  # (3, B)
            if "image_sizes" in batch:
                self._image_sizes.append(batch["image_sizes"])

    def add(self, outputs: ObjectiveOutput, indices: Sequence[int]) -> None:
        """Records metrics and chosen levels of a micro-batch, whose samples have `indices` (B,) in the data set."""
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
        """Records the squared gradients of each part, over this process's shard.

        To be called before the optimizer's step, with groups named as by `parameter_groups`. DeepSpeed makes one step
        per group, on this process's shard of the group's gradients.
        """
        for group in optimizer.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if gradients:
                part = group["name"].split("/")[0]
                square = torch.nn.utils.get_total_norm(gradients).float().square()
                self._squares[part] = self._squares[part] + square if part in self._squares else square

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent in the context from the measured time."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - start

    def take(self) -> Record:
        """The measurements since the last call."""
        passes, trains = self.config.passes, STAGES[self.config.stage].trains
        lengths, flops = [], 0.0  # unknown if the objective samples levels
        if not passes.sampled:
            shapes = self._shapes()
            lengths = sequence_lengths(passes, shapes, self.model_config)
            flops = step_flops(trains, passes, shapes, self.model_config, adapters=self.adapters).total
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
        self._reset()
        self._since = now
        return record

    def _shapes(self) -> list[SampleShape]:
        """Shapes of all samples since the last line."""
        if not self._counts:
            return []
        sizes = iter(torch.cat(self._image_sizes).tolist() if self._image_sizes else [])
        shapes = []
        for num_images, num_tokens, num_answer in torch.cat(self._counts, dim=1).T.tolist():
            image_sizes = [tuple(next(sizes)) for _ in range(num_images)]
            shapes += shapes_of(image_sizes, num_tokens - num_images - num_answer, num_answer)
        return shapes

    def line(self, records: Sequence[Record], grad_norm: float | None) -> dict[str, float]:
        """One line of the log, from one record of each process.

        Args:
            grad_norm: Norm of the whole gradient at the last step, before clipping.
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
        """Peak operations per second of a device; None if unknown."""
        if self.config.logging.peak_tflops is not None:
            return self.config.logging.peak_tflops * 1e12
        if self.device.type != "cuda":
            return None
        runtime = self.config.runtime
        return known_peak(torch.cuda.get_device_name(self.device), runtime.precision, runtime.tf32)


def weighted_means(records: Sequence[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """Means over all processes of metrics given as (weighted sum, weight), without metrics of weight 0."""
    totals: dict[str, tuple[float, int]] = {}
    for record in records:
        for name, (total, weight) in record.items():
            earlier_total, earlier_weight = totals.get(name, (0.0, 0))
            totals[name] = (earlier_total + total, earlier_weight + weight)
    return {name: total / weight for name, (total, weight) in totals.items() if weight > 0}


def _shares_by_source(
    records: Sequence[Record], sources: Sequence[str], granularities: Sequence[int]
) -> dict[str, float]:
    """Share of each level among the images of each source; empty with a single source."""
    counts = {source: [0] * len(granularities) for source in sources}
    for record in records:
        for source, row in zip(sources, record.choices, strict=False):  # empty if the process had no image
            counts[source] = [count + more for count, more in zip(counts[source], row, strict=True)]
    return {
        f"share_{granularity}/{source}": count / sum(row)
        for source, row in counts.items()
        for granularity, count in zip(granularities, row, strict=True)
        if len(counts) > 1 and sum(row) > 0
    }


def _norms_by_part(records: Sequence[Record], grad_norm: float | None) -> dict[str, float]:
    """Gradient norm of each part, from its share in the sum of squares.

    The share is the same for sharded (ZeRO) and for replicated gradients, before and after clipping.
    """
    squares: dict[str, float] = defaultdict(float)
    for record in records:
        for part, square in record.squares.items():
            squares[part] += square
    total = sum(squares.values())
    if grad_norm is None or not 0 < total < float("inf"):
        return {}
    return {f"grad_norm_{part}": grad_norm * (square / total) ** 0.5 for part, square in squares.items()}


def _to_host(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars of one device as numbers, in one transfer."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist(), strict=True))


# ---- callbacks ----------------------------------------------------------------------------------------------------


class RunFiles(TrainerCallback):
    """Writes `log_history.jsonl`, passes the epoch to the sampler, and skips the checkpoint of the last step."""

    def __init__(self, output_dir: Path, sampler: MicroBatches):
        self.log = JsonLines(output_dir / LOG_NAME)
        self.sampler = sampler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the log with the lines up to the resumed checkpoint; lines of steps to be repeated are dropped."""
        if state.is_world_process_zero:
            self.log.path.parent.mkdir(parents=True, exist_ok=True)
            self.log.write(state.log_history)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the sampler's epoch; in a run resumed in a later epoch, accelerate does not find the wrapped sampler."""
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves no checkpoint at the last step: the stage's result follows at once."""
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Appends a line."""
        if state.is_world_process_zero:
            self.log.append(state.log_history[-1:])


class ProgressBar(ProgressCallback):
    """transformers' progress bar, with the loss next to the remaining time instead of a dictionary per line."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows loss and learning rate."""
        logs = state.log_history[-1]
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", lr=f"{logs['learning_rate']:.1e}", refresh=False)


class CollapseAlarm(TrainerCallback):
    """Warns when the router chooses one level for nearly all images; once per collapse."""

    def __init__(self) -> None:
        self._lines: deque[dict[str, float]] = deque(maxlen=COLLAPSE_LINES)
        self._is_collapsed = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Checks the shares of the levels over the last lines."""
        line = state.log_history[-1]
        shares = [name for name in line if name.startswith("share_") and "/" not in name]
        if not state.is_world_process_zero or not shares:
            return
        self._lines.append({"router_agreement": float("nan"), **line})
        if len(self._lines) < COLLAPSE_LINES:
            return
        means = {name: sum(line[name] for line in self._lines) / COLLAPSE_LINES for name in shares}
        most, share = max(means.items(), key=itemgetter(1))
        was_collapsed, self._is_collapsed = self._is_collapsed, share >= COLLAPSE_SHARE
        if was_collapsed or not self._is_collapsed:
            return
        agreement = sum(line["router_agreement"] for line in self._lines) / COLLAPSE_LINES
        best = "" if math.isnan(agreement) else f", which the language model's feedback prefers for {agreement:.0%}"
        logger.warning(
            f"step {state.global_step}: the router has collapsed: level {most.removeprefix('share_')} for {share:.1%} "
            f"of the images of the last {COLLAPSE_LINES} lines of the log{best}. If that is not what the data ask for, "
            "start again with a lower optim.lr or a larger optim.global_batch_size, objective.tie_tolerance 0, or the "
            "data that need other levels in a larger share"
        )


def finish_trackers(trackers: Sequence[str], failed: bool) -> None:
    """Flushes and finishes the runs of wandb and trackio.

    They would do so at the interpreter's shutdown, which distributed processes skip.
    """
    if "wandb" in trackers:
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=int(failed))
    if "trackio" in trackers:
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            trackio.finish()
