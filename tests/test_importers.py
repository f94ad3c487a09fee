"""Published layouts go in, trajectories with the right crops come out; what is dropped is counted by its reason.

1. Crops are exact: pixel for pixel what the data's own convention says, for any size and box.
2. Recorded images and texts come through untouched, from every container.
3. Every broken row is dropped alone, under its reason; kept + rejected + quarantined = planned.
4. Workers, crashes and resuming change no byte.
5. What is carried out again is compared with the record.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_BZIP2, ZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from pearl.boxes import pixel_box
from pearl.cli.importing import import_
from pearl.images import decode, encode
from pearl.parquet import read_trajectories
from pearl.pipelines.engines import EngineConfig
from pearl.pipelines.errors import Rejected, RunError
from pearl.pipelines.generate import OutputPolicy, generate, preview
from pearl.pipelines.importers import importer_class, importer_names, pixelreasoner, taco
from pearl.pipelines.importers.base import Dialogue, Importer, ImportOptions, concluded, final_answer, whole_pixels
from pearl.pipelines.importers.config import ImportConfig
from pearl.pipelines.importers.images import Images, check_images
from pearl.pipelines.importers.rows import Row
from pearl.pipelines.importers.visual_cot import off_the_square
from pearl.pipelines.replay import RecordedStep
from pearl.pipelines.sources import SourceError, SourceOptions
from pearl.pipelines.sources.base import BadRecord
from pearl.pipelines.validation import validate_data
from pearl.records import Observation, ToolCall, Trajectory

LOCAL = EngineConfig(engine="local")
WIDTH, HEIGHT = 200, 120


def picture(path: Path, seed: int, width: int = WIDTH, height: int = HEIGHT, kind: str = "png") -> np.ndarray:
    """Writes noise, in which every crop is told from every other; returns its pixels as they are read."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pixels, kind))  # type: ignore[arg-type]
    return decode(path.read_bytes())


def save(path: Path, pixels: np.ndarray) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pixels, "png"))
    return path.read_bytes()


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        path.write_text(json.dumps(rows, indent=1))
    return path


def config(kind: str, *places: Path | str, images: Path | None = None, **changes: Any) -> ImportConfig:
    options = SourceOptions(images=None if images is None else str(images))
    tools = importer_class(kind).tools
    return ImportConfig(tuple(map(str, places)), options, tools, image_format="png", kind=kind, **changes)


def imported(
    settings: ImportConfig, out: Path, engine: EngineConfig = LOCAL
) -> tuple[list[Trajectory], dict[str, Any]]:
    manifest = generate(settings, out, engine, OutputPolicy())
    rejected = sum(manifest["rejected"].values())
    assert manifest["kept"] + rejected + manifest["quarantined"] == manifest["planned"]
    assert manifest["quarantined"] == 0, list(lines(out, "refused"))
    if manifest["kept"]:
        assert validate_data(str(out)) == (manifest["kept"], [])
    return list(read_trajectories(out)) if manifest["kept"] else [], manifest


def lines(out: Path, folder: str) -> Iterator[dict[str, Any]]:
    for path in sorted((out / "run" / folder).glob("*.jsonl")):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def shown(trajectory: Trajectory, step: int) -> np.ndarray:
    image = trajectory.steps[step - 1].observation.image
    assert image is not None
    return decode(image.data)


def test_a_place_may_be_called_like_a_kind_of_source(tmp_path: Path) -> None:
    """`photos` reads no images' folder; a format does."""
    assert config("lvr", "photos", images=tmp_path).sources == ("photos",)


