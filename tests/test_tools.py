"""Every tool on real and drawn pictures, what the tools refuse, and tiny random checkpoints of the models they load."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AliasChoices, ConfigDict, Field

import pearl
from pearl.boxes import pixel_box
from pearl.errors import PearlError
from pearl.images import Picture, decode
from pearl.pipelines.checks import check_observation
from pearl.pipelines.errors import Rejected
from pearl.pipelines.experts.looking import _agrees
from pearl.pipelines.experts.voice import article
from pearl.records import ToolCall
from pearl.tools import (
    Toolbox,
    ToolError,
    ToolResult,
    ToolUnavailable,
    parse_arguments,
    spec,
    tool_class,
    tool_names,
)
from pearl.tools.base import MAX_REGIONS, PictureTool, ToolArguments
from pearl.tools.depth import nearness_of_metric, read_box, read_point
from pearl.tools.models import _snapshot, import_transformers
from pearl.tools.zoom import MAX_SIDE

PHOTOS = Path(pearl.__file__).parent / "assets" / "photos"
COFFEE = decode((PHOTOS / "coffee.png").read_bytes())
PART = COFFEE[:200, :300].copy()
NOISE = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
PLAIN = ("crop", "zoom", "highlight", "mark", "rotate", "flip", "edges", "segment")
BOX = [0.2, 0.25, 0.7, 0.75]
needs_ocr = pytest.mark.skipif(find_spec("rapidocr") is None, reason="needs rapidocr")


@pytest.fixture(scope="module")
def toolbox() -> Toolbox:
    return Toolbox(PLAIN)


def use(tools: Toolbox, tool: str, pixels: np.ndarray, /, **arguments: Any) -> ToolResult:
    """One call that must succeed."""
    result = tools.execute([(ToolCall(tool, arguments), [Picture(pixels)])])[0]
    assert not result.failed, result.text
    return result


def shown(result: ToolResult) -> np.ndarray:
    assert result.pixels is not None
    assert result.pixels.dtype == np.uint8
    assert result.pixels.shape[2:] == (3,)
    return result.pixels


def same(a: ToolResult, b: ToolResult) -> bool:
    equal = (a.pixels is None) == (b.pixels is None) and (a.pixels is None or np.array_equal(a.pixels, b.pixels))  # type: ignore[arg-type]
    return equal and (a.text, a.numbers, a.failed) == (b.text, b.numbers, b.failed)


def test_crop_is_the_slice_of_the_array(toolbox: Toolbox) -> None:
    result = use(toolbox, "crop", COFFEE, box=BOX)
    np.testing.assert_array_equal(shown(result), COFFEE[100:300, 120:420])
    assert result.numbers == {"width": 300, "height": 200}
    assert "300×200 pixels" in result.text


def test_crop_of_everything_is_everything(toolbox: Toolbox) -> None:
    np.testing.assert_array_equal(shown(use(toolbox, "crop", NOISE, box=[0, 0, 1, 1])), NOISE)


def test_a_result_shares_no_memory_with_its_picture(toolbox: Toolbox) -> None:
    pixels = PART.copy()
    for tool, arguments in GOOD_CALLS:
        shown(use(toolbox, tool, pixels, **arguments))[:] = 0
    np.testing.assert_array_equal(pixels, PART)


sides = st.tuples(st.floats(0, 0.99), st.floats(0.005, 1)).map(lambda s: (s[0], min(1.0, s[0] + s[1])))


@settings(max_examples=200, deadline=None)
@given(sides, sides, st.integers(1, 400), st.integers(1, 400))
def test_a_pixel_box_covers_its_box_and_lies_inside(
    xs: tuple[float, float], ys: tuple[float, float], width: int, height: int
) -> None:
    left, top, right, bottom = pixel_box((xs[0], ys[0], xs[1], ys[1]), width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert left <= xs[0] * width
    assert right >= min(xs[1] * width, width)
    assert top <= ys[0] * height
    assert bottom >= min(ys[1] * height, height)


def test_zoom_of_factor_one_is_the_crop(toolbox: Toolbox) -> None:
    crop = shown(use(toolbox, "crop", NOISE, box=BOX))
    np.testing.assert_array_equal(shown(use(toolbox, "zoom", NOISE, box=BOX, factor=1)), crop)


def test_zoom_enlarges_what_the_box_holds(toolbox: Toolbox) -> None:
    result = use(toolbox, "zoom", COFFEE, box=BOX, factor=3)
    assert shown(result).shape == (600, 900, 3)
    smaller = cv2.resize(shown(result), (300, 200), interpolation=cv2.INTER_AREA)
    assert np.abs(smaller.astype(int) - COFFEE[100:300, 120:420]).mean() < 2


def test_zoom_stops_at_its_largest_side(toolbox: Toolbox) -> None:
    result = use(toolbox, "zoom", COFFEE, box=[0, 0, 1, 1], factor=8)
    assert shown(result).shape == (round(400 * MAX_SIDE / 600), MAX_SIDE, 3)
    assert "1.7 times" in result.text


def test_zoom_refuses_what_is_large_already(toolbox: Toolbox) -> None:
    wide = np.zeros((20, MAX_SIDE + 1, 3), np.uint8)
    refusal = toolbox.execute([(ToolCall("zoom", {"box": [0, 0, 1, 1]}), [Picture(wide)])])[0]
    assert refusal.failed
    assert f"{MAX_SIDE + 1} pixels long already" in refusal.text


def test_highlight_draws_frames_and_nothing_else(toolbox: Toolbox) -> None:
    result = use(toolbox, "highlight", COFFEE, boxes=[BOX, [0, 0, 0.1, 0.1]])
    changed = (shown(result) != COFFEE).any(2)
    assert changed[100, 120:420].all()
    assert changed[100:300, 419].all()
    assert not changed[105:295, 125:415].any()
    assert not changed[305:, :].any()
    assert result.text == "Drew 2 boxes into image 0."


def test_mark_draws_near_its_points_alone(toolbox: Toolbox) -> None:
    result = use(toolbox, "mark", COFFEE, points=[[0.5, 0.5], [1, 1]], labels=["A", "B"])
    changed = (shown(result) != COFFEE).any(2)
    assert changed[195:206, 290:310].any()
    assert changed[380:, 570:].any()
    changed[170:230, 280:360] = False
    changed[350:, 530:] = False
    assert not changed.any()
    assert result.text == "Marked A, B in image 0."


def test_marks_are_numbered_when_they_have_no_labels(toolbox: Toolbox) -> None:
    assert "Marked 1, 2, 3 " in use(toolbox, "mark", COFFEE, points=[[0.1, 0.1], [0.5, 0.5], [0.9, 0.9]]).text


@pytest.mark.parametrize("degrees", [0, 360, -360])
def test_whole_turns_change_nothing(toolbox: Toolbox, degrees: float) -> None:
    np.testing.assert_array_equal(shown(use(toolbox, "rotate", NOISE, degrees=degrees)), NOISE)


@pytest.mark.parametrize("degrees", [90, 180, 270, -90, -270])
def test_quarter_turns_are_exact_and_counter_clockwise(toolbox: Toolbox, degrees: float) -> None:
    turned = shown(use(toolbox, "rotate", NOISE, degrees=degrees))
    np.testing.assert_array_equal(turned, np.rot90(NOISE, int(degrees // 90)))


def test_other_turns_keep_the_corners_on_a_grey_ground(toolbox: Toolbox) -> None:
    white = np.full((60, 100, 3), 255, np.uint8)
    turned = shown(use(toolbox, "rotate", white, degrees=30))
    assert abs(turned.shape[1] - (100 * math.cos(math.pi / 6) + 60 * 0.5)) <= 1
    assert (turned[0, 0] == 128).all()
    assert (turned[turned.shape[0] // 2, turned.shape[1] // 2] == 255).all()
    assert abs(int((turned > 200).all(2).sum()) - white[..., 0].size) < 200


def test_turns_that_grow_beyond_the_limit_are_refused(toolbox: Toolbox, monkeypatch: pytest.MonkeyPatch) -> None:
    import pearl.tools.rotate as module

    monkeypatch.setattr(module, "MAX_PIXELS", 40 * 60)
    pixels = np.zeros((40, 60, 3), np.uint8)
    assert shown(use(toolbox, "rotate", pixels, degrees=90.0)).shape == (60, 40, 3)
    (turned,) = toolbox.execute([(ToolCall("rotate", {"image": 0, "degrees": 45.0}), [Picture(pixels)])])
    assert "would have 71×71 pixels, more than 2,400" in turned.text


def test_a_small_turn_goes_counter_clockwise_like_a_quarter_turn(toolbox: Toolbox) -> None:
    """A dot on the right of the middle moves up."""
    dot = np.zeros((101, 101, 3), np.uint8)
    dot[48:53, 88:93] = 255
    turned = shown(use(toolbox, "rotate", dot, degrees=30))
    rows, _ = np.nonzero(turned[..., 0] > 200)
    assert rows.mean() < turned.shape[0] / 2 - 15


@pytest.mark.parametrize(("direction", "axis"), [("horizontal", 1), ("vertical", 0)])
def test_flip_mirrors_and_twice_is_nothing(toolbox: Toolbox, direction: str, axis: int) -> None:
    once = shown(use(toolbox, "flip", NOISE, direction=direction))
    np.testing.assert_array_equal(once, np.flip(NOISE, axis))
    np.testing.assert_array_equal(shown(use(toolbox, "flip", once, direction=direction)), NOISE)


def test_edges_lie_on_the_outline(toolbox: Toolbox) -> None:
    square = np.zeros((200, 300, 3), np.uint8)
    square[50:150, 80:220] = 255
    outline = shown(use(toolbox, "edges", square))[..., 0] > 0
    near = np.zeros((200, 300), bool)
    near[45:155, 75:225] = True
    near[55:145, 85:215] = False
    assert outline.sum() > 400
    assert not outline[~near].any()


def test_edges_of_nothing_are_none_and_small_parts_are_enlarged(toolbox: Toolbox) -> None:
    blank = use(toolbox, "edges", np.full((200, 200, 3), 90, np.uint8))
    assert blank.numbers["share"] == 0
    assert not shown(blank).any()
    assert min(shown(use(toolbox, "edges", COFFEE, box=[0.5, 0.5, 0.55, 0.6])).shape[:2]) == 160


def test_more_sensitive_edges_are_more(toolbox: Toolbox) -> None:
    faint, strong = (use(toolbox, "edges", COFFEE, sensitivity=s).numbers["share"] for s in (1, 0))
    assert faint > 1.5 * strong > 0


def test_grabcut_finds_a_disc(toolbox: Toolbox) -> None:
    pixels = np.random.default_rng(0).integers(90, 110, (120, 160, 3), dtype=np.uint8)
    disc = np.zeros((120, 160), np.uint8)
    cv2.circle(disc, (80, 60), 30, 1, -1)
    pixels[disc > 0] = (220, 40, 30)
    result = use(toolbox, "segment", pixels, box=[45 / 160, 25 / 120, 115 / 160, 95 / 120])
    kept = (shown(result) == pixels).all(2)
    assert (kept == (disc > 0)).mean() > 0.98
    assert result.numbers["share"] == pytest.approx(disc.mean(), abs=0.01)
    assert f"{result.numbers['share']:.1%} of the image" in result.text


def test_grabcut_on_a_large_picture_keeps_its_size(toolbox: Toolbox) -> None:
    large = cv2.resize(COFFEE, (1200, 130))
    assert shown(use(toolbox, "segment", large, box=BOX)).shape == large.shape


@needs_ocr
def test_ocr_reads_a_drawn_line_and_says_where() -> None:
    sheet = np.full((240, 400, 3), 255, np.uint8)
    cv2.putText(sheet, "PEARL 2604", (60, 150), cv2.FONT_HERSHEY_SIMPLEX, 1.6, (0, 0, 0), 3)
    ocr = Toolbox(["ocr"])
    result = use(ocr, "ocr", sheet, box=[0, 0.25, 1, 1])
    (line,) = result.numbers["lines"]
    assert line["text"].replace(" ", "") == "PEARL2604"
    assert "PEARL" in result.text
    x0, y0, x1, y1 = line["box"]
    assert 0.1 < x0 < 0.2 < 0.8 < x1 < 1
    assert 0.4 < y0 < 0.55 < 0.6 < y1 < 0.75
    assert shown(result).shape == sheet.shape
    blank = ocr.execute([(ToolCall("ocr", {}), [Picture(np.full((100, 100, 3), 255, np.uint8))])])[0]
    assert not blank.failed
    assert blank.pixels is None
    assert blank.text.startswith("No text found")


def sensor_picture() -> Picture:
    """Near at the left, far at the right, sky above."""
    depth = np.tile(np.linspace(1, 10, 100, dtype=np.float32), (60, 1))
    depth[:10] = np.inf
    return Picture(NOISE, depth)


def test_sensor_depth_is_read_exactly() -> None:
    toolbox = Toolbox(["depth"], {"depth": {"model": "sensor"}})
    boxes = [[0, 0.5, 0.1, 0.7], [0.9, 0.5, 1, 0.7], [0, 0, 1, 0.1]]
    call = ToolCall("depth", {"boxes": boxes, "points": [[0.0, 0.9], [1.0, 1.0]]})
    result = toolbox.execute([(call, [sensor_picture()])])[0]
    near, far, sky = result.numbers["boxes"]
    assert near > 0.5 > 0.2 > far > sky == 0
    assert result.numbers["points"][0] > 0.9
    for number, value in enumerate(result.numbers["boxes"], start=1):
        assert f"region {number}: {value:.2f}" in result.text
    assert f"point 2: {result.numbers['points'][1]:.2f}" in result.text
    assert shown(result).shape == NOISE.shape
    assert shown(result)[30, 2].sum() > 3 * shown(result)[30, 97].sum()


def test_nearness_is_the_inverse_of_metres() -> None:
    depth = sensor_picture().depth
    assert depth is not None
    nearness = nearness_of_metric(depth)
    assert nearness.dtype == np.uint8
    assert (np.diff(nearness[30].astype(int)) <= 0).all()
    assert read_point(nearness, (0.5, 0.5)) == pytest.approx(nearness[30, 50] / 255, abs=0.01)
    assert read_box(nearness, (0, 0, 1, 0.15)) == 0


@pytest.mark.parametrize("hole", [0.0, -1.0, float("nan"), float("-inf")])
def test_holes_of_a_sensor_are_not_near_and_do_not_change_the_rest(hole: float) -> None:
    whole = sensor_picture().depth
    assert whole is not None
    holed = whole.copy()
    holed[20:40, 30:60] = hole
    valid = np.ones(whole.shape, bool)
    valid[20:40, 30:60] = False
    nearness = nearness_of_metric(holed)
    assert (nearness[~valid] == 0).all()
    assert np.abs(nearness[valid].astype(int) - nearness_of_metric(whole)[valid]).max() <= 12
    assert nearness[valid].max() == 255
    assert not nearness_of_metric(np.full((4, 5), hole, np.float32)).any()


def test_a_picture_without_sensor_depth_is_refused_and_its_neighbours_are_not() -> None:
    toolbox = Toolbox(["depth"], {"depth": {"model": "sensor"}})
    call = ToolCall("depth", {"boxes": [BOX]})
    results = toolbox.execute([(call, [sensor_picture()]), (call, [Picture(NOISE)]), (call, [sensor_picture()])])
    assert [result.failed for result in results] == [False, True, False]
    assert "image 0 has no sensor depth" in results[1].text
    assert same(results[0], results[2])


GOOD_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("crop", {"box": BOX}),
    ("zoom", {"box": BOX, "factor": 2}),
    ("highlight", {"boxes": [BOX] * MAX_REGIONS}),
    ("mark", {"points": [[0.5, 0.5]] * MAX_REGIONS}),
    ("rotate", {"degrees": 33.3}),
    ("flip", {"direction": "vertical"}),
    ("edges", {}),
    ("segment", {"box": BOX}),
]
NAN, INF = float("nan"), float("inf")
BAD_CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("crop", {"box": [0.5, 0.5, 1.5, 0.9]}, "box.2: Input should be less than or equal to 1"),
    ("crop", {"box": [-0.1, 0, 1, 1]}, "box.0: Input should be greater than or equal to 0"),
    ("crop", {"box": [0.8, 0.1, 0.2, 0.9]}, "needs x0 < x1 and y0 < y1"),
    ("crop", {"box": [0.5, 0.5, 0.5, 0.9]}, "needs x0 < x1 and y0 < y1"),
    ("crop", {"box": [NAN, 0, 1, 1]}, "box.0: Input should be"),
    ("crop", {"box": [0, 0, INF, 1]}, "box.2: Input should be"),
    ("crop", {"box": [0, 0, 1]}, "box"),
    ("crop", {"box": "left half"}, "box: Input should be a valid tuple"),
    ("crop", {"box": ["left", 0, 1, 1]}, "box.0: Input should be a valid number"),
    ("crop", {"box": None}, "box"),
    ("crop", {}, "box: Field required"),
    ("crop", {"box": BOX, "colour": "red"}, "colour: Extra inputs are not permitted"),
    ("crop", {"box": BOX, "image": 1}, "there is no image 1; images 0 to 0 exist"),
    ("crop", {"box": BOX, "image": -1}, "image: Input should be greater than or equal to 0"),
    ("crop", {"box": BOX, "image": 10**30}, "image"),
    ("crop", {"box": BOX, "image": "the first"}, "image: Input should be a valid integer"),
    ("zoom", {"box": BOX, "factor": 1e9}, "factor: Input should be less than or equal to 8"),
    ("zoom", {"box": BOX, "factor": NAN}, "factor"),
    ("zoom", {"box": BOX, "factor": "big"}, "factor: Input should be a valid number"),
    ("highlight", {"boxes": [BOX] * (MAX_REGIONS + 1)}, "boxes: List should have at most 16 items"),
    ("highlight", {"boxes": []}, "boxes: List should have at least 1 item"),
    ("highlight", {"boxes": [BOX, [0.5, 0, 0.4, 1]]}, "boxes.1"),
    ("mark", {"points": [[0.5, 0.5]] * (MAX_REGIONS + 1)}, "points: List should have at most 16 items"),
    ("mark", {"points": [[0.5, 2]]}, "points.0.1"),
    ("mark", {"points": [[0.5, 0.5]], "labels": ["A", "B"]}, "1 points but 2 labels"),
    ("mark", {"points": [[0.5, 0.5]], "labels": ["much too long"]}, "labels.0"),
    ("rotate", {"degrees": INF}, "degrees"),
    ("rotate", {"degrees": 1e6}, "degrees: Input should be less than or equal to 360"),
    ("rotate", {"degrees": "a little"}, "degrees: Input should be a valid number"),
    ("flip", {"direction": "diagonal"}, "direction: Input should be 'horizontal' or 'vertical'"),
    ("edges", {"sensitivity": 2}, "sensitivity"),
    ("segment", {"box": [0, 0, 1, 1]}, "the box is the whole image"),
    ("segment", {"box": [0.5, 0.5, 0.504, 0.504]}, "pixels; at least 4×4 are needed"),
    ("paint", {"box": BOX}, "there is no tool 'paint'; there are: crop, edges"),
]


@pytest.mark.parametrize(("tool", "arguments", "message"), BAD_CALLS)
def test_a_bad_call_is_refused_and_its_neighbours_are_not(
    toolbox: Toolbox, tool: str, arguments: dict[str, Any], message: str
) -> None:
    good = ToolCall("crop", {"box": BOX})
    alone = toolbox.execute([(good, [Picture(COFFEE)])])[0]
    calls = [(call, [Picture(COFFEE)]) for call in (good, ToolCall(tool, arguments), good)]
    before, refusal, after = toolbox.execute(calls)
    assert same(before, alone)
    assert same(after, alone)
    assert refusal.failed
    assert refusal.pixels is None
    assert refusal.text.startswith("Error: ")
    assert message in refusal.text
    assert "\n" not in refusal.text


def test_a_step_that_gave_no_image_cannot_be_looked_at(toolbox: Toolbox) -> None:
    pictures: Sequence[Picture | None] = [Picture(COFFEE), None, Picture(NOISE)]
    calls = [(ToolCall("crop", {"box": BOX, "image": image}), pictures) for image in range(4)]
    first, nothing, second, beyond = toolbox.execute(calls)
    assert nothing.text == "Error: step 1 gave no image"
    assert beyond.text == "Error: there is no image 3; images 0 to 2 exist"
    assert shown(first).shape == (200, 300, 3)
    assert shown(second).shape == (30, 50, 3)


def test_a_mixed_batch_equals_one_by_one(toolbox: Toolbox) -> None:
    calls = [(ToolCall(tool, args), [Picture(pixels)]) for tool, args in GOOD_CALLS for pixels in (PART, NOISE)]
    calls += [(ToolCall(tool, arguments), [Picture(NOISE)]) for tool, arguments, _ in BAD_CALLS]
    together = toolbox.execute(calls)
    assert len(together) == len(calls)
    for call, result in zip(calls, together, strict=True):
        assert same(toolbox.execute([call])[0], result)


@pytest.mark.parametrize("name", tool_names())
def test_the_specification_is_a_json_schema_that_says_what_the_tool_accepts(name: str) -> None:
    function = json.loads(json.dumps(spec(tool_class(name))))["function"]
    assert function["name"] == name
    assert len(function["description"]) > 10
    jsonschema.Draft202012Validator.check_schema(function["parameters"])
    validator = jsonschema.Draft202012Validator(function["parameters"])
    examples = {**dict(GOOD_CALLS), "depth": {"boxes": [BOX]}, "ocr": {}, "detect": {"labels": ["cup"]}}
    assert validator.is_valid(examples[name])
    assert not validator.is_valid({**examples[name], "unheard_of": 1})
    for tool, arguments, _ in BAD_CALLS:
        numbers = json.dumps(arguments)
        if tool == name and not validator.is_valid(arguments) and "NaN" not in numbers and "Inf" not in numbers:
            with pytest.raises(ToolError):
                parse_arguments(tool_class(name), arguments)


def test_a_call_is_recorded_by_the_names_that_it_used() -> None:
    class Turn(ToolArguments):
        model_config = ConfigDict(populate_by_name=True)
        degrees: float = Field(default=0, alias="angle")
        zoom: float = Field(default=1, validation_alias=AliasChoices("factor", "times"))

    class Turner(PictureTool):
        name, description, Arguments = "turner", "Turns.", Turn

        def apply(self, picture: Picture, arguments: Any) -> ToolResult:
            return ToolResult("turned")

    toolbox = Toolbox([])
    toolbox._tools["turner"] = Turner()
    for said, kept in (
        ({"angle": "3", "image": "0"}, {"angle": 3, "image": 0}),
        ({"degrees": "3"}, {"degrees": "3"}),
        ({"angle": "3", "times": 2}, {"angle": 3, "times": 2}),
    ):
        assert toolbox.normal(ToolCall("turner", said)) == ToolCall("turner", kept)


def test_unknown_and_incomplete_tools_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ToolUnavailable, match=r"there is no tool 'paint'; there are: crop, zoom"):
        Toolbox(["crop", "paint"])
    with pytest.raises(ToolUnavailable, match=r"detect: no model is built in: name one, for example --detect-model"):
        Toolbox(["detect"])
    for tool in ("depth", "segment", "detect"):
        gone = Toolbox([tool], {tool: {"model": str(tmp_path / "gone")}})
        with pytest.raises(ToolUnavailable, match="gone' is neither a folder nor a checkpoint that the Hub gives"):
            gone.fingerprint()
        empty = Toolbox([tool], {tool: {"model": str(tmp_path)}})
        arguments: dict[str, dict[str, Any]] = {"segment": {"box": BOX}, "detect": {"labels": ["cup"]}}
        with pytest.raises(ToolUnavailable, match=f"{tool}: '{tmp_path}' is no "):
            empty.execute([(ToolCall(tool, arguments.get(tool, {})), [Picture(NOISE)])])


@pytest.mark.parametrize("error", [ImportError("no such"), SyntaxError("odd"), AttributeError("gone"), OSError("disk")])
def test_an_entry_point_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(_: EntryPoint) -> None:
        raise error

    monkeypatch.setattr(EntryPoint, "load", fail)
    point = EntryPoint("paint", "painting:Paint", "pearl.tools")
    monkeypatch.setattr("pearl.plugins.entry_points", lambda **_: [point])
    with pytest.raises(ToolUnavailable, match=r"tool 'paint' \(painting:Paint\) does not import") as raised:
        tool_class("paint")
    assert str(error) in str(raised.value)
    assert isinstance(raised.value, PearlError)


@pytest.mark.parametrize(("kind", "tool"), [("relative", "depth"), ("sam2", "segment"), ("owlv2", "detect")])
def test_a_hub_id_is_resolved_once_and_loaded_from_its_snapshot(
    random_checkpoint: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tool: str
) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    shutil.copytree(random_checkpoint(kind), snapshot)
    asked: list[tuple[str, list[str]]] = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("pearl.tools.models._snapshot", lru_cache(_snapshot.__wrapped__))
    toolbox = Toolbox([tool], {tool: {"model": "org/name", "device": "cpu"}})
    assert toolbox.fingerprint()[tool] == {"model": "org/name", "revision": "0123abc"}
    arguments: dict[str, dict[str, Any]] = {"segment": {"box": BOX}, "detect": {"labels": ["cup"]}}
    use(toolbox, tool, COFFEE, **arguments.get(tool, {}))
    assert asked == [("org/name", ["*.json", "*.safetensors", "*.txt", "*.model"])]


def test_a_hub_id_that_is_not_in_the_cache_is_said_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    toolbox = Toolbox(["depth"], {"depth": {"model": "org/no-such-model"}})
    for attempt in (toolbox.fingerprint, lambda: use(toolbox, "depth", NOISE)):
        with pytest.raises(ToolUnavailable, match="neither a folder nor a checkpoint that the Hub gives"):
            attempt()


def test_one_colour_is_any_one_colour() -> None:
    red = np.tile(np.array([200, 10, 10], np.uint8), (20, 30, 1))
    with pytest.raises(Rejected, match="of one colour"):
        check_observation(ToolResult("Cut.", red))
    red[3, 4, 1] += 1
    check_observation(ToolResult("Cut.", red))


def test_text_agrees_by_its_words_and_signs_without_words_as_they_are() -> None:
    assert _agrees("STOP here", "stop")
    assert not _agrees("STOPPED", "stop")
    assert not _agrees("anything at all", "?!")
    assert not _agrees("anything", " ")
    assert _agrees("what ?!", "?!")


@pytest.mark.parametrize(
    "expected",
    ["an hour", "an hourglass", "a house", "a unicorn", "a uniform", "an unidentified thing", "an umbrella", "a user",
     "a European flag", "an elephant", "a one-way sign", "an onion", "a cup", "a bus", "a USB stick"],
)  # fmt: skip
def test_the_article_follows_the_sound(expected: str) -> None:
    assert article(expected.partition(" ")[2]) == expected


@pytest.fixture(scope="module")
def nano() -> Toolbox:
    return Toolbox(["depth"], {"depth": {"device": "cpu"}})


def test_the_built_in_depth_model_maps_every_pixel_deterministically(nano: Toolbox) -> None:
    call = ToolCall("depth", {"boxes": [BOX, [0, 0, 0.1, 0.1]], "points": [[0.5, 0.5]]})
    first, second = (nano.execute([(call, [Picture(COFFEE)])])[0] for _ in range(2))
    assert same(first, second)
    assert shown(first).shape == COFFEE.shape
    assert len(np.unique(shown(first).reshape(-1, 3), axis=0)) > 50
    assert [len(first.numbers[kind]) for kind in ("boxes", "points")] == [2, 1]
    assert all(0 <= value <= 1 for value in first.numbers["boxes"])
    assert "region 2: " in first.text


def test_a_depth_batch_of_several_sizes_equals_one_by_one(nano: Toolbox) -> None:
    pictures = [COFFEE, COFFEE[:, ::-1].copy(), NOISE, COFFEE[:300, :200], COFFEE[::-1].copy()]
    calls = [(ToolCall("depth", {"boxes": [BOX]}), [Picture(pixels)]) for pixels in pictures]
    for call, pixels, result in zip(calls, pictures, nano.execute(calls), strict=True):
        alone = nano.execute([call])[0]
        assert shown(result).shape == pixels.shape
        assert result.numbers["boxes"] == pytest.approx(alone.numbers["boxes"], abs=0.01)
        assert np.abs(shown(result).astype(int) - shown(alone)).max() <= 12  # one level of depth in the colour map


def test_depth_refuses_strips_and_its_neighbours_succeed(nano: Toolbox) -> None:
    strips = [np.zeros(shape, np.uint8) for shape in ((4, 400, 3), (2000, 30, 3))]
    call = ToolCall("depth", {})
    results = nano.execute([(call, [Picture(pixels)]) for pixels in (NOISE, *strips, NOISE)])
    assert [result.failed for result in results] == [False, True, True, False]
    assert "image 0 is 400×4, longer than 16:1" in results[1].text
    assert same(results[0], results[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boxes": [BOX] * 17}, "boxes: List should have at most 16 items"),
        ({"points": [[0.5, NAN]]}, "points.0.1"),
        ({"boxes": "all"}, "boxes: Input should be a valid list"),
        ({"model": "better"}, "model: Extra inputs are not permitted"),
    ],
)
def test_depth_refuses_bad_arguments(nano: Toolbox, arguments: dict[str, Any], message: str) -> None:
    result = nano.execute([(ToolCall("depth", arguments), [Picture(NOISE)])])[0]
    assert result.failed
    assert message in result.text


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A folder with a tiny random checkpoint of a kind, made once."""
    import torch

    folder = tmp_path_factory.mktemp("checkpoints")
    kinds = {"sam": save_sam, "sam2": save_sam2, "owlv2": save_owlv2, "grounding-dino": save_grounding_dino}
    kinds |= {kind: lambda at, kind=kind: save_depth_anything(at, kind) for kind in ("relative", "metric")}  # type: ignore[misc]

    def get(kind: str) -> str:
        if not (folder / kind).exists():
            (folder / kind).mkdir()
            torch.manual_seed(0)
            kinds[kind](folder / kind)
        return str(folder / kind)

    return get


