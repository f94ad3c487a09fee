"""`pearl-gen push`, against a server on this machine that speaks the Hub's protocol:

1. a push ends complete and identical to what is on the disk, or leaves the dataset as it was;
2. what was uploaded before an interruption is not sent again;
3. nothing is sent that fails validation, and no message holds the token;
4. what was pushed is read by `load_dataset` and by `pearl-train`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from PIL import Image
from typer.testing import CliRunner, Result

from pearl.cli.publishing import push as push_command
from pearl.images import encode
from pearl.parquet import TrajectoryWriter, read_trajectories, to_row, write_trajectories
from pearl.paths import local_paths, without_folders
from pearl.pipelines.publishing import PublishError, Pushed, make_plan, prepare, push
from pearl.pipelines.run_directory import write_json
from pearl.records import EncodedImage, Observation, Step, ToolCall, Trajectory
from pearl.trainer.data import Table
from tests import hub_server
from tests.hub_server import READ_TOKEN, TOKEN, HubServer, Repository

REPO = "me/trajectories"
SKILLS = ("counting", "depth", "fine detail")

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(push_command)


def noise(seed: int, side: int = 24) -> EncodedImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return EncodedImage(encode(pixels, "png"))


def trajectories(count: int, first: int = 0) -> Iterator[Trajectory]:
    for number in range(first, first + count):
        crop = ToolCall("crop", {"image": 0, "box": [0.1, 0.2, 0.6, 0.9]})
        yield Trajectory(
            id=f"row-{number:06}", image=noise(number), question=f"How many cups stand on table {number}?",
            choices=("one", "two"), answer="two", steps=(Step("I look.", crop, Observation("Cut.", noise(-number % 7, 12))),),
            conclusion="There are two.", expert="annotations", skill=SKILLS[number % 3], source="coco",
            license="CC-BY-4.0", seed=0,
        )  # fmt: skip


def shards(folder: Path, rows: int, each: int, split: str = "train", first: int = 0) -> Path:
    """A folder of shards as a run leaves it."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    total = -(-rows // each)
    for number in range(total):
        made = trajectories(min(each, rows - number * each), first + number * each)
        write_trajectories(folder / "data" / f"{split}-{number:05d}-of-{total:05d}.parquet", made, {"config": {}})
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.stand_in(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """40 trajectories in five shards."""
    return shards(tmp_path / "run", 40, 8)


def publish(data: Path | str, public: bool = False, shard_bytes: int = 10**9) -> Pushed:
    return push(prepare(REPO, make_plan(str(data), shard_bytes=shard_bytes)), public)


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def pushed_data(hub: HubServer) -> dict[str, str]:
    """The data files of the repository by name, as hashes."""
    return {path: blob.sha256 for path, blob in hub.dataset(REPO).files.items() if path.startswith("data/")}


def on_disk(folder: Path) -> dict[str, str]:
    return {f"data/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*.parquet")}


def rows_of(hub: HubServer, folder: Path, split: str = "train") -> list[Trajectory]:
    """The pushed trajectories, in order."""
    folder.mkdir()
    for path, blob in hub.dataset(REPO).files.items():
        if path.startswith(f"data/{split}-"):
            (folder / Path(path).name).write_bytes(blob.data)
    return list(read_trajectories(folder))


# what a push leaves


def test_what_was_pushed_is_trained_on_by_its_name(hub: HubServer, run: Path, tmp_path: Path) -> None:
    publish(run)
    for name in (REPO, f"{REPO}:train"):
        found = Table(name, tmp_path / "cache")
        assert [found[row] for row in range(len(found))] == list(read_trajectories(run))


def test_shards_are_taken_as_they_are_into_a_private_dataset(hub: HubServer, run: Path) -> None:
    done = publish(run)
    assert pushed_data(hub) == on_disk(run)
    assert hub.dataset(REPO).private
    assert (done.files, done.unchanged, done.removed) == (5, 0, 0)
    assert done.revision == hub.dataset(REPO).head
    assert len(hub.dataset(REPO).commits) == 2  # as it was made, and all at once
    others = sorted(path for path in hub.dataset(REPO).files if not path.startswith("data/"))
    assert others == [".gitattributes", "README.md", *(f"pictures/{n}.jpg" for n in range(1, 7))]


