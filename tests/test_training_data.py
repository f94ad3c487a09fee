"""Trajectories for training: rows at random, what is held out, the order, what is left out."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from pearl.parquet import DataError, count_rows, read_table, read_trajectories
from pearl.records import EncodedImage, Step, Trajectory
from pearl.trainer.config import TrainConfig
from pearl.trainer.data import Drawn, Examples, GroupedOrder, Table
from pearl.trainer.models import data_workers
from pearl.trainer.objectives.mirage import Mirage
from pearl.trainer.objectives.sft import Sft, SftAnswer
from pearl.trainer.packing import Example
from pearl.trainer.preparation import Prepared, prepare
from pearl.trainer.views import ViewError
from tests.plain import picture, step, tiny
from tests.runs import config, data_file, rows
from tests.tiny_vlms import FAMILIES


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_file(tmp_path_factory.mktemp("data"))


def ids(table: Table) -> list[str]:
    return [table[row].id for row in range(len(table))]


def test_any_row_is_the_trajectory_that_was_written(data: Path, tmp_path: Path) -> None:
    table = Table(data, tmp_path)
    assert [table[row] for row in (11, 0, 5)] == [rows()[row] for row in (11, 0, 5)]


@pytest.mark.parametrize("place", ["", "*.parquet", "**/*.parquet"])
def test_files_of_a_folder_or_glob_are_one_table(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        data_file(folder, rows()[4 * number : 4 * number + 4], f"train-{number}.parquet")
    assert ids(Table(str(folder / place), tmp_path / "cache")) == [one.id for one in rows()]


def test_a_table_travels_to_workers_without_its_rows(data: Path, tmp_path: Path) -> None:
    table = Table(data, tmp_path)
    assert len(table) == 12
    sent = pickle.dumps(table)
    assert len(sent) < 1000
    assert ids(pickle.loads(sent)) == ids(table)


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    for number, row in enumerate(rows(60)):
        data_file(tmp_path, [row], f"{number:02}.parquet")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/dev/fd").iterdir()]) + 20, hard))
    try:
        assert len(Table(tmp_path / "*.parquet", tmp_path / "cache")) == 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_copy_is_used_again_until_a_file_changes(tmp_path: Path) -> None:
    data, cache = data_file(tmp_path), tmp_path / "cache"
    first = Table(data, cache)
    assert not cache.exists()  # before a row is asked for
    assert len(first) == 12
    made = first.path.stat().st_mtime_ns
    assert Table(data, cache).digest() == first.digest()
    assert first.path.stat().st_mtime_ns == made
    digest = first.digest()
    next(cache.glob("*.sha256")).unlink()
    assert Table(data, cache).digest() == digest
    data_file(tmp_path, rows(3))
    again = Table(data, cache)
    assert again.path != first.path
    assert ids(again) == ["row-00", "row-01", "row-02"]
    assert again.digest() != first.digest()


def test_a_copy_that_was_cut_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = data_file(tmp_path), tmp_path / "cache"

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            len(Table(data, cache))
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    assert len(Table(data, cache)) == 12


MEMORY = """
import re, sys
from pathlib import Path
from pearl.trainer.data import Table

def taken():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

before, most = taken(), 0
table = Table(sys.argv[1], Path(sys.argv[2]))
table.held_out(0.1, 0)
for row in range(len(table)):
    table[row]
    most = max(most, taken())
