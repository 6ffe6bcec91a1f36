"""The store of the language model's feedback: answers' log-probabilities under every level, as sharded Parquet.

The frozen model's feedback is a function of the sample, so it is computed once (`training/feedback.py`) and serves any
number of router trainings. A store is a folder with `store.json`, which says what the feedback is of, and one file per
shard of consecutive samples. A row knows its record by the hash of the data file and the place in it, so a store serves
every selection and order of the samples that it holds.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from avg_llava.checkpoints.loading import ROUTER_KEYS, list_weights, resolve_folder
from avg_llava.checkpoints.weight_files import fingerprint
from avg_llava.common.files import atomic_write, hash_json, write_json
from avg_llava.common.settings import ConfigError
from avg_llava.data.collator import Collator
from avg_llava.data.dataset import ConversationDataset
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.processing import AvgLlavaProcessor

MANIFEST_NAME = "store.json"
FORMAT = 1
SHARD_SIZE = 512  # samples: at most minutes of work that a kill undoes

Status = Literal["compared", "no image", "no supervised tokens", "cut off", "unreadable"]
"""`compared` samples teach the router. `cut off`: levels see different numbers of the answer's tokens."""

# Fields of a model's configuration that do not change what it computes, or that the store has fields of its own for.
_BESIDE_THE_POINT = (
    "router_config", "router", "max_sequence_length", "granularities", "transformers_version", "dtype",
    "_name_or_path", "architectures", "use_cache", "_attn_implementation",
)  # fmt: skip


class FeedbackError(ValueError):
    """Feedback cannot be collected or used; the message says what to do."""


