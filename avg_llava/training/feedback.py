"""Collects the language model's feedback into a store (`training/feedback_store.py`).

Each shard is computed by one process, in fixed batches and on one CPU thread, so that a store does not depend on the
number of processes or on interruptions. Several machines can fill one store: each computes the shards that NNODES and
NODE_RANK assign to it.
"""

import logging
import math
import os
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from avg_llava.common.machine import num_cores
from avg_llava.common.settings import ConfigError
from avg_llava.common.workers import Advance, run_in_workers
from avg_llava.data.collator import Collator
from avg_llava.training.assembly import build_dataset, build_model, load_processor
from avg_llava.training.checkpoint import describe_start
from avg_llava.training.config import TrainConfig
from avg_llava.training.feedback_store import FeedbackError, FeedbackStore, Status, describe
from avg_llava.training.levels import TextBatch, score_answers, use_packed_attention
from avg_llava.training.losses import num_supervised
from avg_llava.training.processes import uses_cpu
from avg_llava.training.stages import OBJECTIVES, STAGES

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """A sample's answer at each level: sums of its tokens' log-probabilities, and numbers of tokens."""

    log_probs: list[float]
    num_tokens: list[int]


@dataclass(frozen=True)
class Collection:
    """State of a store after `collect`; `num_samples` and `num_shards` are those of the complete store."""

    num_samples: int
    num_shards: int
    num_missing_shards: int
    """Shards that other machines have not computed yet."""
    counts: dict[str, int]
    """Samples in the store, by `Status`."""


def collect(config: TrainConfig, output: Path, num_processes: int | None = None) -> Collection:
    """Computes the missing shards of a store: feedback of a configuration's start on its data.

    Args:
        config: Configuration of the router training. Of objective and optimizer only `optim.micro_batch_size`, the
            samples per forward pass, is used.
        num_processes: None: one per GPU, or one per CPU core without a GPU.

    Raises:
        ConfigError: The configuration is not of stage 4, or the folder holds other feedback.
        FeedbackError: A process was killed or ran out of memory, or a log-probability is not finite.
        DataError: A sample is unreadable, and `data.on_bad_sample` is `error`.
    """
    if not OBJECTIVES[STAGES[config.stage].objective].learns_from_feedback:
        raise ConfigError(f"feedback is what stage 4 learns from; the configuration is of stage {config.stage}")
    config = replace(config, objective=replace(config.objective, feedback_store=None))  # feedback is computed, not read
    describe_start(config)
    store = _open_or_create(config, output)
    num_nodes, node = int(os.environ.get("NNODES", "1")), int(os.environ.get("NODE_RANK", "0"))
    todo = [shard for shard in store.missing_shards() if shard % num_nodes == node]
    if todo:
        done = store.manifest.num_samples - sum(len(store.manifest.samples_of(shard)) for shard in todo)
        available = num_cores() if uses_cpu(config) else torch.cuda.device_count()
        with tqdm(
            total=store.manifest.num_samples,
            initial=done,
            desc="feedback",
            unit="sample",
            dynamic_ncols=True,
            disable=not config.logging.progress_bar,
        ) as progress:
            _compute(config, store, todo, num_processes or available, progress)
    num_missing = len(store.missing_shards())
    if not num_missing:
        for leftover in output.glob(".*.new"):  # from processes that were killed while writing
            leftover.unlink(missing_ok=True)
    return Collection(store.manifest.num_samples, store.manifest.num_shards, num_missing, store.count())


def _open_or_create(config: TrainConfig, output: Path) -> FeedbackStore:
    assert config.model.start is not None, "checked by TrainConfig"
    processor, model_config = load_processor(config)
    dataset = build_dataset(config, processor, model_config)
    expected = describe(config.model.start, dataset, config.runtime.precision)
    try:
        store = FeedbackStore.open(output)
    except ConfigError:
        if output.exists() and (not output.is_dir() or any(output.glob("*"))):
            raise
        return FeedbackStore.create(output, expected)
    store.check(expected, to_continue=True)
    return store


def _compute(config: TrainConfig, store: FeedbackStore, shards: list[int], num_processes: int, progress: tqdm) -> None:
    num_processes = min(num_processes, len(shards))
    threads = torch.get_num_threads()
    try:
        for shard in run_in_workers(ShardCollector, (config, store.folder), shards, num_processes, progress.update):
            logger.debug("wrote shard %d", shard)
    except BrokenProcessPool as error:
        raise FeedbackError(
            "a process that collects feedback was killed, perhaps for want of memory. Finished shards are kept: run "
            "the command again, with fewer processes (--num-processes) or a smaller optim.micro_batch_size"
        ) from error
    finally:
        torch.set_num_threads(threads)


# ---- in a worker --------------------------------------------------------------------------------------------------


