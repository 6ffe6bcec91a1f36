"""The command line: help with an example, exit codes, one-line errors, and answers that programs can read."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers.utils import logging as transformers_logging

from avg_llava import cli
from avg_llava.cli.inference import Generate
from avg_llava.cli.options import AnswerOptions, ModelOptions
from avg_llava.data.records import DataError
from avg_llava.serving.limits import Limits
from tests.tiny import make_checkpoint

MODEL = "--model --device --dtype --quantization --static-cache"
ANSWER = "--granularity --token-cost --max-visual-tokens --max-new-tokens"
OPTIONS = {
    "train": "CONFIG --dry-run --force-start",
    "feedback": "--config --output --num-processes --json",
    "verify-data": "--config --output --model-of --num-processes --json",
    "estimate": "--config --gpus --gpu --zero --mfu --num-samples --image-size --prompt-tokens --answer-tokens "
    "--model-of --json",
    "generate": f"{MODEL} --image --prompt --input --output --image-root --batch-size {ANSWER} --json",
    "chat": f"{MODEL} --image {ANSWER}",
    "inspect": "DIR --scan --json",
    "convert": "SOURCE OUTPUT --to --dtype --max-shard-size --dry-run --overwrite --no-check --json",
    "export model": "--model --dtype --output --json",
    "export prompts": f"{MODEL} --input --image-root --output --format {ANSWER} --json",
    "push": "FOLDER OWNER/NAME --license --results --private --yes --json",
    "demo": f"{MODEL} --host --port",
    "serve": f"{MODEL} --name --host --port --api-key-file --max-batch --batch-wait-ms --max-queue --timeout --grace "
    "--max-body-mib --max-images --max-pixels --max-tokens --remote-images",
    "evaluate": "--benchmark --model --output --data --protocol --granularity --token-cost --limit --batch-size "
    "--workers --timed --dtype --check --json",
    "report": "RESULT --against --output --json",
    "mini data": "--output --seed --json",
    "mini benchmarks": "--output --seed --json",
    "mini pretrain": "--output --seed --json",
    "mini claims": "--runs --data --output --token-cost --workers --check --json",
    "mini routers": "DIR --model --answers --data --workers --json",
    "bench train": "--stage --preset --repeats --stored-feedback --json",
    "bench inference": "--preset --batch-size --new-tokens --repeats --static-cache --json",
    "bench data": "--repeats --json",
    "bench serve": "--model --clients --seconds --json",
}
"""Options of every command: the names that scripts rely on."""


@pytest.fixture(autouse=True)
def no_progress_bars():
    transformers_logging.disable_progress_bar()


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


def leaves(group, prefix=""):
    for name, node in group.commands.items():
        yield from leaves(node, f"{prefix}{name} ") if isinstance(node, cli.Group) else [f"{prefix}{name}"]


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*words, "--help"])
    assert exit_.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_every_command_is_in_the_table():
    assert set(OPTIONS) == set(leaves(cli.COMMANDS))


@pytest.mark.parametrize("width", ["60", "200"])
@pytest.mark.parametrize("command", OPTIONS)
def test_help_lists_every_option_and_a_valid_example(capsys, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", width)
    text = help_of(capsys, *command.split())
    listed = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert {*OPTIONS[command].split(), "--debug"} <= listed
    example = text.split("example:\n  avg-llava ")[1].strip()
    assert example.startswith(command)
    assert type(cli.parse(shlex.split(example))).__name__ == command.title().replace("-", "").replace(" ", "")


@pytest.mark.parametrize("group", ["", "mini", "bench", "export"])
def test_help_of_a_group_lists_its_commands(capsys, group):
    text = help_of(capsys, *group.split())
    for command in (name.removeprefix(group).split()[0] for name in OPTIONS if name.startswith(group)):
        assert f"• {command} " in text
    assert f"example:\n  avg-llava {group}" in text


def test_help_of_training_lists_the_configuration(capsys):
    text = help_of(capsys, "train")
    assert "  optim.lr: float\n" in text
    assert "  optim.scheduler: cosine|linear|constant_with_warmup = cosine\n" in text
    assert "  output.dir: str\n      Folder of the run" in text
    assert "  lora.rank: int = 128\n" in text


@pytest.mark.parametrize("command", ["", *OPTIONS])
def test_help_imports_nothing_heavy(command):
    heavy = ["torch", "transformers", "numpy", "pandas", "gradio", "fastapi", "datasets"]
    code = f"""
import sys
from avg_llava import cli
try:
    cli.main({[*command.split(), "--help"]})
