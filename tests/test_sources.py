"""Where samples come from: what good inputs give, and that every bad record is named, counted and left behind."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocowriter import coco

from pearl.errors import PearlError
from pearl.images import decode, encode
from pearl.parquet import read_trajectories
from pearl.pipelines.config import GenerateConfig
from pearl.pipelines.engines import EngineConfig
from pearl.pipelines.experts.base import Case
from pearl.pipelines.experts.looking import look
from pearl.pipelines.experts.voice import Voice
from pearl.pipelines.generate import OutputPolicy, generate
from pearl.pipelines.sources import BadRecord, Item, SourceError, SourceOptions, open_source
from pearl.pipelines.sources.box_questions import AnnotatedImage, questions_from_boxes
from pearl.pipelines.validation import validate_data
from pearl.records import EncodedImage, Region, Sample
from pearl.scenes.samples import NoFittingScene

LOCAL = EngineConfig(engine="local")
NAN = float("nan")


def picture(path: Path, width: int = 160, height: int = 120, seed: int = 0) -> bytes:
    """Random patches, so that no part is of one colour."""
    patches = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    data = encode(patches.repeat(8, 0).repeat(8, 1)[:height, :width], "jpeg")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


def samples(spec: str, **options: Any) -> tuple[dict[str, Sample], dict[str, str]]:
    """All samples of a source by key, and the problems by key."""
    source = open_source(spec, SourceOptions(**options))
    good: dict[str, Sample] = {}
    bad: dict[str, str] = {}
    for item in source.items():
        assert item.key not in good.keys() | bad.keys(), "a key stands twice"
        stored = Item(item.key, json.loads(json.dumps(item.record)), item.problem)
        try:
            if stored.problem is not None:
                raise BadRecord(stored.problem)
            good[item.key] = source.read(stored)
        except BadRecord as error:
            bad[item.key] = str(error)
    return good, bad


def test_photos_are_read_whole() -> None:
    good, bad = samples("photos")
    assert (len(good), bad) == (21, {})
    for sample in good.values():
        assert decode(sample.image.data).shape[0] >= 300
        assert sample.answer in sample.choices
        assert sample.license in ("public domain", "CC0-1.0", "CC-BY-2.0")
        assert sample.regions
        for region in sample.regions:
            x0, y0, x1, y1 = region.box
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1
            assert region.label


def test_photos_take_no_argument() -> None:
    with pytest.raises(SourceError, match="photos takes no argument, but got 'mine'"):
        open_source("photos:mine", SourceOptions())


def test_an_unknown_source_is_said_with_those_that_there_are() -> None:
    with pytest.raises(
        SourceError, match="--source pictures:x: there is no 'pictures'; there are photos, scenes, coco"
    ):
        open_source("pictures:x", SourceOptions())


def foreign_coco() -> dict[str, Any]:
    """As other tools write it: gaps in the ids, float boxes, polygons, crowds as uncompressed and compressed RLE."""
    image = {"date_captured": "2013-11-14 17:02:52", "coco_url": "http://images.example/1.jpg", "flickr_url": ""}
    polygon = {"segmentation": [[12.5, 10.0, 60.0, 11.0, 58.2, 50.75]], "area": 900.25, "iscrowd": 0}
    runs = {"segmentation": {"counts": [0, 5, 19195], "size": [120, 160]}, "area": 5, "iscrowd": 1}
    packed = {"segmentation": {"counts": "PPYo0", "size": [120, 160]}, "area": 5, "iscrowd": 1}
    box_only = {"segmentation": [], "iscrowd": 0}
    boxes: list[tuple[int, int, int, list[float], dict[str, Any]]] = [
        (900100581, 397133, 44, [12.5, 10.0, 47.25, 40.75], polygon),
        (17, 397133, 44, [100.0, 60.5, 30.0, 35.0], polygon),
        (18, 397133, 67, [70.2, 5.1, 30.9, 22.0], box_only),
        (900100123, 397133, 1, [0, 0, 160, 120], runs),
        (21, 37777, 1, [10.0, 10.0, 50.0, 90.0], polygon),
        (22, 37777, 67, [90.0, 40.0, 40.0, 40.0], polygon),
        (23, 37777, 90, [0, 100, 160, 20], packed),
        (24, 252219, 90, [129.6, 90.0, 30.7, 30.2], box_only),
        (25, 252219, 44, [10.0, 10.0, 32.0, 32.0], box_only),
    ]
    names = {1: "person", 44: "bottle", 67: "dining table", 90: "toothbrush"}
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [
            {"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"},
            {"id": 1, "name": "Attribution-NonCommercial-ShareAlike License", "url": ""},
        ],
        "images": [
            {"license": 4, "file_name": "000000397133.jpg", "height": 120, "width": 160, "id": 397133, **image},
            {"license": 1, "file_name": "sub/000000037777.jpg", "height": 120, "width": 160, "id": 37777, **image},
            {"file_name": "000000252219.jpg", "height": 120, "width": 160, "id": 252219, **image},
        ],
        "annotations": [
            {"id": i, "image_id": of, "category_id": category, "bbox": box, **mask, **_area_of(box, mask)}
            for i, of, category, box, mask in boxes
        ],
        "categories": [{"supercategory": "thing", "id": i, "name": name} for i, name in names.items()],
    }


def _area_of(box: list[float], mask: dict[str, Any]) -> dict[str, float]:
    return {"area": 0.8 * box[2] * box[3]} if isinstance(mask["segmentation"], list) and "area" in mask else {}


def coco_folder(folder: Path, document: dict[str, Any]) -> str:
    """Writes the annotations and a picture for each image; the source's name."""
    for number, image in enumerate(document["images"]):
        picture(folder / "pictures" / image["file_name"], seed=number)
    (folder / "instances.json").write_text(json.dumps(document))
    return f"coco:{folder / 'instances.json'}"


def test_a_foreign_coco_file_gives_right_questions(tmp_path: Path) -> None:
    """Each made question is checked against the raw boxes; several seeds, so that both answers of each come up."""
    document = foreign_coco()
    spec = coco_folder(tmp_path, document)
    names = {c["id"]: c["name"] for c in document["categories"]}
    boxes: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    crowds: dict[str, set[str]] = defaultdict(set)
    for a in document["annotations"]:
        image, name = str(a["image_id"]), names[a["category_id"]]
        crowds[image].add(name) if a["iscrowd"] else boxes[image][name].append(a["bbox"])
    answers: dict[str, set[str]] = defaultdict(set)
    for seed in range(12):
        good, bad = samples(spec, seed=seed, images=str(tmp_path / "pictures"))
        assert not bad
        for key, sample in good.items():
            image = key.partition("-")[0]
            assert_right(sample, boxes[image], crowds[image])
            answers[sample.skill].add(sample.answer)
    assert answers.keys() == {"counting", "existence", "spatial relation", "comparison", "depth"}
    assert answers["existence"] == {"yes", "no"}
    assert answers["spatial relation"] == {"left", "right"}
    assert answers["counting"] >= {"1", "2"}


