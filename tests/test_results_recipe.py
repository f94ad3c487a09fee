"""The table of docs/results.md says what the measured files say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pearl.evaluation.insides import Insides
from pearl.evaluation.subject import Subject
from pearl.images import encode
from pearl.records import Box, EncodedImage, Observation, Step, ToolCall, Trajectory
from pearl.trainer.models import place_of
from recipes.results import evidence, work
from recipes.results.jobs import CONTROL, DIRECT, RATES, VARIANTS, searches, table
from recipes.results.seeds import differences, paired
from recipes.results.seen import object_and_mean
from recipes.results.table import markdown, put, rows, searched, write
from tests.plain import picture, trajectory

BEST = RATES[1]


def measured(right: str, seed: int = 0, seconds: float = 0.5) -> dict[str, object]:
    share = right.count("1") / len(right)
    one = {
        "accuracy": share, "categories": {"shape": share}, "unparsed": 0.25, "questions": 4, "seconds": seconds,
        "calls": 1.0, "faults": {"malformed": 2, "too many calls": 1}, "prompt tokens": 60.0, "new tokens": 2.0,
    }  # fmt: skip
    return {"seed": seed, "benchmarks": {name: {**one, "right": right} for name in ("val", "test", "scenes")}}


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(work, "MEASURED", tmp_path)
    for job in searches():
        (tmp_path / f"{job.name}.json").write_text(json.dumps(measured("1110" if job.rate == BEST else "1000")))
    return tmp_path


def test_jobs_have_names_of_their_own_and_go_seed_by_seed() -> None:
    jobs = list(table(dict.fromkeys((one.name for one in VARIANTS), BEST)))
    names = [job.name for job in (*searches(), *jobs)]
    assert len(names) == len(set(names))
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    assert {job.variant.name: job.seed + 1 for job in jobs} == {one.name: one.seeds for one in VARIANTS}
    assert all(job.updates % (1 + len(job.variant.stages)) == 0 for job in jobs)


def test_the_rate_is_the_best_of_the_search(found: Path) -> None:
    assert work.chosen_rates() == {job.variant.name: BEST if job.rate else 0.0 for job in searches()}
    assert searched().splitlines()[2:4] == [
        f"| base |{' 25.0 |' * 4}", "| sft-answer | 25.0 | 75.0 | 25.0 | 25.0 |"
    ]  # fmt: skip
    next(found.glob("search-*")).unlink()
    with pytest.raises(SystemExit, match="run the search first"):
        work.chosen_rates()


def test_the_page_says_what_was_measured() -> None:
    page = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    assert searched() in page
    assert markdown(rows()) in page


def test_the_page_shows_the_evidence_that_was_measured() -> None:
    page = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    for text in evidence.parts(evidence.read()).values():
        assert text in page


def test_runs_at_other_rates_stand_beside_the_table(found: Path) -> None:
    beside_it = [job for job in work.pending(("table",)) if job.rate != BEST and job.variant.objective]
    assert [job.variant.name for job in beside_it] == ["mirage"]
    content = measured("1000")
    for job in (beside_it[0], next(one for one in table(work.chosen_rates()) if one.variant.name == "base")):
        (found / f"{job.name}.json").write_text(json.dumps(content))
    assert "| mirage | 1 | 0.0003 | 25.0 | 25.0 | 25.0 |" in markdown(rows())


def test_rows_differences_and_what_is_not_measured_yet(found: Path) -> None:
    answers = {"base": ["1000"], "sft-answer": ["1100", "1110", "1111"], DIRECT: ["1111", "1111"], CONTROL: ["1111"]}
    for job in table(work.chosen_rates()):
        if job.seed < len(answers.get(job.variant.name, ())):
            content = measured(answers[job.variant.name][job.seed], job.seed)
            (found / f"{job.name}.json").write_text(json.dumps(content))
    text = markdown(rows())
    assert "| base | 1 |  | 25.0 | 25.0 | 25.0 | 25.0 | 1.00 | 0.75 | 60.00 | 2.00 | 0.500 |" in text
    half = 4.303 * 25 / 3**0.5  # Student's
    assert f"| sft-answer | 3 | 0.0001 |{f' 75.0 ± {half:.1f} |' * 3}" in text
    assert f"best form of `pearl` is `{DIRECT}` (100.0) and the best of the others is `sft-answer` (75.0)" in text
    assert f"| {DIRECT} − sft-answer | 2 | +37.5 (" in text
    assert f"| {DIRECT} − {CONTROL} | 1 | +0.0 |" in text
    assert f"| {DIRECT} − base | 2 | +75.0 (" in text
    assert "lvr" not in text
    page = found / "results.md"
    write(page)
    assert text in page.read_text()
    with Image.open(found / "images" / "results.png") as drawn:
        assert drawn.format == "PNG"


def test_paired_differences_draw_seeds_and_questions() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.integers(0, 2, (5, 400))
    ours = np.where(rng.random((5, 400)) < 0.1, 1, theirs)
    ours_by_seed, theirs_by_seed = dict(enumerate(ours)), dict(enumerate(theirs))
    one = paired(differences(ours_by_seed, theirs_by_seed))
    assert one.value == (ours - theirs).mean()
    assert 0 < one.low < one.value < one.high < 0.1
    assert (differences(ours_by_seed, {0: theirs[0]}, fixed=True) == ours - theirs[:1]).all()
    without_one = {seed: ours[seed] for seed in (0, 2, 4)}
    assert (differences(without_one, theirs_by_seed) == (ours - theirs)[[0, 2, 4]]).all()


def test_few_seeds_give_wide_intervals() -> None:
    """Of 400 questions that all move together with their seed, so that Student's interval is known."""
    shares = np.array([0.0, 0.1, 0.02])
    difference = (np.arange(400) < 400 * shares[:, None]).astype(int)
    alone = np.tile(shares[:, None], (1, 400))  # no noise of questions
    one, half = paired(alone), 4.303 * shares.std(ddof=1) / 3**0.5
    assert one.value == pytest.approx(shares.mean())
    assert one.high - one.low == pytest.approx(2 * half, rel=0.25)  # a bootstrap of three values is coarse
    both = paired(difference)
    assert both.high - both.low > 0.9 * (one.high - one.low)