print(most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
def test_data_are_mapped_not_held_in_memory(tmp_path: Path) -> None:
    picture = EncodedImage(os.urandom(2**20))
    made = [replace(one, id=f"{n}", image=replace(picture, path=f"{n}")) for n, one in enumerate(rows(1) * 600)]
    data = data_file(tmp_path, made)
    ended = subprocess.run(
        [sys.executable, "-c", MEMORY, data, tmp_path / "cache"], capture_output=True, text=True, check=True
    )
    assert data.stat().st_size > 600 * 2**20
    assert int(ended.stdout) < 350  # a few row groups, however many there are


def test_of_several_processes_one_writes_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache, read = data_file(tmp_path), tmp_path / "cache", read_table

    def slowly(*args: Any) -> Any:
        (tmp_path / f"written-by-{os.getpid()}").touch()
        time.sleep(0.5)
        return read(*args)

    monkeypatch.setattr("pearl.trainer.data.read_table", slowly)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        lengths = pool.starmap(_length, [(data, cache)] * 3, chunksize=1)
    assert lengths == [12, 12, 12]
    assert len(list(tmp_path.glob("written-by-*"))) == 1
    assert len(list(cache.glob("*.arrow"))) == 1


def _length(data: Path, cache: Path) -> int:
    return len(Table(data, cache))


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.7])
def test_an_image_that_is_held_out_is_in_no_row_that_is_trained_on(tmp_path: Path, fraction: float) -> None:
    """Each image stands in four rows; which are held out does not depend on the rows' order."""
    images = [one.image for one in rows()]
    made = [replace(one, image=images[number % 12]) for number, one in enumerate(rows(48))]
    table = Table(data_file(tmp_path, made), tmp_path / "cache")
    train, held = table.held_out(fraction, seed=0)
    assert sorted(train + held) == list(range(48))
    assert not {table[row].image.data for row in train} & {table[row].image.data for row in held}
    turned = Table(data_file(tmp_path, made[::-1], "turned.parquet"), tmp_path / "cache")
    assert {turned[row].id for row in turned.held_out(fraction, seed=0)[1]} == {table[row].id for row in held}
    assert table.held_out(fraction, seed=1) != (train, held)


def test_about_the_wanted_share_is_held_out(tmp_path: Path) -> None:
    table = Table(data_file(tmp_path, rows(300)), tmp_path / "cache")
    assert 40 < len(table.held_out(0.2, seed=0)[1]) < 80


# order


def epoch(order: GroupedOrder, number: int) -> list[int]:
    order.set_epoch(number)
    return list(order)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = [row % 7 for row in range(100)]
    order = GroupedOrder(lengths, 4, seed=3)
    assert sorted(epoch(order, 0)) == list(range(100))
    assert epoch(order, 0) == epoch(GroupedOrder(lengths, 4, seed=3), 0)
    assert epoch(order, 0) != epoch(order, 1)
    assert epoch(order, 0) != epoch(GroupedOrder(lengths, 4, seed=4), 0)
    torch.manual_seed(1)
    assert epoch(order, 5) == epoch(GroupedOrder(lengths, 4, seed=3), 5)


def test_neighbours_are_about_as_long() -> None:
    lengths = [row * 37 % 101 for row in range(400)]
    batches = [epoch(GroupedOrder(lengths, 4, seed=0), 0)[start : start + 4] for start in range(0, 400, 4)]
    within = [max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in batches]
    assert sum(within) / len(within) < 10


def of_many_lengths() -> list[Trajectory]:
    """Images from 32 to 256 pixels a side, thoughts from a word to a page, in no order; both differ by themselves."""
    made = []
    for number, one in enumerate(rows(48)):
        side = 32 * (1 + number * 5 % 8)
        steps = [step("Look. " * (1 + 20 * (number * 7 % 12)), picture(number, 40, 40)) for _ in range(number % 3)]
        made.append(replace(one, image=picture(number, side, side), steps=tuple(steps)))
    return made


def padded_share(prepared: Prepared, order: Sequence[int]) -> float:
    batches = [order[start : start + 4] for start in range(0, len(order), 4)]
    made = [prepared.packer([prepared.training[row].example for row in batch]) for batch in batches]
    padding = torch.cat([(batch.main.tokens.branch < 0).flatten() for batch in made])
    return padding.float().mean().item()


@pytest.mark.parametrize("objective", ["pearl", "sft-answer", "lvr", "mirage"])
def test_batches_of_the_order_are_padded_less_than_random_ones(tmp_path: Path, objective: str) -> None:
    """As little as if the lengths were known; for an objective that sees one image too, whose size makes a row long."""
    usable = [one for one in of_many_lengths() if one.steps or objective in ("pearl", "sft-answer")]
    data = data_file(tmp_path, usable)
    prepared = prepare(config(data, tmp_path / "out", objective=objective, max_pixels=256**2, batch_size=4))
    count = len(prepared.lengths)
    known = [len(prepared.training[row].example) for row in range(count)]
    grouped, best = (
        padded_share(prepared, epoch(GroupedOrder(lengths, 4, seed=0), 0)) for lengths in (prepared.lengths, known)
    )
    shuffled = [torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(3)]
    assert grouped < 1.05 * best
    assert grouped < min(padded_share(prepared, order) for order in shuffled)