FOREIGN_NAMES = ("person", "bottle", "dining table", "toothbrush")


def assert_right(
    sample: Sample, boxes: dict[str, list[list[float]]], crowd: set[str], names: tuple[str, ...] = FOREIGN_NAMES
) -> None:
    labels = Counter(region.label for region in sample.regions)
    assert labels == {name: len(found) for name, found in boxes.items() if found}
    for region in sample.regions:
        pixels = [region.box[0] * 160, region.box[1] * 120, region.box[2] * 160, region.box[3] * 120]
        assert any(
            np.allclose(pixels, [x, y, min(x + w, 160), min(y + h, 120)], atol=1e-6)
            for x, y, w, h in boxes[region.label]
        )
    asked = {name for name in names if name in sample.question}
    assert not asked & crowd
    if sample.skill == "counting":
        (name,) = asked
        assert sample.answer == str(len(boxes[name]))
    elif sample.skill == "existence":
        (name,) = asked
        assert (sample.answer == "yes") == (name in boxes and bool(boxes[name]))
    else:
        first, second = [boxes[n] for n in sorted(asked, key=sample.question.index)]
        (ax, _, aw, ah), (bx, _, bw, bh) = first[0], second[0]
        assert len(first) == len(second) == 1
        if sample.skill == "spatial relation":
            assert sample.answer == ("left" if ax + aw / 2 < bx + bw / 2 else "right")
        elif sample.skill == "comparison":
            assert (sample.answer == sample.choices[0]) == (aw * ah > bw * bh)
            assert max(aw * ah, bw * bh) > 1.5 * min(aw * ah, bw * bh), "too close to be asked"
        else:
            assert (sample.skill, sample.answer) == ("depth", "")
    assert not sample.choices or sample.answer in (*sample.choices, "")


def test_questions_made_from_boxes_cannot_be_guessed_without_a_look() -> None:
    """Of images in which ones are the commonest, and many things are in sight."""
    names = list("abcdefgh")
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for key in range(1500):
        rng = np.random.default_rng(key)
        corners = rng.uniform(0, 0.8, (int(rng.integers(1, 7)), 2))
        labels = rng.choice(names, len(corners))
        regions = [Region(str(n), (x, y, x + 0.1, y + 0.1)) for n, (x, y) in zip(labels, corners, strict=True)]
        for asked in questions_from_boxes(AnnotatedImage(tuple(regions), frozenset()), names, 0, str(key)):
            answers[asked["skill"]][asked["answer"]] += 1
            if asked["skill"] == "counting":
                assert asked["choices"] == ["1", "2", "3", "4"]
    assert abs(answers["existence"]["yes"] - answers["existence"]["no"]) < 0.15 * answers["existence"].total()
    assert answers["counting"]["2"] > 0.2 * answers["counting"].total()


@pytest.mark.parametrize(
    ("areas", "larger"),
    [((None, None), None), ((300, 200), "the a"), ((200, 300), None), ((300, 290), None), ((None, 200), None)],
)
def test_what_is_larger_is_asked_where_box_and_object_agree(
    areas: tuple[int | None, int | None], larger: str | None
) -> None:
    """A box of twice the other's size."""
    boxes = (0.1, 0.1, 0.5, 0.5), (0.6, 0.6, 0.88, 0.88)
    regions = [
        Region(name, box, {} if area is None else {"area": str(area)})
        for name, box, area in zip("ab", boxes, areas, strict=True)
    ]
    found = list(questions_from_boxes(AnnotatedImage(tuple(regions), frozenset()), [], 0, "key"))
    assert [one["answer"] for one in found if one["skill"] == "comparison"] == [larger] * (larger is not None)


def test_what_is_larger_by_far_is_asked_of_boxes_alone() -> None:
    regions = Region("a", (0.1, 0.1, 0.6, 0.6)), Region("b", (0.7, 0.7, 0.9, 0.9))
    found = list(questions_from_boxes(AnnotatedImage(regions, frozenset()), [], 0, "key"))
    assert [one["answer"] for one in found if one["skill"] == "comparison"] == ["the a"]


def test_a_label_that_is_the_answer_is_not_spoken_before_the_look() -> None:
    sample = Sample(
        "k", EncodedImage(encode(np.zeros((20, 20, 3), np.uint8))), "What lies beside the cup?", (), "spoon",
        (Region("cup", (0.1, 0.1, 0.4, 0.4)), Region("spoon", (0.5, 0.1, 0.9, 0.4)), Region("spoon", (0.5, 0.5, 0.9, 0.9))),
        "attribute", "test", "CC0", {"targets": [0, 1]},
    )  # fmt: skip
    case = Case(sample, frozenset({"crop"}), Voice(np.random.default_rng(0)))
    assert case.names == ["the cup", "the place in question"]
    case.query = {"targets": [0, 1, 2]}
    assert case.names == ["the cup", "place in question 1", "place in question 2"]
    case.query = {"targets": [1]}
    assert case.names == ["the place in question"]


