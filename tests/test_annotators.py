"""Folders of images that tools annotate: what is asked of what they find, and that what is unsure is not asked about."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from pearl.boxes import intersection_over_union
from pearl.cli.gen import app
from pearl.images import Picture, decode, encode
from pearl.parquet import read_trajectories
from pearl.pipelines.config import GenerateConfig, recipe
from pearl.pipelines.engines import EngineConfig
from pearl.pipelines.errors import ConfigError, Rejected, RunError
from pearl.pipelines.generate import OutputPolicy, generate
from pearl.pipelines.publishing.card import make_card
from pearl.pipelines.publishing.facts import gather
from pearl.pipelines.publishing.plan import make_plan
from pearl.pipelines.rollout import Refusal, Rollout
from pearl.pipelines.shards import ShardMaker, ShardTask
from pearl.pipelines.sources import AnnotationOptions, BadRecord, SourceError, SourceOptions, Thresholds, open_source
from pearl.pipelines.sources.annotators import Annotators, settled
from pearl.pipelines.sources.box_questions import AnnotatedImage, questions_from_boxes
from pearl.pipelines.sources.folder import Folder
from pearl.pipelines.validation import validate_data
from pearl.records import Box, Region, Sample, Trajectory
from pearl.tools import Toolbox, ToolUnavailable
from pearl.tools.depth import Depth
from pearl.tools.detect import Detect
from pearl.tools.ocr import Ocr
from pearl.tools.segment import Segment
from tests.test_tools import save_owlv2, save_sam

LOCAL = EngineConfig(engine="local")
CPU: Mapping[str, Any] = {"depth": {"device": "cpu"}, "segment": {"device": "cpu"}}
needs_ocr = pytest.mark.skipif(find_spec("rapidocr") is None, reason="needs rapidocr")


def signs(path: Path, *written: tuple[str, tuple[int, int]]) -> Path:
    """A street without things, with white words on blue signs at (x, y) in pixels of 480×360."""
    pixels = np.full((360, 480, 3), 225, np.uint8)
    pixels[200:] = (120, 140, 110)
    for text, (x, y) in written:
        (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 1.3, 3)
        cv2.rectangle(pixels, (x - 12, y - height - 12), (x + width + 12, y + 14), (20, 60, 160), -1)
        cv2.putText(pixels, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 1.3, (255, 255, 255), 3, cv2.LINE_AA)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pixels, "png"))
    return path


def checkpoint(folder: Path, save: Callable[[Path], None] = save_owlv2) -> str:
    """A tiny random model."""
    import torch

    folder.mkdir()
    torch.manual_seed(0)
    save(folder)
    return str(folder)


def options(*annotators: str, **changes: Any) -> SourceOptions:
    own = {name: changes.pop(name) for name in ("labels", "settings", "detect", "ocr") if name in changes}
    return SourceOptions(annotation=AnnotationOptions(annotators, **{"settings": CPU, **own}), **changes)


def samples(folder: Path, chosen: SourceOptions) -> tuple[dict[str, Sample], dict[str, str]]:
    """By key the samples of a folder, and why others are none."""
    source = open_source(f"folder:{folder}", chosen)
    good, refused = dict[str, Sample](), dict[str, str]()
    for item in source.items():
        try:
            good[item.key] = source.read(item)
        except Rejected as error:
            refused[item.key] = error.detail
    return good, refused


@pytest.fixture
def finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Scripts what the detector finds in every picture, (label, score, box) each; the settings that name it."""

    def script(*found: tuple[str, float, Box]) -> dict[str, Any]:
        best: list[dict[str, Any]] = [
            {"label": label, "score": score, "box": box} for label, score, box in sorted(found, key=lambda f: -f[1])
        ]

        def find(_: Detect, __: Picture, labels: Sequence[str], threshold: float) -> list[dict[str, Any]]:
            return [one for one in best if one["score"] >= threshold and one["label"] in labels]

        monkeypatch.setattr(Detect, "find", find)
        (tmp_path / "detector").mkdir(exist_ok=True)
        return {**CPU, "detect": {"model": str(tmp_path / "detector")}}

    return script


LEFT, MIDDLE, RIGHT, SMALL = (0.02, 0.3, 0.3, 0.7), (0.36, 0.3, 0.64, 0.7), (0.7, 0.3, 0.98, 0.7), (0.4, 0.8, 0.5, 0.95)


