"""Verification of data with every fault, and the skip list it writes."""

import json
import re
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from avg_llava.data import ConversationDataset, DataError, DataSource
from avg_llava.data import verify as verification
from avg_llava.data.skip_list import read_skip_list
from avg_llava.data.verify import verify
from avg_llava.model.templates import CONTENT_AS_TEXT, TEMPLATES, ConversationTemplate
from avg_llava.training.run import message_of
from tests.datasets.faults import write_faults
from tests.tiny import record, write_records

WIDE = "images/wide.png"


@pytest.fixture
def bad(folder, tmp_path_factory) -> Path:
    """A file of records with every known fault, and some valid ones."""
    return write_faults(folder, tmp_path_factory.mktemp("outside"))


EXPECTED = {
    2: "unreadable: ",
    3: "unreadable: ",
    5: "oversized: ",
    6: "outside root: ",
    7: "malformed: sample 'dots'",
    8: "malformed: sample 'roles out of order'",
    9: "malformed: sample 'placeholders'",
    11: "masked: its answers are empty, or beyond the longest sequence",
    12: "missing: ",
}


@pytest.fixture
def make(processor, config):
    def dataset(*sources, **options) -> ConversationDataset:
        sources = [source if isinstance(source, DataSource) else DataSource(source) for source in sources]
        return ConversationDataset(sources, processor, "vicuna_v1", config, max_length=300, **options)

    return dataset


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_fault_is_found(bad, make, tmp_path, num_processes):
    output = tmp_path / "lists" / "skip.json"
    shown = []
    dataset = make(bad, on_bad_sample="skip")
    found = verify(dataset, num_processes, output, lambda done, total: shown.append((done, total)))
    (source,) = found.sources
    assert (source.path, source.num_records) == (str(bad), 13)
    assert source.groups == {"images": 9, "(text only)": 1, "(malformed)": 3}
    assert source.problems == {
        "malformed": 3,
        "unreadable": 2,
        "missing": 1,
        "oversized": 1,
        "outside root": 1,
        "masked": 1,
        "over-long": 2,
    }
    assert shown[-1] == (10, 10)
    (records,) = read_skip_list(output).files.values()
    assert records.path == str(bad)
    assert list(records.skip) == list(EXPECTED)
    for position, prefix in EXPECTED.items():
        assert records.skip[position].startswith(prefix), records.skip[position]
    for position, name in {2: "images/cut.jpg", 3: "images/empty.jpg", 5: "images/bomb.png", 12: "nowhere.png"}.items():
        assert name in records.skip[position]
    assert found.num_skipped == len(EXPECTED)
    assert [path.name for path in output.parent.iterdir()] == ["skip.json"]


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ("truncated JPEG", r"images/cut\.jpg: cannot be read as an image"),
        ("0 bytes", r"images/empty\.jpg: cannot be read as an image"),
        ("bomb", r"images/bomb\.png: .*limit of 89478485 pixels"),
        ("link", r"images/link\.png leads out of the image root"),
        ("dots", r"image path '\.\./wide\.png' leaves the image root"),
        ("roles out of order", r"turns must alternate between human and gpt"),
        ("placeholders", r"1 images but 2 <image> placeholders"),
        ("missing", r"images/nowhere\.png: image file not found"),
    ],
)
def test_a_worker_names_the_sample_in_one_line(bad, make, identity, message):
    """Through a loader worker, as in training, and formatted as by the training command."""
    (only,) = [record for record in json.loads(bad.read_text()) if record["id"] == identity]
    path = write_records(bad.parent, record("sound", "Hi", "Yes"), only, name="one.json")
    with pytest.raises(DataError) as caught:
        list(DataLoader(make(path), num_workers=1, collate_fn=list))
    line = message_of(caught.value).replace("\n  ", " ")  # malformed records are listed one per line
    assert "\n" not in line
    assert re.search(rf"sample '{identity}' \(.*one\.json, record 1\): .*{message}", line)


@pytest.mark.parametrize(
    ("identity", "problem"),
    [("over-long", "over-long sample cut"), ("masked", "sample without supervised tokens"), ("GIF named .jpg", None)],
)
def test_usable_samples_are_used(bad, make, caplog, identity, problem):
    """One log line names a truncated or masked sample; a GIF with another suffix is an image."""
    (only,) = [record for record in json.loads(bad.read_text()) if record["id"] == identity]
    dataset = make(write_records(bad.parent, only, name="one.json"))
    assert len(dataset[0]["pixel_values"]) == 1
    lines = [entry.getMessage() for entry in caplog.records if problem and entry.getMessage().startswith(problem)]
    assert (len(lines) == 1 and f"sample '{identity}'" in lines[0]) if problem else not caplog.records


