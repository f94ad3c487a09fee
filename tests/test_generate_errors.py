"""What a run refuses or cannot do: it says so in one line, and leaves nothing half done that looks whole."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from pearl.images import encode
from pearl.parquet import DataError, count_rows
from pearl.pipelines.config import GenerateConfig
from pearl.pipelines.engines import EngineConfig
from pearl.pipelines.errors import RunError
from pearl.pipelines.generate import OutputPolicy, generate, preview
from pearl.pipelines.run_directory import RunDirectory
from pearl.pipelines.sources import SourceError, SourceOptions
from pearl.pipelines.sources.coco import Coco
from pearl.tools import ToolUnavailable

LOCAL = EngineConfig(engine="local")
PLAIN = OutputPolicy()
PHOTOS = GenerateConfig(("photos",), SourceOptions(tools=("crop", "highlight")), ("crop", "highlight"), shard_size=8)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run; do not change it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    generate(PHOTOS, out, LOCAL, PLAIN)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_a_place_that_is_not_ours_is_never_touched(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    root = out if name == "out" else tmp_path / "out.parquet.run"
    (root / "data").mkdir(parents=True)
    (root / "data" / "thesis.parquet").write_text("years of work")
    before = files(tmp_path)
    for policy in (PLAIN, OutputPolicy(resume=True), OutputPolicy(overwrite=True)):
        with pytest.raises(RunError, match="is there already and is no run of pearl-gen; choose another --out"):
            generate(PHOTOS, out, LOCAL, policy)
        assert files(tmp_path) == before


def test_a_file_in_the_way_is_refused_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "traj.parquet"
    out.write_text("an old file")
    for policy in (PLAIN, OutputPolicy(resume=True)):
        with pytest.raises(RunError, match=r"traj\.parquet is there already"):
            generate(PHOTOS, out, LOCAL, policy)
    assert files(tmp_path) == {"traj.parquet": b"an old file"}
    kept = generate(PHOTOS, out, LOCAL, OutputPolicy(overwrite=True))["kept"]
    assert count_rows(out) == kept > 5


def test_a_plain_file_as_folder_and_a_folder_as_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("text")
    (tmp_path / "folder.parquet").mkdir()
    for policy in (PLAIN, OutputPolicy(overwrite=True)):
        with pytest.raises(RunError, match="plain is there already"):
            generate(PHOTOS, tmp_path / "plain", LOCAL, policy)
        with pytest.raises(RunError, match=r"folder\.parquet is a folder; choose another --out"):
            generate(PHOTOS, tmp_path / "folder.parquet", LOCAL, policy)
    assert files(tmp_path) == {"plain": b"text"}


def test_an_empty_folder_is_a_fine_place(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert generate(PHOTOS, tmp_path / "out", LOCAL, PLAIN)["kept"] > 5


def test_a_finished_run_is_not_made_again_unasked(run: Path) -> None:
    before = files(run)
    with pytest.raises(RunError, match="holds a finished run: --resume continues it, --overwrite starts anew"):
        generate(PHOTOS, run, LOCAL, PLAIN)
    assert files(run) == before
    (run / "manifest.json").unlink()
    with pytest.raises(RunError, match="holds an unfinished run: --resume"):
        generate(PHOTOS, run, LOCAL, PLAIN)


def test_what_is_refused_anyway_is_refused_before_sources_are_hashed(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setattr("pearl.pipelines.generate.recipe", lambda _: pytest.fail("the sources were hashed"))
    for config, out, policy, said in (
        (PHOTOS, tmp_path / "taken", PLAIN, "is there already"),
        (PHOTOS, run, PLAIN, "holds a finished run"),
        (replace(PHOTOS, seed=5), run, OutputPolicy(resume=True), "made with another configuration"),
    ):
        with pytest.raises(RunError, match=said):
            generate(config, out, LOCAL, policy)
        with pytest.raises(RunError, match=said):
            preview(config, out, policy)


def test_resuming_a_finished_run_changes_nothing(run: Path) -> None:
    before = files(run)
    manifest = generate(PHOTOS, run, LOCAL, OutputPolicy(resume=True))
    assert manifest == json.loads(before["manifest.json"])
    assert files(run) == before


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (replace(PHOTOS, seed=5), "seed: 0 there, 5 now"),
        (replace(PHOTOS, shard_size=9), "shard_size: 8 there, 9 now"),
        (replace(PHOTOS, tools=("crop",)), r"tools: \['crop', 'highlight'\] there, \['crop'\] now"),
        (replace(PHOTOS, image_format="webp"), "image_format: None there, 'webp' now"),
        (replace(PHOTOS, source_options=SourceOptions(seed=3)), r"source_options\.seed: 0 there, 3 now"),
    ],
)
def test_a_run_of_another_configuration_is_not_resumed(run: Path, other: GenerateConfig, difference: str) -> None:
    before = files(run)
    with pytest.raises(RunError, match=rf"another configuration; it cannot be resumed:\n(.*\n)*  {difference}"):
        generate(other, run, LOCAL, OutputPolicy(resume=True))
    assert files(run) == before


def test_a_run_of_other_inputs_is_not_resumed(tmp_path: Path) -> None:
    config = coco(tmp_path)
    generate(config, tmp_path / "out", LOCAL, PLAIN)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(questions.read_text().replace("What is it?", "What is that?"))
    with pytest.raises(RunError, match="made with other inputs, models or versions; it cannot be resumed:\n  sources"):
        generate(config, tmp_path / "out", LOCAL, OutputPolicy(resume=True))


def test_overwriting_starts_anew_and_keeps_what_is_not_ours(run: Path, tmp_path: Path) -> None:
    (run / "README.md").write_text("mine")
    (run / "run" / "done" / "00099.json").write_text("{}")
    other = replace(PHOTOS, shard_size=21)
    manifest = generate(other, run, LOCAL, OutputPolicy(overwrite=True))
    generate(other, tmp_path / "fresh", LOCAL, PLAIN)
    assert list(manifest["files"]) == ["data/train-00000-of-00001.parquet"]
    ours, fresh = files(run), files(tmp_path / "fresh")
    assert ours.pop("README.md") == b"mine"
    assert ours.keys() == fresh.keys()
    shard = next(iter(manifest["files"]))
    assert ours[shard] == fresh[shard]


def test_sources_that_cannot_be_listed_do_not_cost_the_old_data(run: Path, tmp_path: Path) -> None:
    """The fault stands behind the first item."""
    before = files(run)
    good = tmp_path / "good.parquet"
    picture = {"bytes": encode(np.zeros((40, 40, 3), np.uint8)), "path": "a.jpg"}
    rows = [{"image": picture, "question": "What is it?", "answer": "a cup"}]
    pq.write_table(pa.Table.from_pylist(rows), good)
    (tmp_path / "later.parquet").write_text("no table")
    other = GenerateConfig((f"parquet:{tmp_path}",), SourceOptions(), ("crop",))
    with pytest.raises(SourceError):
        generate(other, run, LOCAL, OutputPolicy(overwrite=True))
    assert files(run) == before


def test_a_run_killed_while_it_is_overwritten_is_still_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            generate(PHOTOS, run, LOCAL, OutputPolicy(overwrite=True))
    assert not (run / "manifest.json").exists()
    assert generate(PHOTOS, run, LOCAL, OutputPolicy(overwrite=True))["kept"] > 5


def test_images_that_vanish_stop_the_run_and_are_no_bad_input(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    config = coco(tmp_path / "data", images=6)
    out = tmp_path / "out"
    source = config.open_sources()[0]
    assert isinstance(source, Coco)
    pictures, away = source.images, tmp_path / "away"
    listed = RunDirectory.write_plan

    def unmounted(*arguments: Any) -> int:
        count = listed(*arguments)
        pictures.rename(away)
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "write_plan", unmounted)
        with pytest.raises(RunError, match=r"cannot be read: .*; --resume goes on"):
            generate(config, out, LOCAL, PLAIN)
    away.rename(pictures)
    manifest = generate(config, out, LOCAL, OutputPolicy(resume=True))
    assert not manifest["rejected"].get("bad input")
    assert manifest["kept"] > 0


def test_resume_and_overwrite_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="--resume and --overwrite exclude each other"):
        OutputPolicy(resume=True, overwrite=True)


def test_two_processes_do_not_work_on_one_run(run: Path) -> None:
    before = files(run)
    with FileLock(run / "run" / "lock"):
        for policy in (OutputPolicy(resume=True), OutputPolicy(overwrite=True)):
            with pytest.raises(RunError, match="another process is working on"):
                generate(PHOTOS, run, LOCAL, policy)
    assert files(run) == before


@pytest.mark.parametrize("name", ["file/out", "file/out.parquet", "dangling/out", "/proc/nowhere/out"])
def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(RunError, match=r"cannot write .*out"):
        generate(PHOTOS, tmp_path / name, LOCAL, PLAIN)
    assert files(tmp_path) == {"file": b"in the way"}


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write everywhere, so it becomes nobody for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        if not os.access(__file__, os.R_OK, effective_ids=True):
            pytest.skip("this checkout lies where nobody but its owner may read")
        yield
    finally:
        os.seteuid(user)


def test_a_place_without_permission_is_said(finished: Path, tmp_path: Path) -> None:
    closed, readable = tmp_path / "closed", Path(tempfile.mkdtemp())
    closed.mkdir()
    closed.chmod(0o000)
    readable.chmod(0o555)
    try:
        for out in (closed / "out", readable / "out", readable / "out.parquet"):
            with unprivileged(), pytest.raises(RunError, match=r"cannot write .*out.*: Permission denied"):
                generate(PHOTOS, out, LOCAL, PLAIN)
        assert not list(readable.iterdir())
    finally:
        closed.chmod(0o700)
        readable.rmdir()


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A disk of this size mounted at `folder`, and how to make it larger; needs root."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")

    def grow(kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", folder], check=True)

    try:
        yield grow
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("kilobytes", [4, 24, 700])
def test_a_full_disk_stops_the_run_and_a_larger_one_lets_it_continue(
    tmp_path: Path, finished: Path, kilobytes: int
) -> None:
    with small_disk(tmp_path / "disk", kilobytes) as grow:
        out = tmp_path / "disk" / "out"
        with pytest.raises(RunError, match=r"cannot write .*: No space left on device"):
            generate(PHOTOS, out, LOCAL, PLAIN)
        assert not (out / "manifest.json").exists()
        assert not list(out.rglob("*.tmp"))
        grow(20_000)
        generate(PHOTOS, out, LOCAL, OutputPolicy(resume=True))
        whole, resumed = ({p.name: p.read_bytes() for p in (at / "data").iterdir()} for at in (finished, out))
        assert whole == resumed


def test_a_limit_on_file_size_stops_the_run(tmp_path: Path) -> None:
    """What a quota or an old file system does: writing fails in the middle of a shard."""
    call = [sys.executable, "-m", "pearl.cli.gen", "trajectories", "--source", "photos", "--tools", "crop,highlight"]
    call += ["--engine", "local", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        call, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "cannot write" in line
    assert "File too large" in line
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out" / "data").iterdir())


def test_an_unknown_tool_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ToolUnavailable, match="there is no tool 'paint'"):
        generate(replace(PHOTOS, tools=("crop", "paint")), tmp_path / "out", LOCAL, PLAIN)
    with pytest.raises(ToolUnavailable, match="no model is built in"):
        generate(replace(PHOTOS, tools=("detect",)), tmp_path / "out", LOCAL, PLAIN)
    assert not (tmp_path / "out").exists()


def test_a_missing_model_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    settings = {"depth": {"model": str(tmp_path / "gone")}}
    config = replace(PHOTOS, tools=("crop", "depth"), tool_settings=settings)
    with pytest.raises(ToolUnavailable, match="gone' is neither a folder nor a checkpoint that the Hub gives"):
        generate(config, tmp_path / "out", LOCAL, PLAIN)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_no_model_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    settings = {"depth": {"model": str(tmp_path / "empty")}}
    config = replace(PHOTOS, tools=("crop", "depth"), tool_settings=settings)
    with pytest.raises(RunError, match=r"depth: .*empty' is no depth estimation checkpoint"):
        generate(config, tmp_path / "out", LOCAL, PLAIN)
    assert not (tmp_path / "out" / "manifest.json").exists()


def coco(folder: Path, images: int = 1) -> GenerateConfig:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for i in range(images):
        (folder / f"{i}.jpg").write_bytes(encode(pixels))
    listed = [{"id": i, "file_name": f"{i}.jpg", "width": 50, "height": 40} for i in range(images)]
    annotations = [{"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 30, 30]} for i in range(images)]
    categories = [{"id": 1, "name": "cat"}]
    document = {"images": listed, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(document))
    question = {"id": 1, "image": "0.jpg", "question": "What is it?", "answer": "a cat", "skill": "attribute"}
    (folder / "questions.jsonl").write_text(json.dumps({**question, "annotation_ids": [0]}))
    options = SourceOptions(questions=str(folder / "questions.jsonl"), tools=("crop",))
    return GenerateConfig((f"coco:{folder / 'instances.json'}",), options, ("crop",))


def test_an_empty_source_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    nothing = GenerateConfig((f"folder:{tmp_path / 'pictures'}",), SourceOptions(tools=("ocr",)), ("ocr",))
    unannotated = replace(coco(tmp_path, images=0), source_options=SourceOptions(tools=("crop",)))
    for config, error, message in (
        (nothing, SourceError, "pictures holds no image"),
        (unannotated, SourceError, "nothing can be asked about"),
    ):
        for out in (tmp_path / "out", tmp_path / "out.parquet"):
            with pytest.raises(error, match=message):
                generate(config, out, LOCAL, PLAIN)
            with pytest.raises(error, match=message):
                preview(config, out, PLAIN)
    assert not list(tmp_path.glob("out*"))


def test_a_source_that_is_mended_needs_no_flag(tmp_path: Path) -> None:
    config = coco(tmp_path)
    whole = (tmp_path / "instances.json").read_text()
    (tmp_path / "instances.json").write_text(whole[:-9])
    with pytest.raises(SourceError, match=r"instances\.json is not JSON"):
        generate(config, tmp_path / "out", LOCAL, PLAIN)
    (tmp_path / "instances.json").write_text(whole)
    assert generate(config, tmp_path / "out", LOCAL, PLAIN)["kept"] == 1


def test_a_run_of_refusals_alone_ends_with_an_empty_file(tmp_path: Path) -> None:
    config = coco(tmp_path)
    (tmp_path / "0.jpg").write_text("no picture")
    manifest = generate(config, tmp_path / "out.parquet", LOCAL, PLAIN)
    assert (manifest["planned"], manifest["kept"], manifest["rejected"]) == (1, 0, {"bad input": 1})
    assert count_rows(tmp_path / "out.parquet") == 0


def damaged_rows(path: Path, count: int) -> GenerateConfig:
    """A Parquet file whose footer is whole and whose pages are not: every read of it fails."""
    picture = encode(np.zeros((40, 50, 3), np.uint8))
    rows = [{"image": picture, "question": f"What is it? {i}", "answer": "a cat"} for i in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    return GenerateConfig((f"parquet:{path}",), SourceOptions(tools=("crop",)), ("crop",), shard_size=6)


def test_too_many_failures_stop_the_run_and_a_higher_limit_lets_it_end(tmp_path: Path) -> None:
    config = damaged_rows(tmp_path / "rows.parquet", 24)
    out = tmp_path / "out"
    with pytest.raises(
        RunError, match=r"12 of 24 samples are quarantined, more than --max-quarantined allows; .*refused"
    ):
        generate(config, out, LOCAL, PLAIN)
    assert not (out / "manifest.json").exists()
    manifest = generate(config, out, LOCAL, OutputPolicy(resume=True, max_quarantined=1))
    assert (manifest["kept"], manifest["quarantined"]) == (0, 24)
    lines = [json.loads(line) for path in (out / "run" / "refused").iterdir() for line in path.open()]
    assert len(lines) == 24
    assert all(line["quarantined"] and line["detail"] for line in lines)


def test_few_failures_do_not_stop_a_run(tmp_path: Path) -> None:
    manifest = generate(damaged_rows(tmp_path / "rows.parquet", 10), tmp_path / "out", LOCAL, PLAIN)
    assert manifest["quarantined"] == manifest["planned"] == 10


def test_a_configuration_that_makes_no_sense_is_refused() -> None:
    for changes, message in (
        ({"tools": ()}, "no tools"),
        ({"shard_size": 0}, "shard size 0"),
        ({"sources": ("photos", "photos")}, "a source stands twice"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(PHOTOS, **changes)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "pearl.cli.gen", *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["trajectories", "--tools", "crop,paint"], 1, "there is no tool 'paint'"),
        (["trajectories", "--resume", "--overwrite"], 1, "--resume and --overwrite exclude each other"),
        (
            ["trajectories", "--source", "coco:{tmp}/gone.json"],
            1,
            "gone.json cannot be read: No such file or directory",
        ),
        (["trajectories", "--shard-size", "many"], 2, "Invalid value for '--shard-size'"),
        (
            ["trajectories", "--tools", "depth", "--depth-model", "org/no-such-model"],
            1,
            "nor a checkpoint that the Hub",
        ),
        (
            ["inspect", "{tmp}/a/rather/long/path/so/that/the/message/would/be/wrapped/at/eighty.parquet"],
            1,
            "no Parquet",
        ),
        (["paint"], 2, "No such command 'paint'"),
    ],
)
def test_the_command_line_says_what_is_wrong_without_a_traceback(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    out = ["--out", str(tmp_path / "out")] if arguments[0] == "trajectories" else []
    done = command(*filled, *out, HF_HUB_OFFLINE="1")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    if code == 1:
        assert len(done.stderr.strip().splitlines()) == 1, "one problem, one line"
        assert done.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_validate_exits_with_one_when_there_is_a_problem(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    assert command("validate", str(finished)).returncode == 0
    done = command("validate", str(tmp_path / "bad.parquet"))
    assert done.returncode == 1
    assert "bad.parquet is not a readable Parquet file" in done.stderr


def test_a_hub_dataset_that_cannot_be_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = replace(PHOTOS, sources=("hf:org/no-such-data",))
    with pytest.raises(
        (SourceError, DataError), match="org/no-such-data is no local path, and the Hub does not give it"
    ):
        generate(config, tmp_path / "out", LOCAL, PLAIN)
    assert not (tmp_path / "out").exists()