def detected(*found: tuple[str, float, Box]) -> list[Region]:
    return [Region(label, box, {"score": str(score)}) for label, score, box in found]


@pytest.mark.parametrize(
    ("found", "kept", "unsure"),
    [
        ([("cup", 0.9, LEFT), ("cup", 0.8, RIGHT)], 2, ""),
        ([("cup", 0.9, LEFT), ("cup", 0.8, (0.02, 0.3, 0.31, 0.71))], 1, ""),  # the same one twice
        ([("cup", 0.9, LEFT), ("cup", 0.2, (0.02, 0.3, 0.3, 0.55))], 1, ""),  # a weak echo of it
        ([("cup", 0.9, LEFT), ("cup", 0.2, RIGHT)], 1, "cup"),
        ([("cup", 0.9, LEFT), ("cat", 0.2, LEFT)], 1, "cat"),
        ([("cup", 0.9, LEFT), ("cup", 0.8, (0.02, 0.3, 0.3, 0.55))], 2, "cup"),  # perhaps twice
        ([("cup", 0.9, LEFT), ("cup", 0.8, (0.1, 0.4, 0.2, 0.5))], 2, "cup"),  # one within another
        ([("cup", 0.9, LEFT), ("mug", 0.8, LEFT), ("cup", 0.7, RIGHT)], 1, "cup mug"),
        ([("cup", 0.9, LEFT), ("cup", 0.8, (0.5, 0.5, 0.5005, 0.9))], 1, "cup"),  # no tool takes such a box
        ([], 0, ""),
    ],
)
def test_what_is_unsure_is_told_from_what_is_seen_twice(
    found: list[tuple[str, float, Box]], kept: int, unsure: str
) -> None:
    regions, labels = settled(detected(*found), 0.4)
    assert (len(regions), labels) == (kept, frozenset(unsure.split()))


def asked_about(image: Path, annotation: AnnotationOptions) -> tuple[AnnotatedImage, list[dict[str, Any]]]:
    """What is found in an image, and what is asked about it under many seeds."""
    found = Annotators(annotation).annotate(Picture(decode(image.read_bytes())))
    return found, [one for seed in range(25) for one in questions_from_boxes(found, annotation.labels, seed, "a")]


def test_nothing_is_asked_about_a_label_that_is_unsure(tmp_path: Path, finds: Callable[..., dict[str, Any]]) -> None:
    sure = [("cup", 0.9, LEFT), ("cup", 0.8, RIGHT), ("cat", 0.7, MIDDLE)]
    found = [*sure, ("cup", 0.3, SMALL), ("bird", 0.2, (0.6, 0.8, 0.7, 0.95))]
    image = signs(tmp_path / "a.png")
    annotation = AnnotationOptions(("detect",), ("cup", "cat", "bird", "dog"), finds(*found))
    _, asked = asked_about(image, annotation)
    assert not [one["question"] for one in asked if "cup" in one["question"] or "bird" in one["question"]]
    assert {(one["skill"], one["answer"]) for one in asked} == {
        ("counting", "1"), ("existence", "yes"), ("existence", "no"),
    }  # fmt: skip
    assert all("dog" in one["question"] for one in asked if one["answer"] == "no")
    _, believed = asked_about(image, replace(annotation, detect=Thresholds(0.15, 0.15)))
    assert ("counting", "3") in {(one["skill"], one["answer"]) for one in believed}


def test_what_has_a_low_score_is_not_there(tmp_path: Path, finds: Callable[..., dict[str, Any]]) -> None:
    settings = finds(("cup", 0.9, LEFT), ("cup", 0.1, RIGHT), ("dog", 0.1, RIGHT))
    found, asked = asked_about(signs(tmp_path / "a.png"), AnnotationOptions(("detect",), ("cup", "dog"), settings))
    assert len(found.regions) == 1
    assert {(one["skill"], one["answer"]) for one in asked} == {
        ("counting", "1"), ("existence", "yes"), ("existence", "no"),
    }  # fmt: skip


