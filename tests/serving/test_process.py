"""`avg-llava serve` as a process: shutdown, and many concurrent clients."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest

from avg_llava import cli
from avg_llava.bench import serving as stress
from avg_llava.bench.serving import started_server
from avg_llava.inference.pipeline import Pipeline
from tests.serving.running import CHAT, MINI, Running, endless, rest_of, running, save_talker, stream_of, until

pytestmark = pytest.mark.xdist_group("serving")
LONG = endless(max_tokens=400)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return save_talker(tmp_path_factory.mktemp("talker"))


def client_of(address):
    return Running(urlsplit(address).port)


def test_sigterm_drains(talker):
    with started_server(talker, "--name", "mini", "--max-tokens", "100000", "--max-batch", "1") as (process, address):
        server = client_of(address)
        _, response = stream_of(server, LONG)
        waiting = server.connect()
        waiting.request("POST", CHAT, json.dumps(endless(max_tokens=5)), {"Content-Type": "application/json"})
        until(lambda: server.metric("avg_llava_queue_depth") == 1)
        process.send_signal(signal.SIGTERM)
        until(lambda: server.request("GET", "/health")[0] == 503)
        assert json.loads(server.request("GET", "/health")[2]) == {"status": "draining"}
        status, response_body = server.chat(endless())
        assert (status, response_body["error"]["code"]) == (503, "shutting_down")
        texts, end = rest_of(response)
        assert (end, len(texts) > 10) == ("done", True)
        answer = waiting.getresponse()
        assert answer.status == 200
        assert json.loads(answer.read())["usage"]["completion_tokens"] == 5
        assert process.wait(30) == 0
        with pytest.raises(OSError):
            server.request("GET", "/health")


def test_a_second_signal_aborts(talker):
    flags = ("--name", "mini", "--max-tokens", "100000", "--grace", "1000")
    with started_server(talker, *flags) as (process, address):
        server = client_of(address)
        _, response = stream_of(server, endless())
        process.terminate()
        until(lambda: server.request("GET", "/health")[0] == 503)
        process.send_signal(signal.SIGINT)
        assert rest_of(response)[1] == "shutting_down"
        assert process.wait(30) == 1


def test_startup_errors(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--model", str(MINI), "--port", port]) == 1
        assert "ddress already in use" in capsys.readouterr().err
    empty = tmp_path / "key"
    empty.touch()
    assert cli.main(["serve", "--model", str(MINI), "--api-key-file", str(empty)]) == 1
    assert "must hold one line, the key" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", "--model", str(MINI), "--port", "70000"])
    assert exit_.value.code == 2


def check_load(result, clients):
    assert result["failures"] == {}
    assert result["wrong"] == 0, result["wrong_examples"]
    assert result["answered"] >= clients
    assert result["mean_batch_size"] > 1
    assert result["exit_code"] == 0
    assert set(result["images_by_granularity"]) == {"4", "8", "16", "32", "64"}
    assert stress.is_fine(result)


def test_concurrent_clients_get_their_answers():
    result = stress.bench_serve(MINI, clients=16, seconds=4)
    check_load(result, 16)
    lines = stress.table_lines(result)
    assert lines[0].startswith(f"16 clients for 4 s: {result['answered']} answers")
    assert [sum(name in line for line in lines) for name in ("p50", "whole answer", "first token")] == [1, 1, 1]


@pytest.mark.slow
def test_64_clients_for_two_minutes():
    """With an allocator that returns freed memory (docs/serving.md), so that only leaks grow."""
    command = [sys.executable, "-m", "avg_llava.cli", "bench", "serve", "--model", str(MINI), "--json"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["clients"], result["seconds"]) == (64, 120)
    check_load(result, 64)
    memory = result["memory_bytes"]
    assert memory["peak"] <= 1.1 * memory["peak_of_first_half"]


def test_the_benchmark_detects_errors():
    """Clients count wrong answers and failed requests."""
    predictor = Pipeline.load(MINI).predictor
    questions = stress.make_questions(predictor, 6)
    swapped = [stress.Question(question.body, questions[0].expected) for question in questions]
    broken = stress.Question({**questions[0].body, "n": 3}, questions[0].expected)
    results = stress.ClientResults()
    with running(predictor) as server:
        for sent in (swapped[1:], [broken]):
            stress._run_client(server.address, sent, 0, time.monotonic() + 0.5, results)
    assert len(results.wrong) == len(results.seconds) >= 1
    assert set(results.failures) == {"400"}
    with pytest.raises(OSError, match="refused"):
        stress.read_metrics(server.address)
    stress._run_client(server.address, swapped, 0, time.monotonic() + 0.1, results)
    assert results.failures["ConnectionRefusedError"] > 0