def test_a_public_dataset_is_asked_for(hub: HubServer, run: Path) -> None:
    publish(run, public=True)
    assert not hub.dataset(REPO).private


def test_a_single_large_file_is_cut_and_keeps_rows_and_order(hub: HubServer, tmp_path: Path) -> None:
    given = list(trajectories(200))
    write_trajectories(tmp_path / "traj.parquet", given)
    publish(tmp_path / "traj.parquet", shard_bytes=(tmp_path / "traj.parquet").stat().st_size // 3)
    assert sorted(pushed_data(hub)) == [f"data/train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert rows_of(hub, tmp_path / "pushed") == given


def test_a_single_small_file_stays_one(hub: HubServer, tmp_path: Path) -> None:
    write_trajectories(tmp_path / "traj.parquet", trajectories(20))
    publish(tmp_path / "traj.parquet")
    assert list(pushed_data(hub).values()) == list(on_disk(tmp_path).values())
    assert list(pushed_data(hub)) == ["data/train-00000-of-00001.parquet"]


def test_large_files_go_up_in_parts(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer(part=20_000) as hub:
        hub.stand_in(monkeypatch, tmp_path / "home")
        publish(run)
        assert hub.parts
        assert pushed_data(hub) == on_disk(run)


def test_the_same_push_again_sends_and_changes_nothing(hub: HubServer, tmp_path: Path) -> None:
    write_trajectories(tmp_path / "traj.parquet", trajectories(200))
    first = publish(tmp_path / "traj.parquet", shard_bytes=300_000)
    stored = list(hub.stored)
    again = publish(tmp_path / "traj.parquet", shard_bytes=300_000)
    assert hub.stored == stored
    assert again.unchanged == again.files == first.files > 1
    assert again.revision == first.revision


def test_other_data_takes_the_place_of_what_was_pushed_before(hub: HubServer, run: Path, tmp_path: Path) -> None:
    publish(run)
    before = hub.dataset(REPO).head
    smaller = shards(tmp_path / "smaller", 80, 40)
    assert publish(smaller).removed == 5
    assert pushed_data(hub) == on_disk(smaller)
    assert before in hub.dataset(REPO).commits


# interruptions


@pytest.mark.parametrize("how", ["drop", "half", 500, 429])
def test_what_fails_is_tried_again(hub: HubServer, run: Path, how: int | str) -> None:
    for part in ("create", "preupload", "objects/batch", "/lfs-verify", "validate-yaml", "/commit/"):
        hub.disturb("POST", part, how)
    hub.disturb("PUT", "/lfs/", how, times=3)
    hub.disturb("GET", "/api/datasets", how, times=2)
    hub.disturb("GET", "/tree/", how)
    publish(run)
    assert not hub.mend()
    assert pushed_data(hub) == on_disk(run)
    assert len(hub.dataset(REPO).commits) == 2


def test_a_commit_whose_answer_is_lost_is_made_once(hub: HubServer, run: Path) -> None:
    hub.disturb("POST", "/commit/", "deaf")
    done = publish(run)
    assert done.revision == hub.dataset(REPO).head
    assert hub.count("POST /api/datasets/me/trajectories/commit") == 1


def test_200_trajectories_interrupted_three_times_end_the_same(hub: HubServer, tmp_path: Path) -> None:
    run = shards(tmp_path / "run", 200, 20)
    for method, part, after in (("PUT", "/lfs/", 8), ("PUT", "/lfs/", 4), ("POST", "/commit/", 0)):
        hub.disturb(method, part, "drop", times=99, after=after)
        with pytest.raises(PublishError, match=r"is not reached .*; the same command goes on where it stopped"):
            publish(run)
        hub.mend()
        assert pushed_data(hub) == {}
    publish(run)
    assert pushed_data(hub) == on_disk(run)
    assert len(hub.stored) == len(set(hub.stored))


def test_a_hub_that_keeps_failing_is_named(hub: HubServer, run: Path) -> None:
    hub.disturb("POST", "objects/batch", 503, times=40)
    with pytest.raises(PublishError, match=r"the Hub fails .*503"):
        publish(run)


def test_a_change_by_someone_else_meanwhile_is_not_overwritten(hub: HubServer, run: Path) -> None:
    def meddle(line: str) -> None:
        if "/commit/" in line:
            hub.dataset(REPO).commit({})

    hub.on_request = meddle
    with pytest.raises(PublishError, match="was changed by someone else meanwhile"):
        publish(run)
    assert hub.dataset(REPO).files == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_5000_trajectories_pushed_by_a_process_that_is_interrupted_three_times(tmp_path: Path) -> None:
    data = shards(tmp_path / "run", 5000, 128)
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home")
        code = "from tests.test_publishing import app; app()"
        start = [sys.executable, "-c", code, str(data), "--repo", REPO]

        kill_at(hub, start, environment, "PUT /lfs/", 12)
        assert 0 < len(hub.stored) < 46  # 40 shards and six pictures
        kill_at(hub, start, environment, "POST /api/datasets/me/trajectories/commit", 1)
        assert len(hub.stored) == 46
        hub.disturb("PUT", "/lfs/", "drop", times=60, after=3)
        for lost in hub.stored[-9:]:  # what the Hub lost meanwhile is sent again
            del hub.storage[lost]
        del hub.stored[-9:]
        failed = subprocess.run(start, env=environment, capture_output=True, text=True, check=False)
        assert failed.returncode != 0
        assert "is not reached" in failed.stderr
        hub.mend()
        assert len(hub.stored) == 37 + 3
        assert pushed_data(hub) == {}

        ended = subprocess.run(start, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert pushed_data(hub) == on_disk(data)
        assert len(hub.stored) == len(set(hub.stored)) == 46
        read = "import datasets, json; d = datasets.load_dataset('me/trajectories', split='train'); print(len(d), d[4999]['id'])"
        shown = subprocess.run(
            [sys.executable, "-c", read], env=environment, capture_output=True, text=True, check=True
        )
        assert shown.stdout.split() == ["5000", "row-004999"]


def kill_at(hub: HubServer, start: Sequence[str], environment: dict[str, str], line: str, number: int) -> None:
    """Starts a push and kills it, without warning, when the Hub receives the given request for the given time."""
    seen = 0
    pushing = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def strike(received: str) -> None:
        nonlocal seen
        seen += received.startswith(line)
        if seen == number and pushing.poll() is None:
            hub.disturb("POST", "/commit/", "drop")
            os.kill(pushing.pid, signal.SIGKILL)

    hub.on_request = strike
    assert pushing.wait() == -signal.SIGKILL
    hub.on_request = lambda received: None
    hub.mend()


def test_a_hub_that_does_not_keep_what_was_sent(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "apply", lambda files, key, value: None)
    with pytest.raises(PublishError, match=r"does not hold what was sent as README\.md, pictures/1\.jpg, "):
        publish(run)


def test_a_repository_that_keeps_shards_as_text(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_server, "LARGE", ())
    with pytest.raises(PublishError, match=r"does not keep data/train-00000-of-00005\.parquet in large-file storage"):
        publish(run)


# what is refused


def test_without_a_token_nothing_is_asked(
    hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.stand_in(monkeypatch, tmp_path / "home", token=None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(PublishError, match="there is no token for the Hub: `hf auth login`, or set HF_TOKEN"):
        publish(run)
    assert hub.requests == []


@pytest.mark.parametrize("token", ["hf_wrong", "hf_wrong\x01with a control character"])
def test_a_wrong_token_is_refused_and_not_shown(
    hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    hub.stand_in(monkeypatch, tmp_path / "home", token=token)
    with pytest.raises(PublishError) as refused:
        publish(run)
    assert "hf_wrong" not in str(refused.value)
    assert hub.repositories == {}


def test_a_token_that_may_only_read(hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(run)
    hub.stand_in(monkeypatch, tmp_path / "home", token=READ_TOKEN)
    with pytest.raises(PublishError, match="the token may not write to me/trajectories"):
        publish(run)


def test_a_place_of_someone_else(hub: HubServer, run: Path) -> None:
    with pytest.raises(PublishError, match="the token may not write to them/theirs"):
        push(prepare("them/theirs", make_plan(str(run))))


@pytest.mark.parametrize("name", ["mine", "me/this is no name", "a/b/c", ""])
def test_a_name_that_is_none(run: Path, name: str) -> None:
    with pytest.raises(PublishError, match="is no name of a dataset"):
        prepare(name, make_plan(str(run)))


def test_a_repository_with_something_else(hub: HubServer, run: Path) -> None:
    publish(run)
    files = {path: blob for path, blob in hub.dataset(REPO).files.items() if path != "README.md"}
    hub.dataset(REPO).commit(files)
    with pytest.raises(PublishError, match=r"holds something else already \(data/train-00000-of-00005.parquet, "):
        publish(run)
    assert hub.dataset(REPO).files == files


def test_a_name_taken_by_a_model(hub: HubServer, run: Path) -> None:
    hub.repositories["model", REPO] = Repository("model", REPO, private=True)
    with pytest.raises(PublishError, match="is on the Hub as something else than a dataset"):
        publish(run)


def test_a_visibility_that_is_not_the_one_asked_for(hub: HubServer, run: Path) -> None:
    publish(run)
    with pytest.raises(PublishError, match="is private already: leave --public out"):
        publish(run, public=True)
    hub.dataset(REPO).private = False
    with pytest.raises(PublishError, match="is public already: say --public if you mean it"):
        publish(run)


def test_a_hub_that_is_not_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = HubServer()
    hub.stand_in(monkeypatch, tmp_path / "home")
    hub.close()
    with pytest.raises(PublishError, match=rf"the Hub at {hub.url} is not reached"):
        publish(run)


def test_data_that_fails_validation_is_not_sent(hub: HubServer, tmp_path: Path) -> None:
    good = list(trajectories(30))
    bad = [replace(one, answer="three") for one in good[:12]]
    write_trajectories(tmp_path / "traj.parquet", [*bad, *good[12:], good[29]])
    with pytest.raises(PublishError, match="nothing is uploaded, for pearl-gen validate finds 13 problems") as refused:
        publish(tmp_path / "traj.parquet")
    lines = str(refused.value).splitlines()
    assert "row 0 (row-000000): the answer 'three' is not among the choices" in lines[1]
    assert lines[-1] == "… and 3 more"
    assert hub.requests == []


# splits


def test_splits_by_name(hub: HubServer, tmp_path: Path) -> None:
    train, test = shards(tmp_path / "a", 60, 20), shards(tmp_path / "b", 30, 30, first=60)
    publish(f"train={train},test={test}")
    assert sorted(pushed_data(hub)) == [
        "data/test-00000-of-00001.parquet",
        *(f"data/train-{n:05d}-of-00003.parquet" for n in range(3)),
    ]
    configs = card_of(hub).data["configs"]
    assert [one["split"] for one in configs[0]["data_files"]] == ["train", "test"]


def test_splits_by_the_names_of_the_files(tmp_path: Path) -> None:
    shards(tmp_path, 30, 30, "test")
    assert [split.name for split in make_plan(str(tmp_path)).splits] == ["test"]
    shards(tmp_path, 60, 30, "train", first=30)
    plan = make_plan(str(tmp_path))
    assert [(split.name, split.rows) for split in plan.splits] == [("train", 60), ("test", 30)]
    assert [split.name for split in make_plan(f"all={tmp_path}").splits] == ["all"]
    shutil.copy(next(tmp_path.rglob("test-*")), tmp_path / "clean.parquet")
    with pytest.raises(PublishError, match=r"others, such as clean\.parquet: move them, or .*: train=DATA,test=DATA"):
        make_plan(str(tmp_path))
    named = make_plan(f"train={tmp_path}/data/train-*,test={tmp_path}/data/test-*")
    assert [(split.name, split.rows) for split in named.splits] == [("train", 60), ("test", 30)]
    with pytest.raises(PublishError, match="holds the splits train, test, which --split would make one"):
        make_plan(str(tmp_path), "train")


def test_splits_by_names_with_numbers_of_more_digits(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "test")):
        write_trajectories(tmp_path / f"{split}-000000-of-000001.parquet", trajectories(1, number))
    assert [(split.name, split.rows) for split in make_plan(str(tmp_path)).splits] == [("train", 1), ("test", 1)]


def test_a_shard_that_lies_beside_its_others_may_be_pushed_alone(run: Path) -> None:
    plan = make_plan(str(next(run.rglob("*-00001-of-*"))))
    assert prepare(REPO, plan).plan.rows == 8


@pytest.mark.parametrize(
    ("data", "split", "said"),
    [
        ("train={},test={}", None, "40 trajectories stand in train and in test, such as row-000000"),
        ("train={},train={}", None, "the split train is named twice"),
        ("train={},{}", None, "expected split=DATA,split=DATA"),
        ("train={}", "test", "leave --split out"),
        ("{}", "my split", "is no name of a split"),
    ],
)
def test_splits_that_cannot_be(run: Path, data: str, split: str | None, said: str) -> None:
    with pytest.raises(PublishError, match=said):
        make_plan(data.format(run, run), split)


def test_a_split_without_rows(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "none.parquet", [])
    with pytest.raises(PublishError, match="has no rows"):
        make_plan(str(tmp_path / "none.parquet"))


# the card


def card_of(hub: HubServer) -> DatasetCard:
    return DatasetCard(hub.dataset(REPO).files["README.md"].data.decode())


def test_the_card_renders_and_shows_pictures_that_are_there(hub: HubServer, run: Path) -> None:
    publish(run)
    files = hub.dataset(REPO).files
    page = MarkdownIt("gfm-like", {"linkify": False}).render(card_of(hub).text)
    shown = re.findall(r'<img src="([^"]+)"', page)
    assert len(shown) == 6
    for name in shown:
        picture = Image.open(io.BytesIO(files[name].data))
        assert (picture.format, picture.height) == ("JPEG", 224)
        assert len(files[name].data) < 150_000
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "How to load it", "Samples", "What is in it", "Tools", "How it was made", "Sources, licences, credits",
        "Known limits", "Columns", "The generator's configuration",
    ]  # fmt: skip
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert cells[cells.index("coco") : cells.index("coco") + 3] == ["coco", "CC-BY-4.0", "40"]
    assert "|" not in re.sub(r"<(pre|code)>.*?</\1>", "", page, flags=re.DOTALL)


def test_the_cards_metadata(hub: HubServer, run: Path) -> None:
    publish(run)
    data = card_of(hub).data
    assert (data["license"], data["size_categories"]) == ("cc-by-4.0", ["n<1K"])
    assert data["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
    info = data["dataset_info"]
    assert [feature["name"] for feature in info["features"]] == list(to_row(next(trajectories(1))))
    assert info["splits"][0]["num_examples"] == 40
    assert "pearl-trajectories" in data["tags"]


def test_the_run_beside_the_data_is_told(run: Path) -> None:
    write_json(
        run / "manifest.json",
        {
            "planned": 50, "kept": 40, "fingerprint": "f" * 64,
            "recipe": {"tools": {"crop": {"revision": "r1"}}, "versions": {"pillow": "13.0.0"}},
        },
    )  # fmt: skip
    (run / "run" / "refused").mkdir(parents=True)
    refusal = {"reason": "too | dark", "quarantined": False}
    (run / "run" / "refused" / "00000.jsonl").write_text(f"{json.dumps(refusal)}\n" * 10)
    text = prepare(REPO, make_plan(str(run))).card.text
    assert "kept 40 of 50 samples (80%)" in text
    assert "| too \\| dark | 10 | 20.0% |" in text
    assert "| crop | 40 | revision `r1` |" in text
    assert "pillow 13.0.0" in text


def test_text_of_the_data_does_nothing_in_the_card(tmp_path: Path) -> None:
    evil = "x | ![](http://evil/x.png) <script>alert(1)</script> `code` **b**\n\n# Title"
    one = next(trajectories(1))
    step = replace(one.steps[0], thought=evil, observation=Observation(evil, one.steps[0].observation.image))
    made = replace(
        one, question=evil, conclusion=evil, skill=evil, source=evil, license=evil, expert=evil, answer=evil,
        choices=(evil,), steps=(step,),
    )  # fmt: skip
    write_trajectories(tmp_path / "traj.parquet", [made])
    text = prepare(REPO, make_plan(str(tmp_path / "traj.parquet"))).card.text
    page = MarkdownIt("gfm-like", {"linkify": False}).render(DatasetCard(text).text)
    assert "<script" not in page
    assert re.findall(r'<img src="([^"]+)"', page) == ["pictures/1.jpg"]
    assert page.count("<h1>") == 1
    assert DatasetCard(text).data["license"] == "other"


def test_credits_and_missing_licences_are_said(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "traj.parquet", (replace(one, license="unknown") for one in trajectories(3)))
    text = prepare(REPO, make_plan(str(tmp_path / "traj.parquet")), "Photographs by *A. Person*.").card.text
    assert "Photographs by *A. Person*." in text
    assert "The licence of the images of 3 trajectories is not stated" in text


def test_folders_of_this_machine_stay_out_of_the_card(tmp_path: Path) -> None:
    made_by = {"config": {"sources": ["coco:/home/someone/instances.json", "hf:org/name"], "count": 3}}
    with TrajectoryWriter(tmp_path / "traj.parquet", made_by) as writer:
        for one in trajectories(3):
            writer.write(one)
    publication = prepare(REPO, make_plan(str(tmp_path / "traj.parquet")))
    assert "someone" not in publication.card.text
    assert "coco:instances.json" in publication.card.text
    assert publication.local_paths == ("/home/someone/instances.json",)
    shown = command(tmp_path / "traj.parquet", "--repo", REPO, "--dry-run").output
    assert "note: the files' metadata, sent as it is, names /home/someone/instances.json" in shown


def test_paths_in_settings() -> None:
    settings = {"a": ["/x/y.json", "hf:org/name", "https://host/x"], "b": {"c": r"C:\data\z", "d": 3, "e": None}}
    assert local_paths(settings) == ["/x/y.json", r"C:\data\z"]
    assert without_folders(settings) == {
        "a": ["y.json", "hf:org/name", "https://host/x"], "b": {"c": "z", "d": 3, "e": None},
    }  # fmt: skip
    assert without_folders("timm:local-dir:/x/vit") == "timm:local-dir:vit"
    assert without_folders("C:/data/z") == "z"


# the command


def test_a_dry_run_shows_plan_and_card_and_asks_no_one(
    hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.stand_in(monkeypatch, tmp_path / "home", token=None)
    result = command(run, "--repo", REPO, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "40 trajectories" in result.stdout
    assert "to the private dataset me/trajectories" in result.stdout
    assert "data/train-00000-of-00005.parquet … data/train-00004-of-00005.parquet" in result.stdout
    assert DatasetCard(result.stdout[result.stdout.index("---\n") :]).data["license"] == "cc-by-4.0"
    assert hub.requests == []


def test_the_command_says_what_it_did_and_never_the_token(hub: HubServer, run: Path) -> None:
    result = command(run, "--repo", REPO)
    assert result.exit_code == 0, result.output
    assert f"5 files (0 unchanged) in {hub.url}/datasets/{REPO}, commit {hub.dataset(REPO).head[:12]}" in result.stdout
    assert "5/5 data/train-00004-of-00005.parquet" in result.stderr
    assert TOKEN not in result.output


# who reads it


def test_load_dataset_reads_what_was_pushed(hub: HubServer, tmp_path: Path) -> None:
    train, test = shards(tmp_path / "a", 200, 50), shards(tmp_path / "b", 20, 20, first=200)
    publish(f"train={train},test={test}")
    code = """
import datasets, hashlib, json
whole = datasets.load_dataset("me/trajectories")
streamed = next(iter(datasets.load_dataset("me/trajectories", split="test", streaming=True)))
print(json.dumps({
    "rows": {name: split.num_rows for name, split in whole.items()},
    "ids": whole["train"]["id"][:],
    "size": whole["train"][7]["steps"][0]["image"].size,
    "pixels": hashlib.sha256(whole["train"][7]["image"].tobytes()).hexdigest(),
    "streamed": [streamed["id"], streamed["image"].size],
}))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["rows"] == {"train": 200, "test": 20}
    assert found["ids"] == [one.id for one in trajectories(200)]
    assert found["size"] == [12, 12]
    pixels = Image.open(io.BytesIO(noise(7).data)).tobytes()
    assert found["pixels"] == hashlib.sha256(pixels).hexdigest()
    assert found["streamed"] == ["row-000200", [24, 24]]


def test_pearl_train_reads_what_was_pushed(hub: HubServer, run: Path, tmp_path: Path) -> None:
    from pearl.cli.train import app as train_app
    from tests.runs import model

    publish(run)
    flags = ["--data", REPO, "--model", str(model()), "--out", str(tmp_path / "out"), "--eval-fraction", "0"]
    result = CliRunner().invoke(train_app, [*flags, "--max-steps", "1", "--batch-size", "2"])
    assert result.exit_code == 0, result.output
    assert "1 updates; the model" in result.stdout