def test_places_sizes_and_nearness_of_things_are_asked(tmp_path: Path, finds: Callable[..., dict[str, Any]]) -> None:
    settings = finds(("cup", 0.9, LEFT), ("cat", 0.8, RIGHT), ("ball", 0.7, SMALL))
    annotation = AnnotationOptions(("detect", "depth"), ("cup", "cat", "ball"), settings)
    found, asked = asked_about(signs(tmp_path / "a.png"), annotation)
    near = {f"the {r.label}": float(r.attributes["nearness"]) for r in found.regions}
    middle = {f"the {r.label}": r.box[0] + r.box[2] for r in found.regions}
    assert {one["skill"] for one in asked} >= {"counting", "spatial relation", "comparison", "depth"}
    for one in asked:
        first, second = one["query"].get("names", ("", ""))
        if one["skill"] == "depth":
            assert one["answer"] == max((first, second), key=near.__getitem__)
            assert abs(near[first] - near[second]) >= 0.08
        elif one["skill"] == "spatial relation":
            assert one["answer"] == ("left" if middle[first] < middle[second] else "right")


def test_without_the_depth_annotator_the_experts_reading_tells(
    tmp_path: Path, finds: Callable[..., dict[str, Any]]
) -> None:
    signs(tmp_path / "in" / "a.png")
    settings = finds(("cup", 0.9, LEFT), ("cat", 0.8, RIGHT))
    good, _ = samples(tmp_path / "in", options("detect", labels=("cup", "cat"), settings=settings))
    assert good["a.png#depth"].answer == ""


def test_every_region_says_what_made_it(tmp_path: Path) -> None:
    """A disc in a box that is too large: the mask's box is the disc's."""
    pixels = np.random.default_rng(0).integers(90, 110, (120, 160, 3), dtype=np.uint8)
    cv2.circle(pixels, (80, 60), 30, (220, 40, 30), -1)
    detector = checkpoint(tmp_path / "owlv2")
    annotation = AnnotationOptions(
        ("detect", "segment", "depth"), ("cup",), {**CPU, "detect": {"model": detector, "device": "cpu"}}
    )
    annotators = Annotators(annotation)
    loose = Region("disc", (0.28, 0.21, 0.74, 0.82), {"annotator": "detect", "model": "m", "score": "0.9"})
    outlined = annotators._outlined(Picture(pixels), loose)
    assert outlined is not None
    assert outlined.box == pytest.approx((50 / 160, 30 / 120, 111 / 160, 91 / 120), abs=0.02)
    assert outlined.attributes["mask_model"] == "grabcut"
    agreement = intersection_over_union(outlined.box, loose.box)
    assert float(outlined.attributes["mask_agreement"]) == pytest.approx(agreement, abs=0.006)
    (region,) = annotators._with_nearness(Picture(pixels), [outlined])
    assert region.attributes["nearness_model"].startswith("depth-nano@")
    found = Annotators(replace(annotation, annotators=("detect",))).annotate(Picture(pixels)).regions
    assert found
    for one in found:
        assert one.label == "cup"
        assert one.attributes["annotator"] == "detect"
        assert one.attributes["model"].startswith("owlv2@"), "the folder's place is nobody's business"
        assert 0.4 <= float(one.attributes["score"]) <= 1


def test_a_mask_that_contradicts_its_box_makes_the_label_unsure(
    tmp_path: Path, finds: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**finds(("cup", 0.9, LEFT), ("cat", 0.8, RIGHT)), "segment": {"model": str(tmp_path)}}
    annotators = Annotators(AnnotationOptions(("detect", "segment"), ("cup", "cat"), settings))

    def mask(_: Segment, picture: Picture, within: Box) -> np.ndarray:
        """All of the cat's box, a corner of the cup's."""
        whole = np.zeros((picture.height, picture.width), bool)
        x0, y0, x1, y1 = (round(side * 100) for side in within)
        whole[y0 : y1 if within == RIGHT else y0 + 10, x0 : x1 if within == RIGHT else x0 + 10] = True
        return whole

    monkeypatch.setattr(Segment, "mask", mask)
    annotated = annotators.annotate(Picture(np.zeros((100, 100, 3), np.uint8)))
    assert [region.label for region in annotated.regions] == ["cat"]
    assert annotated.crowded == {"cup"}


