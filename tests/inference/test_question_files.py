"""Files of questions: resumed, with invalid lines, and with the same answers as single questions."""

import json
import signal
import subprocess
import sys
import time

import pytest

from avg_llava import cli
from avg_llava.data.records import DataError
from avg_llava.inference.answers import Decoding
from avg_llava.inference.budget import Budget
from avg_llava.inference.pipeline import Pipeline
from avg_llava.inference.question_files import answer_file, read_questions
from tests.tiny import make_checkpoint, noise_images


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Pipeline.load(checkpoint).predictor


@pytest.fixture
def folder(tmp_path):
    for number, image in enumerate(noise_images()):
        image.save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder, records):
    path = folder / "questions.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


GOOD = [
    {"id": "a", "prompt": "how many dots?", "image": "0.png"},
    {"prompt": "no image"},
    {"id": 7, "prompt": "compare", "image": ["1.png", "2.png"], "granularity": 4},
    {"prompt": "what color?", "image": "3.png", "max_visual_tokens": 20},
]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_equal_questions_asked_one_by_one(predictor, folder, batch_size):
    questions = read_questions(write(folder, GOOD), folder, Budget())
    assert answer_file(predictor, questions, folder / "out.jsonl", Decoding(5), batch_size) == 0
    answers = lines(folder / "out.jsonl")
    assert [answer["id"] for answer in answers] == ["a", "2", "7", "4"]
    for question, answer in zip(questions, answers, strict=True):
        (single,) = predictor.predict([question.request], question.budget, Decoding(5))
        assert (answer["text"], tuple(answer["granularity"])) == (single.text, single.granularity)
    assert answers[2]["granularity"] == [4, 4]
    assert answers[3]["num_visual_tokens"] <= 20


def test_bad_lines_are_named_and_lose_nothing(predictor, folder):
    (folder / "broken.png").write_bytes(b"GIF89a nothing")
    bad = {
        "b1": {"id": "b1", "prompt": "what?", "image": "broken.png"},
        "b2": {"id": "b2", "prompt": "what?", "image": "../0.png"},
        "b3": {"id": "b3", "prompt": "what?", "image": "0.png", "granularity": 5},
        "b4": {"id": "b4", "prompt": "what?", "image": "0.png", "max_visual_tokens": 1},
        "b5": {"id": "b5", "prompt": "word " * 5000},
        "b6": {"id": "b6", "prompt": "<image> <image>", "image": "0.png"},
        "b7": {"id": "b7", "prompt": "what?", "imgae": "0.png"},
        "b8": {"id": "b8"},
        "b9": {"id": "b9", "prompt": "what?", "token_cost": "much"},
        "14": "{not json",
    }
    questions = read_questions(write(folder, [*GOOD, *bad.values()]), folder, Budget())
    assert answer_file(predictor, questions, folder / "out.jsonl", Decoding(2), 4) == len(bad)
    assert len(lines(folder / "out.jsonl")) == len(GOOD)
    errors = {line["id"]: line["error"] for line in lines(folder / "out.errors.jsonl")}
    assert errors.keys() == bad.keys()
    for name, part in {
        "b1": "broken.png",
        "b2": "leaves the image root",
        "b3": "granularity 5",
        "b4": "max_visual_tokens 1 is too low",
        "b5": "max_sequence_length",
        "b6": "placeholders",
        "b7": "imgae",
        "b8": "prompt",
        "b9": "token_cost must be a number",
        "14": "not JSON",
    }.items():
        assert part in errors[name]


def test_mended_lines_are_answered_by_the_next_run(predictor, folder):
    broken = {"id": "x", "prompt": "what?", "image": "late.png"}
    questions = read_questions(write(folder, [*GOOD, broken]), folder, Budget())
    assert answer_file(predictor, questions, folder / "out.jsonl", Decoding(2), 2) == 1
    before = (folder / "out.jsonl").read_text()
    (folder / "0.png").rename(folder / "late.png")  # the others are not read again
    assert answer_file(predictor, questions, folder / "out.jsonl", Decoding(2), 2) == 0
    assert (folder / "out.jsonl").read_text().startswith(before)
    assert lines(folder / "out.jsonl")[-1]["id"] == "x"
    assert not (folder / "out.errors.jsonl").exists()


def test_equal_ids_are_refused(folder):
    with pytest.raises(DataError, match="two records have the id '1'"):
        read_questions(write(folder, [{"prompt": "a"}, {"prompt": "b", "id": "1"}]), folder, Budget())


def test_a_killed_run_goes_on(checkpoint, folder):
    records = [{"id": str(number), "prompt": "how many dots?", "image": "0.png"} for number in range(60)]
    command = ["generate", "--model", str(checkpoint), "--input", str(write(folder, records))]
    command += ["--output", str(folder / "out.jsonl"), "--batch-size", "1", "--max-new-tokens", "3"]
    running = subprocess.Popen([sys.executable, "-m", "avg_llava.cli", *command], stderr=subprocess.DEVNULL)
    while not (folder / "out.jsonl").exists() or (folder / "out.jsonl").read_bytes().count(b"\n") < 5:
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    with (folder / "out.jsonl").open("a") as file:
        file.write('{"id": "half a li')  # as left by a kill during a write
    assert cli.main(command) == 0
    answers = lines(folder / "out.jsonl")
    assert [answer["id"] for answer in answers] == [record["id"] for record in records]
    assert len({answer["text"] for answer in answers}) == 1


def test_usage(capsys, checkpoint, folder):
    assert cli.main(["generate", "--model", str(checkpoint), "--input", str(write(folder, GOOD))]) == 1
    assert "give --prompt for one question, or --input and --output" in capsys.readouterr().err
