"""Whatever makes the shards, and whatever dies on the way, the bytes are the same.

1. Ray with one worker, Ray with two, and a two-node cluster give the shards of the plain loop.
2. A run whose workers and driver are killed with SIGKILL, and which is resumed, gives them too.
3. A sample that kills its worker ends alone in quarantine; its shard's other samples are kept.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from pearl.files import file_hash
from pearl.pipelines.config import GenerateConfig
from pearl.pipelines.engines import EngineConfig
from pearl.pipelines.engines.ray import RayEngine
from pearl.pipelines.errors import RunError
from pearl.pipelines.generate import OutputPolicy, generate
from pearl.pipelines.shards import ShardTask
from pearl.pipelines.sources import SourceOptions

LOCAL = EngineConfig(engine="local")
TOOLS = ("crop", "depth")
COUNT = 24
FLAGS = ["--count", str(COUNT), "--size", "224", "--shard-size", "6", "--seed", "3"]


def config_of(*sources: str, count: int = COUNT, tools: tuple[str, ...] = TOOLS) -> GenerateConfig:
    options = SourceOptions(count=count, seed=3, size=224, tools=tools)
    settings = {"depth": {"model": "depth-nano"}} if "depth" in tools else {}
    return GenerateConfig(
        sources=sources or ("photos", "scenes"), source_options=options, tools=tools, tool_settings=settings,
        seed=3, shard_size=6,
    )  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    found = {path.name: file_hash(path) for path in sorted((folder / "data").glob("*.parquet"))}
    assert found
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference") / "out"
    generate(config_of(), out, LOCAL, OutputPolicy())
    return hashes(out)


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_gives_the_bytes_of_the_loop(tmp_path: Path, reference: dict[str, str], workers: int) -> None:
    manifest = generate(config_of(), tmp_path / "out", EngineConfig(num_workers=workers), OutputPolicy())
    assert hashes(tmp_path / "out") == reference
    assert manifest["planned"] == COUNT + 21


def test_two_nodes_give_the_bytes_of_the_loop(tmp_path: Path, reference: dict[str, str], two_nodes: str) -> None:
    engine = EngineConfig(address=two_nodes, num_workers=2)
    generate(config_of(), tmp_path / "out", engine, OutputPolicy())
    assert hashes(tmp_path / "out") == reference


def test_more_workers_than_the_cluster_has_room_for_do_not_hang(tmp_path: Path, two_nodes: str) -> None:
    engine = EngineConfig(address=two_nodes, num_workers=3, num_gpus_per_worker=1)
    manifest = generate(config_of("photos"), tmp_path / "out", engine, OutputPolicy())
    assert manifest["planned"] == 21


@pytest.mark.parametrize(("gpus", "seen"), [(0.0, ""), (0.5, "0")])
def test_workers_see_the_gpus_that_they_asked_for(tmp_path: Path, two_nodes: str, gpus: float, seen: str) -> None:
    task = ShardTask(config_of("photos"), "", str(tmp_path), 1)
    ray.init(address=two_nodes, log_to_driver=False)
    try:
        worker = RayEngine(task, EngineConfig(num_gpus_per_worker=gpus), lambda _: None)._spawn()
        assert ray.get(worker.__ray_call__.remote(lambda _: os.environ["CUDA_VISIBLE_DEVICES"])) == seen
    finally:
        ray.shutdown()


def test_gpus_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no GPU"):
        generate(config_of("photos"), tmp_path / "out", EngineConfig(num_gpus_per_worker=1), OutputPolicy())


def test_one_file_holds_what_the_shards_hold(tmp_path: Path) -> None:
    from pearl.parquet import read_trajectories

    generate(config_of("photos"), tmp_path / "shards", LOCAL, OutputPolicy())
    generate(config_of("photos"), tmp_path / "traj.parquet", LOCAL, OutputPolicy())
    assert list(read_trajectories(tmp_path / "traj.parquet")) == list(read_trajectories(tmp_path / "shards"))


def test_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = generate(config_of("photos"), out, LOCAL, OutputPolicy())
    before = {path: path.stat().st_mtime_ns for path in (out / "data").iterdir()}
    assert generate(config_of("photos"), out, LOCAL, OutputPolicy(resume=True)) == first
    assert before == {path: path.stat().st_mtime_ns for path in (out / "data").iterdir()}


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(config_of("photos"), out, LOCAL, OutputPolicy())
    expected = hashes(out)
    (out / "manifest.json").unlink()
    victim = next((out / "data").iterdir())
    victim.write_bytes(victim.read_bytes()[:-100])
    generate(config_of("photos"), out, LOCAL, OutputPolicy(resume=True))
    assert hashes(out) == expected


def test_two_runs_cannot_share_an_output(tmp_path: Path) -> None:
    from filelock import FileLock

    out = tmp_path / "out"
    generate(config_of("photos"), out, LOCAL, OutputPolicy())
    (out / "manifest.json").unlink()
    with FileLock(out / "run" / "lock"), pytest.raises(RunError, match="another process"):
        generate(config_of("photos"), out, LOCAL, OutputPolicy(resume=True))


def start(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pearl.cli.gen", "trajectories", *FLAGS, "--out", str(out), "--resume"]
    return subprocess.Popen(
        [*command, "--num-workers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def workers_of(driver: int) -> list[int]:
    """The shard workers that descend from a driver."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def descends(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == driver:
                return True
        return False

    return [int(pid) for pid, _, arguments in rows if "ray::ShardWorker" in arguments and descends(int(pid))]


