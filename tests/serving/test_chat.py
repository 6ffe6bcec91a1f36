"""The terminal conversation, as typed."""

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
        said = []
        Chat(predictor, Budget(), Decoding(5), said.append).run(lines)
        return said

    return run


def test_a_conversation(predictor, image, talk, capsys):
    said = talk(f"/image {image}\n", "how many dots?\n", "\n", "why?", "/quit", "never read")
    conversation = Conversation(predictor, Budget(), Decoding(5))
    answers = [conversation.ask("how many dots?", image), conversation.ask("why?")]
    assert [line.strip() for line in capsys.readouterr().out.strip().splitlines()] == [
        answer.text for answer in answers
    ]
    assert said[0] == "image of 40x40 pixels: ask about it"
    assert said[1].startswith(f"[{answers[0].granularity[0]} tokens per crop (routed), {answers[0].num_visual_tokens} ")
    assert len(said) == 3


def test_commands(image, talk):
    said = talk(
        f"/image {image}", "/granularity 4", "what?", "/cost 1000", f"/image {image}", "what?", "/reset", "/help"
    )
    assert "4 visual tokens per crop" in said[1]
    assert said[2].startswith("[4 tokens per crop (forced), ")
    assert "1000 nats" in said[3]
    assert said[5].startswith("[1 tokens per crop (routed), ")
    assert said[6:] == ["a new conversation", HELP]
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
def test_mistakes_do_not_end_it(talk, line, message):
    said = talk(line, "/reset")
    assert said[0].startswith("error: ")
    assert message in said[0]
    assert said[1] == "a new conversation"


def test_images_by_address(image, talk):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(image.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = talk(f"/image http://127.0.0.1:{server.server_address[1]}/image.png")
        server.shutdown()
    assert said == ["image of 40x40 pixels: ask about it"]


def test_command_reads_a_pipe(checkpoint, image, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("how many dots?\n/quit\n"))
    arguments = ["chat", "--model", str(checkpoint), "--image", str(image), "--max-new-tokens", "3"]
    assert cli.main([*arguments, "--granularity", "2"]) == 0
    output = capsys.readouterr().out
    assert "image of 40x40 pixels" in output
    assert "[2 tokens per crop (forced), " in output
