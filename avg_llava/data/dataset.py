"""The training data set: records of several files as token ids, labels and image crops, one sample at a time.

The files' indices list the valid records; records are parsed and images opened when a sample is requested. An
invalid sample is an error that names it or, with `on_bad_sample="skip"`, a logged and counted omission: a malformed
record is left out from the start, and a sample with an unreadable image becomes a masked row, so that batches keep
their size and every rank takes the same steps.
"""

import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from avg_llava.common.files import hash_json
from avg_llava.common.registry import find_entry
from avg_llava.data.encoding import encode_conversation, render_conversation
from avg_llava.data.index import RecordIndex, open_index
from avg_llava.data.records import ASSISTANT, HUMAN, DataError, Sample, Turn
from avg_llava.data.skip_list import SkipList
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.images import MAX_IMAGE_PIXELS, load_image
from avg_llava.model.processing import AvgLlavaProcessor
from avg_llava.model.splice import IGNORE_INDEX
from avg_llava.model.templates import TEMPLATES

logger = logging.getLogger(__name__)

MAX_LOGGED = 10  # samples per kind of problem that are logged at level WARNING; later ones at INFO


@dataclass(frozen=True)
class DataSource:
    """One file of records.

    Attributes:
        path: A `.json` list, a `.jsonl` file or a `.parquet` file.
        image_root: Folder that image paths are relative to; None means the file's folder.
        sampling: `all`, `first:N`, `end:N` or `random:N` (N records or a share such as `10%`), in the file's order.
            None means all.
        weight: Passes over the selected records per epoch; of a fraction, a random subset of that share is used.
        follow_links: Accept image paths that leave the root through symbolic links.
    """

    path: str | Path
    image_root: str | Path | None = None
    sampling: str | None = None
    weight: float = 1.0
    follow_links: bool = False

    @property
    def root(self) -> Path:
        """The image root."""
        return Path(self.path).parent if self.image_root is None else Path(self.image_root)


class OutsideRootError(DataError):
    """An image lies outside its root."""


class Origin(NamedTuple):
    """Origin of a sample: index of its source, and position of its record in the source's file."""

    source: int
    position: int


class SourceFile(NamedTuple):
    """A source's file as it was indexed; `sha256` is the hash of its bytes."""

    path: str
    sha256: str
    sampling: str
    image_root: str
    weight: float


class EncodedText(NamedTuple):
    """Token ids and labels (L,) of a sample, truncated to the maximal length, and the number of images that fit.

    `cut` describes the truncation, and `masked` says why no token is supervised; None where that is not the case.
    """

    input_ids: Tensor
    labels: Tensor
    num_images: int
    cut: str | None
    masked: str | None


def select_records(num_records: int, sampling: str, weight: float, path: Path, seed: str) -> np.ndarray:
    """Indices of a file's records that are used in an epoch, in the file's order, once per pass.

    `sampling` and `weight` are those of `DataSource`: weight 2.3 is two passes and a random 30 % of the records.

    Raises:
        DataError: `sampling` has another form or asks for more records than there are, or `weight` is not positive.
    """
    if not weight > 0:
        raise DataError(f"weight {weight} of {path}: it is the number of passes over the file, and above 0")
    selected = _apply_sampling(num_records, sampling, path, seed)
    passes = int(weight)
    extra = random.Random(f"{seed}/weight").sample(range(len(selected)), round((weight - passes) * len(selected)))
    return np.concatenate([np.tile(selected, passes), selected[np.sort(np.array(extra, dtype=np.int64))]])


def _apply_sampling(num_records: int, sampling: str, path: Path, seed: str) -> np.ndarray:
    if sampling == "all":
        return np.arange(num_records)
    match = re.fullmatch(r"(first|end|random):(\d+(?:\.\d+)?%|\d+)", sampling)
    if match is None:
        raise DataError(
            f"sampling {sampling!r} of {path}: use all, first:N, end:N or random:N (N records, or a share such as "
            "10%); to repeat records, set the source's weight"
        )
    kind, amount = match[1], match[2]
    count = round(num_records * float(amount[:-1]) / 100) if amount.endswith("%") else int(amount)
    if count > num_records:
        raise DataError(f"sampling {sampling!r} of {path}: the file holds only {num_records} records")
    if kind == "first":
        return np.arange(count)
    if kind == "end":
        return np.arange(num_records - count, num_records)
    return np.array(sorted(random.Random(seed).sample(range(num_records), count)), dtype=np.int64)