except SystemExit:
    print("loaded:", *set({heavy}) & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(tmp_path, shell):
    with pytest.raises(SystemExit):
        cli.main(["--tyro-write-completion", shell, str(tmp_path / "script")])
    script = (tmp_path / "script").read_text()
    assert "verify-data" in script
    assert "max-visual-tokens" in script
    if shell == "bash":
        subprocess.run(["bash", "-n", tmp_path / "script"], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Expected one of {train, feedback,"),
        ("mini", "Expected one of {data, benchmarks,"),
        ("fly", "avg-llava: unknown command 'fly'; there are train, feedback,"),
        ("generat --model m", "avg-llava: unknown command 'generat'; did you mean 'generate'?"),
        ("mini clams", "avg-llava mini: unknown command 'clams'; did you mean 'claims'?"),
        ("generate", "Missing from avg-llava generate:"),
        ("generate --model m --promt p", "--prompt TEXT"),
        ("generate --model m --mod m", "Unrecognized options: --mod"),
        ("generate --model m --granularity many", "'many' is not a whole number of at least 1"),
        ("generate --model m --batch-size 0", "'0' is not a whole number of at least 1"),
        ("generate --model m --quantization 9bit", "invalid choice '9bit'"),
        ("generate --model m --no-json", "Unrecognized options: --no-json"),
        ("evaluate --benchmark gqa --model m --granularity x", "'x' is none of auto, random, all"),
        ("estimate --config c --image-size 640", "expected WIDTHxHEIGHT such as 640x480, got '640'"),
        ("serve --model m --port 70000", "'70000' is not a port"),
        ("demo --port x", "'x' is not a port"),
        ("serve --model m --max-queue 0", "--max-queue must be at least 1, got 0"),
        ("report", "at least one result file"),
        ("mini routers --model m --answers a", "at least one checkpoint"),
    ],
)
def test_wrong_usage_is_2(capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments.split())
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_options_are_read():
    words = "--model=m --image a.png --image b.png --prompt None --max-visual-tokens 9 --dtype bfloat16"
    assert cli.parse(["generate", *words.split()]) == Generate(
        loading=ModelOptions(model="m", dtype="bfloat16"),
        image=(Path("a.png"), Path("b.png")),
        prompt="None",
        answering=AnswerOptions(max_visual_tokens=9),
    )
    command = cli.parse(["serve", "--model", "m", "--port", "0", "--max-batch", "3", "--remote-images"])
    assert (command.listening.port, command.limits) == (0, Limits(max_batch=3, remote_images=True))
    command = cli.parse(["estimate", "--config", "c", "--image-size", "640x480", "--zero", "3-offload"])
    assert (command.image_size, command.zero, command.json) == ((480, 640), "3-offload", False)
    for text, value in {"auto": "auto", "all": "all", "64": 64}.items():
        command = cli.parse(["evaluate", "--benchmark", "all", "--model", "m", "--granularity", text])
        assert command.granularity == value
    command = cli.parse(["report", "a", "b", "--against", "c", "d", "--output", "e", "--json"])
    assert (command.results, command.against) == ((Path("a"), Path("b")), (Path("c"), Path("d")))


def test_a_prompt_may_begin_with_a_dash():
    for prompt in ("-what is it?", "--model or not?", "- a, b", "-5 degrees?", "-is a=b?"):
        command = cli.parse(["generate", "--model", "dir", "--prompt", prompt, "--json"])
        assert isinstance(command, Generate)
        assert (command.prompt, command.json) == (prompt, True)


def test_further_options_of_training_go_to_the_configuration():
    overrides = ["--optim.lr", "1e-3", "--output.overwrite", "--optim.betas", "[0.9,0.95]", "--seed=-1"]
    command = cli.parse(["train", "--debug", "c.yaml", *overrides, "--dry-run"])
    assert (command.config, command.debug, command.dry_run, command.force_start) == (Path("c.yaml"), True, True, False)
    assert command.overrides == tuple(overrides)


@pytest.mark.parametrize(
    "command", ["estimate --config c.yaml", "verify-data --config c.yaml", "feedback --config c.yaml --output store"]
)
def test_values_of_a_configuration_can_be_changed_in_every_command_that_reads_one(command):
    overrides = ["--model.start", "dir", "--optim.lr=1e-3"]
    assert cli.parse([*command.split(), *overrides]).overrides == tuple(overrides)
    for wrong in (["--gpuss", "8"], ["--modle=0.4"], ["word"], ["word", *overrides]):
        with pytest.raises(SystemExit) as stop:
            cli.parse([*command.split(), *wrong])
        assert stop.value.code == 2


def test_an_estimate_takes_changed_values():
    words = ["estimate", "--config", "configs/mini/stage1.yaml", "--gpus", "1"]
    halves = []
    for batch in (8, 4):
        outcome = cli.parse(
            [*words, "--optim.global_batch_size", str(batch), "--optim.micro_batch_size", "1"]
        ).compute()
        halves.append(outcome.facts["step"]["flops"])
    assert halves[0] == pytest.approx(2 * halves[1])


def test_installed_command_answers():
    done = subprocess.run(
        [sys.executable, "-m", "avg_llava.cli", "generate", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "--token-cost" in done.stdout


@pytest.mark.parametrize("command", ["--help", "serve --help"])
def test_closed_output_ends_a_command_quietly(command):
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "avg_llava.cli", *command.split()]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


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


@pytest.mark.parametrize("command", ["generate", "convert"])
def test_libraries_print_nothing(checkpoint, image, tmp_path, command):
    arguments = {
        "generate": ["--model", checkpoint, "--image", image, "--prompt", "hello", "--max-new-tokens", "2", "--json"],
        "convert": [checkpoint, tmp_path / "converted", "--json"],
    }[command]
    done = subprocess.run(
        [sys.executable, "-m", "avg_llava.cli", command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"WANDB_MODE": "disabled"},
    )
    assert json.loads(done.stdout)
    assert done.stderr == ""
