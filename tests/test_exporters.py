from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pearl.images import decode, header
from pearl.parquet import read_trajectories, write_trajectories
from pearl.pipelines.exporters import Exported, ExportError, bring_back, export_data, exporter_names, read_export
from pearl.pipelines.exporters.base import ImageFolder
from pearl.records import EncodedImage, Trajectory
from pearl.torch_setup import prepare_torchvision
from pearl.trainer.conversation import template_names
from tests.plain import conversation, inputs_of, picture, step, tiny, trajectories, trajectory
from tests.runs import data_file, rows

NATIVE = ("llamafactory", "ms-swift", "openai")


def several() -> list[Trajectory]:
    """With steps of every kind: without an image, without a thought, without text, an image shown twice."""
    return [replace(one, id=f"row-{number}") for number, one in enumerate(trajectories())]


def exported(
    kind: str, folder: Path, data: Sequence[Trajectory] | None = None, **options: Any
) -> tuple[Path, Exported]:
    out = folder / "out" / (f"{kind}.parquet" if kind == "trl" else kind)
    return out, export_data(kind, data_file(folder, several() if data is None else data), out, **options)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]


def test_the_formats() -> None:
    assert exporter_names() == ["trl", "llamafactory", "ms-swift", "openai"]


@pytest.mark.parametrize("kind", exporter_names())
def test_round_trip_in_words(kind: str, tmp_path: Path) -> None:
    out, found = exported(kind, tmp_path)
    assert list(read_export(kind, out)) == several()
    shown = sum(1 + sum(one.observation.image is not None for one in row.steps) for row in several())
    assert (found.rows, found.images, found.changed, found.lost) == (len(several()), shown, 0, [])


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("template", ["pearl", "published-pixelreasoner"])
def test_round_trip_with_native_calls(kind: str, template: str, tmp_path: Path) -> None:
    out, _ = exported(kind, tmp_path, template=template, native_calls=True)
    assert list(read_export(kind, out)) == several()
    specs = json.loads((out / "export.json").read_text())["tools"]
    assert [one["function"]["name"] for one in specs] == ["crop"]
    assert specs[0]["function"]["parameters"]["properties"]["box"]


def test_round_trip_with_inline_images_and_names(tmp_path: Path) -> None:
    named = [
        replace(
            one,
            image=EncodedImage(one.image.data, f"photos/{one.id}.png"),
            steps=tuple(
                replace(s, observation=replace(s.observation, image=EncodedImage(picture(n).data, f"{n}.png")))
                for n, s in enumerate(one.steps)
            ),
        )
        for one in several()
    ]
    for kind, inline in (("openai", True), ("openai", False), ("trl", False)):
        folder = tmp_path / f"{kind}-{inline}"
        folder.mkdir()
        out, _ = exported(kind, folder, named, inline_images=inline)
        assert list(read_export(kind, out)) == named
        assert (out / "images").exists() == (kind == "openai" and not inline)


def test_what_a_template_does_not_say_is_named(tmp_path: Path) -> None:
    for name in template_names():
        folder = tmp_path / name
        folder.mkdir()
        out, found = exported("ms-swift", folder, template=name)
        if found.lost:
            with pytest.raises(ExportError, match=r"template does not say \$.*text"):
                list(read_export("ms-swift", out))
        else:
            assert list(read_export("ms-swift", out)) == several()
    assert {"thought", "call", "text", "conclusion"} == set(
        exported("openai", tmp_path, template="published-lvr")[1].lost
    )


def test_rows_that_change_and_rows_that_do_not_fit(tmp_path: Path) -> None:
    spaced = trajectory(step("  I look. "))
    marked = trajectory(question="What is <image>?")
    out, found = exported("llamafactory", tmp_path, [replace(spaced, id="a"), replace(marked, id="b"), *several()])
    assert found.changed == 1
    assert found.left_out == {"a text holds <image>": 1}
    assert [one.id for one in read_export("llamafactory", out)][:2] == ["a", "row-0"]
    with pytest.raises(ExportError, match="no row to export"):
        exported("ms-swift", tmp_path, [marked])
    assert not list((tmp_path / "out").glob("*swift*"))
    assert not list((tmp_path / "out").glob(".*"))


def test_edited_messages_come_back_as_they_are_now(tmp_path: Path) -> None:
    out, _ = exported("openai", tmp_path)
    text = (out / "data.jsonl").read_text()
    (out / "data.jsonl").write_text(text.replace("How far is the cup?", "How far is the mug?", 1))
    assert next(read_export("openai", out)).question == "How far is the mug?"
    (out / "data.jsonl").write_text(text.replace("Answer: 12", "Answer: 13", 1))
    with pytest.raises(ExportError, match="row 'row-0': the conclusion is not in the template's words"):
        next(read_export("openai", out))