@pytest.mark.parametrize("by_question", [False, True])
def test_intervals_hold_what_they_should(by_question: bool) -> None:
    """Of 200 experiments without any difference: noise of each answer, or of questions too."""
    rng = np.random.default_rng(0)
    held, width = 0, list[float]()
    for _ in range(200):
        noise = rng.normal(size=(3, 100)) + by_question * rng.normal(size=100)
        one = paired(noise)
        held += one.low <= 0 <= one.high
        width.append(one.high - one.low)
    student = 2 * 4.303 * ((1 / 3 + by_question) / 100) ** 0.5
    assert held >= 0.93 * 200
    assert np.mean(width) < 1.1 * student


def test_a_part_of_a_page_is_replaced_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: begin -->old<!-- a: end -->\nafter\n")
    put(page, "a", "new")
    put(page, "b", "more")
    assert page.read_text() == (
        "before\n<!-- a: begin -->\n\nnew\n\n<!-- a: end -->\nafter\n\n<!-- b: begin -->\n\nmore\n\n<!-- b: end -->\n"
    )


def crops(pixels: np.ndarray, *boxes: Box) -> Trajectory:
    calls = [ToolCall("crop", {"image": number, "box": box}) for number, box in enumerate(boxes)]
    steps = [Step("", call, Observation("", picture(1))) for call in calls]
    return trajectory(*steps, image=EncodedImage(encode(pixels, "png")))


def test_the_token_at_the_object_is_the_one_that_shows_it() -> None:
    insides = Insides.of(Subject.load(place_of(None)))
    grey = np.full((252, 252, 3), 128, np.uint8)
    marked = grey.copy()
    marked[2 * 28 : 3 * 28, 6 * 28 : 7 * 28] = (255, 0, 0)

    def change(row: int, column: int) -> float:
        around: Box = ((column - 0.5) / 9, (row - 0.5) / 9, (column + 1.5) / 9, (row + 1.5) / 9)
        inner: Box = (0.25, 0.25, 0.75, 0.75)
        before, after = (object_and_mean(insides, crops(pixels, around, inner))[0] for pixels in (grey, marked))
        return float((after - before).norm())

    assert max(((row, column) for row in range(1, 8) for column in range(1, 8)), key=lambda at: change(*at)) == (2, 6)