def lvr_row(path: str, boxes: list[Any], reply: str, **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat lies there?\nBe brief."}, {"from": "gpt", "value": reply}]
    return {
        "dataset": "own", "split": "train", "question_id": 1, "image": [path], "conversations": turns, "bboxes": boxes,
        **changes,
    }  # fmt: skip


ONE = "<lvr>\n<answer> a red cup </answer>"
BOX = [0.25, 0.1, 0.613, 0.777]


def test_lvr_crops_each_box_of_the_image_itself(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "own" / "1.png", 1)
    two = "First the left. <lvr>\nNow the right.\n<lvr>\nBoth are cups.\n<answer>cups</answer>"
    second = [0.5, 0.5, 1.0, 1.0]
    rows = [lvr_row("own/1.png", [BOX], ONE), lvr_row("own/1.png", [BOX, second], two)]
    (single, double), _ = imported(config("lvr", write_rows(tmp_path / "d.json", rows)), tmp_path / "out")
    assert single.question == "What lies there?\nBe brief."
    assert (single.answer, single.conclusion, single.expert) == ("a red cup", "a red cup", "recorded")
    assert (single.source, single.skill, single.license) == ("lvr:own", "grounding", "unknown")
    assert single.image.data == (tmp_path / "own" / "1.png").read_bytes()
    assert single.steps[0].call == ToolCall("crop", {"image": 0, "box": BOX})
    covered = pixels[int(0.1 * HEIGHT) : int(np.ceil(0.777 * HEIGHT)), 50 : int(np.ceil(0.613 * WIDTH))]
    for trajectory in (single, double):
        assert (shown(trajectory, 1) == covered).all()
    assert (shown(double, 2) == pixels[60:, 100:]).all()
    assert [step.thought for step in double.steps] == ["First the left.", "Now the right."]
    assert double.conclusion == "Both are cups.\ncups"


def test_an_lvr_meta_file_leads_to_data_and_images(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / "1.png", 1)
    write_rows(tmp_path / "data" / "a.json", [lvr_row("1.png", [BOX], ONE)])
    write_rows(tmp_path / "data" / "b.json", [lvr_row("1.png", [BOX], ONE)])
    entries = [{"ds_name": n, "data_path": f"data/{n}.json", "image_folder": "pictures"} for n in "ab"]
    meta = write_rows(tmp_path / "meta.json", entries)
    found, _ = imported(config("lvr", meta), tmp_path / "out")
    assert len(found) == 2
    assert imported(config("lvr", tmp_path / "data", images=tmp_path / "pictures"), tmp_path / "again")[1]["kept"] == 2
    write_rows(meta, [{"ds_name": "x", "data_path": "../secret.json", "image_folder": "pictures"}])
    with pytest.raises(SourceError, match=r"meta.json, entry 1: ../secret.json: the path leaves the folder"):
        generate(config("lvr", meta), tmp_path / "bad", LOCAL, OutputPolicy())


def visual_cot_row(path: str, pixels: list[int] | None, square: str, **changes: Any) -> dict[str, Any]:
    instruction = (
        " Please provide the bounding box coordinate of the region that can help you answer the question better."
    )
    said = ["<image>\nWhich colour?" + instruction, square, "<image>", "green"]
    turns = [{"from": who, "value": value} for who, value in zip(("human", "gpt") * 2, said, strict=True)]
    entries = [path] if pixels is None else [path, f"{path}###{pixels}"]
    return {"dataset": "own", "split": "train", "question_id": 0, "image": entries, "conversations": turns, **changes}


def padded_to_square(box: list[int], width: int, height: int) -> str:
    """As Visual-CoT's conversion does it."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    moved = [box[0] + left, box[1] + top, box[2] + left, box[3] + top]
    return "[" + ", ".join(f"{value / side:.3f}" for value in moved) + "]"


@pytest.mark.parametrize(("width", "height"), [(200, 120), (121, 333), (90, 90)])
def test_visual_cot_crops_the_pixels_and_undoes_the_square(tmp_path: Path, width: int, height: int) -> None:
    pixels = picture(tmp_path / "cot" / "own" / "1.png", 1, width, height)
    box = [11, 23, 60, 77]
    square = padded_to_square(box, width, height)
    rows = [visual_cot_row("cot/own/1.png", box, square), visual_cot_row("cot/own/1.png", None, square)]
    found, _ = imported(config("visual-cot", write_rows(tmp_path / "d.json", rows)), tmp_path / "out")
    for trajectory in found:
        assert (trajectory.question, trajectory.answer, trajectory.source) == (
            "Which colour?",
            "green",
            "visual-cot:own",
        )
        assert (shown(trajectory, 1) == pixels[23:77, 11:60]).all(), "3 decimals of at most 333 pixels round back"


def test_the_square_of_a_large_image_is_undone_to_its_rounding() -> None:
    generator = random.Random(0)
    for _ in range(300):
        width, height = generator.randint(20, 4000), generator.randint(20, 4000)
        box = [generator.randint(0, width - 2), generator.randint(0, height - 2), width, height]
        back = off_the_square(json.loads(padded_to_square(box, width, height)), (width, height))
        assert np.allclose(back, box, atol=0.0005 * max(width, height) + 1e-6)


def test_whole_pixels_are_cropped_exactly_whatever_the_size() -> None:
    generator = random.Random(0)
    for _ in range(20_000):
        width, height = generator.randint(2, 5000), generator.randint(2, 5000)
        left, top = generator.randint(0, width - 1), generator.randint(0, height - 1)
        right, bottom = generator.randint(left + 1, width), generator.randint(top + 1, height)
        box = whole_pixels([left, top, right, bottom], (width, height))
        assert all(0 <= value <= 1 for value in box)
        assert pixel_box(box, width, height) == (left, top, right, bottom)


def thinkmorph_row(folder: Path, **changes: Any) -> dict[str, Any]:
    problem, reasoning = ((folder / name).read_bytes() for name in ("p.png", "r.jpg"))
    return {
        "pid": "7", "question": "Where is it?", "answer": "B", "problem_image_0": {"bytes": problem, "path": "p.png"},
        "resoning_thought_0": "<think>I mark the spot.</think><image_start>",
        "reasoning_image_0": {"bytes": reasoning, "path": None},
        "resoning_thought_1": "<think>It is to the right.</think>", "task": "Visual_Search", "full_text_only_thought": "…",
        **changes,
    }  # fmt: skip


def test_thinkmorph_keeps_both_images_and_both_thoughts(tmp_path: Path) -> None:
    picture(tmp_path / "p.png", 1)
    picture(tmp_path / "r.jpg", 2, kind="jpeg")
    rows = [thinkmorph_row(tmp_path), thinkmorph_row(tmp_path, resoning_thought_1="Right: <answer>B</answer>")]
    data = write_rows(tmp_path / "data" / "train-00000-of-00001.parquet", rows * 2)
    found, manifest = imported(config("thinkmorph", data, license="mit"), tmp_path / "out")
    assert manifest["kept"] == 4
    one, other = found[:2]
    assert (one.question, one.answer, one.skill, one.license) == ("Where is it?", "B", "visual search", "mit")
    assert one.conclusion == "It is to the right.\nThe answer is B."
    assert other.conclusion == "Right: B"
    assert one.image.data == (tmp_path / "p.png").read_bytes()
    (step,) = one.steps
    assert (step.thought, step.call) == ("I mark the spot.", ToolCall("imagine", {"image": 0}))
    assert step.observation.image is not None
    assert step.observation.image.data == (tmp_path / "r.jpg").read_bytes(), "not one byte is changed"


def mirage_row(**changes: Any) -> dict[str, Any]:
    said = "I draw the way. <output_image>\nSo it is \\boxed{left, {then} up}."
    return {
        "text_input": "<image>\nWhich way?",
        "text_output": said,
        "image_input": "m.png",
        "image_output": "h.png",
        **changes,
    }


def test_mirage_puts_the_helper_image_between_its_texts(tmp_path: Path) -> None:
    picture(tmp_path / "m.png", 1)
    picture(tmp_path / "h.png", 2)
    rows = [mirage_row(), mirage_row(image_input=["m.png"], text_output="Go up.")]
    (one, other), _ = imported(config("mirage", write_rows(tmp_path / "d.jsonl", rows)), tmp_path / "out")
    assert (one.question, one.answer) == ("Which way?", "left, {then} up")
    assert one.steps[0].thought == "I draw the way."
    assert one.conclusion == "So it is left, {then} up."
    assert one.steps[0].observation.image is not None
    assert one.steps[0].observation.image.data == (tmp_path / "h.png").read_bytes()
    assert (other.answer, other.conclusion) == ("Go up.", "Go up."), "nothing is marked: the whole text is the answer"
    assert other.steps[0].thought


def part(**given: Any) -> dict[str, Any]:
    """A part with every key, as the nulls of a table fill them."""
    return {"text": None, "image": None, "video": None, **given}


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def pixelreasoner_row(*turns: tuple[str, list[dict[str, Any]]]) -> dict[str, Any]:
    system = ("system", [part(text="Tools: …")])
    return {"message_list": [{"role": role, "content": content} for role, content in (system, *turns)]}


def their_crop(pixels: np.ndarray, box: list[float]) -> np.ndarray:
    """PixelReasoner's executed crop, written down from its description."""
    height, width = pixels.shape[:2]
    across, down = min(0.1, 600 / width), min(0.1, 600 / height)
    x0, y0, x1, y1 = box if max(box) < 1 else (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    x0, y0, x1, y1 = (min(max(v, 0), 1) for v in (x0 - across, y0 - down, x1 + across, y1 + down))
    return pixels[int(y0 * height) : int(y1 * height), int(x0 * width) : int(x1 * width)]


def two_crops(folder: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """A row with a crop of the image in fractions, and one of that crop in pixels; and what they showed."""
    original = picture(folder / "in" / "7.png", 7)
    first = their_crop(original, [0.3, 0.3, 0.6, 0.7])
    second = their_crop(first, [5, 10, 30, 40])
    save(folder / "in" / "7a.png", first)
    save(folder / "in" / "7b.png", second)
    row = pixelreasoner_row(
        ("user", [part(text="Which letter?"), part(image="in/7.png")]),
        ("assistant", [part(text="Closer. " + call("crop_image_normalized", bbox_2d=[0.3, 0.3, 0.6, 0.7], target_image=1))]),
        ("user", [part(text="Here is the cropped image:"), part(image="in/7a.png")]),
        ("assistant", [part(text="Still closer.\n" + call("crop_image_normalized", bbox_2d=[5, 10, 30, 40], target_image=2))]),
        ("user", [part(text="Here is the cropped image:"), part(image="in/7b.png")]),
        ("assistant", [part(text="It is \\boxed{K}.")]),
    )  # fmt: skip
    return row, [original, first, second]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.parquet"])
@pytest.mark.parametrize("reexecute", [False, True])
def test_pixelreasoner_counts_images_from_one_and_pads_its_crops(tmp_path: Path, name: str, reexecute: bool) -> None:
    row, pictures = two_crops(tmp_path)
    data = write_rows(tmp_path / name, [row])
    (trajectory,), manifest = imported(config("pixelreasoner", data, reexecute=reexecute), tmp_path / "out")
    assert (trajectory.question, trajectory.answer, trajectory.conclusion) == ("Which letter?", "K", "It is K.")
    assert [step.thought for step in trajectory.steps] == ["Closer.", "Still closer."]
    assert [step.call.tool for step in trajectory.steps] == ["crop", "crop"]
    assert [step.call.arguments["image"] for step in trajectory.steps] == [0, 1]
    for number, source in enumerate(pictures[:2], start=1):
        left, top, right, bottom = pixel_box(
            trajectory.steps[number - 1].call.arguments["box"], source.shape[1], source.shape[0]
        )
        assert (source[top:bottom, left:right] == pictures[number]).all(), "our call shows what theirs showed"
        assert (shown(trajectory, number) == pictures[number]).all()
    assert manifest.get("reexecuted") == ({"as recorded": 2} if reexecute else None)


def test_their_crops_are_ours_for_any_size() -> None:
    generator = random.Random(1)
    for _ in range(300):
        width, height = generator.randint(40, 9000), generator.randint(40, 60)
        pixels = np.arange(width * height, dtype=np.int64).reshape(height, width)
        x, y = sorted(generator.random() for _ in range(2)), sorted(generator.random() for _ in range(2))
        box = [x[0], y[0], x[1], y[1]]
        if generator.random() < 0.5:
            box = [x[0] * width, y[0] * height, x[1] * width + 1, y[1] * height + 1]
        ours = pixel_box(pixelreasoner.carried_out(box, (width, height)), width, height)
        assert (pixels[ours[1] : ours[3], ours[0] : ours[2]] == their_crop(pixels, box)).all()


def taco_turns(*turns: Any, form: str = "openai") -> dict[str, Any]:
    """Alternating user and assistant turns; an assistant's is (thought, name, arguments)."""
    said = [turn if isinstance(turn, str) else acted(*turn) for turn in turns]
    if form == "openai":
        roles = ("user", "assistant") * len(said)
        return {"conversation": [{"role": r, "content": t} for r, t in zip(roles, said, strict=False)]}
    roles = ("human", "gpt") * len(said)
    return {"conversations": [{"from": r, "value": t} for r, t in zip(roles, said, strict=False)]}


def acted(thought: str, name: str, arguments: dict[str, Any]) -> str:
    return json.dumps({"thought": thought, "actions": [{"name": name, "arguments": arguments}]})


ASK = "<image>\n# USER REQUEST #:\nIn image-0, what is it?\nNow please generate your response:\n"
END = ("So it's a bird.", "Terminate", {"answer": "bird"})


def observation(value: dict[str, Any]) -> str:
    return f"OBSERVATION:\n{value!r}\nThe OBSERVATION can be incomplete or incorrect, so please be critical."


def expanded(pixels: np.ndarray, box: list[float]) -> np.ndarray:
    """What TACO's Crop shows of the image, written down from its description (without the box that it draws)."""
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    across, down = (x1 - x0) * 0.25, (y1 - y0) * 0.25
    x0, y0, x1, y1 = max(0, x0 - across), max(0, y0 - down), min(width, x1 + across), min(height, y1 + down)
    return pixels[int(y0) : int(y1), int(x0) : int(x1)]


def taco_rows(folder: Path) -> list[dict[str, Any]]:
    original = picture(folder / "t" / "image-0.png", 3)
    crop = expanded(original, [0.3, 0.2, 0.5, 0.4]).copy()
    crop[:4] = (255, 255, 0)
    save(folder / "t" / "image-1.png", crop)
    box = {"image": "image-0", "bbox": [0.3, 0.2, 0.5, 0.4]}
    regions = {
        "image": "image-1: <img /tmp/image-1.jpg>",
        "regions": [{"label": 'it\'s a "bird"', "bbox": [0.1, 0.2, 0.3, 0.4]}],
    }
    turns = [ASK, ("Look.", "LocalizeObjects", {"image": "image-0", "objects": ["bird"]}), observation(regions),
             ("Compare.", "GetImageToImagesSimilarity", {"image": "image-1", "other_images": ["image-0"]}),
             observation({"similarity": [0.5], "best_image_index": 0}), END]  # fmt: skip
    files = ["t/image-0.png", "t/image-1.png"]
    return [
        {"id": "a", "images": files, "metadata": {}, **taco_turns(ASK, ("Crop.", "Crop", box), observation({"image": "image-1"}), END)},
        {"sample_id": "b", "image": files, **taco_turns(*turns, form="llava")},
    ]  # fmt: skip


def test_taco_reads_json_turns_and_python_observations(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.json", taco_rows(tmp_path))
    (cropped, compared), _ = imported(config("taco", data), tmp_path / "out")
    assert (cropped.question, cropped.answer, cropped.conclusion) == (
        "In image-0, what is it?",
        "bird",
        "So it's a bird.",
    )
    assert cropped.steps[0].call.tool == "crop"
    original = decode((tmp_path / "t" / "image-0.png").read_bytes())
    left, top, right, bottom = pixel_box(cropped.steps[0].call.arguments["box"], WIDTH, HEIGHT)
    assert (original[top:bottom, left:right] == expanded(original, [0.3, 0.2, 0.5, 0.4])).all()
    assert cropped.steps[0].observation.image is not None
    assert cropped.steps[0].observation.image.data == (tmp_path / "t" / "image-1.png").read_bytes(), "theirs is kept"
    found, similar = compared.steps
    assert found.call == ToolCall("LocalizeObjects", {"image": 0, "objects": ["bird"]})
    assert json.loads(found.observation.text) == {
        "regions": [{"label": 'it\'s a "bird"', "bbox": [0.1, 0.2, 0.3, 0.4]}]
    }
    assert similar.call.arguments == {"image": 1, "other_images": [0]}
    assert (similar.observation.image, json.loads(similar.observation.text)["similarity"]) == (None, [0.5])


def test_what_is_carried_out_again_is_compared_with_the_record(tmp_path: Path) -> None:
    rows = taco_rows(tmp_path)
    zoom = {"image": "image-0", "bbox": [0.3, 0.2, 0.5, 0.4], "zoom_factor": 2}
    unrecorded = taco_turns(ASK, ("Zoom.", "ZoomIn", zoom), observation({"image": "image-1"}), END)
    rows.append({"id": "c", "images": ["t/image-0.png"], **unrecorded})
    picture(tmp_path / "t" / "small" / "image-1.png", 5, 20, 20)
    rows.append({**rows[0], "id": "d", "images": ["t/image-0.png", "t/small/image-1.png"]})
    data = write_rows(tmp_path / "d.json", rows)
    assert imported(config("taco", data), tmp_path / "kept")[1]["rejected"] == {"a recorded image is missing": 1}
    (cropped, compared, zoomed, _), manifest = imported(config("taco", data, reexecute=True), tmp_path / "out")
    original = decode((tmp_path / "t" / "image-0.png").read_bytes())
    assert (shown(cropped, 1) == expanded(original, [0.3, 0.2, 0.5, 0.4])).all(), "ours, without the box they draw"
    assert [step.call.tool for step in (*compared.steps, *zoomed.steps)] == [
        "LocalizeObjects", "GetImageToImagesSimilarity", "zoom",
    ]  # fmt: skip
    assert manifest["reexecuted"] == {"another size": 1, "other pixels": 1}
    listed = {line["key"]: line for line in lines(tmp_path / "out", "differences")}
    assert listed["d.json:1"]["outcome"] == "other pixels"
    assert float(listed["d.json:1"]["detail"]) > 6
    assert listed["d.json:4"]["detail"].startswith("20×20 recorded, ")


def test_a_recorded_jpeg_of_the_same_pixels_is_as_recorded(tmp_path: Path) -> None:
    row, pictures = two_crops(tmp_path)
    smooth = np.linspace(0, 255, HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)
    save(tmp_path / "in" / "7.png", smooth)
    (tmp_path / "in" / "7a.png").write_bytes(encode(their_crop(smooth, [0.3, 0.3, 0.6, 0.7]), "jpeg"))
    row["message_list"][4:6] = []
    del row["message_list"][4:-1]
    data = write_rows(tmp_path / "d.json", [row])
    assert imported(config("pixelreasoner", data, reexecute=True), tmp_path / "out")[1]["reexecuted"] == {
        "as recorded": 1
    }
    assert len(pictures) == 3


def asks(**changes: Any) -> dict[str, Any]:
    return {"from": "human", "value": "<image>\nWhat?", **changes}


TWO_IMAGES, GONE = "more than one input image", "bad input"
INVALID_BOX, NO_NUMBERS = "a box is inverted, empty or outside the image", "a box is not four numbers"
BROKEN: list[tuple[str, dict[str, Any] | Any, str]] = [
    ("lvr", lvr_row("1.png", [BOX, BOX], ONE), "boxes and <lvr> differ in number"),
    ("lvr", lvr_row("1.png", [], "<answer>4</answer>"), "no box"),
    ("lvr", lvr_row("1.png", [[0.5, 0.1, 0.2, 0.7]], ONE), INVALID_BOX),
    ("lvr", lvr_row("1.png", [[0.1, 0.1, 0.2, 1.7]], ONE), INVALID_BOX),
    ("lvr", lvr_row("1.png", [[0.1, 0.1, 0.2]], ONE), NO_NUMBERS),
    ("lvr", lvr_row("1.png", [[0.1, 0.1, float("nan"), 0.4]], ONE), NO_NUMBERS),
    ("lvr", lvr_row("1.png", [[0.5, 0.5, 0.51, 0.51]], ONE), "an observation is too small"),
    ("lvr", lvr_row("1.png", [BOX], ONE, image=["1.png", "1.png"]), TWO_IMAGES),
    ("lvr", lvr_row("1.png", [BOX], "<lvr>"), "the answer is empty"),
    ("lvr", lvr_row("1.png", [BOX], ONE, conversations=[asks()] * 3), "not one question and one answer"),
    ("lvr", lvr_row("1.png", [BOX], ONE, conversations=None), "there is no conversation"),
    ("lvr", lvr_row("1.png", [BOX], ONE, conversations=[asks(value=3)]), "a turn is not somebody's text"),
    ("lvr", lvr_row("../secret.png", [BOX], ONE), GONE),
    ("lvr", lvr_row("/etc/passwd", [BOX], ONE), GONE),
    ("lvr", lvr_row("gone.png", [BOX], ONE), GONE),
    ("lvr", lvr_row("text.png", [BOX], ONE), GONE),
    ("lvr", lvr_row("half.png", [BOX], ONE), GONE),
    ("lvr", lvr_row("1.png", [BOX], "\ud800 <lvr> <answer>a</answer>"), GONE),
    ("lvr", "not an object", GONE),
    ("visual-cot", visual_cot_row("1.png", [11, 23, 60, 77], "[0.5, 0.5, 0.9, 0.9]"), "its two boxes contradict each other"),
    ("visual-cot", visual_cot_row("1.png", [11, 23, 60, 77], "the left"), NO_NUMBERS),
    ("visual-cot", visual_cot_row("1.png", None, "[0.1, 0.0, 0.2, 0.9]"), INVALID_BOX),
    ("visual-cot", visual_cot_row("1.png", None, "[0.3, 0.3, 0.6, 0.6]", image=["1.png", "2.png###[1,2,3,4]"]), TWO_IMAGES),
    ("visual-cot", visual_cot_row("1.png", None, "[0.3, 0.3, 0.6, 0.6]", conversations=[asks()]), "not a question, a box, an image and an answer"),
    ("mirage", mirage_row(text_output="<output_image> and <output_image>"), "more than one helper image"),
    ("mirage", mirage_row(image_output=None), "no helper image"),
    ("mirage", mirage_row(image_input=["1.png", "1.png"], image_output="1.png"), TWO_IMAGES),
    ("mirage", mirage_row(image_output="flat.png", image_input="1.png"), "an observation is of one colour"),
    ("mirage", mirage_row(image_output="half.png", image_input="1.png"), GONE),
    ("mirage", mirage_row(text_input=None, image_output="1.png"), "the question is no text"),
    ("pixelreasoner", pixelreasoner_row(("user", [part(text="?"), part(video="v.mp4")]), ("assistant", [part(text="a")])), "video"),
    ("pixelreasoner", pixelreasoner_row(("user", [part(text="?"), part(image="1.png")]), ("assistant", [part(text="a")])), "the number of steps is out of bounds"),
    ("pixelreasoner", {"message_list": []}, "there is no conversation"),
    ("pixelreasoner", pixelreasoner_row(("user", [part(text="?")])), "the conversation does not lead from a question to an answer"),
    ("pixelreasoner", {"message_list": [{"role": "user", "content": 3}]}, "a message is not a list of parts"),
]  # fmt: skip


def looked(arguments: dict[str, Any] | str, shows: str | None = "1.png", thought: str = "Look. ") -> dict[str, Any]:
    said = arguments if isinstance(arguments, str) else call("crop_image_normalized", **arguments)
    seen = [part(text="Here:")] if shows is None else [part(text="Here:"), part(image=shows)]
    return pixelreasoner_row(
        ("user", [part(text="?"), part(image="1.png")]), ("assistant", [part(text=thought + said)]), ("user", seen),
        ("assistant", [part(text="\\boxed{a}")]),
    )  # fmt: skip


GOOD = {"bbox_2d": [0.2, 0.2, 0.5, 0.5], "target_image": 1}
BROKEN += [
    ("pixelreasoner", looked({**GOOD, "target_image": 2}), "a call names an image that is not there"),
    ("pixelreasoner", looked({**GOOD, "target_image": "first"}), "a call names an image that is not there"),
    ("pixelreasoner", looked({**GOOD, "bbox_2d": [0.2, 0.2]}), NO_NUMBERS),
    ("pixelreasoner", looked({**GOOD, "bbox_2d": [500, 500, 600, 600]}), INVALID_BOX),
    ("pixelreasoner", looked("<tool_call>{not json</tool_call>"), "a call is not JSON"),
    ("pixelreasoner", looked("nothing is called"), "a turn has not one call"),
    ("pixelreasoner", looked(GOOD, shows=None), "a crop shows no image"),
    ("pixelreasoner", looked(GOOD, thought=""), "a thought is empty"),
]


def taco_row(*turns: Any, images: tuple[str, ...] = ("1.png", "1.png")) -> dict[str, Any]:
    return {"id": "x", "images": list(images), **taco_turns(*turns)}


OCR = ("Read.", "OCR", {"image": "image-0"})
CROP = ("Crop.", "Crop", {"image": "image-0", "bbox": [0.1, 0.1, 0.4, 0.4]})
BROKEN += [
    ("taco", taco_row(ASK, END), "more than one input image"),
    ("taco", taco_row(ASK, END, images=("1.png",)), "the number of steps is out of bounds"),
    ("taco", taco_row(ASK, OCR, "OBSERVATION:\n__import__('os').system('true')", END, images=("1.png",)), "an observation is no Python literal"),
    ("taco", taco_row(ASK, OCR, "OBSERVATION:\n" + "(" * 5000, END, images=("1.png",)), "an observation is no Python literal"),
    ("taco", taco_row(ASK, OCR, f"OBSERVATION:\n{'x' * 200_000!r}", END, images=("1.png",)), "an observation is too long"),
    ("taco", taco_row(ASK, OCR, "OBSERVATION:\n[1, 2]", END, images=("1.png",)), "an observation is no dict"),
    ("taco", taco_row(ASK, OCR, "Execution failed with ValueError", END, images=("1.png",)), "a turn is no observation"),
    ("taco", taco_row(ASK, OCR, observation({"text": "a"}), "I think so", images=("1.png",)), "an assistant turn is not JSON with a thought and actions"),
    ("taco", taco_row(ASK, OCR, observation({"text": "a"}), OCR, images=("1.png",)), "the last turn gives no answer"),
    ("taco", taco_row(ASK, json.dumps({"thought": "", "actions": []}), observation({"text": "a"}), END, images=("1.png",)), "a turn has not one action"),
    ("taco", taco_row(ASK, CROP, observation({"image": "image-2"}), END), TWO_IMAGES),
    ("taco", taco_row(ASK, CROP, observation({"image": "image-1"}), END, images=("1.png",)), "a recorded image is missing"),
    ("taco", taco_row(ASK, CROP, observation({"text": "a"}), END, images=("1.png",)), "a crop shows no image"),
    ("taco", taco_row(ASK, ("Crop.", "Crop", {"image": "image-5", "bbox": [0, 0, 1, 1]}), observation({"image": "image-1"}), END), "a call names an image that is not there"),
    ("taco", taco_row(ASK, ("Crop.", "Crop", {"image": "image-0", "bbox": [0, 0, 2, 1]}), observation({"image": "image-1"}), END), INVALID_BOX),
    ("taco", taco_row(ASK, OCR, images=("1.png",)), "the last turn gives no answer"),
    ("taco", taco_row(ASK, OCR, observation({"text": "a"})), "the turns do not alternate"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["lvr", "visual-cot", "mirage", "pixelreasoner", "taco"])
def test_every_broken_row_is_dropped_alone_and_counted_by_its_reason(tmp_path: Path, kind: str) -> None:
    pixels = picture(tmp_path / "in" / "1.png", 1)
    for name in ("m.png", "h.png"):
        save(tmp_path / "in" / name, pixels)
    save(tmp_path / "in" / "flat.png", np.zeros_like(pixels))
    data = save(tmp_path / "secret.png", pixels)
    (tmp_path / "in" / "text.png").write_text("I am a text")
    (tmp_path / "in" / "half.png").write_bytes(data[: len(data) // 2])
    good = {
        "lvr": lvr_row("1.png", [BOX], ONE),
        "visual-cot": visual_cot_row("1.png", [11, 23, 60, 77], padded_to_square([11, 23, 60, 77], WIDTH, HEIGHT)),
        "mirage": mirage_row(),
        "pixelreasoner": looked(GOOD),
        "taco": taco_row(ASK, OCR, observation({"text": "a"}), END, images=("1.png",)),
    }[kind]
    broken = [(row, reason) for of, row, reason in BROKEN if of == kind]
    rows = [good, *(row for row, _ in broken), good]
    data_file = write_rows(tmp_path / "in" / "d.jsonl", rows)
    _, manifest = imported(config(kind, data_file), tmp_path / "out")
    expected: dict[str, int] = {}
    for _, reason in broken:
        expected[reason] = expected.get(reason, 0) + 1
    reasons = {line["key"]: line["reason"] for line in lines(tmp_path / "out", "refused")}
    for number, (_, reason) in enumerate(broken, start=2):
        assert reasons.get(f"d.jsonl:{number}") == reason
    assert (manifest["kept"], manifest["rejected"]) == (2, expected)


def test_broken_thinkmorph_rows(tmp_path: Path) -> None:
    picture(tmp_path / "p.png", 1)
    picture(tmp_path / "r.jpg", 2)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"reasoning_image_0": None}, "no reasoning image"),
        ({"resoning_thought_0": None}, "the first thought is no text"),
        ({"resoning_thought_0": " "}, "a thought is empty"),
        ({"answer": ""}, "the answer is empty"),
        ({"problem_image_0": {"bytes": b"no image", "path": "x"}}, "bad input"),
        ({"problem_image_0": {"bytes": None, "path": "/etc/passwd"}}, "bad input"),
    ]
    rows = [thinkmorph_row(tmp_path), *(thinkmorph_row(tmp_path, **change) for change, _ in changes)]
    _, manifest = imported(config("thinkmorph", write_rows(tmp_path / "d.parquet", rows)), tmp_path / "out")
    assert manifest["kept"] == 1
    assert manifest["rejected"] == {reason: 2 if reason == "bad input" else 1 for _, reason in changes}


def test_lines_that_are_no_json_are_counted_and_a_cut_list_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", 1)
    row = json.dumps(lvr_row("1.png", [BOX], ONE))
    (tmp_path / "d.jsonl").write_text("\ufeff" + row + "\n\n{cut\n" + "[" * 50_000 + "\n" + row)
    _, manifest = imported(config("lvr", tmp_path / "d.jsonl"), tmp_path / "out")
    assert (manifest["kept"], manifest["rejected"]) == (2, {"bad input": 2})
    (tmp_path / "cut.json").write_text(f"[{row}, {row[:40]}")
    with pytest.raises(SourceError, match=r"cut.json is no whole JSON list: after row 1"):
        generate(config("lvr", tmp_path / "cut.json"), tmp_path / "none", LOCAL, OutputPolicy())
    assert not (tmp_path / "none").exists()


def many(folder: Path) -> Path:
    for number in range(6):
        picture(folder / f"{number}.png", number)
    rows = [lvr_row(f"{n % 6}.png", [[0.1, 0.1, 0.3 + n / 50, 0.8]] * (n % 9 != 4), ONE) for n in range(24)]
    return write_rows(folder / "d.json", rows)


def test_ray_and_a_resumed_run_give_the_bytes_of_the_loop(tmp_path: Path) -> None:
    settings = config("lvr", many(tmp_path / "in"), shard_size=5)
    _, manifest = imported(settings, tmp_path / "loop")
    assert manifest["rejected"] == {"boxes and <lvr> differ in number": 3}
    _, on_ray = imported(settings, tmp_path / "ray", EngineConfig(num_workers=2))
    assert on_ray["files"] == manifest["files"]
    out = tmp_path / "loop"
    (out / "manifest.json").unlink()
    next(iter((out / "run" / "done").glob("*2.json"))).unlink()
    next(iter((out / "data").glob("*-00003-*"))).write_bytes(b"damaged")
    assert generate(settings, out, LOCAL, OutputPolicy(resume=True))["files"] == manifest["files"]
    with pytest.raises(RunError, match="reexecute: False there, True now"):
        generate(
            config("lvr", settings.sources[0], shard_size=5, reexecute=True), out, LOCAL, OutputPolicy(resume=True)
        )
    (tmp_path / "in" / "d.json").write_text("[]")
    with pytest.raises(RunError, match="other inputs"):
        generate(settings, out, LOCAL, OutputPolicy(resume=True))


def test_a_folder_and_a_hub_id_are_read_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "p.png", 1)
    picture(tmp_path / "r.jpg", 2)
    for name in ("data/train-0.parquet", "data/train-1.parquet", ".cache/old.parquet"):
        write_rows(tmp_path / "hub" / name, [thinkmorph_row(tmp_path)] * 3)
    found, _ = imported(config("thinkmorph", tmp_path / "hub"), tmp_path / "folder")
    assert len(found) == len({trajectory.id for trajectory in found}) == 6
    asked: list[str] = []

    def download(repo: str, **_: Any) -> Path:
        asked.append(repo)
        return tmp_path / "hub"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert len(imported(config("thinkmorph", "ThinkMorph/Visual_Search"), tmp_path / "out")[0]) == 6
    assert set(asked) == {"ThinkMorph/Visual_Search"}
    for place in (tmp_path / "nothing", tmp_path / "folder" / "run" / "lock"):
        with pytest.raises(SourceError):
            list(importer_class("lvr")(str(place), ImportOptions()).items())


def zipped(folder: Path, archive: Path) -> Path:
    """The folder's files as an archive; they are gone from the folder."""
    with ZipFile(archive, "w") as out:
        for file in sorted(one for one in folder.rglob("*.*") if one.is_file()):
            out.write(file, file.relative_to(folder).as_posix())
            file.unlink()
    return archive


def test_images_stay_in_their_zip_archive(tmp_path: Path) -> None:
    data = many(tmp_path / "in")
    found, plain = imported(config("lvr", data, shard_size=5), tmp_path / "plain")
    data.rename(tmp_path / "d.json")
    archive = zipped(tmp_path / "in", tmp_path / "images.zip")
    settings = config("lvr", tmp_path / "d.json", images=archive, shard_size=5)
    again, manifest = imported(settings, tmp_path / "zip", EngineConfig(num_workers=2))
    assert (again, manifest["rejected"]) == (found, plain["rejected"])
    for place in (tmp_path / "d.json", tmp_path / "gone.zip"):
        with pytest.raises(SourceError, match=r"is neither a folder nor a zip archive|gone.zip is not there"):
            generate(config("lvr", tmp_path / "d.json", images=place), tmp_path / "none", LOCAL, OutputPolicy())


def in_the_hubs_cache(folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[list[str]]]:
    """A snapshot as huggingface_hub lays it: links to files that are named by their hash. And what is asked for."""
    repository = folder / "datasets--org--lvr"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(one for one in files.rglob("*") if one.is_file())):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    asked: list[list[str]] = []

    def download(repo: str, allow_patterns: list[str], **_: Any) -> Path:
        asked.append(allow_patterns)
        return snapshot

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return snapshot, asked


@pytest.mark.parametrize("own", ["images", "images.zip"])
def test_images_of_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    data = many(tmp_path / "in" / "images")
    data.rename(tmp_path / "in" / "d.json")
    if own.endswith("zip"):
        zipped(tmp_path / "in" / "images", tmp_path / "in" / own)
    snapshot, asked = in_the_hubs_cache(tmp_path / "cache", tmp_path / "in", monkeypatch)
    found, _ = imported(config("lvr", "org/lvr", images=Path(own)), tmp_path / "out")
    assert len(found) == 21
    assert {trajectory.image.path for trajectory in found} == {f"{number}.png" for number in range(6)}
    assert all(own in patterns for patterns in asked)
    asked.clear()
    for missing, said in (
        (Path("pictures.zip"), "pictures.zip is not there"),
        (tmp_path / "p.zip", "p.zip is not there"),
    ):
        with pytest.raises(SourceError, match=said):
            generate(config("lvr", "org/lvr", images=missing), tmp_path / "none", LOCAL, OutputPolicy())
    assert len(asked) == 1, "what is said to be on this machine is looked for before anything is downloaded"
    (tmp_path / "cache" / "secret.png").write_bytes((tmp_path / "in" / "d.json").read_bytes())
    (snapshot / "link.png").symlink_to(tmp_path / "cache" / "secret.png")
    for path in ("../../blobs/" + "0" * 40, "link.png"):
        with pytest.raises(BadRecord, match="the path leaves the folder"):
            Images(snapshot, 10**6).read(path)


def test_broken_members_of_an_archive_are_dropped_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        picture(tmp_path / "in" / f"{number}.png", number)
    picture(tmp_path / "in" / "huge.png", 5, width=400, height=400)
    (tmp_path / "in" / "note.png").write_text("no picture")
    archive = zipped(tmp_path / "in", tmp_path / "images.zip")
    with ZipFile(archive, "a") as opened:
        opened.writestr("bomb.png", bytes(10**6), ZIP_BZIP2)
        damaged, locked = opened.getinfo("1.png"), opened.getinfo("2.png")
    content = bytearray(archive.read_bytes())
    content[damaged.header_offset + 200] ^= 0xFF
    content[locked.header_offset + 6] |= 1  # says that it is encrypted, here and in the list at the end
    listed = content.rindex(b"2.png") - 46
    content[listed + 8] |= 1
    archive.write_bytes(content)
    monkeypatch.setattr("pearl.pipelines.importers.images.MAX_FILE_BYTES", 200_000)
    names = [
        "0.png",
        "./3.png",
        "1.png",
        "2.png",
        "huge.png",
        "note.png",
        "gone.png",
        "../images.zip",
        "/0.png",
        "a\0b",
    ]
    rows = [lvr_row(name, [BOX], ONE) for name in (*names, "bomb.png")]
    settings = config("lvr", write_rows(tmp_path / "d.jsonl", rows), images=archive)
    found, manifest = imported(settings, tmp_path / "out")
    assert [trajectory.image.path for trajectory in found] == ["0.png", "3.png"]
    assert manifest["rejected"] == {"bad input": len(rows) - 2}
    said = "".join(file.read_text() for file in (tmp_path / "out" / "run" / "refused").iterdir())
    reasons = ("Bad CRC-32", "encrypted", "more than the limit", "there is no such member", "note.png in images.zip: ")
    for reason in reasons:
        assert reason in said
    monkeypatch.setattr("pearl.pipelines.importers.images.MAX_FILE_BYTES", 10**7)
    with pytest.raises(BadRecord, match="compressed by method 12"):
        Images(archive, 10**6).read("bomb.png")
    archive.write_bytes(content.replace(b"PK\x01\x02", b"PK\x01\x03"))
    with pytest.raises(SourceError, match="neither a folder nor a zip archive"):
        check_images(archive.rename(tmp_path / "other.zip"))


class Notes(Importer):
    """A format of another package: one recorded text a row."""

    name = "notes"
    columns = ("image", "note")

    def dialogue(self, row: Row, images: Images) -> Dialogue:
        if not row.get("note"):
            raise Rejected("no note")
        step = RecordedStep("I read.", ToolCall("read", {"image": 0}), Observation(row["note"]))
        return Dialogue(images.read(row["image"]), "What does it say?", [step], "", row["note"], "text")


def test_another_package_adds_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("notes", "tests.test_importers:Notes", "pearl.importers")
    monkeypatch.setattr("pearl.plugins.entry_points", lambda group: [point])
    assert importer_names()[-1] == "notes"
    picture(tmp_path / "1.png", 1)
    data = write_rows(tmp_path / "d.jsonl", [{"image": "1.png", "note": "hello"}, {"image": "1.png"}])
    (trajectory,), manifest = imported(config("notes", data), tmp_path / "out")
    assert (trajectory.answer, trajectory.conclusion) == ("hello", "The answer is hello.")
    assert manifest["rejected"] == {"no note": 1}


def test_an_unknown_format_is_said_with_those_that_there_are() -> None:
    with pytest.raises(SourceError, match="no format 'coco'; there are: lvr, visual-cot, thinkmorph"):
        importer_class("coco")


@pytest.mark.parametrize(
    ("text", "conclusion", "answer"),
    [
        ("So <answer> B </answer>.", "So B.", "B"),
        (r"So \boxed{\frac{1}{2}} it is", r"So \frac{1}{2} it is", r"\frac{1}{2}"),
        (r"cut \boxed{a", r"cut \boxed{a", r"cut \boxed{a"),
        (" A cup. ", "A cup.", "A cup."),
    ],
)
def test_where_the_answer_stands(text: str, conclusion: str, answer: str) -> None:
    assert final_answer(text) == (conclusion, answer)


@pytest.mark.parametrize(
    ("thought", "answer", "named"),
    [("Based on what I know.", "no", False), ("I read 12.", "2", False), ("It is red.", "red", True), ("", "a", False)],
)
def test_a_conclusion_names_the_answer_as_a_word_of_its_own(thought: str, answer: str, named: bool) -> None:
    said = concluded(thought, answer)
    assert said == (thought if named else f"{thought}\nThe answer is {answer}.".strip())


def test_tacos_expanded_boxes_are_ours_for_any_size() -> None:
    generator = random.Random(2)
    for _ in range(300):
        width, height = generator.randint(30, 3000), generator.randint(30, 90)
        pixels = np.arange(width * height).reshape(height, width)
        x, y = generator.random() * 0.8, generator.random() * 0.8
        box = [x, y, x + 0.2, y + 0.2]
        left, top, right, bottom = pixel_box(taco.carried_out(box, (width, height)), width, height)
        assert (pixels[top:bottom, left:right] == expanded(pixels, box)).all()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command("import")(import_)
    app.callback()(lambda: None)
    write_rows(tmp_path / "d.json", taco_rows(tmp_path))
    command = ["import", "taco", "d.json", "--engine", "local", "--reexecute", "--out", "got.parquet"]
    dry = CliRunner().invoke(app, [*command, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "got.parquet").exists()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert [t.answer for t in read_trajectories(tmp_path / "got.parquet")] == ["bird", "bird"]
    assert json.loads((tmp_path / "got.parquet.run" / "manifest.json").read_text())["reexecuted"] == {"other pixels": 1}


def test_a_preview_writes_nothing(tmp_path: Path) -> None:
    found = preview(config("lvr", many(tmp_path / "in")), tmp_path / "out", OutputPolicy())
    assert found["planned"] == 24
    assert not (tmp_path / "out").exists()
