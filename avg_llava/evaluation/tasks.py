"""Questions of lmms-eval's tasks, over the hub's data sets or local copies of them.

lmms-eval makes the prompts and scores the answers. Images are decoded here, one question at a time: a broken image
costs one question instead of the run, and no image is kept in memory.
"""

import sys
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lmms_eval
import lmms_eval.api.metrics  # registers the metrics that tasks name
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.utils import load_yaml_config
from loguru import logger as harness_logger

from avg_llava.evaluation.benchmarks import HarnessTask, Protocol
from avg_llava.evaluation.questions import BenchmarkError, Questions, fingerprint_rows
from avg_llava.evaluation.results import DatasetFacts, HarnessFacts
from avg_llava.inference.answers import Request
from avg_llava.model.images import DataError, decode_image, load_image

MAX_NEW_TOKENS = 1024
"""For tasks that set no limit, as in the published harness."""

harness_logger.remove()
harness_logger.add(sys.stderr, level="WARNING")


def open_data(path: str, config: str | None, split: str) -> datasets.Dataset:
    """Opens a split of a data set; its images stay encoded.

    Raises:
        BenchmarkError: The data set cannot be opened.
    """
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
    """A task of lmms-eval over a single split."""

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Opens the split; called by lmms-eval's constructor."""
        split = self.config.test_split
        self.dataset = {split: open_data(self.DATASET_PATH, self.DATASET_NAME, split)}
        if not len(self.dataset[split]):
            raise BenchmarkError(f"the data set {self.DATASET_PATH} has no rows in the split {split}")
        self.dataset_no_image = self.dataset


def _task_yaml(task: str) -> Path:
    path = Path(lmms_eval.__file__).parent / "tasks" / f"{task}.yaml"
    if not path.is_file():
        raise BenchmarkError(
            f"lmms-eval {version('lmms-eval')} has no task {task} ({path}); constraints.txt pins one that has it"
        )
    return path


def generation_limits(options: Mapping[str, Any] | None) -> tuple[int, tuple[str, ...]]:
    """Returns the maximum length of an answer in tokens and the strings that end it, from a task's options."""
    options = options or {}
    until = options.get("until") or []
    return int(options.get("max_new_tokens", MAX_NEW_TOKENS)), (until,) if isinstance(until, str) else tuple(until)


class HarnessQuestions(Questions):
    """The questions of a benchmark whose source is a `HarnessTask`.

    `data` is a folder with local copies of the data sets, each named like its repository; None uses the hub's.

    Raises:
        BenchmarkError: The data set cannot be opened, or lacks columns that the task reads.
    """

    docs: datasets.Dataset

    def __init__(self, name: str, protocol: Protocol, data: Path | None = None) -> None:
        super().__init__(name, protocol)
        assert isinstance(self.benchmark.source, HarnessTask)
        self.source = self.benchmark.source
        config = load_yaml_config(str(_task_yaml(self.source.task)))
        for key in ("process_docs", "dataset_kwargs"):  # loading the data, which `_Task.download` does instead
            config.pop(key, None)
        if data is not None:
            folder = data / self.source.folder
            if not folder.is_dir():
                raise BenchmarkError(
                    f"{folder} is missing: --data names the folder that holds a copy of {config['dataset_path']} under "
                    f"the name {self.source.folder}"
                )
            config["dataset_path"] = str(folder)
        if protocol == "paper":
            config |= self.source.paper
        try:
            self.task = _Task(config=config, model_name="default")
        except (KeyError, IndexError, TypeError) as error:
            raise BenchmarkError(
                f"{config['dataset_path']} is not what {self.source.task} reads ({type(error).__name__}: {error}); "
                "its columns must be those of the public data set"
            ) from error
        self.docs = self.task.task_docs  # with encoded images
        self.max_new_tokens, self.stop = generation_limits(self.task.config.generation_kwargs)
        self.harness = HarnessFacts("lmms-eval", version("lmms-eval"), str(self.task.config.task))

    @cached_property
    def dataset(self) -> DatasetFacts:
        config = self.task.config
        images = [name for name, feature in self.docs.features.items() if isinstance(feature, datasets.Image)]
        fingerprint = fingerprint_rows(self.docs.remove_columns(images))
        return DatasetFacts(str(config.dataset_path), config.dataset_name, config.test_split, len(self), fingerprint)

    def label(self, index: int) -> str:
        column = self.source.name_column
        identity = f" ({column} {self.docs[index][column]})" if column in self.docs.column_names else ""
        return f"{super().label(index)}{identity}"

    def prompt(self, index: int) -> str:
        return str(self.task.doc_to_text(self.docs[index]))

    def reference(self, index: int) -> Any:
        """The right answer; the list of all annotators' answers if the task scores against these."""
        if self.task.config.doc_to_target == "answer" and "answer" not in self.docs.column_names:
            return self.docs[index]["answers"]
        return self.task.doc_to_target(self.docs[index])

    def request(self, index: int) -> Request:
        doc = dict(self.docs[index])
        if self.source.image_config:
            row = self._image_rows.get(doc["imageId"])
            if row is None:
                raise DataError(
                    f"{self.label(index)}: the configuration {self.source.image_config} has no image {doc['imageId']!r}"
                )
            doc["image"] = self._images[row]["image"]
        for column, value in doc.items():
            if isinstance(value, dict) and set(value) == {"bytes", "path"}:
                name = f"{self.label(index)}, column {column}"
                doc[column] = (
                    load_image(value["path"]) if value["bytes"] is None else decode_image(value["bytes"], name)
                )
        try:
            images = self.task.doc_to_visual(doc)
        except (AttributeError, KeyError) as error:  # the image column of the row is empty
            raise DataError(f"{self.label(index)}: has no image where the task expects one ({error})") from error
        return Request(str(self.task.doc_to_text(doc)), tuple(images))

    def outcome(self, index: int, answer: str) -> dict[str, Any]:
        doc = dict(self.docs[index])
        instance = Instance("generate_until", (), 0, {"task": self.name, "doc_id": index, "repeats": 1})
        instance.resps = [answer]
        (ensemble,) = self.task._filters
        ensemble.apply([instance], [doc])
        return dict(self.task.process_results(doc, [instance.filtered_resps[ensemble.name]]))

    @cached_property
    def _images(self) -> datasets.Dataset:
        return open_data(self.task.DATASET_PATH, self.source.image_config, self.task.config.test_split)

    @cached_property
    def _image_rows(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self._images["id"])}