class ShardCollector:
    """Loads the model in the worker of a number, and computes shards of the store in a folder."""

    def __init__(self, number: int, config: TrainConfig, folder: Path):
        disable_progress_bar()
        torch.set_num_threads(1)  # the number of threads affects the order of sums, and so the last digits
        torch.set_float32_matmul_precision("high" if config.runtime.tf32 else "highest")
        self.config = config
        self.store = FeedbackStore.open(folder)
        self.device = torch.device("cpu" if uses_cpu(config) else f"cuda:{number % torch.cuda.device_count()}")
        model, processor = build_model(config)
        use_packed_attention(model)
        self.model = model.to(self.device).eval()
        self.dataset = build_dataset(config, processor, model.config)
        self.unique = self.dataset.unique()
        self.lengths = self.dataset.modality_lengths
        self.collate = Collator(processor.tokenizer.pad_token_id)

    def __call__(self, shard: int, advance: Advance) -> int:
        """Computes and writes a shard, and returns its number."""
        indices = self.unique[self.store.manifest.samples_of(shard)].tolist()
        rows: dict[int, dict[str, Any]] = {}
        for items in self._loader(indices):
            for item, answer in zip(items, self._answers(items), strict=True):
                rows[item["index"]] = self._row(item, answer)
            advance(len(items))
        self.store.write_shard(shard, [rows[index] for index in indices])
        return shard

    def _loader(self, indices: list[int]) -> DataLoader:
        """Batches of a shard's samples, sorted by length, with and without images separately."""
        ordered = sorted(indices, key=self.lengths.__getitem__)  # lengths of samples without images are negative
        num_text_only = sum(self.lengths[index] < 0 for index in ordered)
        size = self.config.optim.micro_batch_size
        batches = [
            group[start : start + size]
            for group in (ordered[:num_text_only], ordered[num_text_only:])
            for start in range(0, len(group), size)
        ]
        return DataLoader(
            self.dataset, batch_sampler=batches, collate_fn=list, num_workers=self.config.data.num_workers
        )

    @torch.inference_mode()
    def _answers(self, items: list[dict[str, Any]]) -> list[Answer | None]:
        """The answer of each sample of a batch; None for samples without images or supervised tokens."""
        takes_part = [bool(item["pixel_values"]) and _num_supervised(item) > 0 for item in items]
        scored = list(compress(items, takes_part))
        if not scored:
            return [None] * len(items)
        batch = {name: tensor.to(self.device) for name, tensor in self.collate(scored).items()}
        runtime = self.config.runtime
        # The same precision as the trainer's: without DeepSpeed, float32 weights under autocast.
        mixed = runtime.deepspeed is None and runtime.precision != "fp32"
        dtype = torch.float16 if runtime.precision == "fp16" else torch.bfloat16
        try:
            with torch.autocast(self.device.type, dtype, enabled=mixed):
                features = self.model.encode_images(batch["pixel_values"], batch["image_sizes"])
                texts = TextBatch(batch["input_ids"], batch["attention_mask"], batch["labels"])
                answers = score_answers(self.model, features, texts)
        except torch.OutOfMemoryError as error:
            raise FeedbackError(
                f"out of GPU memory with {len(scored)} samples at a time; lower optim.micro_batch_size "
                f"{self.config.optim.micro_batch_size} and run again, finished shards are kept"
            ) from error
        found = map(Answer, answers.log_probs.tolist(), answers.num_tokens.tolist())
        return [next(found) if is_scored else None for is_scored in takes_part]

    def _row(self, item: dict[str, Any], answer: Answer | None) -> dict[str, Any]:
        """A sample's values for the columns of the store; absent ones are null."""
        index = item["index"]
        origin = self.dataset.origin(index)
        files = list(self.store.manifest.files)
        row = {
            "file": files.index(self.dataset.files[origin.source].sha256),
            "position": origin.position,
            "id": item["id"],
            "status": _status(item, answer),
            "truncated": item["over_long"],
            "num_tokens": _num_supervised(item),
        }
        if answer is None or row["status"] != "compared":
            return row
        log_probs, levels = answer.log_probs, self.store.manifest.levels
        if not all(map(math.isfinite, log_probs)):
            raise FeedbackError(
                f"the log-probability of the answer of {self.dataset.sample(index).name} is {log_probs} under the "
                f"levels {levels}; look at this sample, or use runtime.precision bf16 or fp32"
            )
        return row | {f"log_prob_{level}": value for level, value in zip(levels, log_probs, strict=True)}


def _status(item: dict[str, Any], answer: Answer | None) -> Status:
    if item["unreadable"]:
        return "unreadable"
    if not item["pixel_values"]:
        return "no image"
    if answer is None or not any(answer.num_tokens):
        return "no supervised tokens"
    return "compared" if len(set(answer.num_tokens)) == 1 else "cut off"


def _num_supervised(item: dict[str, Any]) -> int:
    return int(num_supervised(item["labels"][None]))