def test_the_skip_list_removes_every_unusable_sample(bad, make, tmp_path):
    """No remaining sample is an error, and no valid one is lost."""
    verify(make(bad, on_bad_sample="skip"), 1, tmp_path / "skip.json")
    skip_list = read_skip_list(tmp_path / "skip.json")
    dataset = make(bad, skip_list=skip_list)
    assert [dataset[index]["id"] for index in range(len(dataset))] == ["sound", "text", "GIF named .jpg", "over-long"]
    assert [position for _, position in dataset.skipped] == list(EXPECTED)
    assert all(bool((dataset[index]["labels"] != -100).any()) for index in range(len(dataset)))
    assert dataset.fingerprint() != make(bad, on_bad_sample="skip").fingerprint()
    again = verify(make(bad, on_bad_sample="skip", skip_list=skip_list), 1)
    assert again.num_skipped == 0


def test_a_list_of_other_data_is_refused(bad, make, tmp_path):
    verify(make(bad, on_bad_sample="skip"), 1, tmp_path / "skip.json")
    bad.write_text(bad.read_text().replace("A car.", "A bus."))
    with pytest.raises(DataError, match=r"skip\.json does not know .*data\.json.*verify-data` again"):
        make(bad, skip_list=read_skip_list(tmp_path / "skip.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read the skip list .*data\.skip_list"),
        ("no JSON", "is no skip list"),
        ("[]", "is no skip list"),
        ('{"format": 2}', "of format 2; this program reads 1"),
        ('{"format": 1, "files": {"a": {"path": "b", "skip": {"first": "c"}}}}', "is no skip list"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "skip.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_skip_list(path)


def test_a_killed_verification_continues(folder, make, tmp_path, monkeypatch):
    """Checked samples are not checked again: their images are deleted in between."""
    monkeypatch.setattr(verification, "BATCH_SIZE", 2)
    records = [
        record(number, "<image>\nWhat?", "A car.", WIDE if number < 4 else "images/tall.png") for number in range(7)
    ]
    path = write_records(folder, *records)
    output = tmp_path / "skip.json"

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        verify(make(path), 1, output, kill)
    findings_file = tmp_path / ".skip.json.partial"
    partial = '[[0, 4, "images", [["unread'  # the line that was being written
    findings_file.write_text(findings_file.read_text() + partial)
    (folder / WIDE).unlink()
    found = verify(make(path), 2, output)
    assert (found.num_skipped, found.sources[0].num_records) == (0, 7)
    assert json.loads(output.read_text())["files"]
    assert not findings_file.exists()
    assert verify(make(path), 1, output).sources[0].problems == {"missing": 4}


def test_image_paths_that_are_not_unicode(folder, make, tmp_path):
    path = write_records(folder, record("bad", "<image>\nWhat?", "A car.", "\ud800.png"))
    found = verify(make(path), 1, tmp_path / "skip.json")
    (records,) = read_skip_list(tmp_path / "skip.json").files.values()
    assert "half a character pair" in records.skip[0]
    assert found.num_skipped == 1


def test_findings_of_other_data_are_dropped(folder, make, tmp_path):
    output = tmp_path / "skip.json"
    path = write_records(folder, record("good", "<image>\nWhat?", "A car.", WIDE))
    (tmp_path / ".skip.json.partial").write_text('"another"\n[[0, 0, "images", [["missing", "gone"]]]]\n')
    assert verify(make(path), 1, output).num_skipped == 0


def test_sources_are_counted_apart_and_records_once(folder, make):
    first = write_records(folder, *[record(n, "<image>\nWhat?", "A car.", WIDE) for n in range(3)], name="first.json")
    second = write_records(folder, record("bad", "<image>\nWhat?", "A car.", "images/none.png"), name="second.json")
    found = verify(make(DataSource(first, weight=3), second), 1)
    assert [source.num_records for source in found.sources] == [3, 1]
    assert [source.problems for source in found.sources] == [{}, {"missing": 1}]


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        (
            "{%- generation -%}{{- content + eos_token -}}{%- endgeneration -%}{{- ' ; ' -}}",
            "2 supervised spans for 1 answers",
        ),
        (
            "{{- content[:2] -}}{%- if message.role == 'assistant' -%}"
            "{%- generation -%}{{- content[2:] + eos_token -}}{%- endgeneration -%}{%- endif -%}",
            "is not the answer",
        ),
    ],
    ids=["questions", "half answers"],
)
def test_labels_are_compared_with_the_answers(folder, processor, config, monkeypatch, jinja, message):
    loop = "{%- for message in messages -%}\n" + CONTENT_AS_TEXT + jinja + "{%- endfor -%}"
    monkeypatch.setitem(TEMPLATES, "own", ConversationTemplate(loop))
    path = write_records(folder, record("a", "<image>\nWhat?", "A car.", WIDE), record("b", "Why?", "So."))
    found = verify(ConversationDataset([DataSource(path)], processor, "own", config, on_bad_sample="skip"), 1)
    assert found.sources[0].problems == {"mislabelled": 2}
    (records,) = found.skip_list.files.values()
    assert all(re.match(f"mislabelled: .*{message}", reason) for reason in records.skip.values())
