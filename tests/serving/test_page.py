"""The page in a browser, as a person uses it: `avg-llava demo` with the shipped model, in headless Chromium."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from avg_llava.inference.pipeline import Pipeline
from avg_llava.serving.demo import MAX_UPLOAD_BYTES, save_examples
from tests.serving.running import free_port

pytestmark = pytest.mark.xdist_group("browser")

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 120
SWITCHES = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,1400"),
]


def program(*names):
    """Where a program is. Continuous integration installs it (.ci/run); elsewhere its absence skips these tests."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        message = f"{names[0]} is not installed; on Debian: apt-get install chromium chromium-driver"
        assert os.environ.get("CI") != "true", message
        pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, folder of its temporary files) of a running page; told to end, it ends well and leaves nothing."""
    program("chromium"), program("chromedriver")
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "avg_llava.cli", "demo", "--port", str(port)]
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            address = f"http://127.0.0.1:{port}/"
            assert line.startswith(f"the page is at {address}"), line
            yield address, folder
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert list(folder.glob("avg-llava-demo-*")) == []


@pytest.fixture(scope="module")
def driver(server, tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    for switch in [*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(program("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(ROOT / "avg_llava" / "mini" / "checkpoint")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """(path of the image, question), as the page has them."""
    return save_examples(tmp_path_factory.mktemp("examples"))


class Page:
    """What a person does with the page, and sees on it."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.all("#examples tr"))

    def wait(self, condition, seconds=SECONDS):
        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: condition())

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).text

    def answer(self):
        return self.one("#answer textarea").get_property("value")

    def take_example(self, question):
        next(row for row in self.all("#examples tr") if question in row.text).click()
        self.wait(lambda: self.all("#image img") and self.one("#question textarea").get_property("value") == question)

    def choose_file(self, path):
        for button in self.all("#image button[aria-label='Remove Image']"):
            button.click()
        self.wait(lambda: self.all("#image input[type=file]"))
        self.one("#image input[type=file]").send_keys(str(path))

    def set_number(self, selector, value):
        number = self.one(f"{selector} input[type=number]")
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys(str(value), Keys.TAB)

    def ask(self, seconds=SECONDS):
        """Asks, and returns when the figures of the new answer are there."""
        before = self.text("#stats")
        self.one("#ask").click()
        self.wait(lambda: "speed-up" in (now := self.text("#stats")) and now != before, seconds)  # read once

    def figures(self):
        return {cell.text.split("\n")[0]: cell.text.split("\n")[1] for cell in self.all("#stats .avg-stats > div")}

    def message(self, part):
        """Waits for a message with these words, reads all of it, and puts it away."""
        self.wait(lambda: any(part in toast.text for toast in self.all(".toast-body")))
        toast = next(toast for toast in self.all(".toast-body") if part in toast.text)
        text = toast.text
        toast.find_element(By.CSS_SELECTOR, "button").click()
        self.wait(lambda: not self.all(".toast-body"))
        return text


@pytest.fixture
def page(driver, server):
    return Page(driver, server[0])


def shown_image(page, selector):
    """(width, height) in pixels of the file that an image shows, once it is there."""
    page.wait(lambda: page.all(f"{selector} img") and page.one(f"{selector} img").get_property("naturalWidth"))
    return tuple(page.one(f"{selector} img").get_property(side) for side in ("naturalWidth", "naturalHeight"))


def test_ask_and_change_the_budget(page, pipeline, examples):
    path, question = examples[0]
    expected = pipeline.ask(path, question)
    page.take_example(question)
    page.ask()
    assert page.answer() == expected.text
    assert page.figures()["Level"] == f"{expected.granularity[0]} per crop"
    assert page.figures()["Visual tokens"].startswith(f"{expected.num_visual_tokens} of ")
    probabilities = [f"{share:.1%}" for share in expected.router_probs[0]]
    shown = page.text("#router").split("\n")
    assert [line for line in shown if line in probabilities] == probabilities
    assert shown_image(page, "#tiles") == (768, 768)
    assert shown_image(page, "#overview") == (320, 320)

    page.set_number("#token-cost", 1)
    page.ask()
    frugal = pipeline.ask(path, question, token_cost=1)
    assert frugal.num_visual_tokens < expected.num_visual_tokens
    assert page.figures()["Level"] == f"{frugal.granularity[0]} per crop"
    assert page.figures()["Visual tokens"].startswith(f"{frugal.num_visual_tokens} of ")
    assert page.answer() == frugal.text

    page.set_number("#token-cost", 0)
    page.set_number("#max-visual-tokens", 100)
    page.ask()
    limited = pipeline.ask(path, question, max_visual_tokens=100)
    assert limited.num_visual_tokens <= 100
    assert page.figures()["Visual tokens"].startswith(f"{limited.num_visual_tokens} of ")

    page.set_number("#max-visual-tokens", 336)
    next(choice for choice in page.all("#level label") if choice.text == "32").click()
    page.wait(lambda: page.one("#token-cost input[type=number]").get_property("disabled"))
    page.ask()
    assert page.figures()["Level"] == "32 per crop"
    assert "forced" in page.text("#stats")
    assert "did not run" in page.text("#router")


def test_all_levels_side_by_side(page, pipeline, examples):
    path, question = examples[4]
    page.take_example(question)
    page.one("#compare").click()
    page.wait(lambda: len(page.all("#levels [data-level] img")) == 5)
    for card, level in zip(page.all("#levels [data-level]"), pipeline.model.config.granularities, strict=True):
        answer = pipeline.ask(path, question, granularity=level)
        lines = card.text.split("\n")
        assert answer.text in lines
        assert lines[lines.index("visual tokens") + 1] == str(answer.num_visual_tokens)
        assert card.find_element(By.TAG_NAME, "img").get_property("naturalWidth") == 768
    routed = pipeline.ask(path, question).granularity[0]
    assert [card.get_attribute("data-level") for card in page.all("#levels .avg-chosen")] == [str(routed)]


def test_what_is_wrong_is_said(page, tmp_path):
    (tmp_path / "broken.png").write_text("not an image")
    page.choose_file(tmp_path / "broken.png")
    assert "broken.png: cannot be read as an image" in page.message("broken.png")
    page.one("#question textarea").send_keys("What is this?")
    page.one("#ask").click()
    message = page.message("broken.png")
    assert "Traceback" not in message
    assert str(tmp_path) not in message
    (tmp_path / "huge.png").write_bytes(bytes(MAX_UPLOAD_BYTES + 1))
    page.choose_file(tmp_path / "huge.png")
    assert "size" in page.message("maximum")
    Image.new("1", (8000, 8000)).save(tmp_path / "wide.png")
    page.choose_file(tmp_path / "wide.png")
    assert "8000x8000" in page.message("wide.png")
    assert page.answer() == ""


def test_a_stopped_answer_leaves_the_page_usable(page, examples):
    page.take_example(examples[1][1])
    page.one("#ask").click()
    page.one("#stop").click()
    for _ in range(8):  # a press does nothing while the stopped answer is on its way out
        with contextlib.suppress(TimeoutException):
            page.ask(seconds=15)
            break
    else:
        pytest.fail("the page answers no more")
    assert page.answer()


def test_nothing_is_asked_of_others(page, driver, server):
    """Of all that the browser has done so far."""
    addresses = []
    for line in driver.get_log("performance"):
        message = json.loads(line["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            addresses.append(message["params"]["request"]["url"])
    assert any(address.startswith(f"{server[0]}gradio_api/") for address in addresses)
    others = [at for at in addresses if not at.startswith((server[0], "data:", "blob:", "chrome:"))]
    assert others == []
