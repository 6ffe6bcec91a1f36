"""The page's event handlers, its limits, and its server."""

import signal
import socket
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
from PIL import Image

from avg_llava.inference.answers import Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.pipeline import Pipeline
from avg_llava.mini.questions import all_questions
from avg_llava.mini.world import scene_of
from avg_llava.serving import demo as demo_module
from avg_llava.serving.demo import (
    EXAMPLES,
    MAX_NEW_TOKENS,
    MAX_QUESTION_CHARACTERS,
    MAX_UPLOAD_BYTES,
    Demo,
    measure_first_token,
    read_controls,
    save_examples,
    serve_page,
    wait_for_signal,
)
from tests.serving.running import free_port, save_talker
from tests.tiny import make_checkpoint, noise_images

CONTROLS = ("router", 0, 100, 5)
LONG = ("router", 0, 100, MAX_NEW_TOKENS)
TAB, OTHER_TAB = SimpleNamespace(session_hash="tab"), SimpleNamespace(session_hash="other tab")


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return Pipeline.load(make_checkpoint(tmp_path_factory.mktemp("tiny"))).predictor


@pytest.fixture
def upload(tmp_path):
    noise_images()[0].save(tmp_path / "0123.png")
    return {"path": str(tmp_path / "0123.png"), "orig_name": "dots.png"}


def test_controls():
    assert read_controls("router", 0.5, 100, 7) == (Budget(None, 0.5, 100), Decoding(7))
    assert read_controls("16", 0.5, 100, 7) == (Budget(16, 0.0, 100), Decoding(7))
    for wrong in [("fine", 0, 9, 9), ("router", -1, 9, 9), ("router", 0, 0, 9), ("router", 0, 9, MAX_NEW_TOKENS + 1)]:
        with pytest.raises(ValueError):
            read_controls(*wrong)


def test_ask(predictor, upload):
    frames = list(Demo(predictor).ask(TAB, upload, " how many dots? ", *CONTROLS))
    (answer,) = predictor.predict([Request("how many dots?", (noise_images()[0],))], decoding=Decoding(5))
    text, stats, bars, *pictures = frames[0]
    level = answer.granularity[0]
    assert text == ""
    assert f"{level} per crop" in stats
    assert f"<b>{level}</b>" in bars
    assert pictures == [None, None]
    *_, answered, last = frames
    assert answered[0] == answer.text
    assert "being measured" in answered[1]
    assert "speed-up" in last[1]
    assert f"{answer.num_visual_tokens} of " in last[1]
    assert last[0] == gr.skip()
    assert (last[3].width, last[4].size) == (768, (320, 320))  # tiles of 32 pixels, enlarged


def test_budget(predictor, upload):
    for controls, level in [(("8", 0, 100, 2), 8), (("router", 1e6, 100, 2), 1), (("router", 0, 10, 2), 1)]:
        first = next(Demo(predictor).ask(TAB, upload, "how many dots?", *controls))
        assert f"{level} per crop" in first[1]


def test_text_only(predictor):
    frames = list(Demo(predictor).ask(TAB, None, "hello", *CONTROLS))
    (answer,) = predictor.predict([Request("hello")], decoding=Decoding(5))
    assert frames[-1] == (answer.text, "", "", None, None)


def test_compare(predictor, upload):
    frames = list(Demo(predictor).compare(TAB, upload, "how many dots?", "8", 0, 100, 5))
    assert [frame.count("data-level") for frame in frames] == [0, 1, 2, 3, 4, 5, 5]
    assert [frame.count(" ms<") for frame in frames] == [0, 0, 0, 0, 0, 0, 10]  # first token and whole answer
    assert [frame.count("<img") for frame in frames] == [0, 0, 0, 0, 0, 0, 5]
    for level in predictor.granularities:
        (answer,) = predictor.predict([Request("how many dots?", (noise_images()[0],))], Budget(level), Decoding(5))
        card = frames[-1].split(f"data-level='{level}'")[1].split("data-level")[0]
        assert f"<div class='avg-answer'>{answer.text}</div>" in card
        assert f"<span>{answer.num_visual_tokens}</span>" in card
    (routed,) = predictor.predict([Request("how many dots?", (noise_images()[0],))])
    assert f"avg-chosen' data-level='{routed.granularity[0]}'" in frames[-1]