def save_depth_anything(folder: Path, kind: str) -> None:
    import torch

    tf = import_transformers()
    backbone = tf.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    config = tf.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, patch_size=14, reassemble_factors=[2, 1, 1, 0.5],
        neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, head_hidden_size=8, depth_estimation_type=kind,
        max_depth=10 if kind == "metric" else 1, initializer_range=0.1,
    )  # fmt: skip
    model = tf.DepthAnythingForDepthEstimation(config)
    torch.nn.init.constant_(model.head.conv3.bias, 0.5)
    model.save_pretrained(folder)
    size = {"height": 56, "width": 56}
    tf.DPTImageProcessor(size=size, ensure_multiple_of=14, keep_aspect_ratio=True).save_pretrained(folder)


def save_sam(folder: Path) -> None:
    tf = import_transformers()
    vision = tf.SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16, output_channels=16,
        global_attn_indexes=[1], window_size=2, mlp_dim=64, num_pos_feats=8,
    )  # fmt: skip
    prompt = tf.SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4)
    decoder = tf.SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
    )
    config = tf.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    tf.SamModel(config).save_pretrained(folder)
    image_processor = tf.SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16},
    )  # fmt: skip
    tf.SamProcessor(image_processor).save_pretrained(folder)


def save_sam2(folder: Path) -> None:
    tf = import_transformers()
    backbone = tf.Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 4, 2], global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    vision = tf.Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=32,
    )  # fmt: skip
    prompt = tf.Sam2PromptEncoderConfig(hidden_size=32, image_size=64, patch_size=16, mask_input_channels=4)
    decoder = tf.Sam2MaskDecoderConfig(
        hidden_size=32, mlp_dim=32, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
    )
    config = tf.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    tf.Sam2Model(config).save_pretrained(folder)
    image_processor = tf.Sam2ImageProcessor(size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16})
    tf.Sam2Processor(image_processor, target_size=64).save_pretrained(folder)


