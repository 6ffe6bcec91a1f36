"""The terminal conversation: questions, commands and errors."""

import functools
import http.server
import io
import threading

import pytest

from avg_llava import cli
from avg_llava.inference.answers import Decoding
from avg_llava.inference.budget import Budget
from avg_llava.inference.conversation import Conversation
from avg_llava.inference.pipeline import Pipeline
from avg_llava.serving.chat import HELP, Chat
from tests.tiny import make_checkpoint, noise_images


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Pipeline.load(checkpoint).predictor


@pytest.fixture
def image(tmp_path):
    noise_images()[0].save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def talk(predictor):
    def run(*lines):
        output_lines = []
        Chat(predictor, Budget(), Decoding(5), output_lines.append).run(lines)
        return output_lines

    return run


def test_conversation(predictor, image, talk, capsys):
    output_lines = talk(f"/image {image}\n", "how many dots?\n", "\n", "why?", "/quit", "not reached")
    conversation = Conversation(predictor, Budget(), Decoding(5))
    answers = [conversation.ask("how many dots?", image), conversation.ask("why?")]
    assert [line.strip() for line in capsys.readouterr().out.strip().splitlines()] == [
        answer.text for answer in answers
    ]
    assert output_lines[0] == "image of 40x40 pixels: ask about it"
    assert output_lines[1].startswith(
        f"[{answers[0].granularity[0]} tokens per crop (routed), {answers[0].num_visual_tokens} "
    )
    assert len(output_lines) == 3


def test_commands(image, talk):
    output_lines = talk(
        f"/image {image}", "/granularity 4", "what?", "/cost 1000", f"/image {image}", "what?", "/reset", "/help"
    )
    assert "4 visual tokens per crop" in output_lines[1]
    assert output_lines[2].startswith("[4 tokens per crop (forced), ")
    assert "1000 nats" in output_lines[3]
    assert output_lines[5].startswith("[1 tokens per crop (routed), ")
    assert output_lines[6:] == ["a new conversation", HELP]
    assert talk("/granularity 4", "/granularity auto")[-1] == "the router chooses"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image absent.png", "absent.png: image file not found"),
        ("/granularity 5", "granularity 5 is not one of this model's levels: 1, 2, 4, 8, 16"),
        ("/granularity many", "/granularity needs a number, got 'many'"),
        ("/cost -1", "token_cost is a price"),
        ("/fly", "unknown command /fly; /help lists them"),
        ("/image http://127.0.0.1:9/x.png", "refused"),
    ],
)
def test_errors_do_not_end_the_conversation(talk, line, message):
    output_lines = talk(line, "/reset")
    assert output_lines[0].startswith("error: ")
    assert message in output_lines[0]
    assert output_lines[1] == "a new conversation"


def test_images_by_url(image, talk):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(image.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        output_lines = talk(f"/image http://127.0.0.1:{server.server_address[1]}/image.png")
        server.shutdown()
    assert output_lines == ["image of 40x40 pixels: ask about it"]


def test_command_reads_standard_input(checkpoint, image, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("how many dots?\n/quit\n"))
    arguments = ["chat", "--model", str(checkpoint), "--image", str(image), "--max-new-tokens", "3"]
    assert cli.main([*arguments, "--granularity", "2"]) == 0
    output = capsys.readouterr().out
    assert "image of 40x40 pixels" in output
    assert "[2 tokens per crop (forced), " in output
