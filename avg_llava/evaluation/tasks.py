"""A benchmark's questions: lmms-eval's own task code over the hub's data set or a local copy of it.

lmms-eval writes the prompts and scores the answers. Images are decoded here, one question at a time: a broken one costs
that question, not the run, and nothing is held in memory.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lmms_eval
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.utils import load_yaml_config
from loguru import logger as harness_logger
from PIL import Image

from avg_llava.data.records import DataError
from avg_llava.evaluation.benchmarks import BENCHMARKS, Benchmark, Protocol
from avg_llava.evaluation.benchmarks.mmmu import PAPER_TASKS
from avg_llava.inference.answers import Request
from avg_llava.model.images import decode_image, load_image

MAX_NEW_TOKENS = 1024
"""Where a task names no limit, as in the published harness."""

harness_logger.remove()
harness_logger.add(sys.stderr, level="WARNING")


class BenchmarkError(ValueError):
    """A data set that is not the benchmark's, or cannot be opened."""


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """The harness prints while it scores: to standard error, which is not for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def open_data(path: str, config: str | None, split: str) -> datasets.Dataset:
    """A split of a data set, its images left as bytes."""
    try:
        data = datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        name = " ".join(filter(None, [path, config, split]))
        raise BenchmarkError(f"cannot open the data set {name} ({type(error).__name__}: {error})") from error
    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    return data


class _Task(ConfigurableTask):
    """lmms-eval's task over a single split, opened by `open_data`."""

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Opens the split; called by the constructor."""
        split = self.config.test_split
        self.dataset = {split: open_data(self.DATASET_PATH, self.DATASET_NAME, split)}
        if not len(self.dataset[split]):
            raise BenchmarkError(f"the data set {self.DATASET_PATH} has no rows in the split {split}")
        self.dataset_no_image = self.dataset


@cache
def _task_yaml(task: str) -> Path:
    path = Path(lmms_eval.__file__).parent / "tasks" / f"{task}.yaml"
    if not path.is_file():
        raise BenchmarkError(
            f"lmms-eval {version('lmms-eval')} has no task {task} ({path}); constraints.txt pins one that has it"
        )
    return path


class BenchmarkQuestions:
    """The questions of a benchmark, by number.

    Args:
        name: One of `BENCHMARKS`.
        protocol: Whose prompts and metrics.
        data: Folder with local copies of the data sets, each named like its repository; None takes the hub's.

    Raises:
        BenchmarkError: the data set cannot be opened, or lacks columns that the task reads.
    """

    def __init__(self, name: str, protocol: Protocol, data: Path | None = None) -> None:
        self.name = name
        self.benchmark: Benchmark = BENCHMARKS[name]
        self.protocol = protocol
        config = load_yaml_config(str(_task_yaml(self.benchmark.task)))
        for key in ("process_docs", "dataset_kwargs"):  # of where the data come from, which is our part
            config.pop(key, None)
        if data is not None:
            folder = data / self.benchmark.folder
            if not folder.is_dir():
                raise BenchmarkError(
                    f"{folder} is missing: --data names the folder that holds a copy of {config['dataset_path']} under "
                    f"the name {self.benchmark.folder}"
                )
            config["dataset_path"] = str(folder)
        if protocol == "paper":
            config |= PAPER_TASKS.get(name, {})
        try:
            self.task = _Task(config=config, model_name="default")
        except (KeyError, IndexError, TypeError) as error:
            raise BenchmarkError(
                f"{config['dataset_path']} is not what {self.benchmark.task} reads ({type(error).__name__}: {error}); "
                "its columns must be those of the public data set"
            ) from error

    def __len__(self) -> int:
        return len(self.docs)

    @property
    def docs(self) -> datasets.Dataset:
        """The rows; images as bytes."""
        return self.task.task_docs

    @property
    def image_columns(self) -> list[str]:
        """Columns that hold images."""
        return [name for name, feature in self.docs.features.items() if isinstance(feature, datasets.Image)]

    @property
    def max_new_tokens(self) -> int:
        """Longest answer in tokens."""
        return int((self.task.config.generation_kwargs or {}).get("max_new_tokens", MAX_NEW_TOKENS))

    @property
    def stops(self) -> list[str]:
        """Texts at which an answer ends."""
        until = (self.task.config.generation_kwargs or {}).get("until") or []
        return [until] if isinstance(until, str) else list(until)

    def label(self, index: int) -> str:
        """How messages call a question."""
        column = self.benchmark.name_column
        named = f" ({column} {self.docs[index][column]})" if column in self.docs.column_names else ""
        return f"{self.name} question {index}{named}"

    def prompt(self, index: int) -> str:
        """What the model is asked, without the conversation around it."""
        return str(self.task.doc_to_text(self.docs[index]))

    def reference(self, index: int) -> Any:
        """The right answer, as the task states it; where it judges by all annotators' answers, these."""
        if self.task.config.doc_to_target == "answer" and "answer" not in self.docs.column_names:
            return self.docs[index]["answers"]
        return self.task.doc_to_target(self.docs[index])

    def request(self, index: int) -> Request:
        """A question with its images.

        Raises:
            DataError: an image is missing, damaged or too large; the question is named.
        """
        doc = dict(self.docs[index])
        if self.benchmark.image_config:
            row = self._image_rows.get(doc["imageId"])
            if row is None:
                raise DataError(
                    f"{self.label(index)}: the configuration {self.benchmark.image_config} has no image "
                    f"{doc['imageId']!r}"
                )
            doc["image"] = self._images[row]["image"]
        for column, value in doc.items():
            if isinstance(value, dict) and set(value) == {"bytes", "path"}:
                doc[column] = self._decoded(value, f"{self.label(index)}, column {column}")
        try:
            images = self.task.doc_to_visual(doc)
        except (AttributeError, KeyError) as error:  # a row whose image column is empty
            raise DataError(f"{self.label(index)}: has no image where the task expects one ({error})") from error
        return Request(str(self.task.doc_to_text(doc)), tuple(images))

    def outcome(self, index: int, answer: str) -> dict[str, Any]:
        """What lmms-eval makes of one answer: metric -> number, or record for the metric's aggregation."""
        doc = dict(self.docs[index])
        instance = Instance("generate_until", (), 0, {"task": self.name, "doc_id": index, "repeats": 1})
        instance.resps = [answer]
        (ensemble,) = self.task._filters
        ensemble.apply([instance], [doc])
        with quiet_harness():
            return dict(self.task.process_results(doc, [instance.filtered_resps[ensemble.name]]))

    @cached_property
    def _images(self) -> datasets.Dataset:
        assert self.benchmark.image_config is not None
        return open_data(self.task.DATASET_PATH, self.benchmark.image_config, self.task.config.test_split)

    @cached_property
    def _image_rows(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self._images["id"])}

    def _decoded(self, value: dict[str, Any], name: str) -> Image.Image:
        if value["bytes"] is None:
            return load_image(value["path"])
        return decode_image(value["bytes"], name)


__all__ = ["BenchmarkError", "BenchmarkQuestions", "open_data", "quiet_harness"]