@pytest.mark.parametrize(
    ("question", "controls", "message"),
    [
        ("  ", CONTROLS, "there is no question"),
        (None, CONTROLS, "there is no question"),
        ("?" * (MAX_QUESTION_CHARACTERS + 1), CONTROLS, f"the maximum is {MAX_QUESTION_CHARACTERS}"),
        ("<image> and <image>", CONTROLS, "[1] images"),
        ("what?", ("router", 0, 2, 5), "max_visual_tokens 2 is too low"),
        ("what?", ("router", float("nan"), 100, 5), "token_cost is a price"),
    ],
)
def test_invalid_inputs_are_messages(predictor, upload, question, controls, message):
    demo = Demo(predictor)
    for press in (demo.ask, demo.compare):
        with pytest.raises(gr.Error) as raised:
            list(press(TAB, upload, question, *controls))
        assert message in raised.value.message
        assert not raised.value.print_exception


def test_unknown_levels_are_messages(predictor, upload):
    with pytest.raises(gr.Error, match="granularity 5 is not one of this model's levels"):
        list(Demo(predictor).ask(TAB, upload, "what?", "5", 0, 100, 5))


def test_unreadable_files_are_messages(predictor, tmp_path):
    demo = Demo(predictor)
    (tmp_path / "a").write_text("no image")
    Image.new("1", (8000, 8000)).save(tmp_path / "b", "PNG")  # a small file of 64 million pixels
    demo.check(None)
    for name, message in [("a", "cat.png: cannot be read as an image"), ("b", "above the limit of 32000000 pixels")]:
        for press in (demo.check, lambda upload: list(demo.ask(TAB, upload, "what?", *CONTROLS))):
            with pytest.raises(gr.Error) as raised:
                press({"path": str(tmp_path / name), "orig_name": "cat.png"})
            assert message in raised.value.message
            assert str(tmp_path) not in raised.value.message
    with pytest.raises(gr.Error, match="levels are compared on an image"):
        list(demo.compare(TAB, None, "what?", *CONTROLS))


def record_predictions(monkeypatch, predictor):
    """Records (budget, decoding, time to first token) of each prediction."""
    recorded, predict = [], predictor.predict

    def recording(requests, budget, decoding):
        answers = predict(requests, budget, decoding)
        recorded.append((budget, decoding, answers[0].timings.first_token))
        return answers

    monkeypatch.setattr(predictor, "predict", recording)
    return recorded


def test_first_token_times_are_medians_of_alternating_runs(predictor, monkeypatch):
    recorded = record_predictions(monkeypatch, predictor)
    budgets = [Budget(), Budget(16)]
    request = Request("how many dots?", (noise_images()[0],))
    monkeypatch.setattr(demo_module, "TIMING_SECONDS", 1e9)
    times = measure_first_token(predictor, request, budgets)
    assert [budget for budget, _, _ in recorded] == budgets * 5
    assert {decoding for _, decoding, _ in recorded} == {Decoding(1)}
    for budget, median in zip(budgets, times, strict=True):
        assert median == sorted(time for used, _, time in recorded if used == budget)[2]

    recorded.clear()
    monkeypatch.setattr(demo_module, "time", SimpleNamespace(monotonic=iter([0.0, 1.0, 1e9 + 1]).__next__))
    times = measure_first_token(predictor, request, budgets)  # over the time limit after two rounds
    assert len(recorded) == 4
    assert times[1] == pytest.approx((recorded[1][2] + recorded[3][2]) / 2)


@pytest.fixture
def talker(tmp_path):
    """A model whose answers end at the maximum length only."""
    return Pipeline.load(save_talker(tmp_path / "talker")).predictor


def test_stop_ends_the_run_of_its_tab(talker):
    demo = Demo(talker)
    for tab in (TAB, OTHER_TAB):
        demo.start(tab)
    steps, others = demo.ask(TAB, None, "go on", *LONG), demo.ask(OTHER_TAB, None, "go on", *CONTROLS)
    next(steps), next(others)
    demo.stop(TAB)
    assert list(steps) == []
    assert list(others) != []
    assert list(demo.ask(TAB, None, "go on", *CONTROLS)) != []


def test_stop_ends_a_queued_run(talker, monkeypatch):
    demo = Demo(talker)
    demo.start(TAB)
    demo.stop(TAB)
    with monkeypatch.context() as patch:
        patch.setattr(talker, "encode", None)
        assert list(demo.ask(TAB, None, "go on", *CONTROLS)) == []
    demo.start(TAB)
    assert list(demo.ask(TAB, None, "go on", *CONTROLS)) != []