def test_lengths_are_of_what_the_objective_shows(tmp_path: Path) -> None:
    """And of the data alone; images that cannot be read count nothing."""
    one, blank = rows(4)[3], rows(4)[3]
    shorter = replace(one, steps=one.steps[:1], conclusion="")
    made = [one, shorter, replace(one, image=EncodedImage(b"no image")), replace(blank, steps=())]
    table, found = Table(data_file(tmp_path, made), tmp_path / "cache"), dict[str, list[int]]()
    for name, kind in (("sft", Sft), ("sft-answer", SftAnswer), ("mirage", Mirage)):
        t = tiny("qwen2_5_vl")
        found[name] = table.lengths(kind(), t.encoder)
        assert found[name] == table.lengths(kind(), t.encoder)
    whole, less, unreadable, without = found["sft"]
    assert whole > less > without > 0
    assert whole - unreadable == tiny("qwen2_5_vl").encoder.image(one.image).num_tokens
    assert found["sft-answer"][0] == found["sft-answer"][1] == found["sft-answer"][3] < without
    assert found["sft-answer"][0] < found["mirage"][0] < whole


@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_counted_without_a_look_at_them(name: str) -> None:
    """Exactly where they keep their sizes, else as many as any."""
    encoder = tiny(name).encoder
    images = [picture(1, *size) for size in ((40, 48), (200, 64), (64, 300), (512, 512))]
    counts = [encoder.num_tokens(image.data) for image in images]
    if encoder.family.keeps_sizes:
        assert counts == [encoder.image(image).num_tokens for image in images]
        assert encoder.num_tokens(b"no image") == encoder.num_tokens(picture(1, 900, 2).data) == 0
    else:
        assert counts[0] > 0
        assert len(set(counts)) == 1


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    """Row 3 has a broken image, row 7 a step whose image is broken."""
    folder = tmp_path_factory.mktemp("examples")
    made = rows()
    made[3] = replace(made[3], image=EncodedImage(b"no image"))
    made[7] = replace(made[7], steps=(broken(made[7]), *made[7].steps[1:]))
    return prepare(config(data_file(folder, made), folder / "out")).training


def broken(one: Trajectory) -> Step:
    observation = replace(one.steps[0].observation, image=EncodedImage(b"no image"))
    return replace(one.steps[0], observation=observation)


def drawn(examples: Examples, workers: int) -> list[Drawn]:
    return list(DataLoader(examples, batch_size=None, num_workers=workers))


def test_another_stands_in_for_what_cannot_be_used(examples: Examples) -> None:
    found = drawn(examples, 0)
    usable = [number for number in range(12) if number not in (3, 7)]
    assert [found[number].example.id for number in usable] == [f"row-{number:02}" for number in usable]
    assert {found[number].example.id for number in (3, 7)} <= {f"row-{number:02}" for number in usable}
    refused = {number: {one.id: one for one in each.refused} for number, each in enumerate(found)}
    assert {number for number, told in refused.items() if told} == {3, 7}
    for number, image in ((3, 0), (7, 1)):
        culprit = refused[number][f"row-{number:02}"]
        assert culprit.row == number
        assert culprit.reason.startswith(f"image {image}: ")


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError(24, "Too many open files")]
)
def test_what_the_machine_lacks_is_no_fault_of_a_row(error: Exception, examples: Examples) -> None:
    class Poor(Examples):
        def example(self, trajectory: Trajectory) -> Example:
            raise error

    poor = Poor(examples.table, examples.rows, examples.objective, examples.encoder, examples.template)
    with pytest.raises(type(error)) as raised:
        poor[0]
    assert raised.value is error


def test_a_sample_is_drawn_by_the_seed_alone(examples: Examples) -> None:
    """Files are often sorted, by skill for instance, so their first rows stand for nothing."""
    samples = [[int(one.id) for one in ByNumber(examples, seed).sample(30)] for seed in (0, 0, 1)]
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]
    for sample in samples:
        assert len(set(sample)) == 30
        assert 90 < sum(sample) / 30 < 210
    assert sorted(int(one.id) for one in ByNumber(examples, 0).sample(500)) == list(range(300))


