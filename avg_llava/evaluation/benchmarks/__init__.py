"""The twelve benchmarks of the paper: which lmms-eval task, which data set, which metrics.

The two protocols:

paper    prompts, metrics and answer lengths as the harness had them with which the paper's numbers were made
current  today's lmms-eval
"""

from dataclasses import dataclass
from typing import Literal

Protocol = Literal["paper", "current"]
PROTOCOLS: tuple[Protocol, ...] = ("paper", "current")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        title: As tables call it.
        task: The YAML of lmms-eval's task, below its folder of tasks, without the ending.
        folder: Name of the data set's repository, and of a local copy of it.
        num_questions: Questions of the split, to tell a partial copy from a whole one.
        name_column: Column that names a question to people; None where there is none.
        image_config: Configuration of the same data set that holds the images, by the column `imageId`; None where the
            questions hold them.
    """

    title: str
    task: str
    folder: str
    num_questions: int
    name_column: str | None = None
    image_config: str | None = None


BENCHMARKS: dict[str, Benchmark] = {
    "gqa": Benchmark("GQA", "gqa/gqa", "GQA", 12578, "id", image_config="testdev_balanced_images"),
    "scienceqa": Benchmark("ScienceQA-IMG", "scienceqa/scienceqa_img", "ScienceQA", 2017),
    "vizwiz": Benchmark("VizWiz", "vizwiz_vqa/vizwiz_vqa_val", "VizWiz-VQA", 4319, "question_id"),
    "textvqa": Benchmark("TextVQA", "textvqa/textvqa_val", "textvqa", 5000, "question_id"),
    "chartqa": Benchmark("ChartQA", "chartqa/chartqa", "ChartQA", 2500),
    "docvqa": Benchmark("DocVQA", "docvqa/docvqa_val", "DocVQA", 5349, "questionId"),
    "ai2d": Benchmark("AI2D", "ai2d/ai2d", "ai2d", 3088),
    "mme": Benchmark("MME", "mme/mme", "MME", 2374, "question_id"),
    "mmbench": Benchmark("MMBench", "mmbench/mmbench_en_dev_static", "MMBench", 4329, "index"),
    "mmbench_cn": Benchmark("MMBench-CN", "mmbench/mmbench_cn_dev", "MMBench", 4329, "index"),
    "pope": Benchmark("POPE", "pope/pope", "POPE", 9000, "question_id"),
    "mmmu": Benchmark("MMMU", "mmmu/mmmu_val", "MMMU", 900, "id"),
}

__all__ = ["BENCHMARKS", "PROTOCOLS", "Benchmark", "Protocol"]