def save_owlv2(folder: Path) -> None:
    """Its box head is silenced, so that each of the 4×4 patches predicts the box of one patch around its own corner."""
    import torch

    tf = import_transformers()
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    tokenizer = tf.CLIPTokenizer(**files, model_max_length=16)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    text = {"vocab_size": len(words), "max_position_embeddings": 16, **ends, **common}
    vision = {"image_size": 64, "patch_size": 16, **common}
    model = tf.Owlv2ForObjectDetection(tf.Owlv2Config(text_config=text, vision_config=vision, projection_dim=32))
    torch.nn.init.zeros_(model.box_head.dense2.weight)
    torch.nn.init.zeros_(model.box_head.dense2.bias)
    model.save_pretrained(folder)
    image_processor = tf.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    tf.Owlv2Processor(image_processor, tokenizer).save_pretrained(folder)


def save_grounding_dino(folder: Path) -> None:
    tf = import_transformers()
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    backbone = tf.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_indices=[2, 3, 4],
    )  # fmt: skip
    text = tf.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    config = tf.GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=10,
        num_feature_levels=4, max_text_len=64,
    )  # fmt: skip
    tf.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    image_processor = tf.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    tokenizer = tf.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tf.GroundingDinoProcessor(image_processor, tokenizer).save_pretrained(folder)


