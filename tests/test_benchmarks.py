"""Benchmarks: the published layouts are read as they are, and one bad record refuses the whole."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pearl.evaluation.benchmarks import Benchmark, BenchmarkError, benchmark_names, open_benchmark, scenes
from pearl.evaluation.benchmarks.base import SUFFIX
from pearl.evaluation.benchmarks.blink import Blink
from pearl.evaluation.benchmarks.mmvp import Mmvp
from pearl.evaluation.records import Question, Scoring
from pearl.images import decode, encode
from pearl.parquet import read_trajectories
from pearl.records import Sample
from pearl.scenes.questions import USUAL
from pearl.scenes.samples import NoFittingScene, family_due, scene_sample
from tests.runs import data_file, rows

SCORINGS: tuple[Scoring, ...] = ("strict", "lvr", "pearl-published")
LISTED = json.loads(Path(scenes.__file__).with_name("scenes_test.json").read_text())


def picture(seed: int = 0) -> bytes:
    return encode(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8), "jpeg")


def save(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(seed))


def asked(spec: str, folder: Path, scoring: Scoring = "strict", count: int | None = None) -> tuple[Question, ...]:
    return open_benchmark(f"{spec}={folder}", scoring, count).questions()


# V*

VSTAR: list[dict[str, Any]] = [
    {
        "image": "direct_attributes/sa_1.jpg",
        "text": f"What is the colour of the cup?\n(A) red\n(B) light blue\n(C) green\n(D) white{SUFFIX}",
        "category": "direct_attributes",
        "label": "B",
        "question_id": "0",
    },
    {
        "image": "relative_position/sa_2.jpg",
        "text": "Is the dog left of the car?\n(A) The dog is left.\n(B) The dog is right.",
        "category": "relative_position",
        "label": "A",
        "question_id": "1",
    },
]


def vstar(folder: Path, **changed: Any) -> Path:
    """A folder as the Hub has it; `changed` replaces columns of the second record, None takes one away."""
    for number, record in enumerate(VSTAR):
        save(folder / record["image"], number)
    second = {key: value for key, value in (VSTAR[1] | changed).items() if value is not None}
    lines = (json.dumps(record) + "\n" for record in (VSTAR[0], second))
    (folder / "test_questions.jsonl").write_text("".join(lines))
    return folder


def test_vstar(tmp_path: Path) -> None:
    first, second = asked("vstar", vstar(tmp_path))
    assert (first.id, first.benchmark, first.category) == ("0", "vstar", "direct_attributes")
    assert (first.prompt, first.options, first.answer) == (VSTAR[0]["text"], ("red", "light blue", "green", "white"), 1)
    assert [image.data for image in first.images] == [picture(0)]
    assert (first.opening, first.max_new_tokens) == ("", None)
    assert (second.options, second.answer) == (("The dog is left.", "The dog is right."), 0)
    assert second.prompt == VSTAR[1]["text"] + SUFFIX


def test_vstar_as_parquet_gives_the_same_questions(tmp_path: Path) -> None:
    listed = vstar(tmp_path / "listed")
    images = [{"bytes": picture(number), "path": Path(record["image"]).name} for number, record in enumerate(VSTAR)]
    rows = [record | {"image": image} for record, image in zip(VSTAR, images, strict=True)]
    (tmp_path / "parquet").mkdir()
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "parquet/test-00000-of-00001.parquet")
    assert asked("vstar", tmp_path / "parquet") == asked("vstar", listed)


def test_scorings_word_vstar(tmp_path: Path) -> None:
    vstar(tmp_path)
    lvr, published = (asked("vstar", tmp_path, scoring) for scoring in SCORINGS[1:])
    assert [question.prompt.count(SUFFIX) for question in lvr] == [1, 1]
    assert [question.prompt for question in published] == [record["text"] for record in VSTAR]
    assert {(question.opening, question.max_new_tokens) for question in lvr} == {("", 512)}
    assert {(question.opening, question.max_new_tokens) for question in published} == {("<answer>", 4)}


# MMVP

MMVP: list[list[str]] = [
    ["1", "Are the wings open, or closed?", "(a) Open (b) Closed", "(a)"],
    ["2", "Are the wings open, or closed?", "(a) Open (b) Closed", "(b)"],
    ["3", "Is the dog facing left?", "(a) Yes, it is (b) No", "(a)"],
]


def mmvp(folder: Path, *last: str, header: str = "lndex", images: str = "MMVP Images") -> Path:
    rows = [*MMVP, list(last)] if last else MMVP
    for row in MMVP:
        save(folder / images / f"{row[0]}.jpg", int(row[0]))
    with (folder / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[header, "Question", "Options", "Correct Answer"], *rows])
    return folder


@pytest.mark.parametrize("header", ["lndex", "Index"])
@pytest.mark.parametrize("images", ["MMVP Images", "MMVP_Images"])
def test_mmvp(tmp_path: Path, header: str, images: str) -> None:
    questions = asked("mmvp", mmvp(tmp_path, header=header, images=images))
    assert [question.id for question in questions] == ["1", "2", "3"]
    assert [question.answer for question in questions] == [0, 1, 0]
    assert Mmvp().pairs(questions) == {"1": "1", "2": "1"}  # the third's other half is not asked
    assert questions[2].options == ("Yes, it is", "No")
    assert questions[1].images[0].data == picture(2)
    assert questions[0].prompt == f"Are the wings open, or closed?\nOptions:\nA. Open\nB. Closed{SUFFIX}"


def test_scorings_word_mmvp(tmp_path: Path) -> None:
    mmvp(tmp_path)
    lvr, published = (asked("mmvp", tmp_path, scoring)[0] for scoring in SCORINGS[1:])
    assert lvr.prompt == f"Are the wings open, or closed?\nOptions:\nA. Open B. Closed{SUFFIX}"
    assert published.prompt == "Are the wings open, or closed?\nOptions:\nA. Open B. Closed"
    assert (published.opening, published.max_new_tokens) == ("<answer>", 4)


# BLINK


def blink_row(task: str, number: int, pictures: int = 1) -> dict[str, Any]:
    images = {
        f"image_{n}": {"bytes": picture(10 * number + n), "path": f"{n}.jpg"} if n <= pictures else None
        for n in range(1, 5)
    }
    asks = {"question": "How many?", "choices": ["0", "3", "2"], "answer": "(C)", "prompt": "How many? …"}
    return {"idx": f"val_{task}_{number}", "sub_task": task, **asks, **images}


def blink(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda row: None, rows: int = 2) -> Path:
    """A folder as the Hub has it; `change` has the last row of Jigsaw."""
    for task in Blink.tasks:
        records = [blink_row(task, number, number + 1) for number in range(rows)]
        if task == "Jigsaw":
            change(records[-1])
        table = datasets.Dataset.from_list(records)
        for name in (f"image_{n}" for n in range(1, 5)):
            table = table.cast_column(name, datasets.Image()) if name in table.column_names else table
        (folder / task).mkdir(parents=True)
        table.to_parquet(folder / task / "val-00000-of-00001.parquet")
        datasets.Dataset.from_list([{"idx": "test", "answer": "hidden"}]).to_parquet(
            folder / task / "test-00000-of-00001.parquet"
        )
    return folder


def test_blink(tmp_path: Path) -> None:
    questions = asked("blink", blink(tmp_path))
    assert Counter(question.category for question in questions) == dict.fromkeys(Blink.tasks, 2)
    assert [len(question.images) for question in questions[:2]] == [1, 2]
    first = questions[0]
    assert (first.id, first.options, first.answer) == ("val_Counting_0", ("0", "3", "2"), 2)
    assert first.prompt == f"How many?\nOptions:\nA. 0\nB. 3\nC. 2\n{SUFFIX}"
    assert [image.data for image in questions[1].images] == [picture(11), picture(12)]


def test_scorings_word_blink_alike(tmp_path: Path) -> None:
    blink(tmp_path)
    strict, lvr, published = (asked("blink", tmp_path, scoring) for scoring in SCORINGS)
    assert [question.prompt for question in strict] == [question.prompt for question in published]
    assert list(lvr) == [replace(question, max_new_tokens=512) for question in strict]
    assert {question.opening for question in published} == {"<answer>"}


# What is refused.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": "direct_attributes/none.jpg"}, "'direct_attributes/none.jpg' cannot be read: No such file"),
        ({"image": "../listed/direct_attributes/sa_1.jpg"}, "leaves the folder"),
        ({"image": "/etc/hostname"}, "leaves the folder"),
        ({"image": "a\0b"}, "leaves the folder"),
        ({"image": {"bytes": None, "path": "../x.jpg"}}, "leaves the folder"),
        ({"image": "\ud800.jpg"}, "cannot be read: 'utf-8' codec can't encode"),
        ({"text": "\ud800?\n(A) here\n(B) there"}, "column 'text' holds what is no Unicode"),
        ({"image": 3}, "column 'image' holds int; expected an image or the path of one"),
        ({"image": "test_questions.jsonl"}, "not an image of a known format"),
        ({"label": "C"}, "the answer 'C' is none of the options A to B"),
        ({"label": "left"}, "the answer 'left' is none of the options A to B"),
        ({"label": " "}, "column 'label' holds ' '; expected a text"),
        ({"label": None}, "there is no column 'label', but image, text, category, question_id"),
        ({"text": "Where is it?"}, "lists no options"),
        ({"text": "Where is it?\n(A) here\n(C) there"}, "lists no options"),
        ({"question_id": "0"}, "the id '0' stands there twice"),
        ({"category": None}, "there is no column 'category'"),
    ],
)
def test_one_bad_record_refuses_vstar(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError, match=r"1 of 2 records in .*so none is asked") as error:
        asked("vstar", vstar(tmp_path / "listed", **changed))
    assert "test_questions.jsonl line 2: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 3 is no JSON"), ("[" * 200_000, "line 3 is no JSON"), ("[1]", "line 3 holds list")],
)
def test_a_listing_that_is_no_json(tmp_path: Path, line: str, message: str) -> None:
    with (vstar(tmp_path) / "test_questions.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(BenchmarkError, match=message):
        asked("vstar", tmp_path)


def test_empty_lines_of_a_listing_are_none(tmp_path: Path) -> None:
    with (vstar(tmp_path) / "test_questions.jsonl").open("a") as file:
        file.write("\n  \n")
    assert len(asked("vstar", tmp_path)) == 2


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (("4", "Is it?", "(a) Yes (b) No", "(a)"), "the image 'MMVP Images/4.jpg' cannot be read"),
        (("3", "Is it?", "(a) Yes (b) No", "(a)"), "the id '3' stands there twice"),
        (("3", "Is it?", "(a) Yes (b) No", "(c)"), "the answer '(c)' is none of the options A to B"),
        (("3", "Is it?", "Yes or no", "(a)"), "column 'Options' holds 'Yes or no'; expected (a) … (b) …"),
        (("../1", "Is it?", "(a) Yes (b) No", "(a)"), "column 'Index' holds '../1'; expected a number"),
        (("3", "Is it?"), "column 'Options' holds None; expected a text"),
        (("3", "", "(a) Yes (b) No", "(a)"), "column 'Question' holds ''; expected a text"),
    ],
)
def test_one_bad_record_refuses_mmvp(tmp_path: Path, last: tuple[str, ...], message: str) -> None:
    with pytest.raises(BenchmarkError, match="1 of 4 records") as error:
        asked("mmvp", mmvp(tmp_path, *last))
    assert f"Questions.csv row 4: {message}" in str(error.value)


def test_other_columns_of_mmvp(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="3 of 3 records") as error:
        asked("mmvp", mmvp(tmp_path, header="number"))
    assert "row 1: there is no column 'Index', but number, Question, Options, Correct Answer" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(image_1=None), "column 'image_1' holds NoneType; expected an image"),
        (lambda row: row.update(image_2={"bytes": b"no", "path": "x"}), "not an image of a known format"),
        (lambda row: row.update(answer="(D)"), "the answer '(D)' is none of the options A to C"),
        (lambda row: row.update(answer="(hidden)"), "the answer '(hidden)' is none of the options"),
        (lambda row: row.update(choices=["0"]), "column 'choices' holds ['0']; expected a list"),
        (lambda row: row.update(question=None), "column 'question' holds None; expected a text"),
    ],
)
def test_one_bad_record_refuses_blink(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(BenchmarkError, match="1 of 12 records") as error:
        asked("blink", blink(tmp_path, change))
    assert "Jigsaw/val-00000-of-00001.parquet row 2: " in str(error.value)
    assert message in str(error.value)


def test_other_columns_of_blink(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"there is no column 'choices', but idx, sub_task, question"):
        asked("blink", blink(tmp_path, lambda row: row.pop("choices"), rows=1))


def test_a_missing_task_of_blink(tmp_path: Path) -> None:
    (blink(tmp_path) / "IQ_Test/val-00000-of-00001.parquet").unlink()
    with pytest.raises(BenchmarkError, match=r"has no IQ_Test/val-\*\.parquet"):
        asked("blink", tmp_path)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = blink(tmp_path) / "Jigsaw/val-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BenchmarkError, match=r"Jigsaw/val-00000-of-00001\.parquet is no readable Parquet file"):
        asked("blink", tmp_path)


def test_only_the_first_problems_are_shown(tmp_path: Path) -> None:
    folder = vstar(tmp_path)
    (folder / "test_questions.jsonl").write_text("{}\n" * 40)
    with pytest.raises(BenchmarkError, match="40 of 40 records") as error:
        asked("vstar", folder)
    assert str(error.value).count("there is no column") == 5
    assert str(error.value).endswith("…")


@pytest.mark.parametrize("name", ["vstar", "mmvp"])
def test_an_empty_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(BenchmarkError, match="holds no question; expected"):
        asked(name, tmp_path)


# Places, names, options.


@pytest.mark.parametrize(("spec", "repo"), [("vstar", "craigwu/vstar_bench"), ("vstar=mine/copy", "mine/copy")])
def test_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, repo: str) -> None:
    """The Hub's cache consists of links that lead out of the folder."""
    stored = vstar(tmp_path / "stored")
    (tmp_path / "snapshot/direct_attributes").mkdir(parents=True)
    (tmp_path / "snapshot/relative_position").mkdir()
    for name in ("test_questions.jsonl", *(record["image"] for record in VSTAR)):
        (tmp_path / "snapshot" / name).symlink_to(stored / name)
    calls = []

    def download(repo: str, repo_type: str, allow_patterns: list[str]) -> str:
        calls.append((repo, repo_type, allow_patterns[:2]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert open_benchmark(spec).questions() == asked("vstar", stored)
    assert calls == [(repo, "dataset", ["test_questions.jsonl", "direct_attributes/*"])]


def test_no_such_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(BenchmarkError, match="none/such is no folder, and the Hub does not give it: no network"):
        open_benchmark("mmvp=none/such").questions()
    with pytest.raises(BenchmarkError, match=r"nowhere is neither a folder nor a Hub dataset id \(org/name\)"):
        asked("mmvp", tmp_path / "nowhere")


def test_count_is_of_each_category(tmp_path: Path) -> None:
    blink(tmp_path)
    few = asked("blink", tmp_path, count=1)
    assert [question.id for question in few] == [f"val_{task}_0" for task in Blink.tasks]


def test_versions_are_stated() -> None:
    assert benchmark_names()[:4] == ["vstar", "mmvp", "blink", "scenes"]
    for name in benchmark_names()[:4]:
        assert open_benchmark(name).name == name
        assert open_benchmark(name).version >= 1


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("nothing", {}, "there is no benchmark 'nothing'; there are: vstar, mmvp, blink, scenes"),
        ("vstar=", {}, "names no place"),
        ("scenes=here", {}, "they have no place"),
        ("scenes", {"scoring": "lvr"}, "the scoring 'lvr' cannot read"),
        ("vstar", {"scoring": "lenient"}, "there is no scoring 'lenient'"),
        ("vstar", {"count": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_opened(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        open_benchmark(spec, **options)


class Foreign(Benchmark):
    name, version = "foreign", 3

    def questions(self) -> tuple[Question, ...]:
        return ()


def test_benchmarks_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        "foreign": "tests.test_benchmarks:Foreign",
        "other": "tests.test_benchmarks:Foreign",
        "function": "tests.test_benchmarks:picture",
        "broken": "tests.no_such_module:Foreign",
    }
    found = [EntryPoint(name, value, "pearl.benchmarks") for name, value in points.items()]
    monkeypatch.setattr("pearl.plugins.entry_points", lambda group: found)
    assert benchmark_names()[5:] == ["broken", "foreign", "function", "other"]
    assert open_benchmark("foreign=here", "lvr").place == "here"
    for name, message in {"other": "must agree", "function": "not a subclass", "broken": "does not import"}.items():
        with pytest.raises(BenchmarkError, match=message):
            open_benchmark(name)


# Scenes


def test_the_list_of_scenes_is_the_first_of_each_family() -> None:
    due = Counter[str]()
    expected = []
    for index in range(LISTED["indices"][-1] + 1):
        family = family_due("test", LISTED["seed"], index)
        due[family] += 1
        if due[family] <= 60:
            expected.append(index)
    assert LISTED["indices"] == expected
    assert set(due) == set(USUAL)
    assert len(expected) == 60 * len(USUAL)


def test_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEARL_CACHE", str(tmp_path / "cache"))
    questions = open_benchmark("scenes", count=1).questions()
    assert sorted(question.category for question in questions) == sorted(USUAL)
    for question in questions:
        assert question.prompt.endswith(f"\nOptions: {', '.join(question.options)}.")
        assert decode(question.images[0].data).shape == (252, 252, 3)
        assert 0 <= question.answer < len(question.options)
        assert (question.opening, question.max_new_tokens) == ("", None)
    (cached,) = (tmp_path / "cache").iterdir()
    rows = list(read_trajectories(cached))
    assert [question.options[question.answer] for question in questions] == [row.answer for row in rows]

    monkeypatch.setattr(scenes, "scene_sample", None)
    assert open_benchmark("scenes", count=1).questions() == questions, "they are rendered once"


def test_scenes_are_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = list[Any]()

    def fails_late(*given: Any) -> tuple[Sample, Any]:
        rendered.append(given)
        if len(rendered) > 2:
            raise NoFittingScene("none fits")
        return scene_sample(*given)

    monkeypatch.setenv("PEARL_CACHE", str(tmp_path))
    monkeypatch.setattr(scenes, "scene_sample", fails_late)
    with pytest.raises(BenchmarkError, match="cannot be rendered here: none fits"):
        open_benchmark("scenes", count=1).questions()
    assert not list(tmp_path.iterdir())


def test_scenes_without_mujoco(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(scenes, "version", absent)
    with pytest.raises(BenchmarkError, match=r"rendered scenes need MuJoCo: pip install -e"):
        open_benchmark("scenes").questions()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEARL_CACHE", str(tmp_path / "file"))
    with pytest.raises(BenchmarkError, match=r"cannot be written .*set PEARL_CACHE"):
        open_benchmark("scenes", count=1).questions()


# trajectories


def test_a_file_of_trajectories_is_a_benchmark(tmp_path: Path) -> None:
    data = data_file(tmp_path)
    questions = open_benchmark(f"trajectories={data}").questions()
    assert [question.id for question in questions] == [row.id for row in rows()]
    assert questions[1].prompt == "Where is cup 1?\nOptions: left, right, behind."
    assert (questions[1].options[questions[1].answer], questions[1].category) == (rows()[1].answer, rows()[1].skill)
    assert len(open_benchmark(f"trajectories={data}", count=2).questions()) == 2


def test_trajectories_of_others_may_leave_their_skill_out(tmp_path: Path) -> None:
    data = data_file(tmp_path)
    table = pq.read_table(data)
    columns = {name: pa.nulls(len(table), table[name].type) for name in ("skill", "expert", "source", "license")}
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    pq.write_table(table, data)
    assert {question.category for question in open_benchmark(f"trajectories={data}").questions()} == {""}


def test_trajectories_that_cannot_be_scored_are_refused(tmp_path: Path) -> None:
    odd = data_file(tmp_path, [rows()[0], replace(rows()[1], answer="above")])
    with pytest.raises(BenchmarkError, match=r"row 1 \(row-01\): the answer 'above' is not one of its options"):
        open_benchmark(f"trajectories={odd}").questions()
    with pytest.raises(BenchmarkError, match="trajectories=DATA"):
        open_benchmark("trajectories").questions()
    with pytest.raises(BenchmarkError, match="'lvr' cannot read"):
        open_benchmark(f"trajectories={odd}", "lvr").questions()
