from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image, ImageDraw, ImageEnhance

from pearl.cli import curation, exporting
from pearl.cli.gen import run
from pearl.evaluation.gain import Gain, write_gains
from pearl.parquet import DataError, open_parquet, read_metadata, read_trajectories, resolve_split, write_trajectories
from pearl.pipelines.curation import CurationError
from pearl.pipelines.curation.decontamination import Decontamination, asked, decontaminate, write_report
from pearl.pipelines.curation.duplicates import Dedup, Duplicate, dedup_data
from pearl.pipelines.curation.filtering import Filter, filter_data
from pearl.pipelines.curation.hashing import ImageIndex, near_pairs, nearest, perceptual_hash, share
from pearl.pipelines.curation.merging import Merge, merge_data
from pearl.pipelines.curation.sampling import even_shares, sample_data
from pearl.pipelines.curation.splitting import Split, split_data
from pearl.pipelines.publishing.plan import make_plan
from pearl.records import EncodedImage, Trajectory
from tests.plain import picture, step, trajectory
from tests.runs import data_file, rows


def drawing(seed: int, side: int = 160) -> Image.Image:
    """Shapes of all sizes; pictures of other seeds look different."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(random.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for size in (0.6, 0.5, 0.4, 0.3, 0.2, 0.2):
        x, y = random.uniform(-0.1, 0.9, 2) * side
        draw.ellipse((x, y, x + size * side, y + size * side), tuple(random.integers(0, 256, 3).tolist()))
    return image


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> EncodedImage:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return EncodedImage(file.getvalue())


def made(count: int, per_image: int = 1, prefix: str = "row", **changes: Any) -> list[Trajectory]:
    """`per_image` questions about each of some drawings."""
    return [
        replace(
            trajectory(step("I look.", picture(n)), image=encoded(drawing(n // per_image))),
            **{"id": f"{prefix}-{n:03}", "question": f"What is shown at the place {n}?", **changes},
        )
        for n in range(count)
    ]


def written(folder: Path, trajectories: Sequence[Trajectory], name: str = "traj.parquet") -> Path:
    path = folder / name
    write_trajectories(path, trajectories, {"recipe": name})
    return path


def ids(path: Path) -> list[str]:
    return [one.id for one in read_trajectories(path)]


def made_by(path: Path) -> dict[str, Any]:
    return read_metadata(open_parquet(path).schema_arrow) or {}


# filter


def kept(data: Path, out: Path, **wanted: Any) -> list[str]:
    filter_data(data, out, Filter(**wanted))
    found = ids(out)
    out.unlink()
    return found


def test_filter_by_steps_skill_and_tool(tmp_path: Path) -> None:
    data, out = data_file(tmp_path), tmp_path / "out.parquet"
    steps = {row.id: len(row.steps) for row in rows()}
    assert kept(data, out, min_steps=2) == [name for name, count in steps.items() if count >= 2]
    assert kept(data, out, max_steps=1) == [name for name, count in steps.items() if count <= 1]
    assert kept(data, out, tools=("depth",)) == [name for name, count in steps.items() if not count]
    assert kept(data, out, tools=("crop", "depth")) == list(steps)
    assert kept(data, out, skills=(rows()[0].skill,)) == list(steps)
    assert not list(tmp_path.glob(".*"))


def test_filter_by_gain_with_reasons_and_rows_untouched(tmp_path: Path) -> None:
    data, out, gains = data_file(tmp_path), tmp_path / "out.parquet", tmp_path / "gains.parquet"
    write_gains(
        [Gain(row.id, row.skill, ("crop",), (0.0, float(n)), (1.0,)) for n, row in enumerate(rows()[:8])], gains
    )
    found = filter_data(data, out, Filter(gains=str(gains), min_gain=3, min_image_gain=4))
    assert (found.kept, found.dropped) == (3, {"gain": 3, "image gain": 2, "gain not measured": 4})
    assert list(read_trajectories(out)) == rows()[5:8]
    assert made_by(out)["filter"]["min_gain"] == 3
    odd = [Gain(row.id, row.skill, ("crop",), (0.0, math.nan if n else 9.0), (1.0,)) for n, row in enumerate(rows())]
    write_gains(odd, gains)
    found = filter_data(data, tmp_path / "odd.parquet", Filter(gains=str(gains), min_gain=3))
    assert (found.kept, found.dropped) == (1, {"gain not measured": 11})


def test_filter_by_one_gain_does_not_ask_for_the_other(tmp_path: Path) -> None:
    data, out, gains = data_file(tmp_path, rows()[:4]), tmp_path / "out.parquet", tmp_path / "gains.parquet"
    log_odds = [(9.0, math.nan), (math.inf, 9.0), (1.0, 9.0), (math.nan, 9.0)]
    measured = [
        {"id": row.id, "gain": gain, "image_gain": of_image}
        for row, (gain, of_image) in zip(rows(), log_odds, strict=False)
    ]
    pq.write_table(pa.Table.from_pylist(measured), gains)
    names = [row.id for row in rows()]
    assert kept(data, out, gains=str(gains), min_gain=2) == names[:2]
    assert kept(data, out, gains=str(gains), min_image_gain=2) == names[1:4]
    found = filter_data(data, out, Filter(gains=str(gains), min_gain=0, min_image_gain=0))
    assert (found.kept, found.dropped) == (2, {"gain not measured": 2})


def test_filter_by_size(tmp_path: Path) -> None:
    sizes = [(40, 30), (30, 40), (100, 50), (50, 100)]
    data = [replace(trajectory(image=picture(n, *size)), id=f"{size[0]}x{size[1]}") for n, size in enumerate(sizes)]
    broken = replace(trajectory(image=EncodedImage(b"GIF89a")), id="broken")
    path, out = written(tmp_path, [*data, broken]), tmp_path / "out.parquet"
    assert kept(path, out, min_width=50) == ["100x50", "50x100"]
    assert kept(path, out, min_height=50) == ["100x50", "50x100"]
    assert kept(path, out, min_width=40, max_pixels=1200) == ["40x30"]
    found = filter_data(path, out, Filter(min_pixels=5000))
    assert found.dropped == {"too few pixels": 2, "unreadable image": 1}


def test_filters_that_make_no_sense(tmp_path: Path) -> None:
    data, out = data_file(tmp_path), tmp_path / "out.parquet"
    with pytest.raises(CurationError, match="nothing to filter by"):
        Filter()
    with pytest.raises(CurationError, match="need --gains"):
        Filter(min_gain=1.0)
    with pytest.raises(CurationError, match="exists already"):
        filter_data(data, data, Filter(min_steps=1))
    with pytest.raises(CurationError, match=r"none of 12 trajectories passes: \{'too few steps': 12\}"):
        filter_data(data, out, Filter(min_steps=9))
    with pytest.raises(DataError, match="no file of pearl-eval gain"):
        filter_data(data, out, Filter(gains=str(data), min_gain=1.0))
    with pytest.raises(DataError, match="there is no file"):
        filter_data(data, out, Filter(gains=str(tmp_path / "gone.parquet"), min_gain=1.0))
    assert not out.exists()


# split


def test_split_shares_no_image_and_keeps_order_rows_and_bytes(tmp_path: Path) -> None:
    rows_ = made(300, per_image=3)
    data = written(tmp_path, rows_)
    parts = Split({"train": 0.6, "test": 0.4}, seed=1)
    counts = split_data(data, tmp_path / "a", parts)
    split_data(data, tmp_path / "b", parts)
    found = {name: list(read_trajectories(tmp_path / "a" / f"{name}-00000-of-00001.parquet")) for name in parts.parts}
    assert counts == {name: len(part) for name, part in found.items()}
    assert not {one.image.data for one in found["train"]} & {one.image.data for one in found["test"]}
    assert found["train"] == [one for one in rows_ if one in found["train"]]
    assert len(found["train"]) + len(found["test"]) == 300
    assert 0.45 < counts["train"] / 300 < 0.75
    for name in parts.parts:
        assert (tmp_path / "a" / f"{name}-00000-of-00001.parquet").read_bytes() == (
            tmp_path / "b" / f"{name}-00000-of-00001.parquet"
        ).read_bytes()
    said = made_by(tmp_path / "a" / "test-00000-of-00001.parquet")
    assert (said["part"], said["split"]["seed"], said["made_from"][0]["made_by"]["recipe"]) == (
        "test",
        1,
        "traj.parquet",
    )


def test_split_of_more_data_moves_nothing(tmp_path: Path) -> None:
    parts = Split({"train": 0.5, "test": 0.5})
    split_data(written(tmp_path, made(40)), tmp_path / "few", parts)
    split_data(written(tmp_path, made(60)[::-1], "more.parquet"), tmp_path / "more", parts)
    assert set(ids(tmp_path / "few" / "train-00000-of-00001.parquet")) < set(
        ids(tmp_path / "more" / "train-00000-of-00001.parquet")
    )


def test_split_keeps_near_images_together(tmp_path: Path) -> None:
    shots = [
        replace(trajectory(image=encoded(drawing(n), quality=quality)), id=f"{n}-{quality}")
        for quality in (90, 50)
        for n in range(30)
    ]
    data = written(tmp_path, shots)
    for near, apart in ((None, True), (4, False)):
        out = tmp_path / f"near-{near}"
        split_data(data, out, Split({"train": 0.5, "test": 0.5}, near=near))
        train, test = (
            {name.split("-")[0] for name in ids(out / f"{part}-00000-of-00001.parquet")} for part in ("train", "test")
        )
        assert bool(train & test) == apart


def test_splits_that_make_no_sense(tmp_path: Path) -> None:
    data = written(tmp_path, made(3, per_image=3))
    with pytest.raises(CurationError, match=r"(train|test) would be empty: 3 trajectories"):
        split_data(data, tmp_path / "out", Split({"train": 0.5, "test": 0.5}))
    for parts in ({"train": 1.0}, {"train": 1.0, "test": 0.0}):
        with pytest.raises(CurationError, match="two or more parts"):
            Split(parts)
    with pytest.raises(CurationError, match="no name for a part"):
        Split({"../a": 1, "b": 1})
    with pytest.raises(CurationError, match="0 to 12 bits"):
        Split({"a": 1, "b": 1}, near=13)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


# sample and merge


def test_sample(tmp_path: Path) -> None:
    rows_ = [replace(one, skill="rare" if n % 10 == 0 else "common") for n, one in enumerate(made(100, per_image=5))]
    data, out = written(tmp_path, rows_), tmp_path / "out.parquet"
    assert sample_data(data, out, 30, seed=1) == {"all": 30}
    drawn = list(read_trajectories(out))
    assert drawn == [one for one in rows_ if one in drawn]
    assert sample_data(data, tmp_path / "b.parquet", 30, "skill") == {"rare": 10, "common": 20}
    assert sample_data(data, tmp_path / "c.parquet", 30, seed=1) == {"all": 30}
    assert out.read_bytes() == (tmp_path / "c.parquet").read_bytes()
    with pytest.raises(CurationError, match="101 of 100 trajectories cannot be drawn"):
        sample_data(data, tmp_path / "d.parquet", 101)


def test_even_shares() -> None:
    assert even_shares({"a": 2, "b": 10, "c": 10}, 13) == {"a": 2, "b": 5, "c": 6}
    assert even_shares({"a": 2, "b": 3}, 5) == {"a": 2, "b": 3}


def test_merge(tmp_path: Path) -> None:
    a, b = made(12, source="photos"), made(30, prefix="other", source="scenes")
    first, second = written(tmp_path, a, "a.parquet"), written(tmp_path, [*a[:2], *b], "b.parquet")
    merged = merge_data([first, second], tmp_path / "all.parquet", Merge())
    assert (merged.kept, merged.repeated) == ({"1": 12, "2": 30}, 2)
    assert list(read_trajectories(tmp_path / "all.parquet")) == [*a, *b]
    even = merge_data([first, second], tmp_path / "even.parquet", Merge("source"))
    assert even.kept == {"photos": 12, "scenes": 12}
    weighted = merge_data([first, second], tmp_path / "weighted.parquet", Merge("input", {"2": 2}))
    assert weighted.kept == {"1": 12, "2": 24}
    assert [one["data"] for one in made_by(tmp_path / "all.parquet")["made_from"]] == [str(first), str(second)]


def test_merges_that_make_no_sense(tmp_path: Path) -> None:
    first, second = written(tmp_path, made(4), "a.parquet"), written(tmp_path, made(4, question="Other?"), "b.parquet")
    with pytest.raises(CurationError, match="another row with the id 'row-000'"):
        merge_data([first, second], tmp_path / "out.parquet", Merge())
    with pytest.raises(CurationError, match="given twice"):
        merge_data([first, first], tmp_path / "out.parquet", Merge())
    with pytest.raises(CurationError, match="no skill is called cooking; there are test"):
        merge_data([first], tmp_path / "out.parquet", Merge("skill", {"cooking": 1}))
    with pytest.raises(CurationError, match="weights need something to balance"):
        Merge(weights={"1": 2})


# hashes


def variants() -> dict[str, Callable[[Image.Image], Image.Image]]:
    return {
        "smaller": lambda image: image.resize((image.width // 2, image.height // 2)),
        "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.05),
        "stretched": lambda image: image.resize((200, 120)),
    }


def hash_of(image: Image.Image) -> int:
    value = perceptual_hash(np.asarray(image))
    assert value is not None
    return value


def test_perceptual_hashes_of_one_picture_are_near_and_of_others_far() -> None:
    hashes = [hash_of(drawing(n)) for n in range(40)]
    for change in variants().values():
        assert max((hash_of(change(drawing(n))) ^ hashes[n]).bit_count() for n in range(40)) <= 6
    assert min((a ^ b).bit_count() for n, a in enumerate(hashes) for b in hashes[:n]) > 8
    assert perceptual_hash(np.full((20, 30, 3), 77, np.uint8)) is None


def test_banded_search_finds_the_pairs_that_comparing_all_finds() -> None:
    random = np.random.default_rng(0)
    centres = random.integers(0, 2**64, 40, np.uint64)
    flips = np.array(
        [sum(1 << int(bit) for bit in random.choice(64, n % 9, replace=False)) for n in range(800)], np.uint64
    )
    values = np.unique(np.repeat(centres, 20) ^ flips)
    apart = np.bitwise_count(values[:, None] ^ values[None, :])
    for distance in (0, 1, 4, 12):
        expected = {(i, j) for i, j in zip(*np.nonzero(apart <= distance), strict=True) if i < j}
        assert {(min(pair), max(pair)) for pair in near_pairs(values, distance)} == expected
    assert list(near_pairs(np.array([], np.uint64), 4)) == []


def test_nearest() -> None:
    assert nearest([0b1011, None, 0b1], [0b0, 0b1111, None], 2) == [(1, 1), None, (0, 1)]
    assert nearest([5], [], 2) == [None]
    assert nearest([2**63 + 1], [1], 0) == [None]


def test_images_are_decoded_once_and_unreadable_ones_counted() -> None:
    index = ImageIndex(perceptual=True)
    a, b = encoded(drawing(1)).data, encoded(drawing(1), quality=30).data
    assert [index.add(one) for one in (a, b"x", a, b, b"x")] == [0, 1, 0, 2, 1]
    assert (index.groups(4), index.unreadable) == ([0, 1, 0], 1)
    assert 0 <= share(1, b"a") < 1


# dedup


def test_dedup_across_datasets(tmp_path: Path) -> None:
    a = made(20)
    again = [replace(one, id=f"again-{n}", image=encoded(drawing(n), quality=40)) for n, one in enumerate(a[:5])]
    other_question = [replace(one, id=f"asks-{n}", question="Is there anything else?") for n, one in enumerate(again)]
    first, second = written(tmp_path, a, "a.parquet"), written(tmp_path, [*again, *other_question], "b.parquet")
    found = dedup_data([first, second], tmp_path / "out.parquet", Dedup())
    assert list(read_trajectories(tmp_path / "out.parquet")) == [*a, *other_question]
    assert [(one.id, one.of) for one in found.left_out] == [(f"again-{n}", f"row-00{n}") for n in range(5)]
    assert all(one.bits <= 4 for one in found.left_out)
    assert dedup_data([first, second], tmp_path / "one.parquet", Dedup(images_only=True)).kept == 20
    against = dedup_data([second], tmp_path / "new.parquet", Dedup(), [first])
    assert (against.kept, against.left_out[0]) == (5, Duplicate("again-0", "row-000", found.left_out[0].bits))
    with pytest.raises(CurationError, match="none of 30 trajectories is left"):
        dedup_data([second], tmp_path / "none.parquet", Dedup(images_only=True), [first])


def test_dedup_keeps_other_answers_unless_the_image_is_the_very_same(tmp_path: Path) -> None:
    """Of greys the hash knows nothing: the answer may stand in a colour."""
    (one,) = made(1)
    colour = replace(one, id="colour", image=encoded(drawing(0), quality=40), answer="other")
    label = replace(one, id="label", answer="other")
    data = written(tmp_path, [one, colour, label], "a.parquet")
    found = dedup_data([data], tmp_path / "out.parquet", Dedup())
    assert [row.id for row in read_trajectories(tmp_path / "out.parquet")] == [one.id, "colour"]
    assert [(left.id, left.of) for left in found.left_out] == [("label", one.id)]
    near = replace(one, id="near", image=colour.image)
    data = written(tmp_path, [one, near, replace(near, id="third", answer="other")], "b.parquet")
    found = dedup_data([data], tmp_path / "chain.parquet", Dedup())
    assert [(left.id, left.of) for left in found.left_out] == [("near", one.id), ("third", one.id)]


def test_dedup_against_a_test_set_leaves_none_of_its_questions_whatever_the_answer(tmp_path: Path) -> None:
    test, other = made(2)
    near = replace(test, id="near", image=encoded(drawing(0), quality=40), answer="Left.")
    asks = replace(near, id="asks", question="Is there anything else?")
    against, data = written(tmp_path, [test], "test.parquet"), written(tmp_path, [near, asks, other], "train.parquet")
    found = dedup_data([data], tmp_path / "out.parquet", Dedup(), [against])
    assert [(left.id, left.of) for left in found.left_out] == [("near", test.id)]
    assert list(read_trajectories(tmp_path / "out.parquet")) == [asks, other]


# decontamination


def benchmark(folder: Path) -> Path:
    """Drawings 1 and 2 as files, 3 in Parquet; three questions in the layouts of published benchmarks."""
    (folder / "images").mkdir(parents=True)
    drawing(1).resize((90, 90)).save(folder / "images" / "1.png")
    drawing(2).save(folder / "images" / "two.webp")
    (folder / "images" / "broken.jpg").write_bytes(b"no picture")
    image = {"bytes": encoded(drawing(3), quality=60).data, "path": "3.jpg"}
    pq.write_table(
        pa.Table.from_pylist([{"idx": "a", "image_1": image, "question": "How many <image 1> red cups are there?"}]),
        folder / "val.parquet",
    )
    (folder / "Questions.csv").write_text(
        'Index,Question,Options\n1,"Is the dog\'s tail up, or down?",(a) up (b) down\n'
    )
    text = "What is shown at the place 7?\n(A) a cup\n(B) a hat\nAnswer with the option's letter."
    (folder / "test.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (folder / "bad.jsonl").write_text("{")
    return folder


def test_decontamination(tmp_path: Path) -> None:
    data, out = written(tmp_path, made(20)), tmp_path / "out.parquet"
    folder = benchmark(tmp_path / "bench")
    found = decontaminate(data, {"tiny": folder}, out, Decontamination())
    assert {match.id: match.image for match in found.matches} == {
        "row-001": "images/1.png",
        "row-002": "images/two.webp",
        "row-003": "val.parquet row 1 image_1",
        "row-007": None,
    }
    assert {match.id: match.question for match in found.matches}["row-007"] == "test.jsonl row 1"
    assert ids(out) == [one.id for one in made(20) if one.id not in {match.id for match in found.matches}]
    assert (found.rows, found.kept) == (20, 16)
    assert found.benchmarks["tiny"]["questions"] == 3
    assert [line.split(":")[0] for line in found.benchmarks["tiny"]["unreadable"]] == ["bad.jsonl", "images/broken.jpg"]
    as_json, as_markdown = write_report(found, tmp_path / "report")
    assert json.loads(as_json.read_text())["matches"][0]["image"] == "images/1.png"
    assert "| row-007 | tiny |  |  | test.jsonl row 1 | yes |" in as_markdown.read_text()


@pytest.mark.parametrize(("cause", "left"), [("image", 17), ("question", 19), ("both", 20), ("either", 16)])
def test_causes(cause: Any, left: int, tmp_path: Path) -> None:
    data = written(tmp_path, made(20))
    found = decontaminate(data, {"tiny": benchmark(tmp_path / "bench")}, None, Decontamination(cause=cause))
    assert found.kept == left
    assert Counter(match.left_out for match in found.matches)[True] == 20 - left


def test_benchmarks_that_hold_nothing(tmp_path: Path) -> None:
    data = written(tmp_path, made(2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CurationError, match="holds no image and no column named question or text"):
        decontaminate(data, {"e": tmp_path / "empty"}, None, Decontamination())
    with pytest.raises(CurationError, match="is no folder"):
        decontaminate(data, {"e": tmp_path / "nothing"}, None, Decontamination())


@pytest.mark.parametrize(
    ("text", "stem"),
    [
        ("<image>\nWhere is the red cup?\nOptions: left, right", "where is the red cup"),
        ("Where is the red cup? (A) left (B) right", "where is the red cup"),
        ("Which one is it?", "which one is it"),
        ("What is it?", None),
        ("", None),
    ],
)
def test_what_of_a_question_is_compared(text: str, stem: str | None) -> None:
    assert asked(text) == stem


# the commands


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(written(tmp_path, made(40)))
    benchmark(tmp_path / "bench")
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    for one in (
        curation.split, curation.merge, curation.sample, curation.filter, curation.dedup, curation.decontaminate,
        exporting.export,
    ):  # fmt: skip
        app.command()(one)
    commands = {
        f"split {data} --out splits --parts train=0.5,test=0.5": "in splits",
        "merge splits/train-00000-of-00001.parquet splits/test-00000-of-00001.parquet --out merged.parquet --balance input": "in merged.parquet",
        f"sample {data} --out sample.parquet --count 5 --balance skill": "5 trajectories in sample.parquet: test 5",
        f"filter {data} --out filtered.parquet --min-width 100": "40 trajectories in filtered.parquet",
        f"dedup {data} --out unique.parquet --report unique.json": "40 trajectories in unique.parquet; 0 near",
        f"decontaminate {data} --bench tiny=bench --out clean.parquet": "36 of 40 trajectories in clean.parquet; 4 m",
        "export openai clean.parquet --out openai --inline-images": "36 trajectories with 72 images in openai",
        "export trl clean.parquet --out trl.parquet --template published-lvr": "--back cannot read this export",
    }
    for command, said in commands.items():
        assert run(partial(app, command.split())) == 0, command
        assert said in capsys.readouterr().out
    assert (tmp_path / "clean.overlap.json").is_file()
    assert run(partial(app, ["split", data, "--out", "again", "--parts", "train"])) == 2
    assert run(partial(app, ["split", data, "--out", "again", "--parts", "train=1,train=2"])) == 2
    twice = ["--bench", "tiny=bench", "--bench", "tiny=elsewhere"]
    assert run(partial(app, ["decontaminate", data, *twice, "--out", "again.parquet"])) == 2
    assert [(one.name, one.rows) for one in make_plan("splits").splits] == [
        (name, len(ids(Path(f"splits/{name}-00000-of-00001.parquet")))) for name in ("train", "test")
    ]
    with pytest.raises(DataError, match="splits holds test, train: name one"):
        resolve_split("splits")
    assert run(partial(app, ["split", data, "--out", "splits"])) == 1


def test_what_of_a_benchmark_cannot_be_compared_is_named(tmp_path: Path) -> None:
    folder = benchmark(tmp_path / "bench")
    (folder / "cut.png").write_bytes(encoded(drawing(99)).data[:-300])
    (folder / "nested.json").write_text(json.dumps({"questions": [{"question": "What is it?"}]}))
    report = decontaminate(written(tmp_path, made(5)), {"b": folder}, None, Decontamination())
    unread = report.benchmarks["b"]["unreadable"]
    named = [one.partition(":")[0] for one in unread]
    assert named == ["bad.jsonl", "cut.png", "images/broken.jpg", "nested.json"]


def test_when_everything_overlaps_there_is_a_report_and_no_file(tmp_path: Path) -> None:
    data, out = written(tmp_path, made(20)[1:3]), tmp_path / "clean.parquet"
    folder = benchmark(tmp_path / "bench")
    app = typer.Typer()
    app.command()(curation.decontaminate)
    assert run(partial(app, [str(data), "--bench", f"tiny={folder}", "--out", str(out)])) == 1
    assert len(json.loads((tmp_path / "clean.overlap.json").read_text())["matches"]) == 2
    assert not out.exists()