def test_a_view_that_is_too_large_to_zoom_is_cropped() -> None:
    for side, tool in ((600, "zoom"), (8000, "crop")):
        image = EncodedImage(encode(np.zeros((side // 8, side, 3), np.uint8)))
        box = (0.45, 0.4, 0.55, 0.5)
        sample = Sample(
            "k", image, "What is it?", (), "a cup", (Region("cup", box),), "attribute", "t", "CC0", {"targets": [0]}
        )
        case = Case(sample, frozenset({"crop", "zoom"}), Voice(np.random.default_rng(0)))
        assert next(look(case, 0, "I look.", "the cup")).call.tool == tool


def test_a_coco_file_that_other_libraries_wrote(tmp_path: Path) -> None:
    """pycocowriter writes it, COCO's own pycocotools makes its RLE masks and reads it back as the oracle."""
    names = {3: "bowl", 18: "cup", 61: "plate", 90: "spoon"}
    shapes = [  # image, category, crowd, x, y, width, height
        (139, 3, 0, 10, 12, 40, 30), (139, 18, 0, 90, 60, 44, 50), (139, 90, 1, 0, 100, 160, 20),
        (285, 61, 0, 8, 8, 36, 36), (285, 61, 0, 70, 20, 30, 48), (285, 3, 0, 110, 70, 40, 40), (285, 18, 1, 0, 60, 90, 50),
    ]  # fmt: skip
    annotations = []
    for number, (image, category, crowd, x, y, width, height) in enumerate(shapes):
        mask = np.zeros((120, 160), np.uint8, order="F")
        mask[y : y + height, x : x + width] = 1
        packed = coco_masks.encode(mask)
        packed["counts"] = packed["counts"].decode()
        polygon = [[float(v) for v in (x, y, x + width, y, x + width, y + height, x, y + height)]]
        box, shape = tuple(coco_masks.toBbox(packed)), packed if crowd or number % 2 else polygon
        annotations.append(
            coco.COCOAnnotation(image, 900100 + 7 * number, category, box, float(width * height), shape, crowd)
        )
    images = [coco.COCOImage(i, f"{i:012}.jpg", 160, 120, license=1) for i in (139, 285)]
    licenses = [coco.COCOLicense("CC0-1.0", 1)]
    categories = [coco.COCOCategory(name, key, "kitchen") for key, name in names.items()]
    file = tmp_path / "instances.json"
    coco.COCOData(coco.COCOInfo(2026), images, annotations, licenses, categories).to_json(str(file))
    for number, image in enumerate(images):
        picture(tmp_path / image.file_name, seed=number)

    oracle = COCO(file)
    boxes: dict[int, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for annotation in oracle.loadAnns(oracle.getAnnIds(iscrowd=0)):
        boxes[annotation["image_id"]][names[annotation["category_id"]]].append(annotation["bbox"])
    crowds = {a["image_id"]: names[a["category_id"]] for a in oracle.loadAnns(oracle.getAnnIds(iscrowd=1))}
    assert crowds == {139: "spoon", 285: "cup"}
    skills = set()
    for seed in range(8):
        good, bad = samples(f"coco:{file}", seed=seed)
        assert not bad
        for key, sample in good.items():
            number = int(key.partition("-")[0])
            assert_right(sample, boxes[number], {crowds[number]}, tuple(names.values()))
            skills.add(sample.skill)
    assert skills >= {"counting", "existence", "spatial relation", "comparison"}
    config = GenerateConfig((f"coco:{file}",), SourceOptions(), ("crop", "highlight"))
    manifest = generate(config, tmp_path / "out", LOCAL, OutputPolicy())
    assert (manifest["planned"], manifest["kept"], manifest["quarantined"]) == (7, 6, 0), "one asks for the depth tool"


def test_coco_samples_carry_their_license_and_their_file(tmp_path: Path) -> None:
    good, _ = samples(coco_folder(tmp_path, foreign_coco()), images=str(tmp_path / "pictures"))
    licenses = {key.partition("-")[0]: sample.license for key, sample in good.items()}
    assert licenses["397133"] == "Attribution License"
    assert licenses["37777"] == "Attribution-NonCommercial-ShareAlike License"
    assert licenses["252219"] == "unknown"
    sample = good["37777-0"]
    assert sample.image.data == (tmp_path / "pictures" / "sub" / "000000037777.jpg").read_bytes()
    assert sample.image.path == "000000037777.jpg"


def test_made_questions_depend_on_the_seed_alone(tmp_path: Path) -> None:
    spec, images = coco_folder(tmp_path, foreign_coco()), str(tmp_path / "pictures")
    first, again, other = (samples(spec, images=images, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again
    assert [s.question for s in first.values()] != [s.question for s in other.values()]


def question(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"q{number}", "image": "000000397133.jpg", "question": "What colour is the bottle?",
        "choices": ["green", "red"], "answer": "green", "annotation_ids": [17], "skill": "attribute", **changes,
    }  # fmt: skip


def test_given_questions_find_their_boxes(tmp_path: Path) -> None:
    spec = coco_folder(tmp_path, foreign_coco())
    lines = [question(1), question(2, annotation_ids=[18, 17], id=2), question(3, choices=[], answer="a green")]
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(line) for line in lines)
    (tmp_path / "questions.jsonl").write_text(text, encoding="utf-8")
    good, bad = samples(spec, images=str(tmp_path / "pictures"), questions=str(tmp_path / "questions.jsonl"))
    assert bad == {}
    assert [sample.query["targets"] for sample in good.values()] == [[0], [0, 1], [0]]
    assert [region.label for region in good["2"].regions] == ["dining table", "bottle"]
    assert good["2"].regions[1].box == pytest.approx((100 / 160, 60.5 / 120, 130 / 160, 95.5 / 120))
    assert good["q3"].choices == ()


BAD_LINES: list[tuple[bytes | dict[str, Any], str]] = [
    (b"{not json", "not JSON"),
    (b'"only text"', "not a JSON object"),
    (b'{"id": "x", "question": "caf\xe9"}', "invalid UTF-8"),
    (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (question(1), "the id 'q1' stands there already"),
    (question(2, answer="blue"), "the answer 'blue' is not among the choices"),
    (question(3, choices=["green", 1]), "choices ['green', 1] are not all text"),
    (question(4, choices="green or red"), "the field 'choices' is not a list"),
    (question(5, annotation_ids=[999]), "the annotation 999 is not one of image '000000397133.jpg'"),
    (question(6, annotation_ids=[22]), "the annotation 22 is not one of image"),
    (question(7, annotation_ids=[[17]]), "the annotation ids [[17]]"),
    (question(8, image="gone.jpg"), "the image 'gone.jpg' is not in the annotation file"),
    (question(9, skill="magic"), "the skill 'magic' is none of"),
    (question(10, question="  "), "the field 'question' is empty"),
    (question(11, answer=None), "the field 'answer' is missing or of the wrong kind"),
    ({"id": "q12"}, "the field 'image' is missing"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_question_spoils_its_line_only(tmp_path: Path, line: bytes | dict[str, Any], reason: str) -> None:
    spec = coco_folder(tmp_path, foreign_coco())
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    last = json.dumps(question(99)).encode()
    (tmp_path / "questions.jsonl").write_bytes(b"\n".join([json.dumps(question(1)).encode(), raw, last, b""]))
    good, bad = samples(spec, images=str(tmp_path / "pictures"), questions=str(tmp_path / "questions.jsonl"))
    assert list(good) == ["q1", "q99"]
    assert list(bad) == ["line-2"]
    assert bad["line-2"].startswith("questions.jsonl line 2: ")
    assert reason in bad["line-2"]


BAD_BOXES: list[tuple[Any, str]] = [
    ([150, 10, 30, 30], "lies outside the 160×120 image"),
    ([-20, 10, 30, 30], "lies outside the 160×120 image"),
    ([-0.4, 10, 0.3, 30], "lies outside the 160×120 image"),
    ([160.2, 10, 0.2, 30], "lies outside the 160×120 image"),
    ([60, 60, -30, -30], "has no area"),
    ([10, 10, 0, 30], "has no area"),
    ([NAN, 10, 30, 30], "holds NaN"),
    ([10, 10, float("inf"), 30], "holds NaN, infinity"),
    ([10, 10, 10**400, 30], "a number beyond any image"),
    ([10, 10, 30], "is not [x, y, width, height]"),
    (["10", 10, 30, 30], "is not [x, y, width, height]"),
    (None, "is not [x, y, width, height]"),
    ({"x": 1}, "is not [x, y, width, height]"),
]


@pytest.mark.parametrize(("box", "reason"), BAD_BOXES)
def test_a_bad_box_is_named_and_nothing_is_asked_about_its_category(tmp_path: Path, box: Any, reason: str) -> None:
    document = foreign_coco()
    document["annotations"].append({"id": 77, "image_id": 397133, "category_id": 44, "bbox": box, "iscrowd": 0})
    for seed in range(4):
        good, bad = samples(coco_folder(tmp_path, document), images=str(tmp_path / "pictures"), seed=seed)
        assert list(bad) == ["annotation-77"]
        assert bad["annotation-77"].startswith("instances.json: annotation 77: bbox ")
        assert reason in bad["annotation-77"]
        assert len(good) > 5
        asked = [s.question for key, s in good.items() if key.startswith("397133-")]
        assert asked
        assert not [text for text in asked if "bottle" in text]


def test_half_a_pixel_outside_is_forgiven_and_cut_off(tmp_path: Path) -> None:
    document = foreign_coco()
    document["annotations"] = [{"id": 1, "image_id": 252219, "category_id": 90, "bbox": [-0.5, 60, 160.9, 60.5]}]
    good, bad = samples(coco_folder(tmp_path, document), images=str(tmp_path / "pictures"))
    assert bad == {}
    assert good["252219-0"].regions[0].box == (0, 0.5, 1, 1)


def change_annotation(**changes: Any) -> Any:
    return lambda document: document["annotations"].append({**document["annotations"][1], **changes})


def change_image(**changes: Any) -> Any:
    return lambda document: document["images"].append({**document["images"][0], **changes})


BAD_RECORDS: list[tuple[Any, str, str]] = [
    (change_annotation(id=70, category_id=12345), "annotation-70", "has an unknown category id: 12345"),
    (change_annotation(id=70, category_id=[44]), "annotation-70", "has an unknown category id: '[44]'"),
    (change_annotation(id=70, image_id=5), "annotation-70", "annotation 70: the image id 5 is not there"),
    (change_annotation(id=70, image_id=None), "annotation-70", "annotation 70: the image id None is not there"),
    (change_annotation(id=17), "annotation-17", "the annotation id 17 stands there twice"),
    (change_image(), "image-397133-again", "the image id 397133 stands there twice (000000397133.jpg)"),
    (change_image(id=6, width=0), "image-6", "lacks an id, a file_name, or a width and height"),
    (change_image(id=6, height=10**400), "image-6", "lacks an id, a file_name, or a width and height"),
    (change_image(id=6, height=None), "image-6", "lacks an id, a file_name, or a width and height"),
    (change_image(id=6, file_name=7), "image-6", "lacks an id, a file_name"),
    (change_image(id=None, file_name="new.jpg"), "image-None", "lacks an id"),
    (lambda document: document["images"].append("x.jpg"), "images-3", "images[3] is not a JSON object"),
    (
        lambda document: document["categories"].append({"id": 44, "name": "jar"}),
        "category-44-again",
        "stands there twice",
    ),
    (lambda document: document["categories"].append({"id": 45}), "category-45", "lacks an id or a name"),
]


@pytest.mark.parametrize(("spoil", "key", "reason"), BAD_RECORDS)
def test_a_bad_record_is_named_and_the_others_are_read(tmp_path: Path, spoil: Any, key: str, reason: str) -> None:
    document = foreign_coco()
    coco_folder(tmp_path, document)
    spoil(document)
    (tmp_path / "instances.json").write_text(json.dumps(document))
    good, bad = samples(f"coco:{tmp_path / 'instances.json'}", images=str(tmp_path / "pictures"))
    assert list(bad) == [key]
    assert bad[key].startswith("instances.json: ")
    assert reason in bad[key]
    assert {k.partition("-")[0] for k in good} == {"397133", "37777", "252219"}


def test_two_images_of_one_id_are_both_left_out(tmp_path: Path) -> None:
    """Nobody can tell whose annotations they are."""
    document = foreign_coco()
    document["images"].append({**document["images"][2], "id": 397133})
    good, bad = samples(coco_folder(tmp_path, document), images=str(tmp_path / "pictures"))
    assert "the image id 397133 stands there twice" in bad["image-397133-again"]
    assert {k.partition("-")[0] for k in good} == {"37777", "252219"}
    assert len(bad) == 1 + 4
    assert "annotation 17: the image id 397133 stands there twice" in bad["annotation-17"]
    lines = [question(1), question(2, image="000000252219.jpg", annotation_ids=[24]), question(3)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = {"images": str(tmp_path / "pictures"), "questions": str(tmp_path / "questions.jsonl")}
    good, bad = samples(f"coco:{tmp_path / 'instances.json'}", **asked)
    assert list(good) == ["q2"]
    assert bad["line-1"] == ("questions.jsonl line 1: the image id 397133 stands there twice (000000252219.jpg)")


def test_a_file_of_two_image_ids_is_left_out(tmp_path: Path) -> None:
    """Each id has but a part of what is to be seen there: what the other has would be denied."""
    document = foreign_coco()
    first = document["images"][0]
    document["images"].append({**first, "id": 6, "file_name": f"./{first['file_name']}"})
    good, bad = samples(coco_folder(tmp_path, document), images=str(tmp_path / "pictures"))
    assert f"stands there under two image ids: {first['id']}, 6" in bad["image-6"]
    assert not [key for key in good if key.startswith((f"{first['id']}-", "6-"))]
    assert good
    why = bad["image-6"].removeprefix("instances.json: ")
    assert bad["annotation-17"] == f"instances.json: annotation 17: {why}"
    (tmp_path / "questions.jsonl").write_text(json.dumps(question(1)))
    asked = {"images": str(tmp_path / "pictures"), "questions": str(tmp_path / "questions.jsonl")}
    _, bad = samples(f"coco:{tmp_path / 'instances.json'}", **asked)
    assert bad["line-1"] == f"questions.jsonl line 1: {why}"


def test_who_asks_about_a_spoilt_image_is_told_how_it_is_spoilt(tmp_path: Path) -> None:
    document = foreign_coco()
    coco_folder(tmp_path, document)
    sizes = document["images"][0].pop("width"), document["images"][1].pop("width")
    document["images"].append({**document["images"][1], "width": sizes[1]})
    (tmp_path / "instances.json").write_text(json.dumps(document))
    (tmp_path / "questions.jsonl").write_text(json.dumps(question(1)))
    asked = {"images": str(tmp_path / "pictures"), "questions": str(tmp_path / "questions.jsonl")}
    _, bad = samples(f"coco:{tmp_path / 'instances.json'}", **asked)
    why = "the image 397133 lacks an id, a file_name, or a width and height in pixels"
    assert bad["line-1"] == f"questions.jsonl line 1: {why}"
    assert bad["annotation-17"] == f"instances.json: annotation 17: {why}"
    assert "annotation-21" not in bad  # a second record of its image is whole


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/hostname", "link.jpg", "folder/link.jpg", "a\0b.jpg", ""])
def test_a_path_cannot_leave_the_folder_of_images(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "secret.jpg")
    inside = tmp_path / "pictures"
    inside.mkdir()
    (inside / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (inside / "folder").symlink_to(inside.parent)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    image = {"id": 1, "file_name": name, "width": 160, "height": 120}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 100, 100]}
    document = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "instances.json").write_text(json.dumps(document))
    good, bad = samples(f"coco:{tmp_path / 'instances.json'}", images=str(inside))
    assert not good
    assert bad
    reasons = {"a\0b.jpg": "null character", "": "cannot be read"}
    assert all(reasons.get(name, "the path leaves the folder") in reason for reason in bad.values())


def test_links_inside_the_folder_are_followed_and_circles_are_refused(tmp_path: Path) -> None:
    document = foreign_coco()
    spec = coco_folder(tmp_path, document)
    inside = tmp_path / "pictures"
    (inside / "000000397133.jpg").rename(inside / "moved.jpg")
    (inside / "000000397133.jpg").symlink_to("moved.jpg")
    (inside / "000000252219.jpg").unlink()
    (inside / "000000252219.jpg").symlink_to("000000252219.jpg")
    good, bad = samples(spec, images=str(inside))
    assert {key.partition("-")[0] for key in good} == {"397133", "37777"}
    assert {key.partition("-")[0] for key in bad} == {"252219"}


def test_a_picture_of_another_size_or_none_is_named(tmp_path: Path) -> None:
    spec, inside = coco_folder(tmp_path, foreign_coco()), tmp_path / "pictures"
    picture(inside / "000000397133.jpg", 120, 160)
    (inside / "000000252219.jpg").unlink()
    (inside / "sub" / "000000037777.jpg").write_text("I am a text")
    good, bad = samples(spec, images=str(inside))
    assert not good
    said = {key.partition("-")[0]: reason for key, reason in bad.items()}
    assert said["397133"] == "000000397133.jpg is 120×160 pixels, but instances.json says 160×120"
    assert said["252219"] == "000000252219.jpg: cannot be read: No such file or directory"
    assert said["37777"].startswith("sub/000000037777.jpg: not an image of a known format")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON"),
        (b"{'images': []}", "is not JSON"),
        (b'{"images": [], "info": "caf\xe9"}', "is not valid UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "expected an object with images, annotations, categories"),
        (b'{"annotations": [], "categories": []}', "it has no list 'images'"),
        (b'{"images": {}, "annotations": [], "categories": []}', "it has no list 'images'"),
        (b'{"images": [], "categories": []}', "it has no list 'annotations'"),
        (b'{"images": [], "annotations": []}', "it has no list 'categories'"),
    ],
)
def test_a_file_that_is_no_coco_is_said_with_its_name(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(SourceError, match=r"broken\.json") as raised:
        samples(f"coco:{tmp_path / 'broken.json'}")
    assert reason in str(raised.value)


def test_places_that_are_not_there_are_said(tmp_path: Path) -> None:
    spec = coco_folder(tmp_path, foreign_coco())
    with pytest.raises(SourceError, match="coco needs the annotation file"):
        open_source("coco", SourceOptions())
    with pytest.raises(SourceError, match=r"gone\.json cannot be read: No such file"):
        samples(f"coco:{tmp_path / 'gone.json'}")
    with pytest.raises(SourceError, match=r"the images' folder .*gone is not there; give it with --images"):
        samples(spec, images=str(tmp_path / "gone"))
    with pytest.raises(SourceError, match=r"gone\.jsonl cannot be read"):
        samples(spec, images=str(tmp_path), questions=str(tmp_path / "gone.jsonl"))


def test_questions_that_are_no_text_at_all_are_refused_line_by_line(tmp_path: Path) -> None:
    spec = coco_folder(tmp_path, foreign_coco())
    (tmp_path / "questions.jsonl").write_bytes(b"\xff\xfe\x00\n" * 3)
    good, bad = samples(spec, images=str(tmp_path / "pictures"), questions=str(tmp_path / "questions.jsonl"))
    assert not good
    assert list(bad) == ["line-1", "line-2", "line-3"]
    assert all("invalid UTF-8" in reason for reason in bad.values())


def test_a_folder_of_images_is_asked_what_tools_alone_can_tell(tmp_path: Path) -> None:
    for number, name in enumerate(("b.jpg", "a/c.JPG", "notes.txt")):
        picture(tmp_path / name, seed=number)
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "out.jpg").symlink_to("/etc/hostname")
    good, bad = samples(f"folder:{tmp_path}", tools=("depth", "ocr", "crop"))
    assert list(good) == [f"{name}#{skill}" for name in ("a/c.JPG", "b.jpg") for skill in ("relative depth", "text")]
    assert {key: reason.partition(":")[0] for key, reason in bad.items()} == {
        f"{name}#{skill}": name for name in ("bad.png", "out.jpg") for skill in ("relative depth", "text")
    }
    sample = good["b.jpg#relative depth"]
    assert all(0.1 <= side <= 0.9 for point in sample.query["points"] for side in point)
    assert all(f"({x:.2f}, {y:.2f})" in sample.question for x, y in sample.query["points"])
    assert (sample.choices, sample.answer, sample.license) == (("A", "B"), "", "unknown")
    assert samples(f"folder:{tmp_path}", tools=("crop", "ocr"))[0].keys() == {"a/c.JPG#text", "b.jpg#text"}


def test_folders_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="need the tool depth or ocr"):
        open_source(f"folder:{tmp_path}", SourceOptions(tools=("crop",)))
    with pytest.raises(SourceError, match="is no folder"):
        open_source(f"folder:{tmp_path / 'gone'}", SourceOptions(tools=("depth",)))
    with pytest.raises(SourceError, match="holds no image"):
        samples(f"folder:{tmp_path}", tools=("depth",))


def rows(tmp_path: Path, *changes: dict[str, Any]) -> str:
    """A Parquet dataset as others make them: other names for the columns, HF images."""
    data = picture(tmp_path / "x.jpg")
    plain = {
        "img": {"bytes": data, "path": "x.jpg"}, "problem": "What is it?", "solution": "a cat", "opts": ["a cat", "a dog"],
        "bbox": [[16.0, 12.0, 80.0, 60.0]], "names": ["cat"], "kind": "fine detail", "rights": "MIT",
    }  # fmt: skip
    types = {
        "img": pa.struct([("bytes", pa.binary()), ("path", pa.string())]), "problem": pa.string(),
        "solution": pa.string(), "opts": pa.list_(pa.string()), "bbox": pa.list_(pa.list_(pa.float64())),
        "names": pa.list_(pa.string()), "kind": pa.string(), "uid": pa.int64(), "rights": pa.string(),
    }  # fmt: skip
    numbered = [{**plain, "uid": number, **one} for number, one in enumerate(changes, start=7)]
    table = pa.Table.from_pylist(numbered, pa.schema(list(types.items())))
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    return f"parquet:{tmp_path / 'rows.parquet'}"


COLUMNS = {
    "image": "img", "question": "problem", "answer": "solution", "choices": "opts", "boxes": "bbox", "labels": "names",
    "skill": "kind", "id": "uid", "license": "rights",
}  # fmt: skip


def test_parquet_rows_are_mapped_and_boxes_may_be_pixels_or_fractions(tmp_path: Path) -> None:
    spec = rows(
        tmp_path, {}, {"bbox": [[0.1, 0.1, 0.5, 0.5]]}, {"bbox": None, "names": None, "kind": None, "opts": None}
    )
    good, bad = samples(spec, columns=COLUMNS)
    assert bad == {}
    first, second, third = good.values()
    for key, sample in (("7", first), ("8", second)):
        assert sample.regions[0].box == pytest.approx((0.1, 0.1, 0.5, 0.5))
        assert (sample.regions[0].label, sample.skill, sample.license) == ("cat", "fine detail", "MIT")
        assert (sample.question, sample.answer, sample.choices) == ("What is it?", "a cat", ("a cat", "a dog"))
        assert (sample.query, sample.source, sample.key) == ({"targets": [0]}, "parquet:rows.parquet", key)
    assert list(good) == ["7", "8", "9"]
    assert (third.regions, third.skill, third.choices) == ((), "attribute", ())
    assert first.image.data == (tmp_path / "x.jpg").read_bytes()


def test_boxes_of_a_row_are_all_in_pixels_or_all_fractions(tmp_path: Path) -> None:
    both = {"bbox": [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 80.0, 60.0]], "names": ["dot", "cat"]}
    good, _ = samples(rows(tmp_path, both), columns=COLUMNS)
    dot, cat = good["7"].regions
    assert dot.box == pytest.approx((0, 0, 1 / 160, 1 / 120))
    assert cat.box == pytest.approx((0, 0, 0.5, 0.5))


def test_a_fraction_that_was_rounded_above_one_is_no_pixel(tmp_path: Path) -> None:
    rounded = {"bbox": [[0.1, 0.2, 0.5, 0.6], [0.5, 0.5, 1.0001, 1.0]], "names": ["cat", "dog"]}
    good, bad = samples(rows(tmp_path, rounded), columns=COLUMNS)
    assert bad == {}
    assert [region.box for region in good["7"].regions] == [(0.1, 0.2, 0.5, 0.6), (0.5, 0.5, 1, 1)]


def test_a_cell_that_changes_changes_the_fingerprint(tmp_path: Path) -> None:
    found = [
        open_source(
            rows(tmp_path, *({"problem": word} for word in words)), SourceOptions(columns=COLUMNS)
        ).fingerprint()
        for words in (("aa", "left", "zz"), ("aa", "lift", "zz"))
    ]
    assert found[0] != found[1]


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"img": None}, "the image column holds no image bytes"),
    ({"img": {"bytes": None, "path": "/etc/hostname"}}, "a path alone is not followed"),
    ({"img": {"bytes": b"text", "path": None}}, "not an image of a known format"),
    ({"problem": None}, "the question or the answer is empty"),
    ({"solution": ""}, "the question or the answer is empty"),
    ({"solution": "a cow"}, "the answer 'a cow' is not among the choices"),
    ({"bbox": [[80.0, 12.0, 16.0, 60.0]]}, "is inverted, empty or outside the image"),
    ({"bbox": [[16.0, 12.0, 800.0, 60.0]]}, "is inverted, empty or outside the image"),
    ({"bbox": [[NAN, 0.1, 0.5, 0.5]]}, "is inverted, empty or outside the image"),
    ({"bbox": [[0.5, 0.5, 0.5, 0.9]]}, "is inverted, empty or outside the image"),
    ({"bbox": [[-0.1, 0.5, 0.5, 0.9]]}, "is inverted, empty or outside the image"),
    ({"bbox": [[0.1, 0.1, 0.5]]}, "has not four numbers"),
    ({"bbox": [[0.1, None, 0.5, 0.5]]}, "has not four numbers"),
    ({"bbox": [None]}, "has not four numbers"),
    ({"names": ["cat", "dog"]}, "1 boxes but 2 labels"),
    ({"names": [None]}, "a label is null"),
    ({"opts": ["a cat", None]}, "a choice is null"),
    ({"kind": "nearest"}, "the skill 'nearest' is none of"),
]


def test_options_in_one_text_are_not_taken_letter_by_letter(tmp_path: Path) -> None:
    picture = {"bytes": encode(np.zeros((40, 40, 3), np.uint8)), "path": None}
    row = {"image": picture, "question": "What is it?", "choices": "A. cat B. dog", "answer": "B"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    good, bad = samples(f"parquet:{tmp_path / 'rows.parquet'}")
    assert not good
    assert "the column choices holds 'A. cat B. dog', which is no list" in str(bad)


@pytest.mark.parametrize(("change", "reason"), BAD_ROWS)
def test_a_bad_parquet_row_is_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    good, bad = samples(rows(tmp_path, {}, {}, change, {}), columns=COLUMNS)
    assert len(good) == 3
    (said,) = bad.values()
    assert said.startswith("rows.parquet row 2: ")
    assert reason in said


def test_parquet_sources_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    spec = rows(tmp_path, {})
    with pytest.raises(SourceError, match=r"rows\.parquet has no column image, question, answer \(it has img, problem"):
        samples(spec)
    with pytest.raises(SourceError, match="--columns: picture is none of image, question"):
        open_source(spec, SourceOptions(columns={"picture": "img"}))
    with pytest.raises(SourceError, match="no Parquet file at"):
        samples(f"parquet:{tmp_path / 'gone.parquet'}")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SourceError, match=r"broken\.parquet is not a readable Parquet file"):
        samples(f"parquet:{tmp_path / 'broken.parquet'}")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "lost.parquet").symlink_to(tmp_path / "gone.parquet")
    with pytest.raises(SourceError, match=r"lost\.parquet cannot be read: No such file"):
        open_source(f"parquet:{tmp_path / 'links'}", SourceOptions()).fingerprint()
    with pytest.raises(SourceError, match="parquet needs a place"):
        open_source("parquet", SourceOptions())


def test_a_second_row_of_one_id_is_refused_and_rows_without_id_go_by_their_place(tmp_path: Path) -> None:
    spec = rows(tmp_path, {"uid": 1}, {"uid": 2}, {"uid": 1}, {"uid": None})
    good, bad = samples(spec, columns=COLUMNS)
    assert list(good) == ["1", "2", "0/1/1"]
    assert bad == {"0/1/0": "rows.parquet row 2: the id '1' stands there already"}


def test_a_record_of_a_row_holds_no_path(tmp_path: Path) -> None:
    source = open_source(rows(tmp_path, {}, {}, {}), SourceOptions(columns=COLUMNS))
    assert [dict(item.record) for item in source.items()] == [
        {"file": 0, "group": row // 2, "row": row % 2, "number": row} for row in range(3)
    ]


def test_only_mapped_columns_are_read_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = rows(tmp_path, {}, {})
    file = tmp_path / "rows.parquet"
    table = pq.read_table(file)
    table = table.append_column("img2", pa.array([np.random.default_rng(0).bytes(300_000)] * 2))
    pq.write_table(table, file, use_dictionary=False)
    monkeypatch.setattr("pearl.pipelines.sources.tables.MAX_GROUP_BYTES", 500_000)
    read: list[Any] = []
    original = pq.ParquetFile.read_row_group

    def watched(self: Any, group: int, columns: list[str] | None = None) -> pa.Table:
        read.append(columns)
        return original(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    assert len(samples(spec, columns=COLUMNS)[0]) == 2
    assert read
    assert all(columns is not None and "img2" not in columns for columns in read)
    with pytest.raises(
        SourceError, match=r"row group 0 holds .* more than the limit of 500,000; rewrite the file with"
    ):
        samples(spec, columns={**COLUMNS, "license": "img2"})


def depth_png(shape: tuple[int, int] = (120, 160)) -> bytes:
    """Near at the left, far at the right, a hole in the corner."""
    millimetres = np.tile(np.linspace(500, 9000, shape[1]).astype(np.uint16), (shape[0], 1))
    millimetres[:10, :10] = 0
    buffer = io.BytesIO()
    Image.fromarray(millimetres).save(buffer, "PNG")
    return buffer.getvalue()


def depth_rows(tmp_path: Path, depths: list[Any]) -> str:
    data = picture(tmp_path / "x.jpg")
    plain = {
        "image": data, "question": "Which is closer to the camera, the cup or the spoon?", "answer": "the cup",
        "choices": ["the cup", "the spoon"], "boxes": [[0.1, 0.3, 0.3, 0.8], [0.6, 0.3, 0.9, 0.8]],
        "labels": ["cup", "spoon"], "skill": "depth",
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([{**plain, "depth": depth} for depth in depths]), tmp_path / "rgbd.parquet")
    return f"parquet:{tmp_path / 'rgbd.parquet'}"


@pytest.mark.parametrize("as_image", [False, True])
def test_a_depth_column_becomes_sensor_depth_and_reaches_the_tool(tmp_path: Path, as_image: bool) -> None:
    depth = {"bytes": depth_png(), "path": None} if as_image else depth_png()
    spec = depth_rows(tmp_path, [depth, None])
    good, bad = samples(spec)
    assert bad == {}
    first, second = good.values()
    assert second.depth is None
    assert first.depth is not None
    assert first.depth.dtype == np.float32
    assert first.depth.shape == (120, 160)
    assert np.isnan(first.depth[:10, :10]).all()
    assert first.depth[60, [0, -1]] == pytest.approx([0.5, 9.0])
    config = GenerateConfig((spec,), SourceOptions(tools=("depth",)), ("depth",), {"depth": {"model": "sensor"}})
    manifest = generate(config, tmp_path / "out", LOCAL, OutputPolicy())
    assert (manifest["planned"], manifest["kept"]) == (2, 1)
    (kept,) = read_trajectories(tmp_path / "out")
    assert kept.answer == "the cup"
    assert kept.steps[0].call.tool == "depth"
    assert validate_data(str(tmp_path / "out")) == (1, [])


@pytest.mark.parametrize(
    ("depth", "reason"),
    [
        (depth_png((60, 160)), "the depth is 160×60 pixels, but the image is 160×120"),
        (b"no image", "the depth: not an image"),
        (encode(np.zeros((120, 160, 3), np.uint8), "png"), "the depth: depth must be a 16-bit grey PNG"),
        (7, "the depth column holds no image bytes"),
    ],
)
def test_a_bad_depth_is_said(tmp_path: Path, depth: Any, reason: str) -> None:
    good, bad = samples(depth_rows(tmp_path, [depth]))
    assert not good
    assert reason in bad["0/0/0"]


HUB_FILES = ("data/train-00000-of-1.parquet", "data/validation-0.parquet", "test/0.parquet", "x/training.parquet",
             "testimony.parquet")  # fmt: skip


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", {HUB_FILES[0], HUB_FILES[3]}), ("val", {HUB_FILES[1]}), ("test", {HUB_FILES[2]})],
)
def test_hub_files_of_the_split_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: Any, expected: set[str]
) -> None:
    monkeypatch.setattr("pearl.parquet._download", lambda _: sorted((tmp_path / "train").rglob("*.parquet")))
    depth_rows(tmp_path, [None])
    for name in HUB_FILES:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "rgbd.parquet", tmp_path / "train" / name)
    options = SourceOptions(split=split)
    source = open_source("hf:org/name", options)
    assert {path.relative_to(tmp_path / "train").as_posix() for path in source._files} == expected  # type: ignore[attr-defined]
    assert len(list(source.items())) == len(expected)
    for name in HUB_FILES:
        if name in expected:
            (tmp_path / "train" / name).unlink()
    with pytest.raises(SourceError, match=f"hf:org/name has no split {split}|org/name has no split {split}; it has "):
        open_source("hf:org/name", options)._files  # type: ignore[attr-defined]  # noqa: B018
    for name in HUB_FILES[:-1]:
        (tmp_path / "train" / name).unlink(missing_ok=True)
    assert len(list(open_source("hf:org/name", options).items())) == 1


