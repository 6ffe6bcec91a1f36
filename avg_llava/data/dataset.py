"""The training data set: LLaVA records from several files, encoded one at a time.

Which records are samples is known from their files' indices when the data set is made; records are parsed and images
opened when a sample is asked for. What is wrong with a sample is an error that names it, or, with
`on_bad_sample="skip"`, a logged and counted omission: a malformed record is left out from the start, and a sample whose
image cannot be read becomes a masked row, so that batches keep their size and every rank takes the same steps.
"""

import logging
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
from avg_llava.data.index import RecordIndex, open_index
from avg_llava.data.records import DataError, Sample
from avg_llava.data.sampling import select
from avg_llava.data.skip_list import SkipList
from avg_llava.data.templates import IGNORE_INDEX, TEMPLATES, encode_conversation
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.images import MAX_IMAGE_PIXELS, load_image
from avg_llava.model.processing import AvgLlavaProcessor

logger = logging.getLogger(__name__)

NAMED_IN_LOG = 10  # samples of one kind of trouble that are logged by name before only their number is


@dataclass(frozen=True)
class DataSource:
    """One file of records.

    Attributes:
        path: A `.json` list, a `.jsonl` file or a `.parquet` file.
        image_root: Folder that image paths are relative to; None means the file's own folder.
        sampling: `all`, `first:N`, `end:N` or `random:N` (N records or a share such as `10%`), in the file's order.
            None means all.
        weight: How often these records are passed over in an epoch; of a fraction, so many of them are drawn.
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
    """An image lies outside of its root."""


class Origin(NamedTuple):
    """Where a sample comes from: number of its source, and position of its record in the source's file."""

    source: int
    position: int


class SourceFile(NamedTuple):
    """A source's file as it was read. `sha256` is of its bytes."""

    path: str
    sha256: str
    sampling: str
    image_root: str
    weight: float


class Malformed(NamedTuple):
    """A record that is no sample, and why."""

    origin: Origin
    message: str


class EncodedText(NamedTuple):
    """Token ids and labels (L,) of a sample, cut to the longest sequence.

    Attributes:
        input_ids: One placeholder per image that is kept.
        labels: Ids, or -100 where not supervised.
        num_images: Images whose placeholders are kept.
        cut: What was cut off, in words; None where everything fits.
        masked: Why nothing is supervised; None where something is.
    """

    input_ids: Tensor
    labels: Tensor
    num_images: int
    cut: str | None
    masked: str | None


