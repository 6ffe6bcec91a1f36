"""Store of the language model's feedback: log-probabilities of answers at every level, as sharded Parquet.

The frozen model's feedback is a function of the sample, so it is computed once (`training/feedback.py`) for any number
of router trainings. A store is a folder with `store.json`, which holds the fingerprints of model and data, and one file
per shard of consecutive samples. A row identifies its record by the hash of the data file and the position in it, so
that a store serves any selection and order of its samples.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from avg_llava.checkpoints.checkpoint import ROUTER_KEYS
from avg_llava.checkpoints.formats import open_checkpoint
from avg_llava.checkpoints.weight_files import fingerprint
from avg_llava.common.files import atomic_write, hash_json, write_json
from avg_llava.common.settings import ConfigError
from avg_llava.data.collator import Collator
from avg_llava.data.dataset import ConversationDataset
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.templates import TEMPLATES

MANIFEST_NAME = "store.json"
FORMAT = 1
SHARD_SIZE = 512  # samples; a kill loses at most one shard per process, minutes of work

Status = Literal["compared", "no image", "no supervised tokens", "cut off", "unreadable"]
"""Only `compared` samples train the router. `cut off`: the levels have different numbers of answer tokens."""

# Fields of a model's configuration that do not affect the feedback, or that `FeedbackManifest` holds separately.
_IGNORED_FIELDS = (
    "router_config", "router", "max_sequence_length", "granularities", "transformers_version", "dtype",
    "_name_or_path", "architectures", "use_cache", "_attn_implementation", "template",
)  # fmt: skip


class FeedbackError(ValueError):
    """Feedback cannot be collected or used; the message names the remedy."""


@dataclass(frozen=True)
class FeedbackManifest:
    """Contents of `store.json`: everything that the feedback depends on."""

    levels: list[int]
    """Visual tokens per crop, coarse to fine."""
    model: str
    """Fingerprint of all weights except the router's."""
    architecture: str
    """Fingerprint of the configuration fields that affect the feedback."""
    processor: str
    """Fingerprint of tokenizer and image processor."""
    template: str
    max_length: int
    precision: str
    files: dict[str, str]
    """Path of each data file by its SHA-256; the path is informative only."""
    samples: str
    """Fingerprint of the samples and their order, from which the shards are cut."""
    num_samples: int
    shard_size: int
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        """Number of shards of the complete store."""
        return -(-self.num_samples // self.shard_size)

    def samples_of(self, shard: int) -> range:
        """Indices of a shard's samples into the data set's `unique()` samples."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_samples))


# Fields that must be equal to read from a store, and to continue its collection, with the error messages.
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
    """The manifest of the feedback of a model (a folder or hub id) on a data set built with its processor.

    Raises:
        ConfigError: Two sources have the same content and different images, which could not be distinguished.
    """
    roots: dict[str, str] = {}
    for file in dataset.files:
        if roots.setdefault(file.sha256, file.image_root) != file.image_root:
            raise ConfigError(
                f"{file.path} is given with two image roots, {roots[file.sha256]} and {file.image_root}, or has a "
                "twin: feedback knows a record by its file's content. Give one of the two files other ids"
            )
    origins = dataset.origins[dataset.unique()].tolist()
    tensors = open_checkpoint(start).stored()
    return FeedbackManifest(
        levels=list(dataset.config.granularities),
        model=fingerprint({name: each for name, each in tensors.items() if not name.startswith(ROUTER_KEYS)}),
        architecture=hash_json(_relevant_fields(dataset.config), default=str),
        processor=hash_json(_processor_parts(dataset), default=str),
        template=dataset.template,
        max_length=dataset.max_length,
        precision=precision,
        files={file.sha256: file.path for file in dataset.files},
        samples=hash_json([[dataset.files[source].sha256, position] for source, position in origins]),
        num_samples=len(origins),
        shard_size=SHARD_SIZE,
    )


class FeedbackStore:
    """A folder with feedback."""

    def __init__(self, folder: Path, manifest: FeedbackManifest):
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | Path) -> "FeedbackStore":
        """Opens the store in a folder.

        Raises:
            ConfigError: The folder has no `store.json`, or one that is no manifest of this program.
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
        """Creates an empty store."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST_NAME, dataclasses.asdict(manifest), concurrent=True)
        return cls(folder, manifest)

    def check(self, expected: FeedbackManifest, to_continue: bool = False) -> None:
        """Refuses a store of another model or of other data than the expected manifest.

        Args:
            to_continue: Feedback will be added to the store, not only read from it.

        Raises:
            ConfigError: The manifests differ; the message names all differences.
        """
        differences = []
        for key, message in (_MUST_MATCH_TO_CONTINUE if to_continue else _MUST_MATCH).items():
            theirs, ours = getattr(self.manifest, key), getattr(expected, key)
            if key == "files":
                if list(theirs) == list(ours):
                    continue
                theirs, ours = ", ".join(theirs.values()), ", ".join(ours.values())
            elif theirs == ours:
                continue
            elif key == "levels" and not to_continue and set(ours) <= set(theirs) and ours[-1] == theirs[-1]:
                continue  # some of the levels, and the same finest one, at which samples are truncated
            differences.append(message.format(theirs=theirs, ours=ours))
        if differences:
            raise ConfigError(
                f"the feedback in {self.folder} is not what is asked for: {'; '.join(differences)}. Collect it in "
                "another folder with `avg-llava feedback`, or restore what has changed"
            )

    def shard_path(self, shard: int) -> Path:
        """Path of a shard."""
        return self.folder / f"feedback-{shard:05d}.parquet"

    def missing_shards(self) -> list[int]:
        """Shards that are missing or damaged."""
        return [shard for shard in range(self.manifest.num_shards) if not self._is_whole(shard)]

    def write_shard(self, shard: int, rows: list[dict[str, Any]]) -> None:
        """Writes rows with the columns of `schema`, absent ones null, as a shard, atomically."""
        table = pa.Table.from_pylist(rows, schema=self.schema())
        assert len(table) == len(self.manifest.samples_of(shard))
        with atomic_write(self.shard_path(shard), concurrent=True) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def schema(self) -> pa.Schema:
        """Columns of a shard.

        `file` is an index into the manifest's `files`, `position` the record's index in that file, `truncated` is true
        if the sample exceeds the maximal length, `num_tokens` is the number of answer tokens, and `log_prob_<level>`
        the sum of their log-probabilities in nats, null unless the sample is `compared`.
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

    def count(self) -> dict[str, int]:
        """Numbers of samples in existing shards, by status."""
        existing = filter(lambda shard: self.shard_path(shard).is_file(), range(self.manifest.num_shards))
        statuses = (self._read(shard, ["status"]).column("status").to_pylist() for shard in existing)
        return dict(Counter(chain.from_iterable(statuses)))

    def answers(self, dataset: ConversationDataset) -> tuple[Tensor, Tensor]:
        """The feedback on the samples of a data set, in its order.

        Returns:
            Sums of the answers' log-probabilities (samples, G), and numbers of answer tokens (samples,), 0 for samples
            that take no part.

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
        """(samples,) index of the store's row for each sample of a data set."""
        file_indices = {sha256: index for index, sha256 in enumerate(self.manifest.files)}
        for file in dataset.files:
            if file.sha256 not in file_indices:
                raise ConfigError(
                    f"the feedback in {self.folder} is of other data: {file.path} is not among its files, or has "
                    "changed since it was collected. Collect it in another folder with `avg-llava feedback`"
                )
        of_sources = np.array([file_indices[file.sha256] for file in dataset.files])
        origins = dataset.origins
        wanted = _key(of_sources[origins[:, 0]], origins[:, 1])
        stored = _key(table.column("file").to_numpy(), table.column("position").to_numpy())
        rows: np.ndarray = pc.index_in(pa.array(wanted), value_set=pa.array(stored)).fill_null(-1).to_numpy()
        absent = np.nonzero(rows < 0)[0]
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
    """Adds stored feedback to the batches of a collator."""

    collator: Collator
    log_probs: Tensor
    """(samples, G), see `FeedbackStore.answers`."""
    num_tokens: Tensor
    """(samples,)"""

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch, with `answer_log_probs` (B, G) and `num_answer_tokens` (B,)."""
        batch = self.collator(items)
        index = batch["index"]
        return {**batch, "answer_log_probs": self.log_probs[index], "num_answer_tokens": self.num_tokens[index]}


def _key(files: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One int64 per record: the file's index above 40 bits of position."""
    keys: np.ndarray = files.astype(np.int64) << 40 | positions.astype(np.int64)
    return keys


def _relevant_fields(config: AvgLlavaConfig) -> dict[str, Any]:
    def keep(fields: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in fields.items() if name not in _IGNORED_FIELDS}
        return {name: keep(value) if isinstance(value, Mapping) else value for name, value in kept.items()}

    relevant = keep(config.to_dict())
    # Stores collected before this field existed have its default.
    if relevant["pooling_ladder"] == AvgLlavaConfig.pooling_ladder:
        del relevant["pooling_ladder"]
    return relevant


def _processor_parts(dataset: ConversationDataset) -> list[Any]:
    processor = dataset.processor
    settings, tokenizer = processor.image_processor.to_dict(), processor.tokenizer
    own = [processor.chat_template] if TEMPLATES[dataset.template].jinja is None else []
    return [
        settings,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        processor.image_token_id,
        *own,
    ]