def test_a_depth_checkpoint_is_loaded_from_a_folder(random_checkpoint: Callable[[str], str]) -> None:
    """The same weights read as metres turn the order of nearness round."""
    maps = {}
    for kind in ("relative", "metric"):
        toolbox = Toolbox(["depth"], {"depth": {"model": random_checkpoint(kind), "device": "cpu"}})
        boxes = [[x, y, x + 0.25, y + 0.25] for x in (0, 0.25, 0.5, 0.75) for y in (0, 0.25, 0.5, 0.75)]
        result = use(toolbox, "depth", COFFEE, boxes=boxes)
        assert shown(result).shape == COFFEE.shape
        maps[kind] = result.numbers["boxes"]
    assert np.std(maps["relative"]) > 0.05
    assert np.corrcoef(maps["relative"], maps["metric"])[0, 1] < -0.8


def test_a_fingerprint_follows_the_weights(random_checkpoint: Callable[[str], str], tmp_path: Path) -> None:
    folder = Path(random_checkpoint("relative"))
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    prints = [Toolbox(["depth"], {"depth": {"model": str(at)}}).fingerprint() for at in (folder, tmp_path)]
    assert prints[0] == prints[1]
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert Toolbox(["depth"], {"depth": {"model": str(tmp_path)}}).fingerprint() != prints[0]


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_segment_with_a_prompted_model(random_checkpoint: Callable[[str], str], kind: str) -> None:
    toolbox = Toolbox(["segment"], {"segment": {"model": random_checkpoint(kind), "device": "cpu"}})
    first = use(toolbox, "segment", COFFEE, box=BOX)
    second = use(toolbox, "segment", COFFEE, box=[0.6, 0.6, 0.95, 0.95])
    for result in (first, second):
        kept = (shown(result) == COFFEE).all(2)
        assert 0 < result.numbers["share"] < 1
        assert kept.mean() == pytest.approx(result.numbers["share"], abs=0.02)
    assert not np.array_equal(shown(first), shown(second)), "the box is not seen"
    assert same(first, use(toolbox, "segment", COFFEE, box=BOX))


