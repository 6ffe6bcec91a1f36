"""Benchmarks by name: the twelve of the paper, one file each.

To add one, write a file that defines a `Benchmark`, and enter it in `BENCHMARKS`.
"""

from avg_llava.evaluation.benchmarks import (
    ai2d,
    chartqa,
    docvqa,
    gqa,
    mmbench,
    mme,
    mmmu,
    pope,
    scienceqa,
    textvqa,
    vizwiz,
)
from avg_llava.evaluation.benchmarks.benchmark import PROTOCOLS, Benchmark, Expected, HarnessTask, LocalTask, Protocol

BENCHMARKS: dict[str, Benchmark] = {
    "gqa": gqa.BENCHMARK,
    "scienceqa": scienceqa.BENCHMARK,
    "vizwiz": vizwiz.BENCHMARK,
    "textvqa": textvqa.BENCHMARK,
    "chartqa": chartqa.BENCHMARK,
    "docvqa": docvqa.BENCHMARK,
    "ai2d": ai2d.BENCHMARK,
    "mme": mme.BENCHMARK,
    "mmbench": mmbench.ENGLISH,
    "mmbench_cn": mmbench.CHINESE,
    "pope": pope.BENCHMARK,
    "mmmu": mmmu.BENCHMARK,
}
"""In the order of the paper's tables."""

__all__ = ["BENCHMARKS", "PROTOCOLS", "Benchmark", "Expected", "HarnessTask", "LocalTask", "Protocol"]
