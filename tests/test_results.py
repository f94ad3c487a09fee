"""The folder of results: what is kept, what is gone on with, what is refused, and what it comes to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pearl.evaluation.records import CallMade, Key, Prediction, Reply
from pearl.evaluation.report import markdown, write_summary
from pearl.evaluation.results import Results, ResultsError, Setup, read_results
from pearl.evaluation.statistics import Summary, summarise

KEY = Key("org/base", "tools", "stars")
SETUP = Setup(
    models={"org/base": {"weights": "abc"}},
    modes={"tools": {"new tokens": 64}},
    benchmarks={"stars": {"version": 1, "place": "here"}},
    scoring="strict",
)
CALLS = (
    CallMade("zoom", '{"box": [0, 0, 1, 1]}', "", "Zoomed."),
    CallMade("", "{", "unreadable", "Error: no JSON"),
)


def prediction(
    question: str, choice: int | None = 0, key: Key = KEY, category: str = "near", **reply: Any
) -> Prediction:
    plain = Reply(said=f"({question})", turns=(f"({question})",), prompt_tokens=100, new_tokens=5, seconds=0.1)
    return Prediction(
        question=question,
        benchmark=key.benchmark,
        category=category,
        model=key.model,
        mode=key.mode,
        reply=replace(plain, **reply),
        choice=choice,
        answer=0,
    )


HARD = [
    prediction("1", 0, turns=("call", "(ü)\n"), calls=CALLS, seconds=1 / 3),
    prediction("2", None, said="", turns=()),
    prediction("3/\u2028", 1, said='"\\\n\t</script>', new_tokens=2**40),
]


def journal_of(folder: Path) -> Path:
    (found,) = (folder / "predictions").glob("*.jsonl")
    return found


def test_predictions_come_back_as_they_were(tmp_path: Path) -> None:
    results = Results.open(tmp_path, SETUP)
    assert results.predictions(KEY) == []
    results.add(KEY, HARD[:2])
    results.add(KEY, HARD[2:])
    assert results.predictions(KEY) == HARD
    assert not results.is_finished(KEY)
    results.finish(KEY)
    assert results.is_finished(KEY)
    assert results.predictions(KEY) == HARD
    assert [path.suffix for path in (tmp_path / "predictions").iterdir()] == [".parquet"]


def test_parquet_has_a_column_for_everything(tmp_path: Path) -> None:
    results = Results.open(tmp_path, SETUP)
    results.add(KEY, HARD)
    results.finish(KEY)
    results.finish(KEY)
    (path,) = (tmp_path / "predictions").glob("*.parquet")
    table = pq.read_table(path)
    assert path.name == "org%2Fbase--tools--stars.parquet"
    assert table["question"].to_pylist() == ["1", "2", "3/\u2028"]
    assert table["choice"].to_pylist() == [0, None, 1]
    assert table["correct"].to_pylist() == [True, False, False]
    assert table["turns"].to_pylist() == [["call", "(ü)\n"], [], ["(3/\u2028)"]]
    assert table["new_tokens"].to_pylist() == [5, 5, 2**40]
    assert table["seconds"].to_pylist() == [1 / 3, 0.1, 0.1]
    assert table["calls"].to_pylist()[0][1] == {
        "tool": "",
        "arguments": "{",
        "fault": "unreadable",
        "observation": "Error: no JSON",
    }


def test_resumed_run_keeps_whole_lines(tmp_path: Path) -> None:
    Results.open(tmp_path, SETUP).add(KEY, HARD)
    journal = journal_of(tmp_path)
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])
    assert read_results(tmp_path).predictions == {KEY: HARD[:2]}
    assert journal.read_bytes() == whole[:-20]
    results = Results.open(tmp_path, SETUP, resume=True)
    assert results.predictions(KEY) == HARD[:2]
    results.add(KEY, HARD[2:])
    assert journal.read_bytes() == whole


def test_run_cut_off_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    Results.open(tmp_path, SETUP).add(KEY, HARD[:1])
    journal_of(tmp_path).write_bytes(b'{"question": "1"')
    assert Results.open(tmp_path, SETUP, resume=True).predictions(KEY) == []
    assert read_results(tmp_path).predictions == {}


def test_crash_between_parquet_and_journal_is_mended(tmp_path: Path) -> None:
    results = Results.open(tmp_path, SETUP)
    results.add(KEY, HARD)
    journal, lines = journal_of(tmp_path), journal_of(tmp_path).read_bytes()
    results.finish(KEY)
    journal.write_bytes(lines)
    assert read_results(tmp_path).predictions == {KEY: HARD}
    results = Results.open(tmp_path, SETUP, resume=True)
    assert results.predictions(KEY) == HARD
    results.finish(KEY)
    assert not journal.exists()


def test_a_folder_is_filled_by_one_process_at_a_time(tmp_path: Path) -> None:
    results = Results.open(tmp_path, SETUP)
    ask = (
        "import sys; from pathlib import Path; from tests.test_results import SETUP; "
        "from pearl.evaluation.results import Results, ResultsError\n"
        "try: Results.open(Path(sys.argv[1]), SETUP, resume=True)\n"
        "except ResultsError as error: print(error)"
    )
    command = [sys.executable, "-c", ask, str(tmp_path)]
    other = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "is being filled by another process" in other.stdout
    del results
    other = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert other.stdout == ""


def test_models_with_long_names_have_files_of_their_own(tmp_path: Path) -> None:
    keys = [KEY._replace(model=f"/data/{'folder/' * 40}{end}") for end in "ab"]
    setup = replace(SETUP, models={key.model: SETUP.models[KEY.model] for key in keys})
    results = Results.open(tmp_path, setup)
    for key in keys:
        results.add(key, [replace(HARD[0], model=key.model)])
        results.finish(key)
    assert {key: len(found) for key, found in read_results(tmp_path).predictions.items()} == dict.fromkeys(keys, 1)


def test_half_a_surrogate_pair_does_no_harm(tmp_path: Path) -> None:
    results = Results.open(tmp_path, SETUP)
    results.add(KEY, [prediction("1", said="a\ud800b")])
    results.finish(KEY)
    assert results.predictions(KEY)[0].reply.said == "a?b"


def test_run_is_recorded(tmp_path: Path) -> None:
    Results.open(tmp_path, SETUP)
    Results.open(tmp_path, SETUP, resume=True)
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["models"], run["scoring"]) == ({"org/base": {"weights": "abc"}}, "strict")
    assert run["modes"] == {"tools": {"new tokens": 64}}
    first, second = run["sittings"]
    assert first["date"] <= second["date"]
    assert {"torch", "transformers", "pearl-vlm"} <= set(first["libraries"])
    stored = read_results(tmp_path)
    assert stored.setup == SETUP
    assert stored.sittings == [first, second]


def test_results_are_not_written_over(tmp_path: Path) -> None:
    Results.open(tmp_path, SETUP)
    with pytest.raises(ResultsError, match="holds results already"):
        Results.open(tmp_path, SETUP)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ResultsError, match=r"no run\.json"):
        Results.open(tmp_path, SETUP, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmarks": {"stars": {"version": 2}}}, "version of benchmark 'stars' was 1, now 2"),
        ({"models": {"org/base": {"weights": "def"}}}, "weights of model 'org/base' was 'abc', now 'def'"),
        ({"scoring": "lvr"}, "the scoring was 'strict', now 'lvr'"),
        ({"modes": {"tools": {"new tokens": 32}}}, "new tokens of mode 'tools' was 64, now 32"),
        ({"modes": {"tools": {}, "direct": {}}}, "new tokens of mode 'tools' was 64, now None"),
    ],
)
def test_another_setup_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    Results.open(tmp_path, SETUP)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ResultsError, match=message):
        Results.open(tmp_path, replace(SETUP, **change), resume=True)
    assert (tmp_path / "run.json").read_bytes() == before


def test_resuming_may_add_models_modes_and_benchmarks(tmp_path: Path) -> None:
    Results.open(tmp_path, SETUP).add(KEY, HARD)
    moved, moons = {"version": 1, "place": "there"}, {"version": 7}
    more = replace(
        SETUP,
        models={"new": {"weights": "xyz"}},
        modes={"direct": {"new tokens": 8}},
        benchmarks={"stars": moved, "moons": moons},
    )
    results = Results.open(tmp_path, more, resume=True)
    results.add(Key("new", "direct", "moons"), [prediction("1", key=Key("new", "direct", "moons"))])
    stored = read_results(tmp_path)
    assert stored.setup.models == {"org/base": {"weights": "abc"}, "new": {"weights": "xyz"}}
    assert stored.setup.modes == {"tools": {"new tokens": 64}, "direct": {"new tokens": 8}}
    assert stored.setup.benchmarks == {"stars": moved, "moons": moons}
    assert set(stored.predictions) == {KEY, Key("new", "direct", "moons")}


def test_misplaced_predictions_are_refused(tmp_path: Path) -> None:
    results = Results.open(tmp_path, SETUP)
    with pytest.raises(ValueError, match="was added to"):
        results.add(Key("other", "tools", "stars"), HARD)
    results.add(KEY, HARD)
    results.finish(KEY)
    with pytest.raises(ValueError, match="is finished"):
        results.add(KEY, HARD)


def damaged_line(folder: Path) -> None:
    lines = journal_of(folder).read_bytes().splitlines(keepends=True)
    journal_of(folder).write_bytes(b"".join([lines[0], b"{}\n", *lines[2:]]))


def repeated_line(folder: Path) -> None:
    lines = journal_of(folder).read_bytes().splitlines(keepends=True)
    journal_of(folder).write_bytes(b"".join([*lines, lines[0]]))


def broken_parquet(folder: Path) -> None:
    journal_of(folder).rename(journal_of(folder).with_suffix(".parquet"))


def other_columns(folder: Path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"question": ["1"]}), folder / "predictions" / "a.parquet")


def strange_model(folder: Path) -> None:
    journal_of(folder).write_bytes(journal_of(folder).read_bytes().replace(b"org/base", b"org/other"))


def unreadable_run(folder: Path) -> None:
    (folder / "run.json").write_text("[]")


def newer_format(folder: Path) -> None:
    (folder / "run.json").write_text('{"results_format": 99}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_line, "line 2 is no prediction"),
        (repeated_line, "answers question '1' more than once"),
        (broken_parquet, "not a readable Parquet file"),
        (other_columns, "does not have the columns"),
        (strange_model, r"predictions of .*org/other.*which its run\.json does not name"),
        (unreadable_run, "not the record of an evaluation"),
        (newer_format, "format 99; this release reads 3"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    Results.open(tmp_path, SETUP).add(KEY, HARD)
    damage(tmp_path)
    with pytest.raises(ResultsError, match=message):
        read_results(tmp_path)


def test_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="holds no results"):
        read_results(tmp_path)


BASE, PEARL = Key("base", "tools", "stars"), Key("pearl", "direct", "stars")
PAIRS = {"stars": {"1": "i", "2": "i", "3": "ii", "4": "ii", "5": "iii", "6": "iii"}}


def rows(key: Key, choices: Sequence[int | None]) -> list[Prediction]:
    """Questions 1, 2, …; the first three are near, the others far; 0 is right."""
    categories = ["near"] * 3 + ["far"] * 10
    return [
        prediction(str(number), choice, key, category, prompt_tokens=10 * number, new_tokens=number, seconds=number / 4)
        for number, (choice, category) in enumerate(zip(choices, categories, strict=False), start=1)
    ]


def summary_by_hand() -> Summary:
    base = rows(BASE, [0, 0, 1, None, 0])
    base[0] = replace(base[0], reply=replace(base[0].reply, calls=(*CALLS, *CALLS)))
    base[4] = replace(base[4], reply=replace(base[4].reply, calls=(CallMade("fly", "{}", "no such tool", "Error"),)))
    return summarise({BASE: base, PEARL: rows(PEARL, [0, 1, 0, 0, 0]), Key("none", "direct", "stars"): []}, PAIRS)


def test_scores_are_those_counted_by_hand() -> None:
    base, pearl = summary_by_hand().scores
    assert (base.model, base.mode, base.benchmark, base.questions) == ("base", "tools", "stars", 5)
    assert base.accuracy.value == pytest.approx(3 / 5)
    assert {name: one.questions for name, one in base.categories.items()} == {"far": 2, "near": 3}
    assert base.categories["far"].accuracy.value == pytest.approx(1 / 2)
    assert base.categories["near"].accuracy.value == pytest.approx(2 / 3)
    assert base.macro.value == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert (base.prompt_tokens, base.new_tokens, base.seconds) == (30, 3, 0.75)
    assert (base.calls, base.faults) == (1, {"no such tool": 1, "unreadable": 2})
    assert (base.unparsed, pearl.unparsed) == (1 / 5, 0)
    assert pearl.accuracy.value == pytest.approx(4 / 5)
    assert (pearl.calls, len(pearl.faults)) == (0, 0)


def test_pairs_need_both_questions() -> None:
    base, pearl = summary_by_hand().scores
    assert base.pairs is not None
    assert base.pairs.value == 1 / 2
    assert pearl.pairs is not None
    assert pearl.pairs.value == 1 / 2
    assert summarise({BASE: rows(BASE, [0, 0])}).scores[0].pairs is None


def test_comparison_is_that_counted_by_hand() -> None:
    (comparison,) = summary_by_hand().comparisons
    assert (comparison.first, comparison.second) == (("base", "tools"), ("pearl", "direct"))
    assert (comparison.questions, comparison.first_only, comparison.second_only) == (5, 1, 2)
    assert comparison.difference.value == pytest.approx(-1 / 5)
    assert comparison.macro_difference.value == pytest.approx((0 - 1 / 2) / 2)
    assert comparison.p == 1


def test_runs_are_compared_on_what_both_were_asked() -> None:
    elsewhere = Key("pearl", "direct", "moons")
    everything = {
        BASE: rows(BASE, [0, 0, 1]),
        PEARL: list(reversed(rows(PEARL, [0, 1, 0, 0, 0, 0]))),
        elsewhere: rows(elsewhere, [0]),
        Key("late", "direct", "stars"): [prediction("99", 0, Key("late", "direct", "stars"))],
    }
    (comparison,) = summarise(everything).comparisons
    assert (comparison.questions, comparison.first_only, comparison.second_only) == (3, 1, 1)


def test_summary_is_written(tmp_path: Path) -> None:
    summary = summary_by_hand()
    write_summary(summary, tmp_path)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["scores"][0]["accuracy"]["value"] == summary.scores[0].accuracy.value
    assert written["comparisons"][0]["p"] == 1
    assert (tmp_path / "summary.md").read_text() == markdown(summary)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.json", "summary.md"]


def test_markdown_is_a_table_whatever_the_names() -> None:
    lines = markdown(summary_by_hand()).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:4] == ["stars", "base", "tools", "5"]
    assert cells[4].startswith("60.0 (")
    assert cells[7:] == ["20.0", "30", "3.0", "1.00", "no such tool 1, unreadable 2", "0.75"]
    assert "| stars | base · tools | pearl · direct | -20.0 (" in lines[-1]
    odd = Key("a|b\nc", "direct", "stars")
    table = markdown(summarise({odd: rows(odd, [0])}))
    assert len(table.splitlines()) == 3
    assert "a\\|b c" in table
