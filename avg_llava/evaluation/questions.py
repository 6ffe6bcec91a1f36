"""The questions of a benchmark, whatever they are read from, and those that a `LocalTask` defines."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from avg_llava.common.files import hash_bytes, hash_json
from avg_llava.evaluation.benchmarks import BENCHMARKS, LocalTask, Protocol
from avg_llava.evaluation.benchmarks.benchmark import Doc, Outcome
from avg_llava.evaluation.results import DatasetFacts, HarnessFacts
from avg_llava.inference.answers import Request
from avg_llava.inference.predictor import open_image
from avg_llava.model.images import DataError


class BenchmarkError(ValueError):
    """A data set that cannot be opened or is not the benchmark's."""


class Questions(ABC):
    """The questions of a benchmark, by index."""

    docs: Sequence[Doc]
    max_new_tokens: int
    """Maximum length of an answer in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    harness: HarnessFacts
    """The code that makes prompts and scores."""

    def __init__(self, name: str, protocol: Protocol) -> None:
        self.name = name
        self.benchmark = BENCHMARKS[name]
        self.protocol = protocol

    def __len__(self) -> int:
        return len(self.docs)

    @property
    @abstractmethod
    def dataset(self) -> DatasetFacts:
        """The data set, with a fingerprint of its rows."""

    def label(self, index: int) -> str:
        """The question's name in messages."""
        return f"{self.name} question {index}"

    @abstractmethod
    def prompt(self, index: int) -> str:
        """The question's text, without the conversation template."""

    @abstractmethod
    def reference(self, index: int) -> Any:
        """The right answer, as the task states it."""

    @abstractmethod
    def request(self, index: int) -> Request:
        """The question with its images.

        Raises:
            DataError: An image is missing, damaged or too large; the message names the question.
        """

    @abstractmethod
    def outcome(self, index: int, answer: str) -> Outcome:
        """Scores one answer: metric -> number, or the record that the metric aggregates."""


class LocalQuestions(Questions):
    """The questions of a benchmark whose source is a `LocalTask`; prompts and metrics are the same in both protocols.

    Raises:
        BenchmarkError: There are no questions.
    """

    def __init__(self, name: str, protocol: Protocol, data: Path | None = None) -> None:
        super().__init__(name, protocol)
        assert isinstance(self.benchmark.source, LocalTask)
        self.task = self.benchmark.source
        self.data = data
        self.docs = self.task.read(data)
        if not self.docs:
            raise BenchmarkError(f"the benchmark {name} has no questions")
        self.max_new_tokens = self.task.max_new_tokens
        self.harness = HarnessFacts("avg-llava", version("avg-llava"), name)

    @cached_property
    def dataset(self) -> DatasetFacts:
        return DatasetFacts(
            str(self.data or "built in"), None, "all", len(self), fingerprint_rows(self.docs, default=_hash_bytes)
        )

    def prompt(self, index: int) -> str:
        return self.task.prompt(self.docs[index])

    def reference(self, index: int) -> Any:
        return self.task.reference(self.docs[index])

    def request(self, index: int) -> Request:
        try:
            images = [open_image(image, number) for number, image in enumerate(self.task.images(self.docs[index]), 1)]
        except DataError as error:
            raise DataError(f"{self.label(index)}: {error}") from error
        return Request(self.prompt(index), tuple(images))

    def outcome(self, index: int, answer: str) -> Outcome:
        return self.task.score(self.docs[index], answer)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads questions from a JSON, JSON-lines or Parquet file.

    Raises:
        BenchmarkError: The file is missing, has another suffix, or is not a list of rows.
    """
    if not path.is_file():
        raise BenchmarkError(f"{path} does not exist; --data names the folder of the data sets")
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:  # `str.splitlines` also splits at separators inside strings
                rows = [json.loads(line) for line in file]
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            raise BenchmarkError(f"{path}: questions are read from .json, .jsonl and .parquet files")
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BenchmarkError(f"{path} must hold a list of objects, one per question")
    return rows


def fingerprint_rows(rows: Sequence[Doc], default: Any = str) -> str:
    """SHA-256 of rows; `default` makes JSON of values that are none."""
    lines = [json.dumps(row, sort_keys=True, default=default, ensure_ascii=False) for row in rows]
    return hash_json(lines)


def _hash_bytes(value: Any) -> str:
    if not isinstance(value, bytes):
        raise BenchmarkError(f"rows of a benchmark hold JSON values or bytes, not {type(value).__name__}")
    return hash_bytes(value)