def test_hub_files_in_one_split_s_folder_are_of_that_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "datasets--org--name" / "snapshots" / "0123" / "test"
    folder.mkdir(parents=True)
    depth_rows(tmp_path, [None])
    shutil.copy(tmp_path / "rgbd.parquet", folder / "0.parquet")
    monkeypatch.setattr("pearl.parquet._download", lambda _: [folder / "0.parquet"])
    assert len(list(open_source("hf:org/name", SourceOptions(split="test")).items())) == 1
    with pytest.raises(SourceError, match="has no split train; it has test"):
        list(open_source("hf:org/name", SourceOptions(split="train")).items())


def test_only_the_hub_s_own_cache_has_snapshots(tmp_path: Path) -> None:
    """A folder that is called so means nothing: not in a dataset, and not around one."""
    depth_rows(tmp_path, [None])
    inside, around = tmp_path / "ds", tmp_path / "snapshots" / "2024" / "test_sets" / "vqa"
    for folder, names in ((inside / "snapshots", ("train-0", "test-0")), (around, ("part-0", "part-1"))):
        folder.mkdir(parents=True)
        for name in names:
            shutil.copy(tmp_path / "rgbd.parquet", folder / f"{name}.parquet")
    for place, found in (
        (inside, ["train-0.parquet"]),
        (around, ["part-0.parquet", "part-1.parquet"]),
        (around / "*", ["part-0.parquet", "part-1.parquet"]),
    ):
        source = open_source(f"hf:{place}", SourceOptions())
        assert [path.name for path in source._files] == found  # type: ignore[attr-defined]


