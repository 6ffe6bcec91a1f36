"""What the README says is true: its Python runs, the files that it names exist, its commands are right usage."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from avg_llava import cli
from tests.tiny import make_checkpoint

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_ten_lines_answer_a_question(tmp_path, capsys):
    (code,) = blocks("python")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 10
    Image.effect_noise((50, 40), 60).convert("RGB").save(tmp_path / "image.png")
    code = code.replace("runs/mini/stage4", str(make_checkpoint(tmp_path)))
    code, count = re.subn(r'Image\.open\(".*"\)', f'Image.open("{tmp_path / "image.png"}")', code)
    assert count == 1
    variables: dict[str, object] = {}
    exec(code, variables)
    assert 1 <= len(variables["answer"][0]) <= 16
    assert capsys.readouterr().out.endswith("\n")


def test_files_of_the_tree_exist():
    tree = README.split("## Where things are")[1].split("```")[1].strip("\n")
    folders: list[Path] = [ROOT]  # by depth of indentation
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = folders[depth] / line.split()[0]
        assert path.exists(), line
        folders[depth + 1 :] = [path]
    assert len(tree.splitlines()) > 10


def test_files_of_the_text_exist():
    named = re.findall(r"(?:scripts|configs|playground)/[\w./-]+", README)
    assert len(named) > 10
    for name in named:
        if not name.startswith("playground/data/mini"):  # made by the quickstart
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    "line", [line for block in blocks("bash") for line in block.splitlines() if "avg-llava" in line]
)
def test_commands_are_right_usage(line):
    words = shlex.split(line, comments=True)
    assert words[0] == "avg-llava"
    cli.parse(words[1:])
