"""The web page as people use it: in a real browser, with the small checkpoint."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[app]'")
pytest.importorskip("selenium", reason="the browser is driven by selenium: pip install selenium")

from app_testing import SECONDS, PageServer
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from page.examples import draw_examples
from synthetic.drawing import write_video
from synthetic.scenes import parse_answer

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
CHROMEDRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)
LONG = 1200  # frames, read in so many chunks of two steps that there is time to cancel


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = PageServer(tmp_path_factory.mktemp("page"), "--chunk-tokens", "4")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Videos of a visitor's own, other ones than the examples, and their questions."""
    return draw_examples(tmp_path_factory.mktemp("films"), number=2, seed=7)


class Browser:
    """A browser that shows the page.

    Args:
        server: of the page.
    """

    def __init__(self, server: PageServer):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        arguments = ["headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "mute-audio"]
        # The page must do without the network.
        arguments += ["host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "no-proxy-server"]
        for argument in arguments:
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.server = server
        self.driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
        self.driver.set_page_load_timeout(SECONDS)

    def open(self, width: int = 1280, height: int = 900, theme: str = "light") -> None:
        """Load the page, as a new visitor."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get("about:blank")
        self.driver.get_log("browser")  # of the page before
        self.driver.get(f"{self.server.url}/?__theme={theme}")
        self.wait_for(lambda: self.all("#plan .fact"), "the plan of the first example")

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return " ".join(one.text for one in self.all(selector)).strip()

    def wait_for(self, condition, what: str):
        """Until the condition holds; parts may be replaced while it looks."""
        wait = WebDriverWait(self.driver, SECONDS, 0.1, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: condition(), f"waited for {what}")

    def click(self, selector: str, number: int = 0) -> None:
        one = self.wait_for(lambda: [one for one in self.all(selector) if one.is_displayed()][number:], selector)[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", one)
        one.click()

    def upload(self, path: Path) -> None:
        self.all("#uploader input[type=file]")[0].send_keys(str(path))

    def read(self) -> None:
        self.wait_for(lambda: self.all("#read")[0].is_enabled(), "the button")
        readings = len(self.all("#compare tbody tr"))
        self.click("#read")
        self.wait_for(lambda: len(self.all("#compare tbody tr")) > readings, "the end of the reading")
        assert "Read in" in self.text("#status")

    @property
    def answers(self) -> list[str]:
        return [one.text for one in self.all("#chat [data-testid=bot]")]

    def wait_for_answers(self, number: int) -> list[str]:
        """Until so many are there, and the last is whole."""
        self.wait_for(lambda: len(self.answers) == number and self.is_idle, f"{number} answers")
        return self.answers

    @property
    def is_idle(self) -> bool:
        return self.text("#question button") == "Ask"

    def type(self, question: str) -> None:
        self.all("#question textarea, #question input")[0].send_keys(question, Keys.ENTER)

    def ask(self, question: str) -> str:
        """Type a question; its answer."""
        before = len(self.answers)
        self.type(question)
        self.wait_for(lambda: len(self.answers) > before, "an answer")
        return self.wait_for_answers(before + 1)[-1]

    @property
    def second(self) -> float:
        """Where the video is."""
        return self.driver.execute_script("return document.querySelector('.stage video').currentTime")

    @property
    def overflow(self) -> int:
        """Pixels that the page is wider than the window."""
        return self.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")

    def check_console(self) -> None:
        """No error, and nothing that was asked of another machine."""
        errors = [one for one in self.driver.get_log("browser") if one["level"] == "SEVERE"]
        assert not errors, errors

    def close(self) -> None:
        self.driver.quit()


@pytest.fixture(scope="module")
def first_browser(server):
    browser = Browser(server)
    yield browser
    browser.close()


@pytest.fixture
def browser(first_browser):
    first_browser.open()
    return first_browser


def test_an_example_answers_at_once(browser, tmp_path):
    """A click on a suggestion reads the video and answers; a click on a frame moves the video there."""
    assert "64" in browser.text("#plan") and "43%" in browser.text("#plan")
    questions = draw_examples(tmp_path)[0][1]  # the page has drawn the same
    for number, question in enumerate(questions[:2]):
        browser.click("#chips .chip", number)
        answer = browser.wait_for_answers(number + 1)[-1]
        assert parse_answer(answer, question.choices) == question.answer, question
        # The frame that stands out is of a second that the answer follows from.
        best = browser.wait_for(lambda: browser.all("#evidence .frame.best"), "the frames")[0]
        if number == 0:
            assert question.kind == "needle" and float(best.get_attribute("data-second")) in question.seconds
    assert len(browser.all("#evidence .frame")) == 6
    for selector, number in (("#evidence .frame", 4), ("#evidence .frame", 1), ("#evidence .mark", 20)):
        wanted = float(browser.all(selector)[number].get_attribute("data-second"))
        browser.click(selector, number)
        browser.wait_for(lambda wanted=wanted: abs(browser.second - wanted) < 0.05, f"second {wanted}")
    browser.check_console()


def test_upload_read_ask_and_switch_to_dense(browser, films):
    video, questions = films[0]
    browser.upload(video.path)
    browser.wait_for(lambda: video.path.name in browser.text("#player"), "the upload")
    assert not browser.all("#chips .chip")
    browser.read()
    assert parse_answer(browser.ask(questions[0].text), questions[0].choices) == questions[0].answer
    # Another attention: another reading, and both answer.
    browser.click("#settings input[type=radio][value=dense]")
    browser.wait_for(lambda: "100%" in browser.text("#plan"), "the plan of dense attention")
    assert "dense" in browser.text("#read")
    browser.read()
    browser.type(questions[1].text)
    sparse, dense = browser.wait_for_answers(3)[1:]
    assert sparse.startswith("Sparse, 2 blocks:") and dense.startswith("Dense:")
    assert parse_answer(sparse.partition(":")[2], questions[1].choices) == questions[1].answer
    rows = [one.text for one in browser.all("#compare tbody tr")]
    assert len(rows) == 2 and "43%" in rows[0] and "100%" in rows[1] and browser.overflow <= 0
    browser.check_console()


def test_sliders_change_the_plan(browser):
    box = browser.all("#settings input[type=number]")[0]
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("1", Keys.TAB)
    browser.wait_for(lambda: "32" in browser.text("#plan .fact:first-child dd"), "half of the frames")
    browser.check_console()


def test_two_visitors_at_once(browser, server, films):
    other = Browser(server)
    try:
        other.open()
        both = list(zip((browser, other), films, strict=True))
        for one, (video, _) in both:
            one.upload(video.path)
        for one, (video, _) in both:
            one.wait_for(lambda one=one, video=video: video.path.name in one.text("#player"), "the upload")
            one.click("#read")
        for one, _ in both:
            one.wait_for(lambda one=one: "Read in" in one.text("#status"), "the end of the reading")
        for number in range(2):
            for one, (_, questions) in both:
                one.type(questions[number].text)
            for one, (_, questions) in both:
                answer = one.wait_for_answers(number + 1)[-1]
                assert parse_answer(answer, questions[number].choices) == questions[number].answer
        for one, (_, questions) in both:
            asked = [message.text for message in one.all("#chat [data-testid=user]")]
            assert asked == [question.text for question in questions[:2]]
            one.check_console()
    finally:
        other.close()


def test_broken_files_are_told_and_an_example_goes_on(browser, films, tmp_path):
    text = tmp_path / "notes.mp4"
    text.write_text("no video")
    browser.upload(text)
    browser.wait_for(lambda: "notes.mp4 is not a video file" in browser.text("#uploader .problem"), "the reason")
    cut = tmp_path / "cut.mp4"
    whole = films[0][0].path.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    browser.upload(cut)
    reason = browser.wait_for(lambda: browser.text("#plan [role=alert]"), "the reason")
    assert "cut.mp4" in reason and "/" not in reason and not browser.all("#read")[0].is_enabled()
    browser.click("#uploader .example", 1)
    browser.wait_for(lambda: browser.all("#plan .fact"), "the plan")
    browser.click("#chips .chip")
    assert browser.wait_for_answers(1)[0]


def test_cancel(browser, tmp_path):
    """What was read until then answers."""
    path = write_video(
        tmp_path / "long.mp4", (np.full((56, 56, 3), number % 200, np.uint8) for number in range(LONG)), 2
    )
    browser.upload(path)
    browser.wait_for(lambda: "long.mp4" in browser.text("#player") and "1,200" in browser.text("#plan"), "the upload")
    browser.click("#read")
    browser.wait_for(lambda: " of 1,200 frames" in browser.text("#status"), "progress")
    browser.click("#cancel")
    browser.wait_for(lambda: "Stopped at" in browser.text("#status"), "the end")
    assert "until" in browser.text("#compare tbody") and browser.ask("How many stars are there?")
    browser.check_console()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone(first_browser, theme):
    browser = first_browser
    browser.open(390, 844, theme)
    browser.click("#chips .chip")
    browser.wait_for_answers(1)
    browser.wait_for(lambda: browser.all("#evidence .frame"), "the frames")
    assert browser.overflow <= 0
    colour = browser.all("h1")[0].value_of_css_property("color")
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    assert (red + green + blue > 400) == (theme == "dark")
    # The chat can be used without scrolling past the settings.
    places = [browser.all(part)[0].rect["y"] for part in ("#player", "#plan", "#read", "#chat", "#settings")]
    assert places == sorted(places)
