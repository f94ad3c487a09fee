"""What the report on a dataset counts, and what a real browser shows of it."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from selenium import webdriver
from selenium.webdriver.common.by import By
from typer.testing import CliRunner

from pearl.cli.stats import stats
from pearl.images import encode
from pearl.pages import template
from pearl.parquet import schema, to_row
from pearl.pipelines.stats import StatsError, gather, markdown, write_page
from pearl.pipelines.stats.answers import Answers
from pearl.pipelines.stats.calls import Boxes
from pearl.pipelines.stats.counters import Reservoir, Spread, Tally
from pearl.pipelines.stats.texts import repeated_phrases
from pearl.records import EncodedImage, Trajectory
from tests.plain import opened, picture, step, trajectory
from tests.runs import data_file, rows

HOSTILE = "</script><img src=x onerror=alert(1)>"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --window-size=1280,900"
)


def one_of(report: dict[str, Any]) -> dict[str, Any]:
    (found,) = report["datasets"]
    assert isinstance(found, dict)
    return found


def named(number: int, of: Trajectory) -> Trajectory:
    return replace(of, id=str(number))


def patches(quality: int) -> EncodedImage:
    """Always the same picture, at a JPEG quality."""
    file = io.BytesIO()
    opened(picture(5, 8, 8)).resize((128, 128)).save(file, "JPEG", quality=quality)
    return EncodedImage(file.getvalue())


def test_spread_is_exact_where_it_says_so() -> None:
    spread, numbers = Spread(), np.random.default_rng(0).lognormal(3, 1, 5000)
    for number in numbers:
        spread.add(float(number))
    told = spread.to_json()
    assert (told["count"], told["least"], told["most"]) == (5000, numbers.min(), numbers.max())
    assert told["mean"] == pytest.approx(numbers.mean())
    assert told["median"] == pytest.approx(np.median(numbers), rel=0.022)
    assert told["high"] == pytest.approx(np.quantile(numbers, 0.95), rel=0.022)


def test_small_whole_numbers_have_exact_quantiles() -> None:
    for number in range(1, 46):
        spread = Spread(whole=True)
        for value in (1, number, 1000):
            spread.add(value)
        assert spread.quantile(0.5) == number


def test_zeros_and_nothing() -> None:
    assert (Spread().to_json()["median"], Spread().to_json()["least"]) == (0.0, 0.0)
    spread = Spread()
    for value in (0, 0, 5):
        spread.add(value)
    assert (spread.zeros, spread.quantile(0.5), spread.most) == (2, 0.0, 5)


def test_tally_stops_learning_names() -> None:
    tally = Tally(limit=2)
    for name in ("a", "b", "c", "a", "d", None):
        tally.add(name)
    assert tally.to_json() == {"top": [("a", 2), ("b", 1)], "others": 3, "distinct": 2, "more": True}
    assert tally.to_json(1)["others"] == 4


def test_reservoir_is_uniform_and_repeatable() -> None:
    first, second = Reservoir(1000), Reservoir(1000)
    for number in range(20_000):
        first.add(str(number))
        second.add(str(number))
    places = [int(text) for text in first]
    assert (len(set(places)), first.seen, second.kept) == (1000, 20_000, first.kept)
    assert np.histogram(places, 4, (0, 20_000))[0] == pytest.approx([250] * 4, abs=60)


def test_a_position_that_is_always_right_is_a_shortcut() -> None:
    answers, random = Answers(), np.random.default_rng(0)
    for _ in range(100):
        answers.add(tuple(random.permutation(["red", "blue", "grey", "pink"])), "red", 1)
        choices = tuple(str(one) for one in random.permutation(100)[:4])
        answers.add(choices, choices[2], 1)
    told = answers.to_json("colour")
    rules = {rule["kind"]: rule for rule in told["shortcuts"]}
    assert (told["asked"], told["chance"]) == (200, 0.25)
    assert (rules["text"]["rule"], rules["text"]["sure"]) == ("red", True)
    assert rules["text"]["accuracy"] == pytest.approx((100 + 25) / 200)
    assert (rules["position"]["rule"], rules["position"]["sure"]) == ("C", True)


def test_shuffled_answers_are_none() -> None:
    answers, random = Answers(), np.random.default_rng(1)
    for _ in range(2000):
        choices = tuple(random.permutation(["red", "blue", "green", "violet"]))
        answers.add(choices, choices[random.integers(4)], 1)
    assert not any(rule["sure"] for rule in answers.to_json("")["shortcuts"])


def test_the_longest_option_is_found() -> None:
    answers = Answers()
    for number in range(40):
        answers.add((f"{number}", f"{number} and more"), f"{number} and more", 1)
        answers.add((f"{number} and more", f"{number}"), f"{number} and more", 1)
    rules = {rule["kind"]: rule for rule in answers.to_json("")["shortcuts"]}
    assert (rules["length"]["rule"], rules["length"]["accuracy"], rules["length"]["sure"]) == ("the longest", 1.0, True)
    assert (rules["position"]["accuracy"], rules["position"]["sigmas"]) == (0.5, 0.0)


def test_open_and_impossible_answers() -> None:
    answers = Answers()
    answers.add((), "seven", 0)
    answers.add(("only",), "only", 0)
    answers.add(("a", "b"), "c", 2)
    told = answers.to_json("")
    assert (told["asked"], told["open"], told["outside"], told["chance"]) == (0, 2, 1, None)
    assert told["steps"] == pytest.approx(2 / 3)


def test_boxes_in_the_original_are_measured() -> None:
    boxes = Boxes()
    boxes.add({"box": [0.5, 0, 1, 0.25]}, (200, 400))
    boxes.add({"boxes": [[0, 0, 1, 1], [0, 0, 0, 1], "x", [0, 0, math.nan, 1], [0, 0, 2, 2]], "image": 0}, None)
    boxes.add({"box": [0, 0, 1, 1], "image": 1}, (200, 400))
    told = boxes.to_json()
    assert (told["count"], told["later"], told["unusable"]) == (2, 1, 4)
    assert (told["area"]["least"], told["area"]["most"]) == (0.125, 1)
    assert (told["side"]["count"], told["side"]["least"], told["aspect"]["least"]) == (1, 100, 1)
    assert told["positions"][2][12] == told["positions"][8][8] == 1


def test_boxes_of_numbers_beyond_any_measure_are_counted() -> None:
    boxes = Boxes()
    boxes.add({"boxes": [[0, 0, 1, 10**400], [0, 0, 1, 5e-324]]}, (200, 400))
    told = boxes.to_json()
    assert (told["count"], told["unusable"]) == (1, 1)
    assert math.isfinite(told["aspect"]["most"])


def test_phrases_count_numbers_as_equal() -> None:
    texts = [f"I look at box {n} of the {word}." for n, word in enumerate(("cup", "dog", "cat", "hat"))]
    found = repeated_phrases([*texts, "Something else."])
    assert found[0] == ("at box # of the", 0.8)
    assert len(found) == 1
    assert repeated_phrases([]) == []


def test_counts_of_a_dataset(tmp_path: Path) -> None:
    found = one_of(gather([data_file(tmp_path)]))
    assert (found["rows"], found["calls"], found["steps"]) == (12, 18, [(0, 3), (1, 3), (2, 3), (3, 3)])
    assert found["tools"][0]["tool"] == "crop"
    assert (found["tools"][0]["trajectories"], found["tools"][0]["images"]) == (9, 18)
    assert dict(found["sequences"]["top"])["crop → crop"] == 3
    assert found["licenses"]["top"] == [("CC0-1.0", 12)]
    assert found["originals"]["sizes"]["top"] == [("48×40", 12)]
    assert (found["tool_images"]["longer"]["most"], found["tool_images"]["formats"]["top"]) == (40, [("PNG", 18)])
    assert (found["texts"]["thoughts"]["median"], found["texts"]["questions"]["most"]) == (5, 4)
    assert found["bytes"]["total"] == (tmp_path / "traj.parquet").stat().st_size
    assert 0 < found["bytes"]["originals"] < found["bytes"]["total"]
    assert {kind: of["distinct"] for kind, of in found["duplicates"].items()} == {
        "ids": 12, "images": 12, "questions": 12, "both": 12, "thoughts": 3,
    }  # fmt: skip


def test_files_of_a_folder_count_as_one_dataset(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    data_file(tmp_path / "one")
    data_file(tmp_path / "two", rows()[:5], "a.parquet")
    data_file(tmp_path / "two", rows()[5:], "b.parquet")
    whole, parts = (one_of(gather([tmp_path / name])) for name in ("one", "two"))
    differing = {key for key in whole if whole[key] != parts[key]}
    assert differing == {"name", "files", "bytes"}


def test_duplicates_and_near_duplicates(tmp_path: Path) -> None:
    images = [patches(95), patches(95), patches(60), picture(1)]
    made = [named(number, trajectory(step("Look."), image=image)) for number, image in enumerate(images)]
    path = data_file(tmp_path, [*made, replace(made[3], question="  where is THE red cup? ")])
    found = one_of(gather([path], near=4))["duplicates"]
    assert found["ids"] == {"count": 5, "distinct": 4, "most": 2}
    assert found["images"] == {"count": 5, "distinct": 3, "most": 2}
    assert found["both"] == {"count": 5, "distinct": 3, "most": 2}
    assert found["near_images"] == found["near_both"] == {"count": 5, "distinct": 2, "most": 3}
    assert "near_images" not in one_of(gather([path]))["duplicates"]


def test_what_two_have_in_common(tmp_path: Path) -> None:
    first = data_file(
        tmp_path, [named(0, trajectory(image=patches(95))), named(1, trajectory(image=picture(1)))], "a.parquet"
    )
    second = data_file(
        tmp_path, [named(1, trajectory(image=patches(60))), named(2, trajectory(image=picture(1)))], "b.parquet"
    )
    report = gather([first, second], near=4)
    assert [one["name"] for one in report["datasets"]] == ["a.parquet", "b.parquet"]
    assert report["overlap"] == {
        "ids": [1, 1], "images": [1, 1], "questions": [2, 2], "both": [1, 1], "thoughts": [0, 0], "near_images": [2, 2],
    }  # fmt: skip


def test_strange_rows_are_counted_not_raised(tmp_path: Path) -> None:
    row = to_row(trajectory(step("Look.", EncodedImage(b"no image"))))
    bad = {**row, "image": None, "question": None, "choices": None, "skill": None, "conclusion": None}
    bad["steps"] = [
        None,
        {**row["steps"][0], "arguments": None, "thought": None},
        {**row["steps"][0], "arguments": "[1]"},
    ]
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist([bad, {**row, "choices": ["a", "b"]}], schema=schema()), path)
    found = one_of(gather([path], near=2))
    assert (found["without_image"], found["unreadable"], found["tool_images"]["unreadable"]) == (1, 2, 3)
    assert found["answers"]["all"]["outside"] == 1
    assert "calls whose arguments are no JSON object" in markdown(gather([path]))


@pytest.mark.parametrize(
    ("count", "near", "reason"), [(0, None, "0 datasets"), (3, None, "3 datasets"), (1, 13, "--near 13")]
)
def test_impossible_wishes(tmp_path: Path, count: int, near: int | None, reason: str) -> None:
    with pytest.raises(StatsError, match=reason):
        gather([data_file(tmp_path)] * count, near)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StatsError, match="holds no trajectories"):
        gather([data_file(tmp_path, [])])


def test_markdown_is_tables_that_hold_together(tmp_path: Path) -> None:
    made = [named(n, replace(trajectory(step("a | b")), skill=f"{HOSTILE} | x", license="")) for n in range(3)]
    text = markdown(gather([data_file(tmp_path, made), data_file(tmp_path, name="other.parquet")]))
    assert "<img" not in text
    assert "## In common" in text
    assert "| (none) | 3 | 100.0% |" in text
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_command_writes_both(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(stats)
    data, page, text = data_file(tmp_path), tmp_path / "s.html", tmp_path / "s.md"
    result = CliRunner().invoke(app, [str(data), "--out", str(page), "--markdown", str(text)])
    assert (result.exit_code, page.is_file(), text.is_file()) == (0, True, True)
    assert "12 trajectories in" in result.output
    assert markdown(gather([data])) == text.read_text()


def test_template_allows_no_network_and_no_markup_from_text() -> None:
    text = "".join(template("pearl.pipelines.stats", "stats.html"))
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in text
    assert not re.search(r"unsafe|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|fetch\(", text)
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", text)


def two_datasets(folder: Path) -> dict[str, Any]:
    pixels = np.random.default_rng(3).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    other = [
        named(n, replace(trajectory(
            step(f"{HOSTILE} is at place {n}, I think so.", tool=HOSTILE, box=[0.1, 0.2, 0.3, 0.4]),
            image=EncodedImage(encode(pixels)), choices=("yes", "no"), answer="yes",
        ), skill=HOSTILE, license=HOSTILE))
        for n in range(20)
    ]  # fmt: skip
    return gather([data_file(folder, name="a.parquet"), data_file(folder, other, "b.parquet")])


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in programs.values():
        pytest.fail(f"these tests need a browser: apt-get install -y chromium chromium-driver (found: {programs})")
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = str(programs["chromium"])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(programs["chromedriver"])))
    yield driver
    driver.quit()


@pytest.mark.browser
def test_page_in_a_browser(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    def texts(css: str) -> list[str]:
        return [one.text for one in chromium.find_elements(By.CSS_SELECTOR, css)]

    write_page(two_datasets(tmp_path), tmp_path / "stats.html")
    chromium.get((tmp_path / "stats.html").as_uri())
    assert texts("#extent") == ["12 trajectories and 20 trajectories"]
    assert texts("#legend > span") == ["a.parquet", "b.parquet"]
    assert texts("nav a")[:2] == ["Overview", "In common"]
    assert texts("#answers td.sure")[0].startswith("100.0%\nA · 4.5 σ")
    assert HOSTILE in texts("#tools .name")
    assert texts("[data-shared=questions] td") == ["0 (0.0%)", "0 (0.0%)"]
    assert texts("[data-kind=images] td")[5:] == ["b.parquet", "20", "1", "19 (95.0%)", "20×"]
    assert texts("#words .phrases span")[1].startswith("i look at place #")
    assert chromium.find_elements(By.CSS_SELECTOR, "img") == []
    assert "[object" not in chromium.find_element(By.TAG_NAME, "body").text
    assert "undefined" not in chromium.find_element(By.TAG_NAME, "body").text
    bar, ground = (
        chromium.find_element(By.CSS_SELECTOR, f"#origins .tone-0 .{name}").size for name in ("bar", "ground")
    )
    assert bar["width"] == pytest.approx(ground["width"], abs=1)
    for width in (1280, 390):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    write_page(gather([data_file(tmp_path)]), tmp_path / "stats.html")
    chromium.get((tmp_path / "stats.html").as_uri())
    assert "In common" not in texts("nav a")
    assert "undefined" not in json.dumps(texts("main"))
    assert list(chromium.get_log("browser")) == []  # type: ignore[no-untyped-call]