def kill_until_done(out: Path, kills: int, seed: int) -> int:
    """Runs and resumes until complete; kills workers and the driver at random moments. The kills that hit."""
    rng = random.Random(seed)
    hits = 0
    process = start(out)
    begun = time.monotonic()
    while time.monotonic() - begun < 1500:
        if hits < kills:
            time.sleep(rng.uniform(0.5, 6.0))
            victims = workers_of(process.pid)
            if process.poll() is None and victims and rng.random() < 0.7:
                os.kill(rng.choice(victims), signal.SIGKILL)
                hits += 1
            elif process.poll() is None and victims:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                hits += 1
                process = start(out)
        elif process.wait(timeout=600) == 0:
            return hits
        if process.poll() is not None:
            if (out / "manifest.json").exists() and hits < kills:
                for damaged in [out / "manifest.json", *sorted((out / "run" / "done").iterdir())[::2]]:
                    damaged.unlink()
            process = start(out)
    raise TimeoutError("the run did not end")


@pytest.mark.timeout(600)
def test_killed_and_resumed_gives_the_bytes_of_an_undisturbed_run(tmp_path: Path, reference: dict[str, str]) -> None:
    assert kill_until_done(tmp_path / "out", kills=3, seed=1) == 3
    assert hashes(tmp_path / "out") == reference


@pytest.mark.slow
def test_twenty_kills_lose_and_double_nothing(tmp_path: Path, reference: dict[str, str]) -> None:
    assert kill_until_done(tmp_path / "out", kills=20, seed=2) == 20
    assert hashes(tmp_path / "out") == reference
    assert '"quarantined": 0' in (tmp_path / "out" / "manifest.json").read_text()


LETHAL = """
import os, signal
from pearl.tools.crop import Crop

class Lethal(Crop):
    def apply(self, picture, arguments):
        if picture.width == 600 and arguments.box[2] - arguments.box[0] > 0.5:  # the second question about the coffee
            os.kill(os.getpid(), signal.SIGKILL)
        return super().apply(picture, arguments)
"""


@pytest.mark.timeout(600)
def test_a_sample_that_kills_its_worker_is_quarantined_alone(tmp_path: Path) -> None:
    (tmp_path / "lethal.py").write_text(LETHAL)
    replace_crop = "import pearl.tools.toolbox as t; t.TOOLS.built_in['crop'] = 'lethal:Lethal'\n"
    (tmp_path / "sitecustomize.py").write_text(replace_crop)
    command = [sys.executable, "-m", "pearl.cli.gen", "trajectories", "--source", "photos", "--tools", "crop"]
    command += ["--shard-size", "8", "--num-workers", "1", "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["quarantined"] == 1
    assert manifest["kept"] + sum(manifest["rejected"].values()) + 1 == 21
    lines = [
        line for path in (tmp_path / "out" / "run" / "refused").iterdir() for line in path.read_text().splitlines()
    ]
    quarantined = [refusal for refusal in map(json.loads, lines) if refusal["quarantined"]]
    assert [(refusal["key"], refusal["reason"]) for refusal in quarantined] == [("coffee-02", "the worker died")]


def test_a_fault_of_the_system_is_said_as_plainly_on_ray_as_in_the_loop(tmp_path: Path) -> None:
    model = tmp_path / "empty-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = replace(config_of("photos"), tool_settings={"depth": {"model": str(model)}})
    for engine in (LOCAL, EngineConfig(num_workers=1)):
        with pytest.raises(RunError, match="is no depth estimation checkpoint"):
            generate(config, tmp_path / engine.engine, engine, OutputPolicy())
