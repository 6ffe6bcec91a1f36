"""docs/ablations.md names every configuration of the ablations, and its commands are right usage."""

import re
import shlex
from pathlib import Path

import pytest

from avg_llava import cli
from avg_llava.training.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/ablations.md").read_text("utf-8")
COMMANDS = [
    shlex.split(command, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    for command in block.replace("\\\n", " ").splitlines()
]


def test_every_configuration_has_its_row():
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`([\w]+\.yaml)`", row)}
    assert named == {path.name for path in (ROOT / "configs/ablations").glob("*.yaml")}


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "avg-llava"], ids=" ".join)
def test_commands_are_right_usage(words):
    cli.parse(words[1:])


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "bash"], ids=" ".join)
def test_trainings_are_of_the_script_s_stage(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert Path(words[1]).is_file()
    if words[2:]:
        assert words[1] == f"scripts/train_stage{load_config(words[2], words[3:]).stage}.sh"