def test_closing_a_tab_stops_its_run(talker):
    demo = Demo(talker)
    demo.leave(TAB)
    demo.start(TAB)
    steps = demo.ask(TAB, None, "go on", *LONG)
    next(steps)
    demo.leave(TAB)
    assert list(steps) == []


def test_close_waits_for_the_running_step(talker, monkeypatch):
    demo, encode = Demo(talker), talker.encode
    entered, proceed, steps = threading.Event(), threading.Event(), []

    def slow_encode(requests):
        entered.set()
        assert proceed.wait(60)
        return encode(requests)

    monkeypatch.setattr(talker, "encode", slow_encode)
    handler = threading.Thread(target=lambda: steps.extend(demo.ask(TAB, None, "go on", *LONG)))
    closing = threading.Thread(target=demo.close)
    handler.start()
    assert entered.wait(60)
    closing.start()
    closing.join(0.3)
    assert closing.is_alive()
    proceed.set()
    for thread in (closing, handler):
        thread.join(60)
        assert not thread.is_alive()
    assert len(steps) == 1  # the step that was running
    assert list(demo.ask(TAB, None, "go on", *CONTROLS)) == []


def test_close_cancels_generation(talker):
    demo, num_forwards = Demo(talker), []
    steps = demo.ask(TAB, None, "go on", *LONG)
    handle = talker.model.get_input_embeddings().register_forward_hook(lambda *_: num_forwards.append(1))
    try:
        next(steps)
        demo.close()
        before = len(num_forwards)
        assert list(steps) == []
    finally:
        handle.remove()
    assert len(num_forwards) == before < MAX_NEW_TOKENS


def test_runs_end_before_the_server_stops(predictor, monkeypatch):
    calls, close_page = [], gr.Blocks.close
    monkeypatch.setattr(Demo, "close", lambda demo: calls.append("demo"))
    monkeypatch.setattr(gr.Blocks, "close", lambda page, verbose: (calls.append("page"), close_page(page, verbose)))
    with serve_page(predictor, "127.0.0.1", free_port()):
        assert calls == []
    assert calls == ["demo", "page"]


def test_examples_are_questions_about_their_images(tmp_path):
    examples = save_examples(tmp_path)
    for (index, question), (path, shown) in zip(EXAMPLES, examples, strict=True):
        scene, _ = scene_of(0, "eval", index)
        assert question in [wording for known in all_questions(scene) for wording in known.wordings]
        assert shown == question
        assert Image.open(path).size == scene.pixels().shape[::-1]


def test_serving_connects_to_localhost_only(predictor, monkeypatch):
    """Records every connection of this process while the page, its upload and its limits are used."""
    connect, reached = socket.socket.connect, []

    def recording_connect(sock, address):
        reached.append(address)
        return connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", recording_connect)
    port = free_port()
    with serve_page(predictor, "127.0.0.1", port) as address:
        assert address == f"http://127.0.0.1:{port}/"
        assert "AVG-LLaVA" in httpx.get(address).text
        config = httpx.get(f"{address}config").json()
        assert not config["analytics_enabled"]
        small = httpx.post(f"{address}gradio_api/upload", files={"files": b"x" * 1000})
        large = httpx.post(f"{address}gradio_api/upload", files={"files": b"x" * (MAX_UPLOAD_BYTES + 1)})
        assert (small.status_code, large.status_code) == (200, 413)
        both = httpx.post(f"{address}gradio_api/upload", files=[("files", b"x" * (MAX_UPLOAD_BYTES // 2 + 9999))] * 2)
        endless = httpx.post(f"{address}gradio_api/upload", content=iter([b"x"]))
        assert (both.status_code, endless.status_code) == (413, 411)
        for path in ["http://example.com/a.png", " HTTPS://example.com/a.png"]:
            data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
            response = httpx.post(
                f"{address}gradio_api/queue/join", json={"data": data, "fn_index": 0, "session_hash": "a"}
            )
            assert response.status_code == 400
        response = httpx.post(f"{address}gradio_api/queue/join", json={"data": ["?" * 2**16], "fn_index": 0})
        assert response.status_code == 413
        with (
            pytest.raises(OSError, match=f"port {port}: choose another --port"),
            serve_page(predictor, "127.0.0.1", port),
        ):
            pass
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=5)
    assert reached
    assert {host for host, *_ in reached} == {"127.0.0.1"}


def test_wait_for_signal():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGTERM])
    timer.start()
    try:
        wait_for_signal()
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
