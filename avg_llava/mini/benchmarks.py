"""Writes twelve small benchmarks of the mini world, in the layout and format of their published repositories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, Features, Image, Sequence, Value
from pyarrow import parquet
from tqdm import tqdm

from avg_llava.common.files import hash_file
from avg_llava.mini.benchmark_rows import ROWS, PictureSampler, Rows
from avg_llava.mini.world import MANIFEST, WorldError

COLUMN_TYPES = {
    "": Value("string"),
    "texts": Sequence(Value("string")),
    "image": Image(),
    **{name: Value(name) for name in ("bool", "int8", "int32", "int64")},
}


def parse_columns(columns: str) -> Features:
    """Column types from names separated by spaces; a name is followed by `:` and its type unless it holds text."""
    pairs = (column.partition(":") for column in columns.split())
    return Features({name: COLUMN_TYPES[kind] for name, _, kind in pairs})


_TEXT = Value("string")
_OBJECTS = [{"objectId": _TEXT, "value": _TEXT}]
_GQA_QUESTIONS = Features(
    {
        **parse_columns("id imageId question answer fullAnswer isBalanced:bool"),
        "groups": {"global": _TEXT, "local": _TEXT},
        **parse_columns("entailed equivalent"),
        "types": {"structural": _TEXT, "semantic": _TEXT, "detailed": _TEXT},
        "annotations": {"question": _OBJECTS, "answer": _OBJECTS, "fullAnswer": _OBJECTS},
        "semantic": [{"operation": _TEXT, "argument": _TEXT, "dependencies": Sequence(Value("int32"))}],
        "semanticStr": _TEXT,
    }
)
_SCIENCEQA = parse_columns(
    "image:image question choices:texts answer:int8 hint task grade subject topic category skill lecture solution"
)
_VIZWIZ = parse_columns("question_id image:image question answers:texts category")
_TEXTVQA = parse_columns(
    "image_id question_id:int32 question question_tokens:texts image:image image_width:int32 image_height:int32 "
    "flickr_original_url flickr_300k_url answers:texts image_classes:texts set_name ocr_tokens:texts"
)
_DOCVQA = parse_columns(
    "questionId question question_types:texts image:image docId:int64 ucsf_document_id ucsf_document_page_no "
    "answers:texts data_split"
)
_MMBENCH = parse_columns(
    "index:int32 question hint answer A B C D category image:image source L2-category comment split"
)
_POPE = parse_columns("id question_id question answer image_source image:image category")
_MMMU = parse_columns(
    f"id question options explanation {' '.join(f'image_{number}:image' for number in range(1, 8))} "
    "img_type answer topic_difficulty question_type subfield"
)

REPOSITORIES: dict[str, dict[tuple[str, str], Features]] = {
    "GQA": {
        ("testdev_balanced_images", "testdev"): parse_columns("id image:image"),
        ("testdev_balanced_instructions", "testdev"): _GQA_QUESTIONS,
    },
    "ScienceQA": {("ScienceQA-IMG", "test"): _SCIENCEQA},
    "VizWiz-VQA": {("default", "val"): _VIZWIZ},
    "textvqa": {("default", "validation"): _TEXTVQA},
    "ChartQA": {("default", "test"): parse_columns("type question answer image:image")},
    "DocVQA": {("DocVQA", "validation"): _DOCVQA},
    "ai2d": {("default", "test"): parse_columns("question options:texts answer image:image")},
    "MME": {("default", "test"): parse_columns("question_id image:image question answer category")},
    "MMBench": {("cn", "dev"): _MMBENCH, ("en", "dev"): _MMBENCH},
    "POPE": {
        **{("Full", split): _POPE for split in ("adversarial", "popular", "random")},
        ("default", "test"): _POPE,
    },
    "MMMU": {("default", "validation"): _MMMU},
}
"""Repository name -> (configuration, split) -> column types of lmms-lab's copy on the hub."""


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
    for name in tqdm(REPOSITORIES, desc="drawing benchmarks", unit="repository"):
        rows = ROWS[name](PictureSampler(seed, name))
        _write_repository(folder / name, rows)
        num_rows |= {f"{name}/{config}/{split}": len(found) for (config, split), found in rows.items()}
    sums = {
        path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*.*")) if path.is_file()
    }
    manifest = {"seed": seed, "num_rows": num_rows, "sha256": sums}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return manifest


def _write_repository(folder: Path, rows: Rows) -> None:
    """Writes the files of a dataset repository: a README.md that lists the configurations, and Parquet files."""
    configs: dict[str, list[dict[str, str]]] = {}
    for (config, split), columns in REPOSITORIES[folder.name].items():
        directory = "data" if config == "default" else config
        path = folder / directory / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset = Dataset.from_list(rows[config, split], features=columns)
        parquet.write_table(dataset.data.table, path)
        configs.setdefault(config, []).append({"split": split, "path": f"{directory}/{split}-*"})
    header = {"configs": [{"config_name": name, "data_files": files} for name, files in configs.items()]}
    front_matter = yaml.safe_dump(header, sort_keys=False)
    text = f"Pictures and questions of the mini world, in the columns of {folder.name}."
    (folder / "README.md").write_text(f"---\n{front_matter}---\n\n{text}\n", "utf-8")