@needs_ocr
def test_lines_of_text_are_read_compared_and_never_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    signs(folder / "one.png", ("BAKERY", (150, 120)))
    signs(folder / "two.png", ("EXIT", (40, 90)), ("STATION", (230, 300)))
    signs(folder / "same.png", ("EXIT", (40, 90)), ("EXIT", (230, 300)))
    signs(folder / "none.png")
    good, refused = samples(folder, options("ocr", "depth"))
    assert {key.partition("#")[2] for key in (*good, *refused)} == {"spatial relation", "comparison", "depth", "text"}
    assert len(good) + len(refused) == 16
    only = good["one.png#text"]
    assert (only.question, only.answer) == ("What does the text in the picture say?", "BAKERY")
    (line,) = only.regions
    assert (line.attributes["annotator"], line.attributes["text"]) == ("ocr", "BAKERY")
    assert "rapidocr" in line.attributes["model"]
    assert float(line.attributes["score"]) > 0.9
    relation = good["two.png#spatial relation"]
    first = relation.query["names"][0]
    assert relation.answer == ("left" if first == "the text “EXIT”" else "right")
    answers = {"What does the topmost line of text say?": "EXIT", "What does the lowest line of text say?": "STATION"}
    assert good["two.png#text"].answer == answers[good["two.png#text"].question]
    assert not [key for key in good if key.startswith(("same", "none"))], "twice the same words name no place"
    assert refused["same.png#text"] == "text; found: text “EXIT”, text “EXIT”; unsure: text “EXIT”"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Scripts what is read in every picture, (text, score, box) each."""

    def script(*lines: tuple[str, float, Box]) -> None:
        read = [{"text": text, "score": score, "box": box} for text, score, box in lines]
        monkeypatch.setattr(Ocr, "lines", lambda *_: read)

    return script


TOP, BOTTOM = (0.1, 0.05, 0.4, 0.15), (0.75, 0.45, 0.95, 0.55)


@needs_ocr
def test_text_on_a_thing_is_asked_where_it_is_the_only_one(
    tmp_path: Path, finds: Callable[..., dict[str, Any]], reads: Callable[..., None]
) -> None:
    settings = finds(("bus", 0.9, RIGHT), ("wall", 0.9, (0.0, 0.0, 1.0, 1.0)), ("cat", 0.9, LEFT))
    reads(("Exit", 0.95, TOP), ("Station", 0.99, BOTTOM))
    annotation = AnnotationOptions(("detect", "ocr"), ("bus", "wall", "cat"), settings)
    _, asked = asked_about(signs(tmp_path / "a.png"), annotation)
    assert {(one["question"], one["answer"]) for one in asked if one["skill"] == "text"} == {
        ("What does the text on the bus say?", "Station"), ("What does the topmost line of text say?", "Exit"),
        ("What does the lowest line of text say?", "Station"),
    }  # fmt: skip
    counted = [one["question"] for one in asked if one["skill"] in ("counting", "existence")]
    assert counted
    assert not [question for question in counted if "text" in question]


@needs_ocr
def test_text_that_may_be_misread_is_not_asked_and_names_nothing(tmp_path: Path, reads: Callable[..., None]) -> None:
    image = signs(tmp_path / "a.png")
    for doubtful in (("Statlon", 0.7, BOTTOM), ("?_", 0.99, BOTTOM), ("Station", 0.99, (0.7, 0.7, 0.9, 0.7005))):
        reads(("Exit", 0.95, TOP), doubtful)
        _, asked = asked_about(image, AnnotationOptions(("ocr",)))
        assert {(one["question"], one["answer"]) for one in asked} == {
            ("What does the topmost line of text say?", "Exit")
        }
    reads(("Exit", 0.95, TOP), ("Statlon", 0.4, BOTTOM))
    _, asked = asked_about(image, AnnotationOptions(("ocr",)))
    assert {one["question"] for one in asked} == {"What does the text in the picture say?"}
    reads(("Exit", 0.95, TOP), ("a much longer line than is a name of anything", 0.99, BOTTOM))
    _, asked = asked_about(image, AnnotationOptions(("ocr",)))
    assert {one["skill"] for one in asked} == {"text"}


def made(folder: Path, out: Path, engine: EngineConfig = LOCAL, **changes: Any) -> tuple[dict[str, Any], Path]:
    config = GenerateConfig(
        (f"folder:{folder}",), changes.pop("source_options"), ("crop", "depth", "ocr", "highlight"),
        {"depth": {"device": "cpu"}}, **changes,
    )  # fmt: skip
    return generate(config, out, engine, OutputPolicy()), out


@needs_ocr
def test_machine_made_annotations_are_visible_in_the_data(tmp_path: Path) -> None:
    signs(tmp_path / "in" / "one.png", ("BAKERY", (150, 120)))
    signs(tmp_path / "in" / "two.png", ("EXIT", (40, 90)), ("STATION", (230, 300)))
    (tmp_path / "in" / "bad.png").write_bytes((tmp_path / "in" / "one.png").read_bytes()[:300])
    manifest, out = made(tmp_path / "in", tmp_path / "out", source_options=options("ocr", "depth"))
    assert manifest["quarantined"] == 0
    assert manifest["rejected"]["bad input"] == 4
    assert validate_data(str(out)) == (manifest["kept"], [])
    kept = {trajectory.id: trajectory for trajectory in read_trajectories(out)}
    assert {trajectory.skill for trajectory in kept.values()} >= {"text", "spatial relation", "comparison"}
    assert {trajectory.source for trajectory in kept.values()} == {"folder:annotated-by-ocr+depth"}
    files = sorted((out / "run" / "annotations").glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert {line["id"] for line in lines} == kept.keys()
    for line in lines:
        assert line["image"] == kept[line["id"]].image.path
        assert all({"annotator", "model", "score", "nearness"} <= r["attributes"].keys() for r in line["regions"])
    reading = next(t for t in kept.values() if t.question == "What does the text in the picture say?")
    assert [step.call.tool for step in reading.steps] == ["crop", "ocr"]
    assert reading.answer == "BAKERY"
    shown = CliRunner().invoke(app, ["inspect", str(out)], catch_exceptions=False).output
    assert f"annotated by tools, not by people: ocr+depth {len(kept)}" in shown
    plan = make_plan(str(out))
    card = make_card("org/name", plan, gather(plan)).text
    assert "No one annotated the images of the source `folder:annotated-by-ocr+depth`" in card


@needs_ocr
def test_any_number_of_workers_and_any_shards_annotate_alike(tmp_path: Path) -> None:
    """Shards of three samples, so that the questions about one image fall into several."""
    for number, word in enumerate(("BAKERY", "HOTEL")):
        signs(tmp_path / "in" / f"{number}.png", (word, (40, 90)), ("STATION", (230, 300)))
    settings = {**CPU, "detect": {"model": checkpoint(tmp_path / "owlv2"), "device": "cpu"}}
    chosen = options("detect", "ocr", "depth", labels=("cup",), settings=settings)
    runs = [
        made(tmp_path / "in", tmp_path / name, engine, source_options=chosen, shard_size=3)
        for name, engine in (("one", LOCAL), ("two", EngineConfig(num_workers=2)))
    ]
    first, second = ({p.name: p.read_bytes() for p in (out / "data").iterdir()} for _, out in runs)
    assert len(first) == 4
    assert first == second
    assert runs[0][0]["kept"] >= 4
    made(tmp_path / "in", tmp_path / "whole", source_options=chosen, shard_size=100)
    notes = [
        b"".join(path.read_bytes() for path in sorted((tmp_path / out / "run" / "annotations").iterdir()))
        for out in ("one", "two", "whole")
    ]
    assert notes[0] == notes[1] == notes[2]


def test_the_fingerprint_follows_labels_scores_annotators_and_weights(tmp_path: Path) -> None:
    signs(tmp_path / "in" / "a.png")
    detector = checkpoint(tmp_path / "owlv2")
    own: dict[str, Any] = {"labels": ("cup",), "settings": {**CPU, "detect": {"model": detector}}}

    def printed(*annotators: str, **changes: Any) -> str:
        chosen = options(*annotators, **{**own, **changes})
        source = recipe(GenerateConfig((f"folder:{tmp_path / 'in'}",), chosen, ("crop",)))["sources"]
        return json.dumps(source, sort_keys=True)

    prints = [
        printed("detect"), printed("detect", labels=("cup", "cat")), printed("detect", detect=Thresholds(0.15, 0.5)),
        printed("detect", detect=Thresholds(0.1, 0.4)), printed("detect", "depth"), printed("detect", "segment"),
    ]  # fmt: skip
    assert len(set(prints)) == len(prints)
    assert printed("detect") == prints[0]
    weights = bytearray((Path(detector) / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (Path(detector) / "model.safetensors").write_bytes(weights)
    assert printed("detect") not in prints


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"annotators": ("paint",)}, "--annotate: paint is none of detect, segment, ocr, depth"),
    ({"annotators": ("depth",)}, "--annotate depth: only detect and ocr find regions"),
    ({"annotators": ("ocr", "segment")}, "--annotate segment refines what detect finds: add detect"),
    ({"annotators": ("detect",)}, '--labels "cat,cup"'),
    ({"annotators": ("detect",), "labels": ("cat", " ")}, '--labels "cat,cup"'),
    ({"annotators": ("detect",), "labels": ("cat", "Cat ")}, "--labels: cat stands there twice"),
    ({"annotators": ("ocr",), "labels": ("cat",)}, "--labels is what --annotate detect looks for"),
    ({"annotators": ("ocr", "ocr")}, "--annotate ocr,ocr: a tool stands there twice"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError) as raised:
        AnnotationOptions(**settings)
    assert message in str(raised.value)


@pytest.mark.parametrize("scores", [(0.5, 0.4), (-0.1, 0.4), (0.1, 1.1), (float("nan"), 0.5)])
def test_scores_out_of_order_are_refused(scores: tuple[float, float]) -> None:
    with pytest.raises(SourceError, match="expected 0 ≤ LEAST ≤ SURE ≤ 1"):
        Thresholds(*scores)


def test_a_missing_model_is_said_before_any_work(tmp_path: Path) -> None:
    signs(tmp_path / "in" / "a.png")
    cases: list[tuple[SourceOptions, type[Exception], str]] = [
        (options("detect", labels=("cup",)), ToolUnavailable, "detect: no model is built in: .*--detect-model"),
        (
            options("detect", labels=("cup",), settings={"detect": {"model": str(tmp_path / "gone")}}),
            ToolUnavailable,
            "gone' is neither a folder nor a checkpoint that the Hub gives",
        ),
        (
            options("ocr", "depth", settings={"depth": {"model": "sensor"}}),
            SourceError,
            "no sensor depth; name another --depth-model",
        ),
    ]
    for chosen, kind, message in cases:
        with pytest.raises(kind, match=message):
            made(tmp_path / "in", tmp_path / "out", source_options=chosen)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--annotate is for images without annotation"):
        GenerateConfig(("photos",), options("ocr"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skills": ("counting",)}, "--skill is read by scenes, and the source is photos"),
        ({"columns": {"answer": "foo"}}, "--columns is read by hf and parquet, and the source is photos"),
        ({"questions": "questions.jsonl"}, "--questions is read by coco"),
    ],
)
def test_options_that_no_source_reads_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(("photos",), SourceOptions(**change))


def test_a_model_of_another_kind_or_a_label_that_is_too_long_stops_the_run(tmp_path: Path) -> None:
    signs(tmp_path / "in" / "a.png")
    (tmp_path / "empty").mkdir()
    wrong = options("detect", labels=("cup",), settings={"detect": {"model": str(tmp_path / "empty")}})
    with pytest.raises(RunError, match="empty' is no open-vocabulary detector"):
        made(tmp_path / "in", tmp_path / "out", source_options=wrong)
    own = {"detect": {"model": checkpoint(tmp_path / "owlv2"), "device": "cpu"}}
    long = options("detect", labels=("a b c d e f g h i j k l m n o p q r s t",), settings=own)
    with pytest.raises(RunError, match=r"--labels: the label .* is too long for this detector"):
        made(tmp_path / "in", tmp_path / "other", source_options=long)


def test_an_image_that_cannot_be_decoded_is_bad_input(tmp_path: Path, finds: Callable[..., dict[str, Any]]) -> None:
    whole = signs(tmp_path / "in" / "a.png").read_bytes()
    (tmp_path / "in" / "a.png").write_bytes(whole[: len(whole) // 2])
    source = open_source(f"folder:{tmp_path / 'in'}", options("detect", labels=("cup",), settings=finds()))
    with pytest.raises(BadRecord, match=r"a\.png: unreadable"):
        source.read(next(iter(source.items())))


def test_a_tool_that_experts_use_as_well_is_loaded_once(tmp_path: Path) -> None:
    signs(tmp_path / "in" / "a.png")
    (tmp_path / "detector").mkdir()
    own = {**CPU, "detect": {"model": str(tmp_path / "detector")}}
    chosen = options("detect", "depth", labels=("cup",), settings=own)
    for settings, shared in (
        ({"depth": {"device": "cpu"}}, True),
        ({"depth": {"device": "cpu", "batch_size": 2}}, False),
    ):
        config = GenerateConfig((f"folder:{tmp_path / 'in'}",), chosen, ("crop", "depth"), settings)
        maker = ShardMaker(ShardTask(config, "", str(tmp_path / "out"), 1))
        (source,) = maker.sources
        assert isinstance(source, Folder)
        assert source.annotators is not None
        assert isinstance(maker.toolbox["depth"], Depth)
        assert (source.annotators.toolbox["depth"] is maker.toolbox["depth"]) == shared


@needs_ocr
@pytest.mark.parametrize(
    ("tools", "called"), [(("crop", "ocr"), ["crop", "ocr"]), (("ocr",), ["ocr"]), (("zoom", "ocr"), ["zoom", "ocr"])]
)
@pytest.mark.parametrize("annotated", ["BAKERY", "BAKER"])
def test_a_reading_that_contradicts_the_annotated_text_is_refused(
    tmp_path: Path, tools: tuple[str, ...], called: list[str], annotated: str
) -> None:
    signs(tmp_path / "in" / "one.png", ("BAKERY", (150, 120)))
    sample = samples(tmp_path / "in", options("ocr"))[0]["one.png#text"]
    (outcome,) = Rollout(Toolbox(tools), 0, None, 10**7).run([("x", replace(sample, answer=annotated))])
    if annotated == "BAKERY":
        assert isinstance(outcome, Trajectory)
        assert [step.call.tool for step in outcome.steps] == called
        assert decode(sample.image.data).shape == (360, 480, 3)
    else:
        assert isinstance(outcome, Refusal)
        assert outcome.reason == "the text that was read contradicts the answer"


def test_sam_outlines_what_the_detector_finds(tmp_path: Path) -> None:
    """Random weights: each box is either refined by its mask or makes its label unsure."""
    settings = {
        "detect": {"model": checkpoint(tmp_path / "owlv2"), "device": "cpu"},
        "segment": {"model": checkpoint(tmp_path / "sam", save_sam), "device": "cpu"},
    }
    picture = Picture(decode(signs(tmp_path / "a.png", ("EXIT", (40, 90))).read_bytes()))
    alone = Annotators(AnnotationOptions(("detect",), ("cup",), settings)).annotate(picture)
    both = Annotators(AnnotationOptions(("detect", "segment"), ("cup",), settings)).annotate(picture)
    assert len(alone.regions) > 1
    assert len(both.regions) < len(alone.regions) or both.regions != alone.regions
    assert ("cup" in both.crowded) == (len(both.regions) < len(alone.regions) or "cup" in alone.crowded)
    assert all(region.attributes["mask_model"].startswith("sam@") for region in both.regions)


@needs_ocr
def test_the_command_annotates_a_folder(tmp_path: Path) -> None:
    signs(tmp_path / "in" / "two.png", ("EXIT", (40, 90)), ("STATION", (230, 300)))
    detector = checkpoint(tmp_path / "owlv2")
    run = ["trajectories", "--source", f"folder:{tmp_path / 'in'}", "--engine", "local", "--device", "cpu"]
    run += ["--tools", "crop,ocr", "--out", str(tmp_path / "traj.parquet")]
    flags = ["--annotate", "detect,ocr", "--labels", "cup, cat", "--detect-scores", "0.1,0.6"]
    made = CliRunner().invoke(app, [*run, *flags, "--detect-model", detector], catch_exceptions=False)
    assert "6 planned" in made.output.replace("\n", " ")
    kept = list(read_trajectories(tmp_path / "traj.parquet"))
    assert {t.source for t in kept} == {"folder:annotated-by-detect+ocr"}
    assert CliRunner().invoke(app, [*run, *flags[:-1], "0.1", "--detect-model", detector]).exit_code != 0
    with pytest.raises(ToolUnavailable, match="--detect-model"):
        CliRunner().invoke(app, [*run[:-1], str(tmp_path / "other.parquet"), *flags], catch_exceptions=False)