class ConversationDataset(Dataset[dict[str, Any]]):
    """Encoded samples of one or more files of LLaVA records, in the files' order.

    An item holds `input_ids` and `labels` (L,) with one placeholder id per image, `pixel_values`, a list with one
    (P, 3, S, S) tensor per image, `image_sizes` (images, 2) as (height, width), the sample's `index`, `id` and
    `source`, and the flags `over_long` and `unreadable`.

    A sample longer than `max_length`, counted at the finest level, is truncated at its end. The truncation is the same
    at every level, so that levels can be compared.

    Args:
        template: A key of `TEMPLATES`.
        config: The model's configuration, which determines the number of visual tokens of an image.
        max_length: Maximal sequence length including visual tokens; None means `config.max_sequence_length`.
        max_image_pixels: Larger images count as unreadable.
        seed: Seed of random selections of records.
        skip_list: Records to leave out after sampling.
        index_dir: Folder of the files' indices; None means one beside each file.

    Attributes:
        files: The files of the sources, in order.
        malformed: Origins of the invalid records, and the messages that name them.
        skipped: Origins of the records that the skip list names.
        problem_counts: Number of samples per kind of problem, counted in this process.

    Raises:
        DataError: A file cannot be read, no sample is left, or, with `on_bad_sample="error"`, records are malformed.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        processor: AvgLlavaProcessor,
        template: str,
        config: AvgLlavaConfig,
        max_length: int | None = None,
        on_bad_sample: Literal["error", "skip"] = "error",
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        seed: int = 0,
        skip_list: SkipList | None = None,
        index_dir: str | Path | None = None,
    ) -> None:
        if not find_entry(TEMPLATES, template, "template").is_for_captions:
            probe = [Turn(HUMAN, "?"), Turn(ASSISTANT, "!")]  # a template that cannot be learned is refused at once
            render_conversation(probe, template, processor.tokenizer, processor.chat_template)
        if on_bad_sample not in ("error", "skip"):
            raise ValueError(f"on_bad_sample must be 'error' or 'skip', got {on_bad_sample!r}")
        self.processor = processor
        self.config = config
        self.template = template
        self.max_length = config.max_sequence_length if max_length is None else max_length
        self.on_bad_sample = on_bad_sample
        self.max_image_pixels = max_image_pixels
        self.seed = seed
        self.skip_list = skip_list
        self.files: list[SourceFile] = []
        self.malformed: dict[Origin, str] = {}
        self.skipped: list[Origin] = []
        self.problem_counts: Counter[str] = Counter()
        self._sources = list(sources)
        self._linked_roots = {source.root for source in sources if source.follow_links}
        self._indices: list[RecordIndex] = []
        rows = [self._add_source(source, number, index_dir) for number, source in enumerate(sources)]
        # Of each sample: the row of its file's index, and the number of its source.
        self._rows = np.concatenate([np.zeros(0, np.int64), *rows])
        self._source_numbers = np.repeat(np.arange(len(rows), dtype=np.int32), list(map(len, rows)))
        if self.malformed and on_bad_sample == "error":
            listed = "\n  ".join(list(self.malformed.values())[:MAX_LOGGED])
            raise DataError(
                f"{len(self.malformed)} malformed records; correct them or set on_bad_sample to skip:\n  {listed}"
            )
        for message in self.malformed.values():
            self._report("malformed record left out", message)
        if self.skipped:
            logger.info("%d records are left out by the skip list", len(self.skipped))
        if not len(self):
            raise DataError(f"no usable record in {', '.join(str(source.path) for source in sources) or 'no sources'}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.sample(index)
        try:
            images = self.open_images(sample)
        except DataError as error:
            if self.on_bad_sample == "error":
                raise DataError(f"{sample.name}: {error}; correct it or set on_bad_sample to skip") from error
            self._report("unreadable sample masked", f"{sample.name}: {error}")
            return self._item(index, sample, self._masked_text(), [], unreadable=True)
        text = self.encode_text(sample, [(image.height, image.width) for image in images])
        if text.cut is not None:
            self._report("over-long sample cut", f"{sample.name}: {text.cut}")
        if text.masked is not None:
            self._report("sample without supervised tokens", f"{sample.name}: {text.masked}")
        return self._item(index, sample, text, images[: text.num_images])

    def sample(self, index: int) -> Sample:
        """Reads and validates the record of a sample.

        Raises:
            DataError: The file has changed since the data set was created.
        """
        number = self.source_number(index)
        return self._indices[number].sample(int(self._rows[index]), self._sources[number].root)

    def open_images(self, sample: Sample) -> list[Image.Image]:
        """The decoded images of a sample.

        Raises:
            DataError: An image is missing, lies outside its root, is damaged or too large; the message names the file.
        """
        images = []
        for path in sample.images:
            if sample.image_root not in self._linked_roots:
                _check_inside(path, sample.image_root)
            images.append(load_image(path, self.max_image_pixels))
        return images

    def encode_text(self, sample: Sample, image_sizes: Sequence[tuple[int, int]]) -> EncodedText:
        """Token ids and labels of a sample whose images have these (height, width), truncated to the maximal length.

        Every image is counted at the finest level.
        """
        processor = self.processor
        try:
            encoded = encode_conversation(
                sample.turns,
                processor.tokenizer,
                self.template,
                processor.image_token_id,
                processor.chat_template,
                self.config.text_config.vocab_size,
            )
        except ValueError as error:
            raise DataError(f"{sample.name}: {error}") from error
        finest = self.config.granularities[-1]
        length = num_images = num_tokens = 0
        cut = None
        for token in encoded.input_ids:
            is_image = token == self.processor.image_token_id
            length += num_visual_tokens(image_sizes[num_images], finest, self.config) if is_image else 1
            if length > self.max_length:
                cut = (
                    f"{num_tokens} of {len(encoded.input_ids)} tokens and {num_images} of {len(image_sizes)} images "
                    f"fit into {self.max_length}"
                )
                break
            num_tokens += 1
            num_images += is_image
        labels = torch.tensor(encoded.labels[:num_tokens])
        masked = None
        if bool((labels == IGNORE_INDEX).all()):
            masked = encoded.masked_because or "its answers are empty, or beyond the longest sequence"
        return EncodedText(torch.tensor(encoded.input_ids[:num_tokens]), labels, num_images, cut, masked)

    @property
    def source_names(self) -> list[str]:
        """Names of the sources: the files' names without suffix, or their paths if these names are not unique."""
        names = [Path(file.path).stem for file in self.files]
        return [name if names.count(name) == 1 else file.path for name, file in zip(names, self.files, strict=True)]

    def source_number(self, index: int) -> int:
        """Index of a sample's source."""
        return int(self._source_numbers[index])

    def samples_per_source(self) -> list[int]:
        """Samples of each source, repeated ones as often as they are used."""
        return np.bincount(self._source_numbers, minlength=len(self.files)).tolist()

    @property
    def origins(self) -> np.ndarray:
        """Origins of all samples (samples, 2): index of the source, position of the record in the source's file."""
        return np.stack([self._source_numbers, self._index_field("position")], axis=1)

    @property
    def modality_lengths(self) -> np.ndarray:
        """Numbers of words (samples,), negative for samples without images; `ModalityBatches` groups by them."""
        return self._index_field("length")

    def origin(self, index: int) -> Origin:
        """One row of `origins`."""
        number = self.source_number(index)
        return Origin(number, int(self._indices[number].rows["position"][self._rows[index]]))

    def unique(self) -> np.ndarray:
        """Indices of samples (unique records,) that hold each record once, even if weights or sources repeat it."""
        files: dict[tuple[str, str], int] = {}
        numbers = [files.setdefault((file.sha256, file.image_root), number) for number, file in enumerate(self.files)]
        files_of_samples = np.array(numbers, dtype=np.int64)[self._source_numbers]
        records = files_of_samples << 40 | self._index_field("position")  # no file has 2^40 records
        return np.sort(np.unique(records, return_index=True)[1])

    def fingerprint(self) -> str:
        """SHA-256 of the files' bytes and of the options that select and encode records.

        Neither the files' paths nor the bytes of images count.
        """
        is_random = any("random" in file.sampling or file.weight % 1 for file in self.files)
        parts: dict[str, Any] = {
            "sources": [
                (file.sha256, file.sampling, *([] if file.weight == 1 else [file.weight])) for file in self.files
            ],
            "seed": self.seed if is_random else None,
            "template": self.template,
            "max_length": self.max_length,
            "num_samples": len(self),
        }
        if TEMPLATES[self.template].jinja is None:
            parts["chat_template"] = self.processor.chat_template
        if self.skipped:
            parts["skipped"] = self.skipped
        return hash_json(parts)

    def _add_source(self, source: DataSource, number: int, index_dir: str | Path | None) -> np.ndarray:
        """Indexes a source's file and returns the rows of the index that hold the source's samples, in order."""
        path = Path(source.path)
        if not source.root.is_dir():
            raise DataError(f"image root {source.root} of {path} is no folder; check data.sources")
        index = open_index(path, self.template, index_dir)
        sampling = source.sampling or "all"
        self._indices.append(index)
        self.files.append(SourceFile(str(path), index.sha256, sampling, str(source.root), source.weight))
        rows = select_records(len(index.rows), sampling, source.weight, path, f"{self.seed}/{number}")
        if self.skip_list is not None:
            listed = np.array(sorted(self.skip_list.positions(path, index.sha256)), dtype=np.int64)
            is_listed = np.isin(index.rows["position"][rows], listed)
            self.skipped += [Origin(number, int(position)) for position in index.rows["position"][rows[is_listed]]]
            rows = rows[~is_listed]
        is_sample = index.rows["length"][rows] != 0
        for row in dict.fromkeys(rows[~is_sample].tolist()):  # each once
            try:
                index.sample(row, source.root)
            except DataError as error:
                self.malformed[Origin(number, int(index.rows["position"][row]))] = str(error)
            else:
                raise AssertionError(f"{path}: row {row} is a sample, but the index marks it as malformed")
        return rows[is_sample]

    def _index_field(self, field: str) -> np.ndarray:
        """Values (samples,) of a field of the files' indices."""
        values = [
            index.rows[field][self._rows[self._source_numbers == number]] for number, index in enumerate(self._indices)
        ]
        return np.concatenate(values, dtype=np.int64)  # samples are ordered by source

    def _item(
        self, index: int, sample: Sample, text: EncodedText, images: Sequence[Image.Image], unreadable: bool = False
    ) -> dict[str, Any]:
        # Of each image: pixel_values (1, P, 3, S, S) and image_sizes (1, 2).
        crops = [self.processor.image_processor([image], return_tensors="pt") for image in images]
        return {
            "input_ids": text.input_ids,
            "labels": text.labels,
            "pixel_values": [features["pixel_values"][0] for features in crops],
            "image_sizes": torch.cat([torch.zeros(0, 2, dtype=torch.long), *(row["image_sizes"] for row in crops)]),
            "index": index,
            "id": sample.id,
            "source": sample.source,
            "over_long": text.cut is not None,
            "unreadable": unreadable,
        }

    def _masked_text(self) -> EncodedText:
        """One unsupervised token, which replaces the text of an unreadable sample."""
        tokenizer = self.processor.tokenizer
        token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return EncodedText(torch.tensor([token]), torch.tensor([IGNORE_INDEX]), 0, cut=None, masked="unreadable")

    def _report(self, problem: str, message: str) -> None:
        """Counts a problem and logs it: by name at first, then every thousandth time by its count.

        Counts are per process: each loader worker counts and logs for itself.
        """
        self.problem_counts[problem] += 1
        count = self.problem_counts[problem]
        logger.log(logging.WARNING if count <= MAX_LOGGED else logging.INFO, "%s: %s", problem, message)
        if count % 1000 == 0:
            logger.warning("%s: %d samples so far (names at log level INFO)", problem, count)


def _check_inside(path: Path, root: Path) -> None:
    try:
        is_inside = path.resolve().is_relative_to(root.resolve())
    except UnicodeEncodeError as error:
        raise DataError(f"image path {str(path)!r} holds half a character pair ({error.reason})") from error
    if not is_inside:
        raise OutsideRootError(
            f"{path} leads out of the image root {root} through a link; copy the image, or set follow_links for the "
            "source"
        )