def test_a_corrected_export_is_brought_back_without_the_rows_that_do_not_fit(tmp_path: Path) -> None:
    out, _ = exported("openai", tmp_path)
    text = (out / "data.jsonl").read_text()
    (out / "data.jsonl").write_text(text.replace('"answer\\": \\"12', '"answer\\": \\"13', 1))
    left_out = bring_back("openai", out, tmp_path / "back.parquet")
    found = list(read_trajectories(tmp_path / "back.parquet"))
    assert found == several()[1:]
    assert list(left_out) == ["row-0"]
    assert "not in the template's words" in left_out["row-0"]
    with pytest.raises(ExportError, match="exists already"):
        bring_back("openai", out, tmp_path / "back.parquet")
    out, _ = exported("ms-swift", tmp_path, template="published-lvr")
    with pytest.raises(ExportError, match=r"does not say \$"):
        bring_back("ms-swift", out, tmp_path / "lost.parquet")
    assert not (tmp_path / "lost.parquet").exists()


@pytest.mark.parametrize(("name", "value"), [("seed", None), ("choices", None), ("answer", 3), ("choices", [1])])
def test_facts_that_were_spoilt_leave_their_row_out(name: str, value: Any, tmp_path: Path) -> None:
    out, _ = exported("openai", tmp_path)
    lines = [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]
    facts = json.loads(lines[0]["pearl"]) if isinstance(lines[0]["pearl"], str) else lines[0]["pearl"]
    facts[name] = value
    lines[0]["pearl"] = json.dumps(facts) if isinstance(lines[0]["pearl"], str) else facts
    (out / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    left_out = bring_back("openai", out, tmp_path / "back.parquet")
    assert list(left_out) == ["row-0"]
    assert list(read_trajectories(tmp_path / "back.parquet")) == several()[1:]


def test_a_row_without_seed_comes_back(tmp_path: Path) -> None:
    data = data_file(tmp_path, several())
    table = pq.read_table(data)
    seeds = pa.nulls(len(table), pa.int64())
    pq.write_table(table.set_column(table.schema.names.index("seed"), table.schema.field("seed"), seeds), data)
    export_data("openai", data, tmp_path / "out")
    assert bring_back("openai", tmp_path / "out", tmp_path / "back.parquet") == {}
    assert list(read_trajectories(tmp_path / "back.parquet")) == several()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no export format 'csv'; there are: trl"):
        exported("csv", tmp_path)
    with pytest.raises(ExportError, match="calls stay in the template's words"):
        exported("trl", tmp_path, native_calls=True)
    with pytest.raises(ExportError, match="one way to hold images"):
        exported("llamafactory", tmp_path, inline_images=True)
    out, _ = exported("openai", tmp_path)
    with pytest.raises(ExportError, match="exists already"):
        exported("openai", tmp_path)
    with pytest.raises(ExportError, match="of kind 'openai', not 'ms-swift'"):
        list(read_export("ms-swift", out))
    with pytest.raises(ExportError, match="is no export of pearl-gen"):
        list(read_export("trl", data_file(tmp_path, several())))
    entry = lines(out)[0]
    entry["messages"][0]["content"][0]["image_url"]["url"] = "../../traj.parquet"
    (out / "data.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(ExportError, match="outside"):
        list(read_export("openai", out))


def test_a_stored_turned_image_is_upright_for_consumers_that_ignore_exif(tmp_path: Path) -> None:
    file = io.BytesIO()
    picture_ = Image.fromarray(decode(picture(3, 40, 20).data))
    exif = picture_.getexif()
    exif[0x0112] = 6
    picture_.save(file, "JPEG", exif=exif)
    turned = EncodedImage(file.getvalue())
    out, _ = exported("ms-swift", tmp_path, [trajectory(image=turned)])
    [shown] = (out / "images").rglob("*.*")
    assert Image.open(shown).size == header(turned.data) == (20, 40)


def test_inline_images_are_of_types_that_services_take(tmp_path: Path) -> None:
    for format in ("MPO", "BMP", "TIFF", "PNG"):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 10), "red").save(buffer, format)
        data = buffer.getvalue()
        found = ImageFolder(tmp_path, inline=True).put(EncodedImage(data))
        assert found.startswith(f"data:image/{'jpeg' if format == 'MPO' else 'png'};base64,"), format
        assert decode(ImageFolder(tmp_path, inline=True).get(found).data).shape == (10, 20, 3)


