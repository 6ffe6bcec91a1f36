"""`avg-llava demo` with the shipped model, used in headless Chromium. Each test opens the page anew."""

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
from selenium.common.exceptions import StaleElementReferenceException
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
    """Path of a program. Continuous integration installs it (.ci/run); elsewhere its absence skips these tests."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        message = f"{names[0]} is not installed; on Debian: apt-get install chromium chromium-driver"
        assert os.environ.get("CI") != "true", message
        pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a running page. It ends with exit code 0 on SIGTERM and deletes its temporary files."""
    program("chromium"), program("chromedriver")
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "avg_llava.cli", "demo", "--port", str(port)]
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            address = f"http://127.0.0.1:{port}/"
            assert line.startswith(f"the page is at {address}"), line
            yield address
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
    """The page's examples as (image path, question) pairs."""
    return save_examples(tmp_path_factory.mktemp("examples"))


class Page:
    """A newly opened page, with the actions and observations of a user."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.all("#examples tr"))

    def wait(self, condition):
        # Elements can be rendered anew between finding and reading them.
        wait = WebDriverWait(self.driver, SECONDS, 0.05, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: condition())

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

    def is_idle(self):
        return self.one("#ask").is_enabled() and not self.one("#stop").is_enabled()

    def ask(self):
        """Asks and waits for the measured times of the new answer."""
        # A new rendering replaces the marked element.
        self.driver.execute_script("document.querySelector('#stats .avg-stats')?.setAttribute('data-old', '')")
        self.one("#ask").click()
        self.wait(lambda: any("speed-up" in stats.text for stats in self.all("#stats .avg-stats:not([data-old])")))
        self.wait(self.is_idle)

    def figures(self):
        return {cell.text.split("\n")[0]: cell.text.split("\n")[1] for cell in self.all("#stats .avg-stats > div")}

    def message(self, part):
        """Waits for a message that contains `part`, dismisses it, and returns its text."""
        self.wait(lambda: any(part in toast.text for toast in self.all(".toast-body")))
        toast = next(toast for toast in self.all(".toast-body") if part in toast.text)
        text = toast.text
        toast.find_element(By.CSS_SELECTOR, "button").click()
        self.wait(lambda: not self.all(".toast-body"))
        return text


@pytest.fixture
def page(driver, server):
    return Page(driver, server)


def image_size(page, selector):
    """Waits for an image and returns the (width, height) of its file in pixels."""
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
    assert image_size(page, "#tiles") == (768, 768)
    assert image_size(page, "#overview") == (320, 320)

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


def test_error_messages(page, tmp_path):
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


def test_stop(page, examples):
    page.take_example(examples[1][1])
    assert page.is_idle()
    page.one("#compare").click()
    page.wait(page.one("#stop").is_enabled)
    page.one("#stop").click()
    page.wait(page.is_idle)
    page.ask()
    assert page.answer()


def test_no_requests_to_other_hosts(page, driver, server, examples):
    page.take_example(examples[0][1])
    page.ask()
    urls = []
    for line in driver.get_log("performance"):
        message = json.loads(line["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.append(message["params"]["request"]["url"])
    assert any(url.startswith(f"{server}gradio_api/") for url in urls)
    assert [url for url in urls if not url.startswith((server, "data:", "blob:", "chrome:"))] == []
