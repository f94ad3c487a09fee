"""The page about results: what is written, and what a real browser shows of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from pearl.evaluation.records import CallMade, Key, Prediction, Question, Reply
from pearl.evaluation.report import write_report
from pearl.evaluation.results import Setup, StoredResults
from pearl.evaluation.statistics import summarise
from pearl.images import encode
from pearl.pages import template
from pearl.records import EncodedImage

HOSTILE = "</script><img src=x onerror=alert(1)>"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --window-size=1280,900"
)
RUNS = [("base", "direct"), ("base", "tools"), ("pearl", "direct")]
CHOICES: dict[str, dict[tuple[str, str], list[int | None]]] = {
    "stars": {RUNS[0]: [0, 1, 1, 0, None], RUNS[1]: [0, 0, 1, 0, 1], RUNS[2]: [0, 0, 0, 0, 1]},
    "moons": {RUNS[0]: [1, 0], RUNS[2]: [0, 0]},
}
CALLS = (
    CallMade("zoom", '{"box": [0, 0, 1, 1]}', "", "Zoomed in."),
    CallMade(HOSTILE, HOSTILE, "unknown tool", HOSTILE),
)


def image(seed: int) -> EncodedImage:
    pixels = np.random.default_rng(seed).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    return EncodedImage(encode(pixels))


def category(benchmark: str, number: int) -> str:
    return "moons" if benchmark == "moons" else "near" if number <= 2 else "far"


QUESTIONS = {
    (benchmark, str(number)): Question(
        id=str(number),
        benchmark=benchmark,
        category=category(benchmark, number),
        images=(image(number), image(99)) if number == 2 else (image(number),),
        prompt=f"What is {benchmark} {number}? {HOSTILE}",
        options=("red", HOSTILE),
        answer=0,
    )
    for benchmark, choices in CHOICES.items()
    for number in range(1, len(choices[RUNS[0]]) + 1)
}


def prediction(key: Key, number: int, choice: int | None) -> Prediction:
    calls = CALLS if key.mode == "tools" and number == 2 else ()
    return Prediction(
        question=str(number),
        benchmark=key.benchmark,
        category=category(key.benchmark, number),
        model=key.model,
        mode=key.mode,
        reply=Reply(f"{key.model}: {HOSTILE}", ("first", "last") if calls else ("only",), 1200, number, 0.5, calls),
        choice=choice,
        answer=0,
    )


def results_of(runs: list[tuple[str, str]]) -> StoredResults:
    predictions = {
        Key(*run, benchmark): [
            prediction(Key(*run, benchmark), number, choice)
            for number, choice in enumerate(CHOICES[benchmark][run], start=1)
        ]
        for run in runs
        for benchmark in CHOICES
        if run in CHOICES[benchmark]
    }
    setup = Setup(
        models={"base": {"weights": "abc"}, "pearl": {"weights": HOSTILE}},
        modes={"direct": {"new tokens": 64}, "tools": {"new tokens": 64, "opening": HOSTILE}},
        benchmarks={"stars": {"version": 1}, "moons": {"version": 2}},
        scoring="strict",
    )
    sitting = {"date": "2025-01-02T03:04:05+00:00", "python": "3", "libraries": {"torch": "2"}, "cpus": 2, "gpu": None}
    return StoredResults(setup, [sitting], predictions)


def page_of(folder: Path, runs: list[tuple[str, str]] = RUNS, **options: Any) -> Path:
    results = results_of(runs)
    pairs = {"stars": {"1": "a", "2": "a", "3": "b", "4": "b"}}
    write_report(results, summarise(results.predictions, pairs), QUESTIONS, folder / "report.html", **options)
    return folder / "report.html"


def data_of(page: Path) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    return json.loads(found)


def names(data: Any) -> list[str]:
    return [f"{row['benchmark']} {row['id']}" for row in data["rows"]]


def test_page_holds_the_questions_that_differ(tmp_path: Path) -> None:
    data = data_of(page_of(tmp_path))
    assert names(data) == ["stars 3", "stars 2", "moons 1"]
    assert [reply["correct"] for reply in data["rows"][0]["replies"]] == [False, False, True]
    assert data["benchmarks"][0]["chance"] == {"near": 0.5, "far": 0.5}


def test_of_one_run_it_holds_what_was_wrong(tmp_path: Path) -> None:
    assert names(data_of(page_of(tmp_path, RUNS[:1]))) == ["stars 3", "stars 5", "stars 2", "moons 1"]


def test_limit_is_spread_over_the_questions(tmp_path: Path) -> None:
    data = data_of(page_of(tmp_path, limit=2))
    assert (names(data), data["differing"]) == (["stars 3", "stars 2"], 3)
    assert names(data_of(page_of(tmp_path, limit=0))) == []


def test_missing_questions_are_shown_without_their_words(tmp_path: Path) -> None:
    results = results_of(RUNS)
    assert write_report(results, summarise(results.predictions), {}, tmp_path / "report.html") == 3
    row = data_of(tmp_path / "report.html")["rows"][0]
    assert (row["id"], row["prompt"], row["images"]) == ("3", "", [])


def test_images_are_stored_once(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert len(re.findall(r'id="image-\d+"', page.read_text())) == 4
    assert [row["images"] for row in data_of(page)["rows"]] == [[0], [1, 2], [3]]


def test_hostile_title_is_escaped(tmp_path: Path) -> None:
    text = page_of(tmp_path, title=HOSTILE + "{{data}}").read_text()
    assert HOSTILE not in text
    assert text.count("&lt;/script&gt;") == 2


def test_template_allows_no_network_and_no_markup_from_text() -> None:
    text = "".join(template("pearl.evaluation", "report.html"))
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in text
    assert "unsafe" not in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|fetch\(", text)
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", text)


class Browser:
    """A headless Chromium with short words for what these tests do."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, page: Path) -> None:
        self.driver.get("about:blank")
        self.driver.get(page.as_uri())

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return self.one(css).text

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def cells(self, table: str, row: int) -> list[str]:
        """The first line of each cell of a table's row; rows that name a group do not count."""
        rows = [one for one in self.all(f"{table} tbody tr") if one.find_elements(By.TAG_NAME, "td")]
        return [cell.text.split("\n")[0] for cell in rows[row].find_elements(By.TAG_NAME, "td")]

    def chip(self, facet: str, value: str) -> WebElement:
        return self.one(f'[data-facet="{facet}"][data-value="{value}"]')

    def shown(self) -> list[str]:
        return [one.get_attribute("aria-label") or "" for one in self.all("article") if one.is_displayed()]

    @contextmanager
    def window(self, width: int, height: int) -> Iterator[None]:
        """Another size for a while: a tall one has the whole page on view, whose far parts are else not drawn."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def complaints(self) -> list[Any]:
        return list(self.driver.get_log("browser"))  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in programs.values():
        pytest.fail(f"these tests need a browser: apt-get install -y chromium chromium-driver (found: {programs})")
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = str(programs["chromium"])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(programs["chromedriver"])))
    yield Browser(driver)
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_of(tmp_path_factory.mktemp("page"))


@pytest.fixture
def browser(chromium: Browser, page: Path) -> Iterator[Browser]:
    """The page, opened; afterwards the browser must have had nothing to complain about."""
    chromium.open(page)
    yield chromium
    assert chromium.complaints() == []


@pytest.mark.browser
def test_headline_has_the_accuracies(browser: Browser) -> None:
    assert [browser.cells("#accuracy", run) for run in range(3)] == [["40.0", "50.0"], ["60.0", "–"], ["80.0", "100.0"]]
    assert [one.text for one in browser.all("#accuracy .best")] == ["80.0", "100.0"]
    first = browser.one("#accuracy td").text
    assert "mean of categories 41.7" in first
    assert "pairs 0.0 (0.0 – 0.0)" in first
    assert browser.text("#extent") == "2 benchmarks · 2 models · strict scoring · 2025-01-02"


@pytest.mark.browser
def test_chart_has_a_row_for_each_category(browser: Browser) -> None:
    stars, moons = browser.all("figure")
    told = [one.get_attribute("aria-label") or "" for one in stars.find_elements(By.CSS_SELECTOR, "svg[role=img]")]
    assert [one.split(":")[0] for one in told] == ["All questions", "far", "near"]
    assert re.fullmatch(
        r"near: base · direct 50\.0 \(.*\); base · tools 100\.0 \(.*\); pearl · direct 100\.0 .*", told[2]
    )
    assert len(moons.find_elements(By.CSS_SELECTOR, "svg[role=img]")) == 1
    assert len(stars.find_elements(By.CSS_SELECTOR, "line.chance")) == 2


@pytest.mark.browser
def test_dots_stand_where_their_values_are(browser: Browser) -> None:
    drawing = browser.one("figure svg[role=img]")
    dots = drawing.find_elements(By.CSS_SELECTOR, ".mark")
    middles = [one.rect["x"] + one.rect["width"] / 2 for one in dots]
    places = [(middle - drawing.rect["x"]) / drawing.rect["width"] for middle in middles]
    assert places == pytest.approx([0.4, 0.6, 0.8], abs=0.01)


@pytest.mark.browser
def test_costs_are_told(browser: Browser) -> None:
    assert browser.cells("#costs", 0) == ["5", "1,200", "3.0", "0.00", "–", "20.0%", "0.50"]
    assert browser.cells("#costs", 1)[3:5] == ["0.40", "1 of 2 (50.0%)"]
    assert "unknown tool 1" in browser.text("#costs")


@pytest.mark.browser
def test_comparisons_are_told(browser: Browser) -> None:
    assert browser.cells("#comparisons", 1) == ["−40.0", "", "0", "2", "5", "0.500"]
    assert browser.cells("#comparisons", 3) == ["−50.0", "", "0", "1", "2", "1.000"]


@pytest.mark.browser
def test_one_run_has_nothing_to_be_compared_with(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(tmp_path, RUNS[:1]))
    assert not browser.one("#comparisons").is_displayed()
    assert "Comparisons" not in browser.text("nav")
    assert browser.text("#questions-title") == "What it got wrong"
    assert browser.all(".best") == []


@pytest.mark.browser
def test_hostile_text_is_text(browser: Browser) -> None:
    told = browser.all("article")[1].text
    assert f"What is stars 2? {HOSTILE}" in told
    assert f"B {HOSTILE}" in told
    assert f"pearl: {HOSTILE}" in told
    assert browser.text(".call.invalid .tool") == HOSTILE
    assert browser.text(".call.invalid code") == HOSTILE
    assert browser.text(".call.invalid .observation") == HOSTILE
    assert browser.all("img[src=x]") == []
    assert HOSTILE in browser.text("#record")


@pytest.mark.browser
def test_injected_markup_would_be_stopped(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    with pytest.raises(Exception, match="TrustedHTML"):
        chromium.run("document.body.innerHTML = '<b>x</b>'")
    chromium.complaints()


@pytest.mark.browser
def test_a_question_tells_who_chose_what(browser: Browser) -> None:
    article = browser.all("article")[1]
    verdicts = [one.text for one in article.find_elements(By.CSS_SELECTOR, ".verdict")]
    assert verdicts == ["wrong: B", "right: A", "right: A"]
    options = article.find_elements(By.CSS_SELECTOR, ".option")
    assert [one.get_attribute("title") for one in options] == ["base · tools, pearl · direct", "base · direct"]
    assert options[0].text == "A red ✓"
    assert [one.text for one in article.find_elements(By.CSS_SELECTOR, ".fault")] == ["unknown tool"]
    article.find_element(By.TAG_NAME, "summary").click()
    assert [one.text for one in article.find_elements(By.CSS_SELECTOR, ".turns li")] == ["first", "last"]


@pytest.mark.browser
def test_pictures_are_shown_and_enlarged(browser: Browser) -> None:
    widths = "return [...document.querySelectorAll('article img')].map((one) => one.naturalWidth)"
    with browser.window(1280, 6000):
        WebDriverWait(browser.driver, 10).until(lambda _: browser.run(widths) == [160] * 4)
    small = browser.one(".pictures img").size["width"]
    browser.one(".pictures button").click()
    assert browser.one("dialog[open] img").size["width"] > 2 * small
    browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not browser.one("dialog").is_displayed()


@pytest.mark.browser
@pytest.mark.parametrize(
    ("facet", "value", "shown"),
    [
        ("benchmark", "moons", ["moons 1"]),
        ("category", "near", ["stars 2"]),
        ("right", "1", ["stars 2"]),
        ("right", "2", ["stars 3", "stars 2", "moons 1"]),
        ("wrong", "1", ["stars 3"]),
    ],
)
def test_filters(browser: Browser, facet: str, value: str, shown: list[str]) -> None:
    chip = browser.chip(facet, value)
    assert chip.find_element(By.CLASS_NAME, "count").text == str(len(shown))
    chip.click()
    assert browser.shown() == shown
    assert browser.text("#status") == f"{len(shown)} of 3 questions"
    chip.click()
    assert len(browser.shown()) == 3


@pytest.mark.browser
def test_filters_combine_and_are_cleared(browser: Browser) -> None:
    browser.chip("right", "2").click()
    browser.chip("wrong", "0").click()
    assert len(browser.shown()) == 3
    browser.chip("wrong", "1").click()
    assert browser.shown() == ["stars 3"]
    assert browser.chip("benchmark", "moons").text.split() == ["moons", "0"]
    browser.one("#clear").click()
    assert len(browser.shown()) == 3
    assert not browser.one("#clear").is_displayed()


@pytest.mark.browser
def test_every_control_and_picture_has_a_name(browser: Browser) -> None:
    with browser.window(1280, 6000):
        controls = [one for one in browser.all("button, nav, a, section, figure") if one.is_displayed()]
        assert len(controls) > 20
        assert all(one.accessible_name for one in controls)
    assert all(one.get_attribute("alt") for one in browser.all("article img"))
    assert len(browser.all("h1")) == 1


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_no_wider_than_its_window(browser: Browser, width: int) -> None:
    with browser.window(width, 800):
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
