"""lmms-eval's tasks over local data sets, loaded without this package: the reference for its scores."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import lmms_eval
import pandas
import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator
from lmms_eval.tasks.mmmu.utils import evaluate_mmmu
from lmms_eval.utils import load_yaml_config

from avg_llava.mini.benchmarks import write_benchmarks

# benchmark -> (task, repository)
TASKS = {
    "gqa": ("gqa/gqa", "GQA"),
    "scienceqa": ("scienceqa/scienceqa_img", "ScienceQA"),
    "vizwiz": ("vizwiz_vqa/vizwiz_vqa_val", "VizWiz-VQA"),
    "textvqa": ("textvqa/textvqa_val", "textvqa"),
    "chartqa": ("chartqa/chartqa", "ChartQA"),
    "docvqa": ("docvqa/docvqa_val", "DocVQA"),
    "ai2d": ("ai2d/ai2d", "ai2d"),
    "mme": ("mme/mme", "MME"),
    "mmbench": ("mmbench/mmbench_en_dev_static", "MMBench"),
    "mmbench_cn": ("mmbench/mmbench_cn_dev", "MMBench"),
    "pope": ("pope/pope", "POPE"),
    "mmmu": ("mmmu/mmmu_val", "MMMU"),
}


class LocalTask(ConfigurableTask):
    """A task of lmms-eval whose data set is a folder."""

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        data = datasets.load_dataset(self.DATASET_PATH, self.DATASET_NAME, split=self.config.test_split)
        if self.DATASET_NAME == "testdev_balanced_instructions":  # lmms-eval joins GQA's images from the hub
            images = datasets.load_dataset(self.DATASET_PATH, "testdev_balanced_images", split=self.config.test_split)
            rows = {name: index for index, name in enumerate(images["id"])}
            joined = images.select([rows[name] for name in data["imageId"]]).remove_columns("id")
            data = datasets.concatenate_datasets([data, joined], axis=1)
        self.dataset = {self.config.test_split: data}
        self.dataset_no_image = {
            self.config.test_split: data.remove_columns("image" if "image" in data.features else [])
        }


@contextlib.contextmanager
def mini_benchmarks(folder: Path) -> Iterator[Path]:
    """Writes the mini world's benchmarks below `folder`, where `datasets` also caches them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        write_benchmarks(folder / "data")
        yield folder / "data"


def load_task(benchmark: str, data: Path) -> LocalTask:
    """lmms-eval's task of a benchmark over `data`/<repository>."""
    name, repository = TASKS[benchmark]
    config = load_yaml_config(str(Path(lmms_eval.__file__).parent / "tasks" / f"{name}.yaml"))
    config.pop("process_docs", None)
    return LocalTask(config=config | {"dataset_path": str(data / repository), "dataset_kwargs": {}})


def outcome(task: LocalTask, doc: Mapping[str, Any], prediction: str) -> dict[str, Any]:
    """One answer through the task's filter and `process_results`."""
    doc = {key: list(value) if isinstance(value, list) else value for key, value in doc.items()}  # some tasks change it
    instance = Instance("generate_until", (), 0, metadata={"task": "local", "doc_id": 0, "repeats": 1})
    instance.resps = [prediction]
    (ensemble,) = task._filters
    ensemble.apply([instance], [doc])
    return task.process_results(doc, [instance.filtered_resps[ensemble.name]])


def score(benchmark: str, task: LocalTask, doc: Mapping[str, Any], prediction: str) -> float:
    """The score of one answer by lmms-eval's functions, from 0 to 1."""
    first = next(iter(outcome(task, doc, prediction).values()))
    if benchmark in ("mmbench", "mmbench_cn"):
        row = {key if key in "ABCD" else key.lower(): value for key, value in first.items()}
        answers = {row["index"]: row["answer"]}
        return float(mmbench_evaluator.eval_sub_data(pandas.DataFrame([row]), answers, static_only=True))
    if benchmark == "mmmu":
        return evaluate_mmmu([first])[1]["acc"]
    return float(first["score"] if isinstance(first, dict) else first)


def total(benchmark: str, task: LocalTask, predictions: list[str]) -> dict[str, float]:
    """The scores of a whole data set by lmms-eval's aggregations, for one prediction per row."""
    results = [outcome(task, doc, answer) for doc, answer in zip(task.task_docs, predictions, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):
        if benchmark in ("mmbench", "mmbench_cn"):
            rows = [result["gpt_eval_score"] for result in results]
            return {"circular": mmbench_evaluator.eval_result(rows, "static")[0]}
        return {
            metric: aggregate([result[metric] for result in results if metric in result])
            for metric, aggregate in task.aggregation().items()
            if metric != "submission"
        }


def gold_answer(benchmark: str, doc: Mapping[str, Any]) -> str:
    """The answer that a perfect model gives."""
    if benchmark in ("vizwiz", "textvqa"):
        ((answer, _),) = Counter(doc["answers"]).most_common(1)
        return answer
    if benchmark == "docvqa":
        return doc["answers"][-1]
    if benchmark in ("scienceqa", "ai2d"):
        return "ABCDE"[int(doc["answer"])]
    return doc["answer"]
