"""Indices of record files: they match the JSON module, are built once, shared, and follow changes of the file."""

import json
import multiprocessing
import os
import pickle
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from avg_llava.data import ConversationDataset, DataError, DataSource
from avg_llava.data import index as indexing
from avg_llava.data.index import INDEX_DIR_NAME, open_index
from tests.tiny import record, write_records

FORK = multiprocessing.get_context("fork")


def age(path: Path) -> Path:
    """Sets a file's modification time to the past, so that its index is stored."""
    before = time.time() - 1000
    os.utime(path, (before, before))
    return path


@pytest.fixture
def path(folder) -> Path:
    records = [record(n, "<image>\nWhat is it?", "A car.", "images/wide.png") for n in range(5)]
    return age(write_records(folder, *records, record("text", "Hi", "Yes"), record("bad", "Hi", 3)))


def stored(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


RECORDS = [
    record("ascii", "Hi", "Yes\nand \"no\" \\ ]},["),
    record("déjà vu", "Où?", "Là-bas — \u2028 \u3000 ✓"),
    record("clef 𝄞", "\u0000 \x7f \x85 \xa0", "𝄞" * 3),
    {"id": 4, "conversations": None, "nested": [[{"a": "]"}], {}]},
    "text",
    None,
    [1, [2]],
    -1.5e300,
]  # fmt: skip


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("form", [{}, {"indent": 3}, {"separators": (",", ":")}, "lines"])
def test_records_equal_those_of_the_json_module(tmp_path, form, mark, ascii_only):
    if form == "lines":
        path = tmp_path / "data.jsonl"
        lines = [json.dumps(value, ensure_ascii=ascii_only) for value in RECORDS]
        text = "\r\n\n \t\n".join(lines)
        positions = range(1, 3 * len(RECORDS), 3)
    else:
        path = tmp_path / "data.json"
        text = " \n" + json.dumps(RECORDS, ensure_ascii=ascii_only, **form) + "\r\n\t "
        positions = range(len(RECORDS))
    path.write_bytes(mark + text.encode())
    age(path)
    for _ in range(2):  # from the file, and from the stored index
        index = open_index(path, "vicuna_v1")
        assert [index.record(row).value for row in range(len(index.rows))] == RECORDS
        assert index.rows["position"].tolist() == list(positions)
        assert index.rows["length"].tolist() == [-6, -4, -3, 0, 0, 0, 0, 0]
    assert index.folder is not None


def test_a_stored_index_is_loaded_without_the_file(path, monkeypatch):
    first = open_index(path, "vicuna_v1")
    assert first.folder.parent == path.parent / INDEX_DIR_NAME
    assert first.rows["length"].tolist() == [6] * 5 + [-2, 0]

    def never(path):
        raise AssertionError("the file is parsed again")

    monkeypatch.setattr(indexing, "read_file", never)
    again = open_index(path, "vicuna_v1")
    assert again.sha256 == first.sha256
    assert np.array_equal(again.rows, first.rows)
    assert again.sample(5, path.parent).turns[1].value == "Yes"
    with pytest.raises(DataError, match=r"sample 'bad' \(.*data\.json, record 6\): turn 1"):
        again.sample(6, path.parent)


def test_a_stored_index_gives_the_same_data_set(folder, path, processor, config):
    def make() -> ConversationDataset:
        source = DataSource(path, sampling="first:90%", weight=1.5)
        return ConversationDataset([source], processor, "vicuna_v1", config, on_bad_sample="skip")

    new = make()
    assert len(stored(folder / INDEX_DIR_NAME)) == 1
    old = make()
    assert len(new) == len(old) == 9
    assert new.fingerprint() == old.fingerprint()
    for name in ("origins", "modality_lengths"):
        assert np.array_equal(getattr(new, name), getattr(old, name))
    assert new.unique().tolist() == old.unique().tolist() == list(range(6))
    assert [new.sample(place) for place in range(9)] == [old.sample(place) for place in range(9)]


def test_a_changed_file_has_a_new_index(path):
    before = open_index(path, "vicuna_v1")
    path.write_text(path.read_text().replace("A car.", "A big car."))
    os.utime(path, (1, 1))
    after = open_index(path, "vicuna_v1")
    assert after.sha256 != before.sha256
    assert after.rows["length"][0] == before.rows["length"][0] + 1
    with pytest.raises(DataError, match=r"data\.json was changed while it was in use"):
        before.record(0)


def test_one_index_per_template(path):
    assert open_index(path, "vicuna_v1").rows["length"].tolist() == [6] * 5 + [-2, 0]
    assert open_index(path, "plain").rows["length"].tolist() == [6] * 5 + [0, 0]
    assert len(stored(path.parent / INDEX_DIR_NAME)) == 2


def test_the_index_of_a_file_written_just_now_is_not_stored(path):
    """Two writes within a clock tick give the same size and time with other records."""
    path.write_text(path.read_text())
    status = path.stat()
    assert open_index(path, "vicuna_v1").folder is None
    path.write_text(path.read_text().replace("car", "bus"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert open_index(path, "vicuna_v1").sample(0, path.parent).turns[1].value == "A bus."


@pytest.mark.parametrize("damage", ["rows.npy", "facts.json", "cut", "other"])
def test_a_damaged_index_is_built_again(path, damage, caplog):
    whole = open_index(path, "vicuna_v1")
    if damage == "cut":
        (whole.folder / "rows.npy").write_bytes((whole.folder / "rows.npy").read_bytes()[:150])
    elif damage == "other":
        np.save(whole.folder / "rows.npy", np.zeros(7))
    else:
        (whole.folder / damage).write_bytes(b"")
    again = open_index(path, "vicuna_v1")
    assert "is damaged" in caplog.text
    assert again.folder == whole.folder
    assert again.sample(4, path.parent).id == "4"


def test_without_a_writable_folder_the_index_stays_in_memory(path, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    index = open_index(path, "vicuna_v1", tmp_path / "file" / "indices")
    assert "name a folder with room in data.index_dir" in caplog.text
    assert index.folder is None
    assert index.sample(4, path.parent).id == "4"
    elsewhere = open_index(path, "vicuna_v1", tmp_path / "elsewhere")
    assert elsewhere.folder.parent == tmp_path / "elsewhere"


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_without_disk_space_the_index_stays_in_memory(folder, caplog, suffix):
    """On a full disk nothing partial is left, and the index stays in memory."""
    records = [record(n, "<image>\nWhat?", "A car.", "images/wide.png") for n in range(200)]
    path = write_records(folder, *records)
    if suffix == ".parquet":
        path = folder / "data.parquet"
        pq.write_table(pa.Table.from_pylist(records), path)
    age(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        index = open_index(path, "vicuna_v1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be kept" in caplog.text
    assert stored(path.parent / INDEX_DIR_NAME) == []
    assert index.sample(199, folder).id == "199"
    copy = pickle.loads(pickle.dumps(index))
    assert copy.sample(199, folder) == index.sample(199, folder)
    assert open_index(path, "vicuna_v1").folder is not None, "there is room again"


def _open(path: Path, start, marks: Path) -> None:
    build = indexing._build

    def logged_build(*arguments):
        (marks / str(os.getpid())).touch()
        time.sleep(0.3)
        return build(*arguments)

    indexing._build = logged_build
    start.wait()
    index = open_index(path, "vicuna_v1")
    os._exit(0 if index.sample(4, path.parent).id == "4" and index.folder is not None else 1)


def test_one_of_several_concurrent_processes_builds(path, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    start = FORK.Barrier(4)
    processes = [FORK.Process(target=_open, args=(path, start, marks)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(marks.iterdir())) == 1
    assert len(stored(path.parent / INDEX_DIR_NAME)) == 1


def _hold(path: Path, held) -> None:
    with indexing._locked(path.parent / INDEX_DIR_NAME, path):
        held.set()
        time.sleep(600)


def test_a_killed_builder_releases_the_lock(path):
    held = FORK.Event()
    holder = FORK.Process(target=_hold, args=(path, held))
    holder.start()
    assert held.wait(60)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    assert open_index(path, "vicuna_v1").folder is not None


def test_processes_do_not_copy_rows(folder):
    """The pickle that a spawned worker receives does not grow with the number of records."""
    sizes = []
    for count in (10, 1000):
        records = [record(n, "Hi", "Yes") for n in range(count)]
        index = open_index(age(write_records(folder, *records, name="data.json")), "vicuna_v1")
        sent = pickle.dumps(index)
        assert pickle.loads(sent).sample(count - 1, folder).id == str(count - 1)
        sizes.append(len(sent))
    assert abs(sizes[1] - sizes[0]) < 10


def test_an_empty_list_has_an_index(folder):
    path = age(write_records(folder))
    assert len(open_index(path, "vicuna_v1").rows) == 0
    assert len(open_index(path, "vicuna_v1").rows) == 0


class TestParquet:
    RECORDS = (
        record("one", "<image>\nWhat?", "A car — é.", "images/wide.png"),
        record("two", "<image> or <image>?", "Both.", "images/wide.png", "images/tall.png"),
        record("text", "Hi", "Yes"),
        record("bad", "<image>\nWhat?", "Yes"),
    )

    def write(self, path: Path, *records: dict, row_group_size: int = 2) -> Path:
        """Writes images as lists, because a column has one type."""
        rows = [
            {**entry, "image": entry["image"] if isinstance(entry["image"], list) else [entry["image"]]}
            if "image" in entry
            else entry
            for entry in records
        ]
        table = pa.Table.from_pylist(rows, schema=self.schema())
        pq.write_table(table.append_column("extra", pa.array([b"\xff"] * len(table))), path, row_group_size)
        return path

    def schema(self) -> pa.Schema:
        turn = pa.struct([("from", pa.string()), ("value", pa.string())])
        return pa.schema([("id", pa.string()), ("image", pa.list_(pa.string())), ("conversations", pa.list_(turn))])

    def test_items_are_those_of_the_same_json(self, folder, processor, config):
        json_file = age(write_records(folder, *self.RECORDS))
        parquet_file = age(self.write(folder / "data.parquet", *self.RECORDS))
        for _ in range(2):  # from the file, and from the stored index
            one, other = (
                ConversationDataset([DataSource(path)], processor, "vicuna_v1", config, on_bad_sample="skip")
                for path in (json_file, parquet_file)
            )
            assert len(one) == len(other) == 3
            assert one.modality_lengths.tolist() == other.modality_lengths.tolist()
            assert one.origins.tolist() == other.origins.tolist()
            for index in range(3):
                expected, found = one[index], other[index]
                assert found["input_ids"].equal(expected["input_ids"])
                assert found["labels"].equal(expected["labels"])
                assert len(found["pixel_values"]) == len(expected["pixel_values"])
                assert found["image_sizes"].equal(expected["image_sizes"])
                assert found["source"] == f"{parquet_file}, row {index}"
            assert "data.parquet, row 3): 0 images but 1 <image>" in other.malformed[0, 3]
            assert one.fingerprint() != other.fingerprint(), "they are different files"

    def test_image_as_text_and_turns_as_json(self, folder):
        rows = [{"id": 7, "image": "images/wide.png", "conversations": json.dumps(self.RECORDS[0]["conversations"])}]
        rows.append({"id": 8, "image": None, "conversations": "[no JSON"})
        path = folder / "data.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        index = open_index(path, "vicuna_v1")
        sample = index.sample(0, folder)
        assert (sample.id, sample.images) == ("7", (folder / "images/wide.png",))
        assert sample.turns[1].value == "A car — é."
        with pytest.raises(DataError, match=r"sample '8' \(.*row 1\): conversations must be a list"):
            index.sample(1, folder)

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"id": [1]}, "has no column 'conversations', only id"),
            ({"conversations": ["[]"], "id": [1.5]}, "the column 'id' holds double"),
            ({"conversations": ["[]"], "image": [{"bytes": b"GIF", "path": "a.gif"}]}, "files of their own"),
            ({"conversations": ["[]"], "image": [b"GIF"]}, "the column 'image' holds binary"),
        ],
    )
    def test_other_columns_are_refused(self, folder, columns, message):
        pq.write_table(pa.table(columns), folder / "data.parquet")
        with pytest.raises(DataError, match=rf"data\.parquet.*{message}"):
            open_index(folder / "data.parquet", "vicuna_v1")

    def test_a_damaged_file_is_named(self, folder):
        path = self.write(folder / "data.parquet", *self.RECORDS)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=r"data\.parquet is no Parquet file"):
            open_index(path, "vicuna_v1")
