"""Trajectories in Parquet: exact round trips, what `datasets` makes of them, and clear words about foreign files."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pearl.errors import PearlError
from pearl.images import encode
from pearl.parquet import (
    ROWS_PER_GROUP,
    SCHEMA_VERSION,
    DataError,
    TrajectoryWriter,
    concatenate,
    count_rows,
    open_parquet,
    read_metadata,
    read_trajectories,
    resolve,
    schema,
    to_row,
    write_trajectories,
)
from pearl.pipelines.inspection import inspect_data
from pearl.pipelines.validation import validate_data
from pearl.records import EncodedImage, Observation, Step, ToolCall, Trajectory


def picture(shade: int, width: int = 12, height: int = 10) -> EncodedImage:
    return EncodedImage(encode(np.full((height, width, 3), shade, np.uint8), "png"))


STEPS = (
    Step(
        "I look closer.", ToolCall("crop", {"image": 0, "box": [0.1, 0.2, 0.6, 0.9]}), Observation("Cut.", picture(50))
    ),
    Step("I read.", ToolCall("ocr", {}), Observation("No text found.")),
)
ONE = Trajectory(
    id="a1",
    image=EncodedImage(picture(200).data, "photo.png"),
    question="Which colour has “it” — 什么？",
    choices=("red", "grey"),
    answer="grey",
    steps=STEPS,
    conclusion="It is grey.",
    expert="annotations",
    skill="attribute",
    source="photos",
    license="CC0-1.0",
    seed=2**63 - 1,
)


def written(path: Path, count: int = 1, **changes: Any) -> Path:
    write_trajectories(path, (replace(ONE, id=f"a{i}", **changes) for i in range(count)))
    return path


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
images = st.builds(EncodedImage, st.binary(min_size=1, max_size=30), st.none() | text)
steps = st.builds(
    Step,
    thought=text,
    call=st.builds(ToolCall, text, st.dictionaries(text, json_values, max_size=4)),
    observation=st.builds(Observation, text, st.none() | images),
)
trajectories = st.builds(
    Trajectory,
    **dict.fromkeys(("id", "question", "answer", "conclusion", "expert", "skill", "source", "license"), text),
    image=images,
    choices=st.lists(text, max_size=4).map(tuple),
    steps=st.lists(steps, max_size=3).map(tuple),
    seed=st.integers(-(2**63), 2**63 - 1),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(trajectories, max_size=4))
def test_what_is_written_is_read(tmp_path: Path, rows: list[Trajectory]) -> None:
    file = tmp_path / "rows.parquet"
    write_trajectories(file, rows)
    assert list(read_trajectories(file)) == rows


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a.parquet", 70), written(tmp_path / "b.parquet", 70)
    assert a.read_bytes() == b.read_bytes()


def test_arguments_of_different_tools_are_not_merged(tmp_path: Path) -> None:
    first, second = (step.call.arguments for step in next(read_trajectories(written(tmp_path / "a.parquet"))).steps)
    assert (first, second) == ({"image": 0, "box": [0.1, 0.2, 0.6, 0.9]}, {})


def test_the_schema_is_what_datasets_would_write() -> None:
    value, image = datasets.Value, datasets.Image()
    step = {**dict.fromkeys(("thought", "tool", "arguments", "text"), value("string")), "image": image}
    columns = ["id", "question", "answer", "conclusion", "expert", "skill", "source", "license"]
    features = datasets.Features(
        {
            **dict.fromkeys(columns, value("string")),
            "image": image,
            "choices": datasets.List(value("string")),
            "steps": datasets.List(step),
            "seed": value("int64"),
        }
    )
    features = datasets.Features({name: features[name] for name in schema().names})
    assert schema().equals(features.arrow_schema, check_metadata=False)
    ours, theirs = (json.loads(s.metadata[b"huggingface"]) for s in (schema(), features.arrow_schema))
    assert ours["info"]["features"] == theirs["info"]["features"]


def test_load_dataset_decodes_all_images(tmp_path: Path) -> None:
    files, cache = str(written(tmp_path / "a.parquet", 3)), str(tmp_path / "cache")
    whole = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    stream = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache, streaming=True)
    assert whole.num_rows == 3
    for row in (whole[0], next(iter(stream))):
        assert isinstance(row["image"], Image.Image)
        assert row["image"].getpixel((0, 0)) == (200, 200, 200)
        crop, ocr = row["steps"]
        assert isinstance(crop["image"], Image.Image)
        assert (crop["image"].size, crop["image"].getpixel((3, 3))) == ((12, 10), (50, 50, 50))
        assert ocr["image"] is None
        assert json.loads(crop["arguments"]) == STEPS[0].call.arguments
        assert row["choices"] == ["red", "grey"]


def test_row_groups_are_small_and_pages_are_indexed(tmp_path: Path) -> None:
    metadata = pq.ParquetFile(written(tmp_path / "a.parquet", 150)).metadata
    assert ROWS_PER_GROUP == 64
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [64, 64, 22]
    for group in range(metadata.num_row_groups):
        assert metadata.row_group(group).column(0).has_offset_index
        assert metadata.row_group(group).column(0).has_column_index


def test_a_file_of_no_rows_is_whole(tmp_path: Path) -> None:
    file = written(tmp_path / "none.parquet", 0)
    assert list(read_trajectories(file)) == []
    assert count_rows(file) == 0


def test_metadata_keeps_how_the_file_was_made(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    with TrajectoryWriter(file, {"fingerprint": "ff", "config": {"seed": 3}}) as writer:
        writer.write(ONE)
    kept = read_metadata(open_parquet(file).schema_arrow)
    assert kept == {"schema_version": SCHEMA_VERSION, "fingerprint": "ff", "config": {"seed": 3}}


@pytest.mark.parametrize(("version", "advice"), [(SCHEMA_VERSION + 1, "upgrade pearl-vlm"), (0, "make it again")])
def test_another_schema_version_is_refused_with_advice(tmp_path: Path, version: int, advice: str) -> None:
    file = tmp_path / "other.parquet"
    table = pq.read_table(written(tmp_path / "a.parquet"))
    pq.write_table(table.replace_schema_metadata({"pearl": json.dumps({"schema_version": version})}), file)
    with pytest.raises(DataError, match=rf"other\.parquet has trajectory schema version {version}.*{advice}"):
        list(read_trajectories(file))


def test_shards_that_others_promise_are_missed(tmp_path: Path) -> None:
    for name in ("train-00000-of-00003", "train-00002-of-00003", "test-00000-of-00001", "other"):
        write_trajectories(tmp_path / f"{name}.parquet", [replace(ONE, id=name)])
    rows, problems = validate_data(str(tmp_path))
    assert rows == 4
    assert problems == [f"{tmp_path}/train-00001-of-00003.parquet is missing"]
    write_trajectories(tmp_path / "train-00001-of-00003.parquet", [replace(ONE, id="found")])
    for some in ("train-00000-of-00003.parquet", "train-0000[01]*"):
        assert validate_data(str(tmp_path / some))[1] == []


def test_other_columns_than_the_version_says_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.parquet"
    table = pq.read_table(written(tmp_path / "a.parquet"))
    pq.write_table(table.drop_columns(["seed"]), file)
    with pytest.raises(DataError, match=r"other\.parquet claims schema version .* columns differ"):
        open_parquet(file)


def test_foreign_parquet_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"x": [1, 2]}), file)
    with pytest.raises(DataError, match=r"foreign\.parquet holds no Pearl trajectories"):
        list(read_trajectories(file))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all", None])
def test_what_is_no_parquet_or_truncated_is_refused(tmp_path: Path, content: bytes | None) -> None:
    whole = written(tmp_path / "a.parquet", 20).read_bytes()
    file = tmp_path / "cut.parquet"
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    for metadata in (b"not json", b"[1]", b"null"):
        pq.write_table(pa.table({"id": ["a"]}).replace_schema_metadata({b"pearl": metadata}), tmp_path / "odd.parquet")
        with pytest.raises(DataError, match=r"odd\.parquet holds no Pearl trajectories"):
            open_parquet(tmp_path / "odd.parquet")
    with pytest.raises(DataError, match=r"cut\.parquet is not a readable Parquet file"):
        list(read_trajectories(file))


def test_damage_in_the_middle_is_said_and_the_other_rows_are_still_checked(tmp_path: Path) -> None:
    file = tmp_path / "damaged.parquet"
    data = bytearray(written(file, 150).read_bytes())
    page = pq.ParquetFile(file).metadata.row_group(1).column(0)
    start = page.data_page_offset
    data[start : start + page.total_compressed_size] = bytes(page.total_compressed_size)
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"damaged\.parquet is damaged in row group 1"):
        list(read_trajectories(file))
    rows, problems = validate_data(str(file))
    assert rows == 150 - ROWS_PER_GROUP
    assert len(problems) == 1
    assert problems[0].startswith(f"{file} is damaged in row group 1: ")
    assert "\n" not in problems[0]


def test_a_row_without_an_image_is_refused(tmp_path: Path) -> None:
    table = pq.read_table(written(tmp_path / "a.parquet"))
    nothing = pa.array([None], table.schema.field("image").type)
    pq.write_table(table.set_column(1, table.schema.field("image"), nothing), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="row 'a0' has no image"):
        list(read_trajectories(tmp_path / "b.parquet"))


def test_resolve_finds_a_file_a_folder_and_a_glob(tmp_path: Path) -> None:
    data = tmp_path / "out" / "data"
    data.mkdir(parents=True)
    first, second = written(data / "x-0.parquet"), written(data / "x-1.parquet")
    (tmp_path / "out" / "run").mkdir()
    written(tmp_path / "out" / "run" / "_plan.parquet")
    written(data / ".x-2.parquet.tmp")
    assert resolve(first) == [first]
    assert resolve(tmp_path / "out") == [first, second]
    assert resolve(str(data / "x-*.parquet")) == [first, second]
    assert resolve(str(tmp_path / "**" / "x-1.parquet")) == [second]
    assert count_rows(tmp_path / "out") == 2
    (tmp_path / "spark.parquet").mkdir()
    part = written(tmp_path / "spark.parquet" / "part-0.parquet")
    assert resolve(tmp_path) == [first, second, part]
    assert resolve(str(tmp_path / "s*" / "**")) == [part]
    with pytest.raises(DataError, match="no Parquet file at"):
        resolve(str(tmp_path / "*.parquet"))


@pytest.mark.parametrize("place", ["nothing.parquet", "empty", "no*.parquet", "."])
def test_resolve_says_what_it_expected(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no Parquet file at .*expected a file, a folder, a glob or a Hub dataset id"):
        resolve(tmp_path / place)


def test_a_hub_id_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for place in ("org/no-such-thing", "org/*"):
        with pytest.raises(DataError, match=f"{re.escape(place)} is no local path, and the Hub does not give it"):
            resolve(place)


def test_concatenate_keeps_rows_order_and_schema(tmp_path: Path) -> None:
    parts = [written(tmp_path / f"{i}.parquet", count, seed=i) for i, count in enumerate((70, 0, 3))]
    whole = tmp_path / "whole.parquet"
    concatenate(parts, whole, {"fingerprint": "ff"})
    assert list(read_trajectories(whole)) == [row for part in parts for row in read_trajectories(part)]
    file = open_parquet(whole)
    assert file.metadata.num_rows == 73
    assert max(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)) <= ROWS_PER_GROUP
    assert (read_metadata(file.schema_arrow) or {})["fingerprint"] == "ff"
    assert file.metadata.row_group(0).column(0).has_offset_index
    assert datasets.Features.from_arrow_schema(file.schema_arrow)["image"] == datasets.Image()


def test_inspection_counts_without_images(tmp_path: Path) -> None:
    found = inspect_data(str(written(tmp_path / "a.parquet", 5)))
    assert (found.rows, found.files) == (5, 1)
    assert found.tools == {"crop": 5, "ocr": 5}
    assert found.steps == {2: 5}
    assert 0 < found.image_bytes < found.bytes


def test_validation_names_row_and_reason(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    bad_call = Step("I look.", ToolCall("crop", {"image": 3, "box": [0.9, 0, 0.1, 1]}), Observation("Cut."))
    rows = [
        ONE,
        ONE,
        replace(ONE, id="b", image=EncodedImage(b"no image")),
        replace(ONE, id="c", answer="blue"),
        replace(ONE, id="d", steps=(bad_call,)),
        replace(ONE, id="e", steps=(), conclusion=""),
    ]
    write_trajectories(file, rows)
    count, problems = validate_data(str(file))
    said = "\n".join(problems)
    assert count == 6
    for expected in (
        f"{file} row 1 (a1): the id stands already in {file} row 0",
        "row 2 (b): the image: not an image",
        "row 3 (c): the answer 'blue' is not among the choices",
        "row 4 (d): step 1: there is no image 3",
        "row 4 (d): step 1: bad arguments for crop: box",
        "row 5 (e): empty: conclusion",
        "row 5 (e): there is no step",
    ):
        assert expected in said
    assert len(problems) == 7


ARGUMENTS = [
    ("{", "the arguments are not JSON"),
    ("[1]", "the arguments are a JSON list, not a JSON object"),
    ('"crop"', "the arguments are a JSON str, not a JSON object"),
    (None, "the arguments are null, not a JSON object"),
    ("[" * 100_000, "the arguments are nested too deeply"),
    ('{"a":' * 200 + "1" + "}" * 200, "the arguments are nested too deeply"),
]


@pytest.mark.parametrize(("arguments", "reason"), ARGUMENTS)
def test_arguments_that_are_no_object_are_said_and_the_rest_is_still_checked(
    tmp_path: Path, arguments: str | None, reason: str
) -> None:
    file = tmp_path / "bad.parquet"
    rows = [to_row(replace(ONE, id=f"a{i}")) for i in range(3)]
    rows[1]["steps"][1]["arguments"] = arguments
    pq.write_table(pa.Table.from_pylist(rows, schema()), file)
    with pytest.raises(DataError, match=f"row 'a1' step 2.*{reason}") as raised:
        list(read_trajectories(file))
    assert isinstance(raised.value, PearlError)
    count, (problem,) = validate_data(str(file))
    assert count == 3
    assert reason in problem
    assert inspect_data(str(file)).tools == {"crop": 3, "ocr": 3}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (("question",), "row 'a1': question is null"),
        (("answer",), "row 'a1': answer is null"),
        (("conclusion",), "row 'a1': conclusion is null"),
        (("choices", 0), "row 'a1': one of the choices is null"),
        (("steps", 1, "thought"), "row 'a1' step 2: thought is null"),
        (("steps", 1, "tool"), "row 'a1' step 2: tool is null"),
        (("steps", 1, "text"), "row 'a1' step 2: text is null"),
    ],
)
def test_texts_that_are_null_are_said(tmp_path: Path, place: tuple[str | int, ...], said: str) -> None:
    rows: list[Any] = [to_row(replace(ONE, id=f"a{i}")) for i in range(2)]
    *before, last = place
    inside = rows[1]
    for name in before:
        inside = inside[name]
    inside[last] = None
    file = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema()), file)
    with pytest.raises(DataError, match=said):
        list(read_trajectories(file))


def test_facts_that_are_null_are_read_as_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    facts = ("expert", "skill", "source", "license", "seed")
    pq.write_table(pa.Table.from_pylist([{**to_row(ONE), **dict.fromkeys(facts)}], schema()), file)
    assert list(read_trajectories(file)) == [replace(ONE, expert="", skill="", source="", license="", seed=0)]


def test_rows_without_steps_and_null_steps_are_reported_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "bad.parquet"
    rows = [to_row(replace(ONE, id=f"a{i}")) for i in range(2)]
    rows[0]["steps"], rows[1]["steps"] = None, [None]
    pq.write_table(pa.Table.from_pylist(rows, schema()), file)
    count, problems = validate_data(str(file))
    assert count == 2
    assert "there is no step" in problems[0]
    assert "row 'a1' step 1 is null" in problems[1]
    assert inspect_data(str(file)).steps == {0: 2}


def test_validation_accepts_pictures_above_the_limit_of_a_run(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (8100, 8000)).save(buffer, "PNG")
    file = written(tmp_path / "large.parquet", image=EncodedImage(buffer.getvalue()))
    assert validate_data(str(file)) == (1, [])


def test_large_images_end_a_row_group_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pearl.parquet.BYTES_PER_GROUP", 2500)
    metadata = pq.ParquetFile(written(tmp_path / "a.parquet", 7, image=EncodedImage(bytes(1000)))).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [3, 3, 1]


def test_the_run_folder_of_a_single_file_is_skipped_where_the_file_is(tmp_path: Path) -> None:
    (tmp_path / "x.parquet.run" / "data").mkdir(parents=True)
    part = written(tmp_path / "x.parquet.run" / "data" / "x-0.parquet")
    assert resolve(tmp_path) == [part]
    whole = written(tmp_path / "x.parquet")
    assert resolve(tmp_path) == [whole]
    assert resolve(tmp_path / "x.parquet.run") == [part]