class ConversationDataset(Dataset[dict[str, Any]]):
    """Encoded samples of one or more files of LLaVA records, in their order.

    An item holds `input_ids` and `labels` (L,) with one placeholder id per image, `pixel_values`, a list with one
    (P, 3, S, S) tensor per image, `image_sizes` (images, 2) as (height, width), `index`, `id`, `source`, and whether it
    is `over_long` or `unreadable`.

    A sample longer than `max_length`, counted at the finest level, loses text at its end, the same at every level, so
    that levels can be compared.

    Args:
        sources: The files.
        processor: Tokenizer and image processor.
        template: A key of `TEMPLATES`.
        config: The model's configuration, which says how many visual tokens an image becomes.
        max_length: Longest sequence, visual tokens included; None means `config.max_sequence_length`.
        on_bad_sample: "error" or "skip".
        max_image_pixels: Larger images count as unreadable.
        seed: Seed of what is drawn from the sources.
        skip_list: Records to leave out, after sampling.
        index_dir: Folder of the files' indices; None means one beside each file.

    Attributes:
        files: The files of the sources, in their order.
        origins: (samples, 2) number of the source and position of the record.
        modality_lengths: (samples,) words, negative for a sample without image; what `ModalityBatches` groups by.
        malformed: Records that are no samples.
        skipped: Records that the skip list names.
        troubles: How many samples had which trouble, as far as this process has seen.

    Raises:
        DataError: A file cannot be read, nothing is left, or, unless skipping, records are malformed.
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
        if template not in TEMPLATES:
            raise ValueError(f"unknown template {template!r}; there are {', '.join(TEMPLATES)}")
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
        self.malformed: list[Malformed] = []
        self.skipped: list[Origin] = []
        self.troubles: Counter[str] = Counter()
        self._sources = list(sources)
        self._linked_roots = {source.root for source in sources if source.follow_links}
        self._indices: list[RecordIndex] = []
        used = [self._add(source, number, index_dir) for number, source in enumerate(sources)]
        self._rows = np.concatenate([np.zeros(0, np.int64), *used])  # of a sample, in its file's index
        self._source_numbers = np.repeat(np.arange(len(used), dtype=np.int32), [len(rows) for rows in used])
        if self.malformed and on_bad_sample == "error":
            listed = "\n  ".join(record.message for record in self.malformed[:NAMED_IN_LOG])
            raise DataError(
                f"{len(self.malformed)} malformed records; correct them or set on_bad_sample to skip:\n  {listed}"
            )
        for record in self.malformed:
            self._note("malformed record left out", record.message)
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
            self._note("unreadable sample masked", f"{sample.name}: {error}")
            return self._masked_row(index, sample)
        text = self.encode_text(sample, [(image.height, image.width) for image in images])
        if text.cut is not None:
            self._note("over-long sample cut", f"{sample.name}: {text.cut}")
        if text.masked is not None:
            self._note("sample without supervised tokens", f"{sample.name}: {text.masked}")
        crops = [
            self.processor.image_processor([image], return_tensors="pt") for image in images[: text.num_images]
        ]  # of each image: pixel_values (1, P, 3, S, S) and image_sizes (1, 2)
        return {
            "input_ids": text.input_ids,
            "labels": text.labels,
            "pixel_values": [features["pixel_values"][0] for features in crops],
            "image_sizes": torch.cat([torch.zeros(0, 2, dtype=torch.long), *(row["image_sizes"] for row in crops)]),
            "index": index,
            "id": sample.id,
            "source": sample.source,
            "over_long": text.cut is not None,
            "unreadable": False,
        }

    def sample(self, index: int) -> Sample:
        """Reads the record of a sample.

        Raises:
            DataError: Its file was changed since the data set was made.
        """
        number = self.source_number(index)
        return self._indices[number].sample(int(self._rows[index]), self._sources[number].root)

    def open_images(self, sample: Sample) -> list[Image.Image]:
        """The decoded images of a sample.

        Raises:
            DataError: An image is missing, leads out of its root, is damaged or too large; the message names the file.
        """
        images = []
        for path in sample.images:
            if sample.image_root not in self._linked_roots:
                _check_inside(path, sample.image_root)
            images.append(load_image(path, self.max_image_pixels))
        return images

    def encode_text(self, sample: Sample, image_sizes: Sequence[tuple[int, int]]) -> EncodedText:
        """Ids and labels of a sample whose images have these (height, width), cut to the longest sequence.

        What fits is counted with every image at the finest level.
        """
        encoded = encode_conversation(
            sample.turns, self.processor.tokenizer, self.template, self.processor.image_token_id
        )
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
        """Short names of the sources: their files' names without ending, or their paths where these are not unique."""
        names = [Path(file.path).stem for file in self.files]
        return [name if names.count(name) == 1 else file.path for name, file in zip(names, self.files, strict=True)]

    def source_number(self, index: int) -> int:
        """Number of the source that a sample comes from."""
        return int(self._source_numbers[index])

    @property
    def origins(self) -> np.ndarray:
        """(samples, 2) number of the source, and position of the record in the source's file."""
        return np.stack([self._source_numbers, self._of_samples("position")], axis=1)

    @property
    def modality_lengths(self) -> np.ndarray:
        """(samples,) words, negative for a sample without image."""
        return self._of_samples("length")

    def origin(self, index: int) -> Origin:
        """Where a sample comes from."""
        number = self.source_number(index)
        return Origin(number, int(self._indices[number].rows["position"][self._rows[index]]))

    def unique(self) -> np.ndarray:
        """Positions of the samples, each record once, also where a weight or several sources repeat it."""
        files: dict[tuple[str, str], int] = {}
        numbers = [files.setdefault((file.sha256, file.image_root), number) for number, file in enumerate(self.files)]
        files_of_samples = np.array(numbers, dtype=np.int64)[self._source_numbers]
        records = files_of_samples << 40 | self._of_samples("position")  # no file has 2^40 records
        return np.sort(np.unique(records, return_index=True)[1])

    def fingerprint(self) -> str:
        """A hash of what the records are and how they are read: files' bytes, sampling, template and length.

        Where the files lie does not matter, nor do the images' bytes, which would have to be read.
        """
        is_drawn = any("random" in file.sampling or file.weight % 1 for file in self.files)
        parts: dict[str, Any] = {
            "sources": [
                (file.sha256, file.sampling, *([] if file.weight == 1 else [file.weight])) for file in self.files
            ],
            "seed": self.seed if is_drawn else None,
            "template": self.template,
            "max_length": self.max_length,
            "num_samples": len(self),
        }
        if self.skipped:
            parts["skipped"] = self.skipped
        return hash_json(parts)

    def _add(self, source: DataSource, number: int, index_dir: str | Path | None) -> np.ndarray:
        """Takes in a source; gives the rows of its file's index that are its samples, in their order."""
        path = Path(source.path)
        if not source.root.is_dir():
            raise DataError(f"image root {source.root} of {path} is no folder; check data.sources")
        index = open_index(path, self.template, index_dir)
        sampling = source.sampling or "all"
        self._indices.append(index)
        self.files.append(SourceFile(str(path), index.sha256, sampling, str(source.root), source.weight))
        rows = select(len(index.rows), sampling, source.weight, path, f"{self.seed}/{number}")
        if self.skip_list is not None:
            named = np.array(sorted(self.skip_list.positions(path, index.sha256)), dtype=np.int64)
            is_named = np.isin(index.rows["position"][rows], named)
            self.skipped += [Origin(number, int(position)) for position in index.rows["position"][rows[is_named]]]
            rows = rows[~is_named]
        is_sample = index.rows["length"][rows] != 0
        for row in dict.fromkeys(rows[~is_sample].tolist()):  # each once
            try:
                index.sample(row, source.root)
            except DataError as error:
                self.malformed.append(Malformed(Origin(number, int(index.rows["position"][row])), str(error)))
            else:
                raise AssertionError(f"{path}: row {row} of the index is a sample")
        return rows[is_sample]

    def _of_samples(self, field: str) -> np.ndarray:
        """(samples,) a field of the indices."""
        values = np.zeros(len(self), dtype=np.int64)
        for number, index in enumerate(self._indices):
            is_of_source = self._source_numbers == number
            values[is_of_source] = index.rows[field][self._rows[is_of_source]]
        return values

    def _masked_row(self, index: int, sample: Sample) -> dict[str, Any]:
        """Stands for a sample that cannot be read: one token that no loss looks at."""
        tokenizer = self.processor.tokenizer
        token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return {
            "input_ids": torch.tensor([token]),
            "labels": torch.tensor([IGNORE_INDEX]),
            "pixel_values": [],
            "image_sizes": torch.zeros(0, 2, dtype=torch.long),
            "index": index,
            "id": sample.id,
            "source": sample.source,
            "over_long": False,
            "unreadable": True,
        }

    def _note(self, trouble: str, message: str) -> None:
        """Counts a trouble and logs it: by name at first, then as a running number.

        Counts are per process: loader workers keep and log their own.
        """
        self.troubles[trouble] += 1
        count = self.troubles[trouble]
        if count <= NAMED_IN_LOG:
            logger.warning("%s: %s", trouble, message)
        else:
            logger.info("%s: %s", trouble, message)
            if count % 1000 == 0:
                logger.warning("%s: %d samples so far (names at log level INFO)", trouble, count)


def _check_inside(path: Path, root: Path) -> None:
    if not path.resolve().is_relative_to(root.resolve()):
        raise OutsideRootError(
            f"{path} leads out of the image root {root} through a link; copy the image, or set follow_links for the "
            "source"
        )


__all__ = ["ConversationDataset", "DataSource", "OutsideRootError"]