@dataclass(frozen=True)
class FeedbackManifest:
    """Contents of `store.json`: everything that the feedback depends on."""

    levels: list[int]
    """Visual tokens per crop, coarse to fine."""
    model: str
    """Fingerprint of all weights but the router's."""
    architecture: str
    """Fingerprint of the model's configuration, as far as it bears on the feedback."""
    processor: str
    """Fingerprint of tokenizer and image processor."""
    template: str
    max_length: int
    precision: str
    files: dict[str, str]
    """SHA-256 of each data file, and its path, which is for people."""
    samples: str
    """Fingerprint of which samples there are, in which order: what shards are cut from."""
    num_samples: int
    shard_size: int
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        """Shards of the whole store."""
        return -(-self.num_samples // self.shard_size)

    def samples_of(self, shard: int) -> range:
        """Positions of a shard's samples among the data set's `unique()` ones."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_samples))


# What must be equal for a store to be used, and for its collection to be continued; in the words of messages.
_MUST_MATCH = {
    "format": "it is of format {theirs}, and this program reads {ours}",
    "model": "it is of other model weights (the router apart)",
    "architecture": "it is of a model of another configuration",
    "processor": "it is of another tokenizer or other image settings",
    "levels": "it is of levels {theirs}, not {ours}",
    "template": "it is of data.template {theirs}, not {ours}",
    "max_length": "it is of model.max_length {theirs}, not {ours}",
    "precision": "it is of runtime.precision {theirs}, not {ours}",
}
_MUST_MATCH_TO_CONTINUE = {
    **_MUST_MATCH,
    "files": "it is of other data files ({theirs}, not {ours}, or their contents have changed)",
    "samples": "it is of another selection of samples (sampling, seed, or records left out)",
}


def describe(start: str, dataset: ConversationDataset, precision: str) -> FeedbackManifest:
    """What feedback of a model on a data set depends on.

    Args:
        start: The folder or hub id of the model.
        dataset: The data set, made with the model's processor and configuration.
        precision: `runtime.precision`.
    """
    _refuse_ambiguous_files(dataset)
    origins = dataset.origins[dataset.unique()].tolist()
    tensors = list_weights(resolve_folder(start))
    return FeedbackManifest(
        levels=list(dataset.config.granularities),
        model=fingerprint({name: each for name, each in tensors.items() if not name.startswith(ROUTER_KEYS)}),
        architecture=hash_json(_to_the_point(dataset.config), default=str),
        processor=hash_json(_processor_parts(dataset.processor), default=str),
        template=dataset.template,
        max_length=dataset.max_length,
        precision=precision,
        files={file.sha256: file.path for file in dataset.files},
        samples=hash_json([[dataset.files[source].sha256, position] for source, position in origins]),
        num_samples=len(origins),
        shard_size=SHARD_SIZE,
    )


class FeedbackStore:
    """A folder with feedback.

    Args:
        folder: The store.
        manifest: Contents of its `store.json`.
    """

    def __init__(self, folder: Path, manifest: FeedbackManifest):
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | Path) -> "FeedbackStore":
        """The store in a folder.

        Raises:
            ConfigError: There is none, or it is not one of this program's.
        """
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            raise ConfigError(
                f"{folder} holds no feedback ({MANIFEST_NAME} is missing); collect it with `avg-llava feedback --config"
                f" CONFIG --output {folder}`"
            )
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(Path(folder), FeedbackManifest(**fields))
        except (json.JSONDecodeError, TypeError) as error:
            raise ConfigError(f"{path} is not the manifest of a feedback store: {error}") from error

    @classmethod
    def create(cls, folder: Path, manifest: FeedbackManifest) -> "FeedbackStore":
        """An empty store in a folder that has none."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST_NAME, dataclasses.asdict(manifest), concurrent=True)
        return cls(folder, manifest)

    def check(self, expected: FeedbackManifest, to_continue: bool = False) -> None:
        """Refuses a store of another model or of other data.

        Args:
            expected: What the feedback is to be of.
            to_continue: Whether more is to be added to the store, not only read from it.

        Raises:
            ConfigError: Names everything that differs.
        """
        differences = []
        for key, message in (_MUST_MATCH_TO_CONTINUE if to_continue else _MUST_MATCH).items():
            theirs, ours = getattr(self.manifest, key), getattr(expected, key)
            if key == "files":
                if list(theirs) == list(ours):
                    continue
                theirs, ours = ", ".join(theirs.values()), ", ".join(ours.values())
            elif theirs == ours or (key == "levels" and not to_continue and _serves(theirs, ours)):
                continue
            differences.append(message.format(theirs=theirs, ours=ours))
        if differences:
            raise ConfigError(
                f"the feedback in {self.folder} is not what is asked for: {'; '.join(differences)}. Collect it in "
                "another folder with `avg-llava feedback`, or restore what has changed"
            )

    def shard_path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"feedback-{shard:05d}.parquet"

    def missing_shards(self) -> list[int]:
        """Shards that are not there, or were damaged."""
        return [shard for shard in range(self.manifest.num_shards) if not self._is_whole(shard)]

    def write_shard(self, shard: int, columns: Mapping[str, list[Any]]) -> None:
        """Writes the columns of `schema` as a shard, which appears whole or not at all."""
        table = pa.table(dict(columns), schema=self.schema())
        assert len(table) == len(self.manifest.samples_of(shard))
        with atomic_write(self.shard_path(shard), concurrent=True) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def schema(self) -> pa.Schema:
        """Columns of a shard.

        `file` counts the manifest's `files`, `position` is the record's place in the file, `truncated` says that the
        maximal length cuts the sample; `num_tokens` counts the answer's tokens, and `log_prob_<level>` is the sum of
        their log-probabilities in nats, null unless the sample is `compared`.
        """
        return pa.schema(
            [
                ("file", pa.int16()),
                ("position", pa.int64()),
                ("id", pa.string()),
                ("status", pa.string()),
                ("truncated", pa.bool_()),
                ("num_tokens", pa.int32()),
                *((f"log_prob_{level}", pa.float32()) for level in self.manifest.levels),
            ]
        )

    def count(self) -> dict[Status, int]:
        """How many samples of the shards that are there have which status."""
        counts: dict[Status, int] = {}
        for shard in range(self.manifest.num_shards):
            if self.shard_path(shard).is_file():
                for status in self._read(shard, ["status"]).column("status").to_pylist():
                    counts[status] = counts.get(status, 0) + 1
        return counts

    def answers(self, dataset: ConversationDataset) -> tuple[Tensor, Tensor]:
        """The feedback on the samples of a data set, in its order.

        Returns:
            Sums of the answers' log-probabilities (samples, G), and their numbers of tokens (samples,): 0 for a sample
            that takes no part.

        Raises:
            ConfigError: Shards or samples are missing.
        """
        missing = self.missing_shards()
        if missing:
            raise ConfigError(
                f"the feedback in {self.folder} is not complete: {len(missing)} of {self.manifest.num_shards} shards "
                "are missing. Run the same `avg-llava feedback` command again; it continues"
            )
        table = pa.concat_tables(self._read(shard) for shard in range(self.manifest.num_shards))
        compared = np.array(table.column("status").to_pylist()) == "compared"
        levels = [table.column(f"log_prob_{level}").to_numpy() for level in dataset.config.granularities]
        log_probs = np.where(compared[:, None], np.stack(levels, axis=1), 0)
        num_tokens = np.where(compared, table.column("num_tokens").to_numpy(), 0)
        rows = self._rows(dataset, table)
        return torch.from_numpy(log_probs[rows].astype(np.float32)), torch.from_numpy(num_tokens[rows].astype(np.int64))

    def _rows(self, dataset: ConversationDataset, table: pa.Table) -> np.ndarray:
        """(samples,) row of the store for each sample of a data set."""
        numbers = {sha256: number for number, sha256 in enumerate(self.manifest.files)}
        for file in dataset.files:
            if file.sha256 not in numbers:
                raise ConfigError(
                    f"the feedback in {self.folder} is of other data: {file.path} is not among its files, or has "
                    "changed since it was collected. Collect it in another folder with `avg-llava feedback`"
                )
        of_sources = np.array([numbers[file.sha256] for file in dataset.files])
        origins = dataset.origins
        wanted = _key(of_sources[origins[:, 0]], origins[:, 1])
        stored = _key(table.column("file").to_numpy(), table.column("position").to_numpy())
        order = np.argsort(stored, kind="stable")
        places = np.minimum(np.searchsorted(stored, wanted, sorter=order), len(stored) - 1)
        rows: np.ndarray = order[places]
        absent = np.nonzero(stored[rows] != wanted)[0]
        if len(absent):
            raise ConfigError(
                f"the feedback in {self.folder} lacks {len(absent)} of {len(dataset)} samples, the first of them "
                f"{dataset.sample(absent[0]).name}: it was collected with another sampling. Collect it in another "
                "folder with `avg-llava feedback`"
            )
        return rows

    def _is_whole(self, shard: int) -> bool:
        path = self.shard_path(shard)
        if not path.is_file():
            return False
        try:
            return pq.read_metadata(path).num_rows == len(self.manifest.samples_of(shard))
        except pa.ArrowInvalid:
            return False

    def _read(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        try:
            return pq.read_table(self.shard_path(shard), columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise FeedbackError(
                f"{self.shard_path(shard)} cannot be read ({error}); remove it, and run `avg-llava feedback` again"
            ) from error


@dataclass(frozen=True)
class FeedbackCollator:
    """Adds stored feedback to the batches of a collator.

    Attributes:
        collator: Gives batches with `index`, the samples' positions in the data set.
        log_probs: (samples, G), see `FeedbackStore.answers`.
        num_tokens: (samples,).
    """

    collator: Collator
    log_probs: Tensor
    num_tokens: Tensor

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch, with `answer_log_probs` (B, G) and `num_answer_tokens` (B,)."""
        batch = self.collator(items)
        index = batch["index"]
        return {**batch, "answer_log_probs": self.log_probs[index], "num_answer_tokens": self.num_tokens[index]}


def _serves(stored: list[int], wanted: list[int]) -> bool:
    """Whether feedback of some levels has that of others: samples are cut at the finest, which must be the same."""
    return set(wanted) <= set(stored) and wanted[-1] == stored[-1]


def _key(files: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One whole number per record: files are few, and no file has 2^40 records."""
    keys: np.ndarray = files.astype(np.int64) << 40 | positions.astype(np.int64)
    return keys


def _refuse_ambiguous_files(dataset: ConversationDataset) -> None:
    """Two sources of the same bytes and different images could not be told apart."""
    roots: dict[str, str] = {}
    for file in dataset.files:
        if roots.setdefault(file.sha256, file.image_root) != file.image_root:
            raise ConfigError(
                f"{file.path} is given with two image roots, {roots[file.sha256]} and {file.image_root}, or has a "
                "twin: feedback knows a record by its file's content. Give one of the two files other ids"
            )


def _to_the_point(config: AvgLlavaConfig) -> dict[str, Any]:
    def keep(fields: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in fields.items() if name not in _BESIDE_THE_POINT}
        return {name: keep(value) if isinstance(value, Mapping) else value for name, value in kept.items()}

    return keep(config.to_dict())


def _processor_parts(processor: AvgLlavaProcessor) -> list[Any]:
    settings = processor.image_processor.to_dict()
    tokenizer = processor.tokenizer
    return [settings, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, processor.image_token_id]


__all__ = [
    "FeedbackCollator",
    "FeedbackError",
    "FeedbackManifest",
    "FeedbackStore",
    "Status",
    "describe",
]
