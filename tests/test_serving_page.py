"""Runs the examples of docs/serving.md; only the server's address is replaced."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from avg_llava import cli
from avg_llava.cli.serving import Serve
from avg_llava.inference.pipeline import Pipeline
from avg_llava.serving.limits import Limits
from avg_llava.serving.protocol import ERRORS
from tests.serving.running import MINI, running

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/serving.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8000"
pytestmark = pytest.mark.xdist_group("serving")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def server():
    with running(Pipeline.load(MINI).predictor) as server:
        yield server


def test_examples(server, tmp_path, monkeypatch, capsys):
    start, draw, curl, *_ = blocks("bash")
    command = cli.parse(shlex.split(start)[1:])
    assert isinstance(command, Serve)
    assert (command.name, command.listening.port, command.loading.model) == ("mini", 8000, str(MINI.relative_to(ROOT)))

    monkeypatch.chdir(tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    script = f"{draw}\n{curl.replace(ADDRESS, server.address)}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    text = answer["choices"][0]["message"]["content"]
    assert text

    (code,) = blocks("python")
    exec(code.replace(ADDRESS, server.address), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == text
    assert lines[1].startswith(f"{answer['granularity']} [{{'4': ")
    assert lines[1].endswith(str(answer["usage"]["prompt_tokens_details"]["visual_tokens"]))
    assert re.fullmatch(r".+\[\d+\]", lines[2])


def test_limits_and_statuses_match_the_code():
    named = dict(re.findall(r"`--([\w-]+)` \((\d+)\)", PAGE))
    limits = {field.name.replace("_", "-"): str(field.default) for field in fields(Limits)}
    assert len(named) >= 5
    assert {name: limits[name] for name in named} == named
    rows = re.findall(r"^\| (\d{3}(?:, \d{3})*) \|", PAGE, flags=re.MULTILINE)
    statuses = {int(status) for row in rows for status in row.split(", ")}
    assert statuses == set(ERRORS) | {405}


def test_metrics_match_the_server(server):
    text = server.request("GET", "/metrics")[2].decode()
    exposed = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE avg_llava_")}
    exposed = {name for name in exposed if not name.endswith("_created")}
    named = set(re.findall(r"`(avg_llava_\w+?)(?:\{\w+\})?`", PAGE.split("## Health")[1].split("## Under load")[0]))
    assert named == exposed
