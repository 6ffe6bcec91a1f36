"""Checks every sample before training: missing, unreadable, malformed, over-long or without supervised tokens.

Images are decoded and texts are encoded, by any number of processes; no model is run. A killed check continues from the
findings stored beside its skip list.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from avg_llava.common.files import hash_json
from avg_llava.common.jsonl import JsonLines
from avg_llava.data.dataset import ConversationDataset, OutsideRootError
from avg_llava.data.encoding import find_wrong_label
from avg_llava.data.records import DataError, Sample
from avg_llava.data.skip_list import SkipList, SkippedRecords
from avg_llava.model.images import MissingImageError, OversizedImageError

Problem = Literal[
    "malformed", "missing", "outside root", "oversized", "unreadable", "masked", "mislabelled", "over-long"
]
"""`masked`: no token is supervised. `mislabelled`: the supervised tokens are not the answers. `over-long`: truncated at
the end, as in training, so the sample is counted and used."""

BATCH_SIZE = 32  # samples that a process checks before it reports
TOTAL = "total"
TEXT_ONLY, MALFORMED = "(text only)", "(malformed)"  # groups of samples without an image path


class Finding(NamedTuple):
    """Problems of one sample, if any: `source` is the index of its source, `position` that of its record."""

    source: int
    position: int
    group: str
    problems: tuple[tuple[Problem, str], ...] = ()


@dataclass
class SourceReport:
    """Counts of one source: records used, those by group, and samples by problem, of which a sample may have several.

    A record's group is the first folder of its image path, `TEXT_ONLY` or `MALFORMED`.
    """

    path: str
    num_records: int = 0
    groups: Counter[str] = field(default_factory=Counter)
    problems: Counter[Problem] = field(default_factory=Counter)

    def unexpected(self, expected: Mapping[str, int]) -> dict[str, int]:
        """The counts, by group or `TOTAL`, that differ by more than 1 % from the expected ones."""
        found = {name: self.num_records if name == TOTAL else self.groups[name] for name in expected}
        return {name: found[name] for name in expected if abs(found[name] - expected[name]) > 0.01 * expected[name]}


@dataclass(frozen=True)
class Verification:
    """Counts of every source, and the records that training should skip."""

    sources: list[SourceReport]
    skip_list: SkipList

    @property
    def num_skipped(self) -> int:
        """Number of records that training should skip."""
        return sum(len(records.skip) for records in self.skip_list.files.values())


def verify(
    dataset: ConversationDataset,
    num_processes: int,
    output: Path | None = None,
    callback: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Checks all samples of a data set.

    Args:
        dataset: Made with `on_bad_sample="skip"`, so that it lists its malformed records, and without a skip list.
        output: The skip list to write. Findings are stored beside it until it is complete; without it, a killed check
            starts again.
        callback: Called with the numbers of checked samples and of all samples.

    Raises:
        DataError: A process was killed.
    """
    sources = [SourceReport(file.path) for file in dataset.files]
    skip_list = SkipList({file.sha256: SkippedRecords(file.path, {}) for file in dataset.files})

    def record(finding: Finding) -> None:
        report = sources[finding.source]
        report.num_records += 1
        report.groups[finding.group] += 1
        report.problems.update(problem for problem, _ in finding.problems)
        reasons = [f"{problem}: {message}" for problem, message in finding.problems if problem != "over-long"]
        if reasons:
            skip_list.files[dataset.files[finding.source].sha256].skip[finding.position] = "; ".join(reasons)

    for origin, message in dataset.malformed.items():
        record(Finding(*origin, MALFORMED, (("malformed", message),)))
    indices = dataset.unique()
    store = None if output is None else JsonLines(output.with_name(f".{output.name}.partial"))
    num_done = 0
    for findings in _check_samples(dataset, indices, num_processes, store):
        for finding in findings:
            record(finding)
        num_done += len(findings)
        callback(num_done, len(indices))
    if output is not None and store is not None:
        skip_list.write(output)
        store.path.unlink(missing_ok=True)
    return Verification(sources, skip_list)


def _check_samples(
    dataset: ConversationDataset, indices: np.ndarray, num_processes: int, store: JsonLines | None
) -> Iterator[list[Finding]]:
    """Yields the stored findings, then those of the remaining samples batch by batch, in the order of `indices`."""
    known = [] if store is None else _read_findings(store, _identity(dataset))
    yield known
    loader = DataLoader(
        SampleChecks(dataset),
        BATCH_SIZE,
        sampler=indices[len(known) :].tolist(),
        collate_fn=list,
        num_workers=num_processes if num_processes > 1 else 0,
    )
    try:
        for findings in loader:
            if store is not None:
                store.append([findings])
            yield findings
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that checks samples ended ({error}), perhaps because memory ran out; run again with fewer "
            "processes, which continues from here if there is an --output"
        ) from error


def _read_findings(store: JsonLines, identity: str) -> list[Finding]:
    """Reads the findings of a store, whose first line is its identity; a store of another identity is emptied."""
    lines = store.read()
    if lines[:1] != [identity]:
        store.path.parent.mkdir(parents=True, exist_ok=True)
        store.write([identity])
        return []
    return [
        Finding(source, position, group, tuple((problem, message) for problem, message in problems))
        for line in lines[1:]
        for source, position, group, problems in line
    ]


def _identity(dataset: ConversationDataset) -> str:
    """Hash of everything that the findings depend on, except for the bytes of images."""
    return hash_json([dataset.fingerprint(), [file.image_root for file in dataset.files], dataset.max_image_pixels])


class SampleChecks(Dataset[Finding]):
    """Findings of the samples of a data set."""

    def __init__(self, dataset: ConversationDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Finding:
        sample, origin = self.dataset.sample(index), self.dataset.origin(index)
        group = TEXT_ONLY
        if sample.images:
            folders = sample.images[0].relative_to(sample.image_root).parts[:-1]
            group = folders[0] if folders else "."
        return Finding(*origin, group, tuple(self._problems(sample)))

    def _problems(self, sample: Sample) -> Iterator[tuple[Problem, str]]:
        try:
            images = self.dataset.open_images(sample)
        except MissingImageError as error:
            yield "missing", str(error)
        except OutsideRootError as error:
            yield "outside root", str(error)
        except OversizedImageError as error:
            yield "oversized", str(error)
        except DataError as error:
            yield "unreadable", str(error)
        else:
            text = self.dataset.encode_text(sample, [(image.height, image.width) for image in images])
            if text.cut is not None:
                yield "over-long", text.cut
            if text.masked is not None:
                yield "masked", text.masked
            elif text.cut is None:
                wrong = find_wrong_label(text.labels.tolist(), sample.turns, self.dataset.processor.tokenizer)
                if wrong is not None:
                    yield "mislabelled", wrong
