"""Looking at every sample before training does: what is missing, unreadable, malformed, too long or without answer.

Images are decoded, texts are encoded, nothing else is computed. Done by any number of processes; a run that was killed
goes on from where it was, by notes beside its skip list.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from avg_llava.common.files import hash_json
from avg_llava.data.dataset import ConversationDataset, OutsideRootError
from avg_llava.data.records import DataError, Sample
from avg_llava.data.skip_list import SkipList, SkippedRecords
from avg_llava.model.images import MissingImageError, OversizedImageError

Problem = Literal["malformed", "missing", "outside root", "oversized", "unreadable", "masked", "over-long"]
"""`masked`: nothing is supervised. `over-long`: text is cut off at the end, which training does too, so these samples
are counted and used."""

BATCH_SIZE = 32  # samples that a process looks at before it reports
TOTAL = "total"
TEXT_ONLY, MALFORMED = "(text only)", "(malformed)"  # groups of samples without an image's path


class Finding(NamedTuple):
    """What is wrong with a sample, if anything. `position` is its record's, `source` the source's number."""

    source: int
    position: int
    group: str
    problems: tuple[tuple[Problem, str], ...] = ()


@dataclass
class SourceReport:
    """Counts of one source.

    Attributes:
        path: Its file.
        num_records: Records that are used of it.
        groups: Records by the first folder of their image's path, or `TEXT_ONLY` or `MALFORMED`.
        problems: Samples by what is wrong with them; one may have several problems.
    """

    path: str
    num_records: int = 0
    groups: Counter[str] = field(default_factory=Counter)
    problems: Counter[Problem] = field(default_factory=Counter)

    def unexpected(self, expected: Mapping[str, int]) -> dict[str, int]:
        """The counts, by group and `TOTAL`, that are more than 1 % from what is expected."""
        found = {name: self.num_records if name == TOTAL else self.groups[name] for name in expected}
        return {name: found[name] for name in expected if abs(found[name] - expected[name]) > 0.01 * expected[name]}


@dataclass
class Verification:
    """Counts of every source, and what training should skip."""

    sources: list[SourceReport]
    skip_list: SkipList

    @property
    def num_skipped(self) -> int:
        """Records that training should skip."""
        return sum(len(records.skip) for records in self.skip_list.files.values())


def verify(
    dataset: ConversationDataset,
    num_processes: int,
    output: Path | None = None,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Looks at all samples of a data set.

    Args:
        dataset: Made with `on_bad_sample="skip"`, so that it holds its malformed records, and without skip list.
        num_processes: Processes that look.
        output: The skip list to write. Notes of what was seen are kept beside it until it is written; without it, a run
            that was killed begins anew.
        show: Told how many of all samples are done.

    Raises:
        DataError: A process was killed.
    """
    sources = [SourceReport(file.path) for file in dataset.files]
    skip_list = SkipList({file.sha256: SkippedRecords(file.path, {}) for file in dataset.files})

    def enter(finding: Finding) -> None:
        report = sources[finding.source]
        report.num_records += 1
        report.groups[finding.group] += 1
        report.problems.update(problem for problem, _ in finding.problems)
        reasons = [f"{problem}: {message}" for problem, message in finding.problems if problem != "over-long"]
        if reasons:
            skip_list.files[dataset.files[finding.source].sha256].skip[finding.position] = "; ".join(reasons)

    for record in dataset.malformed:
        enter(Finding(*record.origin, MALFORMED, (("malformed", record.message),)))
    total = len(dataset.unique())
    notes = None if output is None else Notes(output.with_name(f".{output.name}.partial"), _identity(dataset))
    done = 0
    for findings in _findings(dataset, num_processes, notes):
        for finding in findings:
            enter(finding)
        done += len(findings)
        show(done, total)
    if output is not None and notes is not None:
        skip_list.write(output)
        notes.path.unlink(missing_ok=True)
    return Verification(sources, skip_list)


class Notes:
    """What was seen so far, in a file of JSON lines: first what the notes are of, then one line per batch.

    Args:
        path: The file.
        identity: What the notes are of; notes of anything else are dropped.
    """

    def __init__(self, path: Path, identity: str):
        self.path = path
        self.identity = identity

    def read(self) -> list[Finding]:
        """All findings so far; a last line that was cut short by a kill is removed from the file."""
        if not self.path.is_file():
            return self._begin()
        first, *lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) or [""]
        if first != self._head():
            return self._begin()
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            self.path.write_text(first + "".join(whole), encoding="utf-8")
        return [
            Finding(source, position, group, tuple((problem, message) for problem, message in problems))
            for line in whole
            for source, position, group, problems in json.loads(line)
        ]

    def add(self, findings: Sequence[Finding]) -> None:
        """Notes a batch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(findings) + "\n")

    def _begin(self) -> list[Finding]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self._head(), encoding="utf-8")
        return []

    def _head(self) -> str:
        return json.dumps(self.identity) + "\n"


def _findings(dataset: ConversationDataset, num_processes: int, notes: Notes | None) -> Iterator[list[Finding]]:
    """Findings of all samples: first those noted, then the others as they come, in the data set's order."""
    known = [] if notes is None else notes.read()
    yield known
    loader = DataLoader(
        VerifiedSamples(dataset, dataset.unique()[len(known) :]),
        BATCH_SIZE,
        collate_fn=list,
        num_workers=num_processes if num_processes > 1 else 0,
    )
    try:
        for findings in loader:
            if notes is not None:
                notes.add(findings)
            yield findings
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that looks at samples ended ({error}), perhaps for want of memory; run again with fewer "
            "processes, which goes on from here if there is an --output"
        ) from error


class VerifiedSamples(Dataset[Finding]):
    """What is wrong with samples of a data set.

    Args:
        dataset: The data set.
        indices: Positions of the samples.
    """

    def __init__(self, dataset: ConversationDataset, indices: np.ndarray):
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Finding:
        index = int(self.indices[place])
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


def _identity(dataset: ConversationDataset) -> str:
    parts = [dataset.fingerprint(), [file.image_root for file in dataset.files], dataset.max_image_pixels]
    return hash_json(parts)


__all__ = ["TOTAL", "Problem", "SourceReport", "Verification", "verify"]