def test_openai_form(tmp_path: Path) -> None:
    out, _ = exported("openai", tmp_path, native_calls=True, template="published-lvr")
    first = lines(out)[1]
    roles = [message["role"] for message in first["messages"]]
    assert roles == ["user", "assistant", "tool", "user", "assistant"]
    question, call, result, shown, answer = first["messages"]
    assert [part["type"] for part in question["content"]] == ["image_url", "text"]
    assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == {"box": [0, 0, 1, 1]}
    assert (call["weight"], "weight" in answer) == (0, False)
    assert result["tool_call_id"] == call["tool_calls"][0]["id"]
    assert (out / shown["content"][0]["image_url"]["url"]).read_bytes() == several()[1].steps[0].observation.image.data  # type: ignore[union-attr]


def test_trl_loads_it_and_counts_the_same_images_and_tokens(tmp_path: Path) -> None:
    """TRL's collator on `load_dataset` against the same conversations put to the processor by hand."""
    prepare_torchvision()  # before trl imports transformers
    pytest.importorskip("trl")
    from datasets import load_dataset
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    vlm = tiny("qwen2_5_vl")
    out, _ = exported("trl", tmp_path)
    data = load_dataset("parquet", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    batch = DataCollatorForVisionLanguageModeling(vlm.processor)(list(data))
    by_hand = [inputs_of(vlm, conversation(one, "full")) for one in several()]
    assert (
        len(batch["image_grid_thw"])
        == sum(len(one["image_grid_thw"]) for one in by_hand)
        == sum(map(len, data["images"]))
    )
    torch.testing.assert_close(batch["pixel_values"], torch.cat([one["pixel_values"] for one in by_hand]))
    for ids, mask, expected in zip(batch["input_ids"], batch["attention_mask"], by_hand, strict=True):
        given = vlm.processor.tokenizer.decode(ids[mask.bool()]).rstrip()
        assert given == vlm.processor.tokenizer.decode(expected["input_ids"][0]).rstrip()


def test_llamafactory_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wants older releases than ours beside it; 0.9.5 was put on the path by hand, without what it depends on."""
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    data_code = pytest.importorskip("llamafactory.data")
    converter = pytest.importorskip("llamafactory.data.converter").SharegptDatasetConverter
    plugin = data_code.mm_plugin.get_mm_plugin("qwen2_vl", image_token="<|image_pad|>")
    arguments = pytest.importorskip("llamafactory.hparams").DataArguments
    from datasets import load_dataset

    vlm = tiny("qwen2_5_vl")
    for native in (False, True):
        folder = tmp_path / str(native)
        folder.mkdir()
        out, _ = exported("llamafactory", folder, native_calls=native)
        [attributes] = data_code.parser.get_dataset_list(["pearl"], str(out))
        convert = converter(attributes, arguments(media_dir=str(out)))
        file = str(out / attributes.dataset_name)
        data = load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
        for row, expected in zip(map(convert, data), several(), strict=True):
            turns = row["_prompt"] + row["_response"]
            assert len(turns) == 2 + 2 * len(expected.steps)
            said = plugin.process_messages(turns, row["_images"], [], [], vlm.processor)
            assert "".join(turn["content"] for turn in said).count("<|vision_start|>") == len(row["_images"])
            words = data_code.template.TEMPLATES["qwen2_vl"]
            assert words.encode_multiturn(vlm.processor.tokenizer, said, None, row["_tools"] or None)


def test_ms_swift_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, with 4.6.0."""
    preprocessor = pytest.importorskip("swift.dataset").AutoPreprocessor()
    inputs_class = pytest.importorskip("swift.template.template_inputs").StdTemplateInputs
    load_image = pytest.importorskip("swift.template.vision_utils").load_image
    from datasets import load_dataset

    for native in (False, True):
        folder = tmp_path / str(native)
        folder.mkdir()
        out, _ = exported("ms-swift", folder, native_calls=native, template="published-pixelreasoner")
        monkeypatch.setenv("ROOT_IMAGE_DIR", str(out))
        file = str(out / "data.jsonl")
        data = load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
        for row, expected in zip(preprocessor(data), several(), strict=True):
            inputs = inputs_class.from_dict(row)
            assert sum(message["content"].count("<image>") for message in inputs.messages) == len(inputs.images)
            assert len(inputs.tools or ()) == native
            sizes = [load_image(image["path"]).size for image in row["images"]]
            assert sizes[0] == header(expected.image.data)


def test_trl_row_groups_stay_small(tmp_path: Path) -> None:
    data = tmp_path / "many.parquet"
    write_trajectories(data, (replace(one, id=f"{n}-{one.id}") for n in range(20) for one in rows()))
    found = export_data("trl", data, tmp_path / "out.parquet")
    assert (found.rows, pq.ParquetFile(tmp_path / "out.parquet").num_row_groups) == (240, 4)
