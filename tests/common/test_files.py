import hashlib
import json
import os

import pytest

from avg_llava.common.files import atomic_write, hash_bytes, hash_chunks, hash_file, hash_json, write_bytes, write_json


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert names(tmp_path) == [".a.bin.new", "a.bin"]
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_concurrent_writers_use_different_temporary_files(tmp_path):
    with atomic_write(tmp_path / "a", concurrent=True) as temporary:
        temporary.touch()
        assert temporary.name == f".a.{os.getpid()}.new"
        assert list(tmp_path.glob(".*.new")) == [temporary]  # the pattern by which feedback removes leftovers


def test_contents(tmp_path):
    write_bytes(tmp_path / "a", b"\x00\r\n")
    assert (tmp_path / "a").read_bytes() == b"\x00\r\n"
    write_json(tmp_path / "b", {"ü": [1]})
    assert (tmp_path / "b").read_text() == '{\n  "\\u00fc": [\n    1\n  ]\n}\n'
    write_json(tmp_path / "b", ["ü"], indent=1, ensure_ascii=False)
    assert (tmp_path / "b").read_text("utf-8") == '[\n "ü"\n]\n'
    write_json(tmp_path / "b", "ü\udcff\ud800", ensure_ascii=False)
    assert json.loads((tmp_path / "b").read_text("utf-8")) == "ü\udcff\ud800"
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "b", float("nan"), allow_nan=False)
    assert names(tmp_path) == ["a", "b"]


def test_hashes_match_stored_ones(tmp_path):
    expected = hashlib.sha256(b"abc").hexdigest()
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_bytes(b"abc") == hash_chunks([b"a", b"", b"bc"]) == hash_file(tmp_path / "a") == expected
    value = {"b": ["ü", (1, 2.5)], "a": None}
    assert hash_json(value) == hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    assert hash_json(tmp_path, default=str) == hash_json(str(tmp_path))
    with pytest.raises(TypeError):
        hash_json(tmp_path)
