"""What split, dedup, stats and validate cost beside reading the file: processor time, and peak memory, which must not
grow with rows.

    python -m benchmarks.curation --rows 10000 100000 --out benchmarks/results/curation.json

The data are synthetic: one image in `--questions` rows, each with a step whose image is its own. Each command runs in a
process of its own; peak memory is that process's, imports included.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from pearl.images import encode
from pearl.parquet import read_trajectories, write_trajectories
from pearl.pipelines.curation.duplicates import Dedup, dedup_data
from pearl.pipelines.curation.splitting import Split, split_data
from pearl.pipelines.stats import gather, write_page
from pearl.pipelines.validation import validate_data
from pearl.records import EncodedImage, Observation, Step, ToolCall, Trajectory

SIDE = 256


def picture(*names: int, side: int = SIDE) -> EncodedImage:
    """A smooth picture with a little noise, as JPEG: other names give one that looks different."""
    random = np.random.default_rng(names)
    cell = side // 8
    coarse = np.kron(random.integers(0, 256, (8, 8, 3)), np.ones((cell, cell, 1)))
    noisy = coarse + random.normal(0, 4, (side, side, 3))
    return EncodedImage(encode(np.clip(noisy, 0, 255).astype(np.uint8)))


def trajectories(count: int, questions: int) -> Iterator[Trajectory]:
    for number in range(count):
        if number % questions == 0:
            image = picture(number // questions)
        call = ToolCall("crop", {"box": [0.1, 0.1, 0.5, 0.5]})
        seen = Observation("The region.", picture(number, 1, side=64))
        yield Trajectory(
            id=f"row-{number}", image=image, question=f"What is in the part {number % questions}?",
            choices=("red", "blue"), answer="red", steps=(Step("I look closer.", call, seen),),
            conclusion="It is red.", expert="synthetic", skill="colour", source="synthetic", license="CC0-1.0", seed=0,
        )  # fmt: skip


def read(data: Path, folder: Path) -> None:
    for _ in read_trajectories(data):
        pass


def split(data: Path, folder: Path) -> None:
    split_data(data, folder / "split", Split({"train": 0.9, "test": 0.1}))


def dedup(data: Path, folder: Path) -> None:
    dedup_data([data], folder / "unique.parquet", Dedup())


def stats(data: Path, folder: Path) -> None:
    write_page(gather([str(data)]), folder / "stats.html")


def validate(data: Path, folder: Path) -> None:
    rows, problems = validate_data(str(data))
    assert rows
    assert not problems, problems[:3]


def _measured(task: Callable[[Path, Path], None], data: Path) -> tuple[float, float]:
    """Seconds on the processor (of all threads), and the process's peak memory in megabytes."""
    with tempfile.TemporaryDirectory(dir=data.parent) as folder:
        begin = time.process_time()
        task(data, Path(folder))
        seconds = time.process_time() - begin
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(rows: int, questions: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "traj.parquet"
        write_trajectories(data, trajectories(rows, questions))
        results: dict[str, object] = {"rows": rows, "megabytes": round(data.stat().st_size / 1e6, 1)}
        for task in (read, split, dedup, stats, validate):
            with get_context("spawn").Pool(1) as pool:
                seconds, memory = pool.apply(_measured, (task, data))
            results[task.__name__] = {"seconds": round(seconds, 2), "peak_mb": round(memory, 1)}
            print(f"{rows:7} rows {task.__name__:9} {seconds:8.1f} s {memory:8.1f} MB", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--questions", type=int, default=4, help="an image")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = [measure(rows, options.questions) for rows in options.rows]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