class ByNumber(Examples):
    """Rows of which those from 200 up can be used, without the work of making their views."""

    def __init__(self, examples: Examples, seed: int) -> None:
        made = [replace(examples.table[0], id=str(number)) for number in range(300)]
        table = Table(data_file(examples.table.path.parent, made, "numbers.parquet"), examples.table.path.parent)
        super().__init__(table, range(300), examples.objective, examples.encoder, examples.template, None, seed)

    def example(self, trajectory: Trajectory) -> Example:
        if int(trajectory.id) < 200:
            raise ViewError("no region")
        return Example(trajectory.id, (), {})


def test_what_stands_in_is_spread_over_all_that_can_be_used(examples: Examples) -> None:
    """Two hundred rows that cannot be used in one block stop nothing, and favour no row behind it."""
    found = [one.example.id for one in drawn(ByNumber(examples, 0), 0)]
    counts = Counter(found)
    assert set(counts) == {str(number) for number in range(200, 300)}
    assert max(counts.values()) < 10  # 3 in the mean
    assert found[200:] == [str(number) for number in range(200, 300)]


def test_the_seed_alone_decides_what_stands_in(examples: Examples) -> None:
    first, again, other = ([one.example.id for one in drawn(ByNumber(examples, seed), 0)] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_workers_change_nothing(examples: Examples) -> None:
    for alone, beside in zip(drawn(examples, 0), drawn(examples, 2), strict=True):
        assert alone.refused == beside.refused
        assert alone.example.id == beside.example.id
        assert all((view.ids == beside.example.views[name].ids).all() for name, view in alone.example.views.items())


def test_when_nothing_can_be_used_it_is_said(examples: Examples) -> None:
    few = Examples(examples.table, [3, 7], examples.objective, examples.encoder, examples.template)
    with pytest.raises(DataError, match="2 trajectories in a row cannot be used; the last: row-07, row 7: image 1"):
        few[0]


def test_what_is_too_long_is_left_out_whole(examples: Examples) -> None:
    lengths = {one.example.id: len(one.example) for one in drawn(examples, 0)}
    limit = sorted(lengths.values())[4]
    short = Examples(examples.table, examples.rows, examples.objective, examples.encoder, examples.template, limit)
    assert {one.example.id for one in drawn(short, 0)} == {name for name, length in lengths.items() if length <= limit}
    reasons = {one.reason for each in drawn(short, 0) for one in each.refused}
    assert f"{max(lengths.values())} tokens, more than --max-tokens {limit}" in reasons


def test_what_a_file_name_promises_and_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    data_file(data, rows(), "train-00000-of-00003.parquet")
    prepare(config(data, tmp_path / "out"))
    first = data / "train-00001-of-00003.parquet"
    assert f"note: {data} is not whole: {first} is missing, and 1 more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "on_gpu", "cores", "processes", "workers"),
    [
        (None, False, 16, 1, 0),
        (None, True, 16, 1, 4),
        (None, True, 16, 8, 1),
        (None, True, 4, 8, 0),
        (0, True, 16, 1, 0),
        (7, False, 2, 1, 7),
    ],
)
def test_a_gpu_gets_as_many_data_workers_as_there_are_cores_for(
    given: int | None, on_gpu: bool, cores: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert data_workers(TrainConfig(data="traj.parquet", data_workers=given)) == workers


def test_of_several_splits_one_must_be_named(tmp_path: Path) -> None:
    for split in ("test", "train"):
        data_file(tmp_path, rows()[: 2 + (split == "train")], f"{split}-00000-of-00001.parquet")
    assert len(Table(f"{tmp_path}:train", tmp_path / "cache")) == 3
    assert len(Table(f"{tmp_path}:test", tmp_path / "cache")) == 2
    assert len(list(read_trajectories(f"{tmp_path}:test", one_split=True))) == count_rows(f"{tmp_path}:test") == 2
    assert len(list(read_trajectories(tmp_path))) == 5
    with pytest.raises(DataError, match="holds test, train"):
        next(read_trajectories(tmp_path, one_split=True))
    with pytest.raises(DataError, match=f"holds test, train: name one, {tmp_path}:train"):
        Table(tmp_path, tmp_path / "cache")
    with pytest.raises(DataError, match="no split 'val'; it has test, train"):
        Table(f"{tmp_path}:val", tmp_path / "cache")
