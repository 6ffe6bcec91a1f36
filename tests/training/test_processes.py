import json

import pytest

from avg_llava.common.settings import ConfigError
from avg_llava.training import processes


def _write(path, zero):
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


def test_deepspeed_file(tmp_path):
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    assert processes.read_deepspeed_file(_write(tmp_path / "a.json", zero))["zero_optimization"] == zero


def test_deepspeed_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match=r"runtime\.deepspeed: cannot read none\.json"):
        processes.read_deepspeed_file("none.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ConfigError, match=r"b\.json is not valid JSON"):
        processes.read_deepspeed_file(str(tmp_path / "b.json"))
    with pytest.raises(ConfigError, match="would hold no weights"):
        processes.read_deepspeed_file(_write(tmp_path / "c.json", {"stage": 3}))


def test_who_am_i(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (processes.rank(), processes.world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (processes.rank(), processes.world_size()) == (3, 8)


def test_a_single_process_needs_no_launcher(monkeypatch):
    import deepspeed.ops

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that they are restored
        monkeypatch.delenv(name)
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    processes.prepare_deepspeed(use_cpu=True)
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False, "nothing is compiled"
    assert (processes.rank(), processes.world_size()) == (0, 1)
    assert int(processes.os.environ["MASTER_PORT"]) > 0


def test_leaving_skips_the_interpreters_shutdown(monkeypatch):
    codes = []
    monkeypatch.setattr(processes.os, "_exit", codes.append)
    monkeypatch.setattr(processes.logging, "shutdown", lambda: None)
    processes.leave(1)
    assert codes == [1]