def test_detect_with_owlv2_places_boxes_in_the_picture(random_checkpoint: Callable[[str], str]) -> None:
    """OWLv2 sees the picture padded to a square; boxes must be in fractions of the picture itself."""
    toolbox = Toolbox(["detect"], {"detect": {"model": random_checkpoint("owlv2"), "device": "cpu"}})
    result = use(toolbox, "detect", COFFEE, labels=["red cup", "spoon"], threshold=0)
    found = result.numbers["found"]
    across, down = ([(i / 4 - 0.125, i / 4 + 0.125) for i in range(1, 5)] for _ in range(2))
    expected = [(x0, y0 * 1.5, x1, y1 * 1.5) for x0, x1 in across for y0, y1 in down]
    clipped = [tuple(min(max(side, 0.0), 1.0) for side in box) for box in expected]
    assert found
    for one in found:
        assert min(np.abs(np.subtract(one["box"], box)).max() for box in clipped) < 0.01
    assert {one["label"] for one in found} == {"red cup", "spoon"}
    assert shown(result).shape == COFFEE.shape


@pytest.mark.parametrize("kind", ["owlv2", "grounding-dino"])
def test_detect_orders_limits_and_refuses(random_checkpoint: Callable[[str], str], kind: str) -> None:
    toolbox = Toolbox(["detect"], {"detect": {"model": random_checkpoint(kind), "device": "cpu"}})
    labels = ["Red cup", "spoon", "ball"]
    found = use(toolbox, "detect", COFFEE, labels=labels, threshold=0).numbers["found"]
    scores = [one["score"] for one in found]
    assert scores == sorted(scores, reverse=True)
    assert 0 < len(found) <= 20
    assert {one["label"] for one in found} <= set(labels)
    for one in found:
        x0, y0, x1, y1 = one["box"]
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
    assert use(toolbox, "detect", COFFEE, labels=["cup"], threshold=1).text == "Found no cup in image 0."
    good = ToolCall("detect", {"labels": ["cup"], "threshold": 0})
    bad: list[dict[str, Any]] = [
        {"labels": []},
        {"labels": ["cup"] * 11},
        {"labels": [" "]},
        {"labels": ["cup"], "threshold": "low"},
    ]
    calls = [good, *(ToolCall("detect", arguments) for arguments in bad), good]
    results = toolbox.execute([(call, [Picture(COFFEE)]) for call in calls])
    assert [result.failed for result in results] == [False, True, True, True, True, False]
    assert same(results[0], results[-1])


def test_a_label_of_too_many_tokens_is_refused(random_checkpoint: Callable[[str], str]) -> None:
    toolbox = Toolbox(["detect"], {"detect": {"model": random_checkpoint("owlv2"), "device": "cpu"}})
    call = ToolCall("detect", {"labels": ["a b c d e f g h i j k l m n o p q r s t"]})
    result = toolbox.execute([(call, [Picture(NOISE)])])[0]
    assert result.failed
    assert "too long for this detector" in result.text
