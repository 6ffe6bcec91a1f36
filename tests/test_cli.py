"""The command line: help with an example, exit codes, one-line errors, and answers that programs can read."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from avg_llava import cli
from avg_llava.data.records import DataError
from tests.tiny import make_checkpoint

COMMANDS = [
    ["train"],
    ["feedback"],
    ["verify-data"],
    ["estimate"],
    ["generate"],
    ["chat"],
    ["demo"],
    ["serve"],
    ["convert"],
    ["export", "model"],
    ["export", "prompts"],
    ["report"],
    ["mini", "data"],
    ["mini", "pretrain"],
    ["mini", "claims"],
    ["mini", "routers"],
    ["bench", "train"],
    ["bench", "inference"],
    ["bench", "serve"],
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.effect_noise((70, 40), 80).convert("RGB").save(path)
    return path


def fails_in_one_line(capsys, arguments):
    assert cli.main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("avg-llava: ")
    return lines[0]


@pytest.mark.parametrize("command", [*COMMANDS, ["mini"], ["bench"], ["export"]], ids=" ".join)
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--help"])
    assert exit_.value.code == 0
    assert f"example:\n  avg-llava {' '.join(command)}" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_examples_are_right_usage(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    example = capsys.readouterr().out.split("example:\n  avg-llava ")[1].strip()
    words = [word.strip("'") for word in example.replace("What is this?", "What?").split()]
    assert cli.build_parser().parse_args(words).run is not None


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["generate"], ["generate", "--model", "m", "--prompt", "p", "--granularity", "many"], ["mini"]],
    ids=" ".join,
)
def test_wrong_usage_is_2(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: avg-llava" in capsys.readouterr().err


def test_installed_command_answers():
    done = subprocess.run(
        [sys.executable, "-m", "avg_llava.cli", "generate", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "--token-cost" in done.stdout


def test_generate_routes_and_answers_in_json(capsys, checkpoint, image):
    arguments = ["generate", "--model", str(checkpoint), "--image", str(image), "--prompt", "how many dots?", "--json"]
    assert cli.main([*arguments, "--max-new-tokens", "4"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {
        *("text", "granularity", "router_probs", "milliseconds", "finish_reason"),
        *("num_visual_tokens", "num_prompt_tokens", "num_new_tokens"),
    }
    assert sum(answer["router_probs"].values()) == pytest.approx(1, abs=1e-5)
    assert answer["granularity"] == int(max(answer["router_probs"], key=answer["router_probs"].get))
    assert set(answer["milliseconds"]) == {"encode", "route", "prefill", "decode"}
    assert all(milliseconds > 0 for milliseconds in answer["milliseconds"].values())

    level = str(answer["granularity"])
    assert cli.main([*arguments, "--max-new-tokens", "4", "--granularity", level]) == 0
    forced = json.loads(capsys.readouterr().out)
    assert forced["router_probs"] is None
    assert (forced["text"], forced["num_visual_tokens"]) == (answer["text"], answer["num_visual_tokens"])

    assert cli.main([*arguments, "--max-new-tokens", "1", "--token-cost", "1000"]) == 0
    assert json.loads(capsys.readouterr().out)["granularity"] == 1


def test_generate_takes_what_a_model_is_loaded_with(capsys, checkpoint, image):
    arguments = ["generate", "--model", str(checkpoint), "--image", str(image), "--prompt", "how many dots?", "--json"]
    answers = []
    for more in ([], ["--dtype", "bfloat16"], ["--quantization", "8bit"]):
        assert cli.main([*arguments, "--max-new-tokens", "1", *more]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    whole, half, quantised = (answer["router_probs"] for answer in answers)
    assert quantised == whole
    assert half != whole
    assert list(half.values()) == pytest.approx(list(whole.values()), abs=0.02)

    words = []
    for more in ([], ["--static-cache"]):
        assert cli.main([*arguments, "--max-new-tokens", "5", *more]) == 0
        words.append(json.loads(capsys.readouterr().out)["text"])
    assert words[0] == words[1]


def test_generate_prints_the_text(capsys, checkpoint):
    arguments = ["generate", "--model", str(checkpoint), "--prompt", "hello", "--max-new-tokens", "3"]
    assert cli.main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["granularity"], answer["router_probs"], answer["num_visual_tokens"]) == (None, None, 0)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip() == answer["text"]


def test_generate_tells_mistakes_in_one_line(capsys, checkpoint, image, tmp_path):
    start = ["generate", "--model", checkpoint, "--prompt", "hello", "--image"]
    assert "granularity 7 is not one of this model's levels" in fails_in_one_line(
        capsys, [*start, image, "--granularity", 7]
    )
    assert "absent.png" in fails_in_one_line(capsys, [*start, tmp_path / "absent.png"])
    text = tmp_path / "text.png"
    text.write_text("not an image")
    assert "text.png: cannot be read as an image" in fails_in_one_line(capsys, [*start, text])
    assert str(tmp_path) in fails_in_one_line(capsys, ["generate", "--model", tmp_path, "--prompt", "hello"])


def test_debug_shows_the_traceback(checkpoint, tmp_path):
    arguments = ["generate", "--model", str(checkpoint), "--prompt", "hello", "--image", str(tmp_path / "absent.png")]
    with pytest.raises(DataError):
        cli.main([*arguments, "--debug"])


def test_convert_writes_a_checkpoint_that_answers_the_same(capsys, checkpoint, image, tmp_path):
    assert cli.main(["convert", str(checkpoint), str(tmp_path / "converted"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == str(tmp_path / "converted")
    texts = []
    for folder in (checkpoint, tmp_path / "converted"):
        arguments = ["generate", "--model", str(folder), "--image", str(image), "--prompt", "how many dots?"]
        assert cli.main([*arguments, "--max-new-tokens", "4"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    message = fails_in_one_line(capsys, ["convert", checkpoint, tmp_path / "converted"])
    assert "not an empty folder" in message


def test_claims_name_the_stage_that_is_missing(capsys, tmp_path):
    message = fails_in_one_line(capsys, ["mini", "claims", "--runs", tmp_path, "--data", tmp_path])
    assert "stage1 is not a finished stage 1; run `bash scripts/train_stage1.sh" in message
    assert "cannot be -1" in fails_in_one_line(capsys, ["mini", "claims", "--runs", tmp_path, "--token-cost", "-1"])
