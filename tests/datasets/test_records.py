import json
from pathlib import Path

import pytest

from avg_llava.data.records import DataError, Turn, dialogue, parse_record, read_records
from tests.tiny import record

ROOT = Path("root")


def changed(**fields) -> dict:
    """A valid record with some fields replaced or, if `...`, removed."""
    content = {**record("a", "<image>\nWhat?", "A car.", "x.jpg"), **fields}
    return {key: value for key, value in content.items() if value is not ...}


def turn(role, value) -> dict:
    return {"from": role, "value": value}


def test_a_valid_record():
    sample = parse_record(changed(model="", family="fine"), ROOT, "file.json, record 3")
    assert sample.id == "a"
    assert sample.images == (ROOT / "x.jpg",)
    assert sample.turns == (Turn("human", "<image>\nWhat?"), Turn("gpt", "A car."))
    assert sample.name == "sample 'a' (file.json, record 3)"
    assert sample.image_root == ROOT


@pytest.mark.parametrize(("identity", "expected"), [("0007", "0007"), (7, "7"), (..., "here"), (None, "here")])
def test_ids_of_any_kind(identity, expected):
    assert parse_record(changed(id=identity), ROOT, "here").id == expected


@pytest.mark.parametrize("absent", [..., None, []])
def test_text_only(absent):
    sample = parse_record(changed(image=absent, conversations=[turn("human", "Hi"), turn("gpt", "Yes")]), ROOT)
    assert sample.images == ()


def test_several_images_keep_their_order():
    turns = [turn("human", "<image> and <image>?"), turn("gpt", "ok"), turn("human", "<image>"), turn("gpt", "ok")]
    sample = parse_record(changed(image=["b.jpg", "a.jpg", "b.jpg"], conversations=turns), ROOT)
    assert [path.name for path in sample.images] == ["b.jpg", "a.jpg", "b.jpg"]
    assert [turn.value for turn in sample.turns] == [turn["value"] for turn in turns]


def test_a_single_image_without_placeholder_comes_before_the_first_question():
    turns = [turn("gpt", "Hello."), turn("human", "What?"), turn("gpt", "A car.")]
    sample = parse_record(changed(conversations=turns), ROOT)
    assert [turn.value for turn in sample.turns] == ["Hello.", "<image>\nWhat?", "A car."]


GOOD = [turn("human", "<image>\nWhat?"), turn("gpt", "A car.")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": 1.5}, "id must be"),
        ({"id": True}, "id must be"),
        ({"id": ["a"]}, "id must be"),
        ({"image": 3}, "'image' must be a path"),
        ({"image": ""}, "'image' must be a path"),
        ({"image": ["x.jpg", None]}, "'image' must be a path"),
        ({"image": "a\0b"}, "'image' must be a path"),
        ({"image": "/etc/passwd"}, "leaves the image root"),
        ({"image": "../x.jpg"}, "leaves the image root"),
        ({"image": "a/../../x.jpg"}, "leaves the image root"),
        ({"image": "C:\\x.jpg"}, "leaves the image root"),
        ({"image": "a\\..\\x.jpg"}, "leaves the image root"),
        ({"image": ["x.jpg", "y.jpg"]}, "2 images but 1 <image> placeholders"),
        ({"image": ...}, "0 images but 1 <image> placeholders"),
        ({"image": ["x.jpg", "y.jpg"], "conversations": [turn("human", "What?"), GOOD[1]]}, "2 images but 0"),
        ({"conversations": ...}, "conversations must be a list"),
        ({"conversations": []}, "conversations must be a list"),
        ({"conversations": {"from": "human"}}, "conversations must be a list"),
        ({"conversations": ["What?"]}, "turn 0 must be an object"),
        ({"conversations": [GOOD[0], {"from": "gpt"}]}, "turn 1: 'value' must be text, got None"),
        ({"conversations": [GOOD[0], turn("gpt", 4)]}, "turn 1: 'value' must be text, got 4"),
        ({"conversations": [GOOD[0], turn("assistant", "x")]}, "turn 1: 'from' must be 'human' or 'gpt'"),
        ({"conversations": [turn("system", "x"), *GOOD]}, "turn 0: 'from' must be 'human' or 'gpt'"),
        ({"conversations": [{"value": "x"}]}, "turn 0: 'from' must be"),
        ({"conversations": [GOOD[0], turn("gpt", "\ud800")]}, "half a character pair"),
        ({"conversations": [turn("gpt", "Hello.")]}, "no human turn"),
        ({"conversations": [*GOOD, turn("gpt", "more")]}, "two gpt turns"),
        ({"conversations": [GOOD[0], turn("human", "again")]}, "two human turns"),
        ({"conversations": [turn("gpt", "a"), turn("gpt", "b"), *GOOD]}, "two gpt turns|must alternate"),
        ({"conversations": [GOOD[0], turn("gpt", "see <image>")]}, "an answer holds the text <image>"),
    ],
)
def test_bad_records_are_named(fields, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_record(changed(**fields), ROOT, "file.json, record 3")
    assert "file.json, record 3" in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, "text", ["a"]])
def test_records_must_be_objects(value):
    with pytest.raises(DataError, match=r"file.json, record 3: a record is a JSON object"):
        parse_record(value, ROOT, "file.json, record 3")


VALUES = [None, 0, "", [], {}, "<image>", [turn("human", "x")], [[]], {"from": 1}]


@pytest.mark.parametrize("key", ["id", "image", "conversations"])
def test_invalid_values_raise_data_errors_only(key):
    messages = []
    for value in VALUES:
        try:
            assert parse_record(changed(**{key: value}), ROOT, "here").turns
        except DataError as error:
            messages.append(str(error))
    assert messages
    assert all("here" in message for message in messages)


def test_a_leading_turn_of_the_model_is_dropped_for_training():
    turns = (Turn("gpt", "Hello."), Turn("human", "Hi"), Turn("gpt", "Yes"))
    assert dialogue(turns) == turns[1:]


def test_reading_a_list_and_lines(tmp_path):
    content = [record("ä", "Hi", "Yes"), record(2, "Hi", "No")]
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8-sig")
    # U+2028 inside a string does not end a line.
    lines = json.dumps(content[0], ensure_ascii=False) + "\r\n\n" + json.dumps({"id": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8", newline="")
    assert [entry.value for entry in read_records(tmp_path / "a.json")] == content
    read = read_records(tmp_path / "a.jsonl")
    assert [entry.value for entry in read] == [content[0], {"id": "a\u2028b"}]
    assert [entry.source for entry in read] == [f"{tmp_path / 'a.jsonl'}, line {number}" for number in (1, 3)]


def test_a_bad_line_is_one_bad_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id": \n{"id": 3}\n')
    good, bad, also_good = read_records(tmp_path / "a.jsonl")
    assert good.error is also_good.error is None
    assert "not JSON" in bad.error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": 1}', "is not JSON"),
        (b"", "is not JSON"),
        (b'{"id": 1}', "holds a dict"),
        (b"\xff\xfe[]", "is not UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b'[{"id": ' + b"9" * 5000 + b"}]", "is not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json"):
        read_records(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="cannot read"):
        read_records(tmp_path)
