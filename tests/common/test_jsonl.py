import json

import pytest

from avg_llava.common.jsonl import JsonLines, open_folder

ODD = {"id": "ü", "text": "a\u2028b\x85c\r\nd", "path": "\udcff.png"}


def test_values_are_read_as_appended(tmp_path):
    lines = JsonLines(tmp_path / "a.jsonl")
    assert lines.read() == []
    lines.append([ODD, [1]])
    lines.append(value for value in (None, 2.5))
    assert lines.read() == [ODD, [1], None, 2.5]
    assert "ü" in lines.path.read_text("utf-8")
    lines.write([3])
    assert lines.path.read_text() == "3\n"


def test_a_line_cut_short_is_removed(tmp_path):
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.append([{"id": "a", "n": 1}, {"id": "b"}])
    with lines.path.open("a") as file:
        file.write('{"id": "c", "te')
    assert lines.read_by_id() == {"a": {"id": "a", "n": 1}, "b": {"id": "b"}}
    lines.append([{"id": "a", "n": 2}])
    assert lines.read_by_id()["a"]["n"] == 2
    assert len(lines.read()) == 3


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("no JSON\n")
    with pytest.raises(ValueError, match=r"a\.jsonl holds a line that is not JSON"):
        JsonLines(tmp_path / "a.jsonl").read()


def test_lines_of_another_identity_are_deleted(tmp_path, caplog):
    folder = tmp_path / "store"
    open_folder(folder, {"weights": "a"})
    lines = JsonLines(folder / "a.jsonl")
    lines.append([1])
    open_folder(folder, {"weights": "a"})
    assert lines.read() == [1]
    assert not caplog.records
    open_folder(folder, {"weights": "b"})
    assert lines.read() == []
    assert "are computed again" in caplog.text
    assert json.loads((folder / "identity.json").read_text()) == {"weights": "b"}
