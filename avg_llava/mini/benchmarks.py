"""Writes twelve small benchmarks of the mini world, in the layout and format of their published repositories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from pyarrow import parquet
from tqdm import tqdm

from avg_llava.common.files import hash_file
from avg_llava.mini.benchmark_rows import ROWS, PictureSampler, Rows
from avg_llava.mini.benchmark_schemas import REPOSITORIES, Table
from avg_llava.mini.world import MANIFEST, WorldError


def write_benchmarks(output: str | Path, seed: int = 0) -> dict[str, Any]:
    """Writes one folder per repository below `output`, which `datasets.load_dataset(folder)` reads.

    Existing benchmarks are replaced if their content differs and left untouched otherwise.

    Returns:
        The manifest: seed, number of rows of each table and SHA-256 of each file.

    Raises:
        WorldError: `output` holds other files.
    """
    output = Path(output)
    manifest_path = output / MANIFEST
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not manifest_path.exists():
        raise WorldError(f"{output} holds something else than the mini world's benchmarks; choose another --output")
    fresh = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    manifest = _write_all(fresh, seed)
    if manifest_path.exists() and json.loads(manifest_path.read_text("utf-8")) == manifest:
        shutil.rmtree(fresh)
        return manifest
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)
    return manifest


def _write_all(folder: Path, seed: int) -> dict[str, Any]:
    num_rows: dict[str, int] = {}
    for name, tables in tqdm(REPOSITORIES.items(), desc="drawing benchmarks", unit="repository"):
        rows = ROWS[name](PictureSampler(seed, name))
        write_repository(folder / name, tables, rows)
        num_rows |= {f"{name}/{config}/{split}": len(found) for (config, split), found in rows.items()}
    sums = {
        path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*.*")) if path.is_file()
    }
    manifest = {"seed": seed, "num_rows": num_rows, "sha256": sums}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return manifest


def write_repository(folder: Path, tables: list[Table], rows: Rows) -> None:
    """Writes the files of a dataset repository: a README.md that lists the configurations, and Parquet files.

    Args:
        folder: New folder.
        tables: Tables of the repository.
        rows: (configuration, split) -> rows. An image is `{"bytes": PNG, "path": file name}`.
    """
    configs: dict[str, list[dict[str, str]]] = {}
    for table in tables:
        path = folder / table.folder / f"{table.split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset = Dataset.from_list(rows[table.config, table.split], features=table.columns)
        parquet.write_table(dataset.data.table, path)
        pattern = f"{table.folder}/{table.split}-*"
        configs.setdefault(table.config, []).append({"split": table.split, "path": pattern})
    header = {"configs": [{"config_name": name, "data_files": files} for name, files in configs.items()]}
    front_matter = yaml.safe_dump(header, sort_keys=False)
    text = f"Pictures and questions of the mini world, in the columns of {folder.name}."
    (folder / "README.md").write_text(f"---\n{front_matter}---\n\n{text}\n", "utf-8")
