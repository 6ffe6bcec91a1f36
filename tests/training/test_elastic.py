"""Conversion for another number of processes; tests/distributed continues training from converted checkpoints."""

import pytest

from avg_llava.common.settings import ConfigError
from avg_llava.training.elastic import make_universal


def test_a_checkpoint_that_cannot_be_converted(tmp_path):
    (tmp_path / "latest").write_text("global_step4")
    (tmp_path / "global_step4").mkdir()
    with pytest.raises(ConfigError, match=r"could not be converted .*global_step4.* as many processes as wrote it"):
        make_universal(tmp_path)
    assert not (tmp_path / "latest_universal").exists()


def test_once_is_enough(tmp_path):
    (tmp_path / "universal.done").touch()
    make_universal(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["universal.done"]