def test_a_source_of_no_item_is_said(tmp_path: Path) -> None:
    spec = coco_folder(tmp_path, {"images": [], "annotations": [], "categories": []})
    with pytest.raises(SourceError, match=r"coco: nothing can be asked about .*instances\.json"):
        samples(spec)
    (tmp_path / "questions.jsonl").write_text("\n")
    with pytest.raises(SourceError, match=r"questions\.jsonl has no line"):
        samples(spec, questions=str(tmp_path / "questions.jsonl"))
    with pytest.raises(SourceError, match=r"parquet:.*rows\.parquet has no row") as raised:
        samples(rows(tmp_path), columns=COLUMNS)
    assert isinstance(raised.value, PearlError)


def test_the_fingerprint_follows_the_images(tmp_path: Path) -> None:
    spec = coco_folder(tmp_path, foreign_coco())
    images = tmp_path / "pictures"
    options = SourceOptions(images=str(images), tools=("depth",))

    def prints() -> list[Any]:
        return [open_source(one, options).fingerprint() for one in (spec, f"folder:{images}")]

    before = prints()
    assert before == prints()
    named = images / "000000397133.jpg"
    named.write_bytes(named.read_bytes() + b"more")
    changed = prints()
    assert all(a != b for a, b in zip(before, changed, strict=True))
    picture(images / "another.jpg")
    assert prints()[0] == changed[0], "what the file does not name does not count"
    assert prints()[1] != changed[1]
    named.unlink()
    assert prints()[0] != changed[0]


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(1_000_000_001)
    _, bad = samples(f"folder:{tmp_path}", tools=("depth",))
    (reason,) = bad.values()
    assert reason == "huge.jpg: 1,000,000,001 bytes are more than the limit of 1,000,000,000"


