"""Data that several files of this folder share."""

import pytest

from tests.tiny import write_backbones, write_data


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_backbones(folder)
    write_data(folder, num_samples=4)
    return folder
