"""Fixtures of the evaluation's tests: the mini world's benchmarks on disk and a tiny checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evaluation.harness import mini_benchmarks
from tests.tiny import make_checkpoint


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Iterator[Path]:
    """Folder with the data sets of all benchmarks, as `--data` names it."""
    with mini_benchmarks(tmp_path_factory.mktemp("benchmarks")) as folder:
        yield folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))