def test_only_a_scene_that_does_not_fit_is_a_bad_record(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("scenes", SourceOptions(count=1))
    for error, expected in ((NoFittingScene("none fits"), BadRecord), (KeyError("a fault"), KeyError)):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("pearl.pipelines.sources.scenes.scene_sample", fail)
        with pytest.raises(expected):
            source.read(Item("x", {"index": 0}))


def test_scenes_ask_only_about_the_skills_that_are_named() -> None:
    options = SourceOptions(count=8, size=224, skills=("shape", "attribute"))
    source = open_source("scenes", options)
    asked = {source.read(item).skill for item in source.items()}
    assert asked == {"attribute", "shape"}
    assert source.fingerprint() == open_source("scenes", replace(options, skills=options.skills[::-1])).fingerprint()
    assert source.fingerprint() != open_source("scenes", replace(options, skills=())).fingerprint()
    with pytest.raises(SourceError, match="--skill shapes: scenes have attribute, shape,"):
        open_source("scenes", replace(options, skills=("shapes",)))


def mixed(folder: Path) -> tuple[GenerateConfig, Counter[str]]:
    """A COCO folder in which much is wrong, and how often each word must come up in the reasons."""
    document = foreign_coco()
    coco_folder(folder, document)
    pictures = folder / "pictures"
    extra = [("missing.jpg", 160), ("../secret.jpg", 160), ("wide.jpg", 999), ("text.jpg", 160), ("half.jpg", 160)]
    for number, (name, width) in enumerate(extra, start=1):
        document["images"].append({"id": number, "file_name": name, "width": width, "height": 120})
    data = picture(folder / "secret.jpg")
    (pictures / "wide.jpg").write_bytes(data)
    (pictures / "text.jpg").write_text("I am a text")
    (pictures / "half.jpg").write_bytes(data[: len(data) // 2])
    for number, (box, _) in enumerate(BAD_BOXES[:8], start=1000):
        document["annotations"].append({"id": number, "image_id": 37777, "category_id": 1, "bbox": box})
    (folder / "instances.json").write_text(json.dumps(document))
    good = [question(1), question(2), question(3, choices=[], answer="green"), question(4, annotation_ids=[18])]
    named = [question(100 + i, image=name, annotation_ids=[]) for i, (name, _) in enumerate(extra)]
    spoilt = [question(200, annotation_ids=[1000], image="sub/000000037777.jpg"), question(201, question="\ud800?")]
    lines: list[bytes | dict[str, Any]] = [*good, *named, *spoilt, *(line for line, _ in BAD_LINES)]
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "questions.jsonl").write_bytes(b"\n".join(raw))
    options = SourceOptions(images=str(pictures), questions=str(folder / "questions.jsonl"), tools=("crop", "zoom"))
    config = GenerateConfig((f"coco:{folder / 'instances.json'}",), options, tools=("crop", "zoom"), shard_size=16)
    reasons = ["cannot be read", "leaves the folder", "says 999×120", "not an image of a known", "half.jpg: unreadable"]
    reasons += ["annotation 1000", "is not valid Unicode", *(reason for _, reason in BAD_BOXES[:8])]
    return config, Counter([*reasons, *(reason for _, reason in BAD_LINES)])


def refused(out: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((out / "run" / "refused").glob("*.jsonl")):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def test_a_run_over_a_spoilt_folder_keeps_the_good_and_says_why_of_the_rest(tmp_path: Path) -> None:
    config, reasons = mixed(tmp_path)
    out = tmp_path / "out"
    manifest = generate(config, out, LOCAL, OutputPolicy())
    assert manifest["kept"] == 4
    assert manifest["planned"] == 4 + 5 + 2 + len(BAD_LINES) + 8
    assert manifest["rejected"] == {"bad input": manifest["planned"] - 4}
    assert manifest["quarantined"] == 0
    lines = list(refused(out))
    assert len(lines) == manifest["planned"] - manifest["kept"]
    for reason, count in reasons.items():
        assert sum(reason in line["detail"] for line in lines) >= count, reason
    assert {line["source"] for line in lines} == {"coco"}
    assert json.loads((out / "manifest.json").read_text())["rejected"] == manifest["rejected"]
    rows, problems = validate_data(str(out))
    assert (rows, problems) == (4, [])
    assert {t.question for t in read_trajectories(out)} == {"What colour is the bottle?"}


def test_names_and_texts_that_are_no_unicode_are_refused_one_by_one(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "good.jpg")
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9.jpg", "wb") as file:  # noqa: PTH123
        file.write((tmp_path / "in" / "good.jpg").read_bytes())
    options = SourceOptions(tools=("depth",))
    config = GenerateConfig((f"folder:{tmp_path / 'in'}",), options, tools=("depth",))
    manifest = generate(config, tmp_path / "out", LOCAL, OutputPolicy())
    assert manifest["planned"] == 2
    (line,) = (line for line in refused(tmp_path / "out") if "caf" in line["key"])
    assert "is not valid Unicode" in line["detail"]


def test_two_sources_of_one_kind_with_the_same_keys_give_different_ids(tmp_path: Path) -> None:
    for name in ("a", "b"):
        coco_folder(tmp_path / name, foreign_coco())
    sources = tuple(f"coco:{tmp_path / name / 'instances.json'}" for name in ("a", "b"))
    (tmp_path / "pictures").symlink_to(tmp_path / "a" / "pictures")
    options = SourceOptions(images=str(tmp_path / "a" / "pictures"), tools=("crop", "highlight"))
    manifest = generate(
        GenerateConfig(sources, options, ("crop", "highlight")), tmp_path / "out", LOCAL, OutputPolicy()
    )
    ids = [trajectory.id for trajectory in read_trajectories(tmp_path / "out")]
    assert len(ids) == manifest["kept"] > 10
    assert len(set(ids)) == len(ids)
