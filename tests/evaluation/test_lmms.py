"""The model under lmms-eval's own evaluator, on local data, against our evaluation of the same questions."""

from pathlib import Path

import lmms_eval
import pytest
import torch
import yaml
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models.registry_v2 import ModelRegistryV2
from lmms_eval.tasks import TaskManager

from avg_llava.evaluation.answering import Setting
from avg_llava.evaluation.evaluate import evaluate
from avg_llava.evaluation.lmms import AvgLlava, FailedSamplesError


def _task(folder: Path, name: str, file: Path, **changes) -> TaskManager:
    """A task that includes the shipped one and reads local data."""
    shipped = Path(lmms_eval.__file__).parent / "tasks" / f"{name}.yaml"
    content = {
        "include": str(shipped),
        "task": "local_task",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        **changes,
    }
    (folder / "local.yaml").write_text(yaml.safe_dump(content))
    return TaskManager(include_path=str(folder), include_defaults=False)


def test_lmms_eval_finds_the_model():
    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("avg_llava") is AvgLlava


@pytest.mark.parametrize("granularity", ["auto", 8])
def test_scores_under_lmms_eval_are_ours(data, checkpoint, tmp_path, granularity):
    (file,) = (data / "ChartQA" / "data").glob("*.parquet")
    model = AvgLlava(str(checkpoint), granularity=granularity, batch_size=3)
    results = simple_evaluate(
        model, tasks=["local_task"], task_manager=_task(tmp_path, "chartqa/chartqa", file), batch_size=3
    )
    setting = Setting("chartqa", checkpoint, "current", granularity, 0.0, data, None, 1, torch.float32)
    ours = evaluate(setting, tmp_path / "out", num_workers=1, num_timed=0)
    for name, metric in ours.metrics.items():
        assert results["results"]["local_task"][f"{name},none"] == pytest.approx(metric.value)
    predictions = [sample["resps"][0][0] for sample in results["samples"]["local_task"]]
    lines = (tmp_path / "out" / "chartqa.answers.jsonl").read_text().splitlines()
    assert predictions == [yaml.safe_load(line)["prediction"] for line in lines]


def test_a_failed_sample_is_no_empty_answer(data, checkpoint, tmp_path):
    """A prompt that does not fit: all others are answered, then the failure is raised with its name."""
    (file,) = (data / "ChartQA" / "data").glob("*.parquet")
    model = AvgLlava(str(checkpoint), granularity=16, batch_size=4)
    model.predictor.model.config.max_sequence_length = 20
    with pytest.raises(
        FailedSamplesError, match=r"16 of 16 questions failed: local_task question 0 \(test\): a prompt"
    ):
        simple_evaluate(
            model, tasks=["local_task"], task_manager=_task(tmp_path, "chartqa/chartqa", file), batch_size=4
        )


def test_unknown_granularity_is_refused(checkpoint):
    with pytest.raises(ValueError, match="granularity 7 is neither auto nor one of this model's levels"):
        AvgLlava(str(checkpoint), granularity=7)
