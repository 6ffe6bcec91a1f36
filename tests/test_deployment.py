"""Runs the commands of docs/deployment.md up to the engines that need a GPU."""

import re
import shlex
from pathlib import Path

from avg_llava import cli
from avg_llava.inference.export import FORMATS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/deployment.md").read_text("utf-8")


def test_commands_up_to_transformers(tmp_path, monkeypatch, capsys):
    (tmp_path / "avg_llava").symlink_to(ROOT / "avg_llava")
    monkeypatch.chdir(tmp_path)
    before = PAGE.split("### vLLM")[0].replace("\\\n", " ")
    blocks = re.findall(r"```(bash|python)\n(.*?)```", before, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "bash", "python"]
    for language, text in blocks:
        if language == "bash":
            for program in re.findall(r"^python - <<'END'\n(.*?)^END$", text, flags=re.DOTALL | re.MULTILINE):
                exec(program, {})
            for line in re.findall(r"^avg-llava (.*)$", text, flags=re.MULTILINE):
                assert cli.main(shlex.split(line)) == 0, line
        else:
            capsys.readouterr()
            exec(text, {})
    answers = capsys.readouterr().out.splitlines()
    assert [answer.split()[0] for answer in answers] == ["q0", "q1", "q2"]
    assert all(re.fullmatch(r"q\d \[\d+\] [a-z]+", answer) for answer in answers), answers


def test_formats_match_the_command():
    assert re.findall(r"^\| `(\w+)` \|", PAGE.split("## Hand-over")[1], flags=re.MULTILINE) == list(FORMATS)
