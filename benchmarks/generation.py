"""How far generation on Ray is from its limit: a bare process pool that makes the same shards.

    python -m benchmarks.generation speed --count 600      # four runs
    python -m benchmarks.generation memory                 # 10,000 samples against 1,000

`speed` runs pool, Ray, Ray, pool, so that a drift of the machine's speed cancels out. Both make the same shards with
the same code (`ShardMaker.make`), write the same Parquet, and must leave the same bytes. "steady" counts the rows
after as many shards as there are workers are done; "whole" includes the start of Ray or the pool and of the workers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pearl.files import file_hash
from pearl.pipelines.config import GenerateConfig, fingerprint, recipe
from pearl.pipelines.engines import EngineConfig, make_shards
from pearl.pipelines.generate import OutputPolicy, generate
from pearl.pipelines.run_directory import write_json
from pearl.pipelines.shards import ShardMaker, ShardTask
from pearl.pipelines.sources import SourceOptions

SHARD_SIZE = 32


def scenes_config(count: int) -> GenerateConfig:
    options = SourceOptions(count=count, seed=1, tools=("crop", "depth"))
    settings = {"depth": {"model": "depth-nano"}}
    return GenerateConfig(("scenes",), options, ("crop", "depth"), settings, seed=1, shard_size=SHARD_SIZE)


def prepare(config: GenerateConfig, out: Path) -> ShardTask:
    made_by = recipe(config)
    task = ShardTask(config, fingerprint(made_by), str(out), 0)
    directory = task.directory()
    directory.create()
    directory.write_plan(config.open_sources(), config.shard_size)
    return replace(task, total=directory.size()[1])


_maker: ShardMaker


def _open(task: ShardTask) -> None:
    global _maker
    _maker = ShardMaker(task)


def _make(number: int) -> dict[str, Any]:
    return _maker.make(number)


def run_pool(task: ShardTask, workers: int, on_done: Callable[[dict[str, Any]], None]) -> None:
    with get_context("spawn").Pool(workers, _open, (task,)) as pool:
        for marker in pool.imap_unordered(_make, range(task.total)):
            on_done(marker)


def run_ray(task: ShardTask, workers: int, on_done: Callable[[dict[str, Any]], None]) -> None:
    make_shards(task, range(task.total), EngineConfig(num_workers=workers), on_done)


def measure(name: str, config: GenerateConfig, workers: int, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """One run: its rates, and the hashes of its shards."""
    run = {"pool": run_pool, "ray": run_ray}[name]
    out = folder / f"{name}-{time.monotonic_ns()}"
    task = prepare(config, out)
    finished: list[tuple[float, int]] = []
    seconds: dict[str, float] = {}
    begin = time.perf_counter()

    def on_done(marker: dict[str, Any]) -> None:
        finished.append((time.perf_counter() - begin, marker["planned"]))
        for activity, spent in marker["seconds"].items():
            seconds[activity] = seconds.get(activity, 0.0) + spent

    run(task, workers, on_done)
    whole = time.perf_counter() - begin
    warm = finished[workers - 1][0]
    rows = sum(planned for moment, planned in finished if moment > warm)
    directory = task.directory()
    hashes = {p.name: file_hash(p) for p in (directory.shard(n, task.total) for n in range(task.total))}
    total = sum(planned for _, planned in finished)
    figures = {
        "engine": name,
        "rows": total,
        "whole_seconds": round(whole, 1),
        "whole_rows_per_second": round(total / whole, 3),
        "steady_rows_per_second": round(rows / (finished[-1][0] - warm), 3),
        "busy_share": round(sum(seconds.values()) / (workers * whole), 3),
        "seconds": {activity: round(spent, 1) for activity, spent in sorted(seconds.items())},
    }
    shutil.rmtree(out)
    return figures, hashes


def speed(count: int, workers: int) -> dict[str, Any]:
    config = scenes_config(count)
    runs, expected = [], None
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pool", "ray", "ray", "pool"):
            figures, hashes = measure(name, config, workers, Path(folder))
            print(json.dumps(figures), flush=True)
            assert expected in (None, hashes), "the engines do not give the same bytes"
            expected = hashes
            runs.append(figures)

    def ratio(key: str) -> float:
        ray, pool = (sum(float(run[key]) for run in runs if run["engine"] == name) for name in ("ray", "pool"))
        return round(ray / pool, 3)

    return {
        "count": count,
        "workers": workers,
        "runs": runs,
        "ray_to_pool_steady": ratio("steady_rows_per_second"),
        "ray_to_pool_whole": ratio("whole_rows_per_second"),
    }


def rows_file(folder: Path, count: int) -> Path:
    """`count` rows of the shipped photographs, each with one of their boxes: a source that costs little to read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pearl.pipelines.sources import open_source

    source = open_source("photos", SourceOptions())
    samples = [source.read(item) for item in source.items()]
    path = folder / f"rows-{count}.parquet"
    with pq.ParquetWriter(path, pa.schema([("id", pa.string()), ("image", pa.binary()), ("question", pa.string()),
                                           ("answer", pa.string()), ("boxes", pa.list_(pa.list_(pa.float64())))])) as writer:  # fmt: skip
        for start in range(0, count, 100):
            rows = []
            for index in range(start, min(start + 100, count)):
                sample = samples[index % len(samples)]
                rows.append({"id": str(index), "image": sample.image.data, "question": sample.question,
                             "answer": sample.answer, "boxes": [list(sample.regions[0].box)]})  # fmt: skip
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=writer.schema))
    return path


def memory(workers: int) -> dict[str, Any]:
    """Peak memory of the largest worker and of the driver, for 1,000 and 10,000 samples, each in a fresh process."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1000, 10_000):
            path = rows_file(Path(folder), count)
            with get_context("spawn").Pool(1) as pool:
                found[str(count)] = pool.apply(_memory_of, (str(path), str(Path(folder) / f"out-{count}"), workers))
            print(count, json.dumps(found[str(count)]), flush=True)
    small, large = found["1000"], found["10000"]
    found["ratio"] = {name: round(large[name] / small[name], 3) for name in ("worker_mb", "driver_mb")}
    return found


def _memory_of(path: str, out: str, workers: int) -> dict[str, float]:
    import resource

    options = SourceOptions(tools=("crop",))
    config = GenerateConfig((f"parquet:{path}",), options, ("crop",), shard_size=128)
    begin = time.perf_counter()
    manifest = generate(config, Path(out), EngineConfig(num_workers=workers), OutputPolicy())
    return {
        "kept": manifest["kept"],
        "seconds": round(time.perf_counter() - begin, 1),
        "worker_mb": manifest["peak_memory_mb"],
        "driver_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = speed(options.count, options.workers) if options.what == "speed" else memory(options.workers)
    print(json.dumps({key: value for key, value in found.items() if key != "runs"}, indent=1))
    if options.out:
        write_json(options.out, found)


if __name__ == "__main__":
    main()
