"""Twelve small data sets of the mini world, as local clones of the benchmarks' public repositories look."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from avg_llava.common.files import hash_file
from avg_llava.mini import benchmark_rows as open_ended
from avg_llava.mini import lettered
from avg_llava.mini.benchmark_schemas import REPOSITORIES, write_repository
from avg_llava.mini.sketchbook import Sketchbook
from avg_llava.mini.world import MANIFEST, WorldError

ROWS = {
    "GQA": open_ended.gqa,
    "ScienceQA": lettered.scienceqa,
    "VizWiz-VQA": open_ended.vizwiz,
    "textvqa": open_ended.textvqa,
    "ChartQA": open_ended.chartqa,
    "DocVQA": open_ended.docvqa,
    "ai2d": lettered.ai2d,
    "MME": open_ended.mme,
    "MMBench": lettered.mmbench,
    "POPE": open_ended.pope,
    "MMMU": lettered.mmmu,
}
"""Repository -> what draws its rows. MMBench holds both the English and the Chinese benchmark."""


def write_benchmarks(output: str | Path, seed: int = 0) -> dict[str, Any]:
    """Draws the data sets below `output`, one folder per repository, which `datasets.load_dataset(folder)` reads.

    Data sets drawn earlier are replaced if they differ, and otherwise left as they are.

    Returns:
        The manifest: seed, number of rows of each table and SHA-256 of each file.

    Raises:
        WorldError: `output` holds something else.
    """
    output = Path(output)
    manifest_path = output / MANIFEST
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not manifest_path.exists():
        raise WorldError(f"{output} holds something else than the mini world's benchmarks; choose another --output")
    fresh = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    manifest = _draw(fresh, seed)
    if manifest_path.exists() and json.loads(manifest_path.read_text("utf-8")) == manifest:
        shutil.rmtree(fresh)
        return manifest
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)
    return manifest


def _draw(folder: Path, seed: int) -> dict[str, Any]:
    num_rows: dict[str, int] = {}
    for name, tables in tqdm(REPOSITORIES.items(), desc="drawing benchmarks", unit="repository"):
        rows = ROWS[name](Sketchbook(seed, name))
        write_repository(folder / name, tables, rows)
        num_rows |= {f"{name}/{config}/{split}": len(found) for (config, split), found in rows.items()}
    sums = {
        path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*.*")) if path.is_file()
    }
    manifest = {"seed": seed, "num_rows": num_rows, "sha256": sums}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return manifest
