"""The trajectories of the table: `python -m recipes.results.data`, about a quarter of an hour on 2 cores.

Crops of rendered scenes, of which only the questions are kept that a crop helps the base to answer (colours and shapes
of small objects; `pearl-eval gain` says by how much, see docs/results.md). The table trains on the split `train`,
chooses on `val`, and is measured on `test` and on the benchmark `scenes`, which is of that split too. `fewer` are
an eighth of `train`, and `more` three times as many, other scenes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pearl.pipelines.curation.filtering import Filter, filter_data

DATA = Path("runs/results/data")
TOOLS, SKILLS = ("crop",), ("attribute", "shape")
SIZE = 252


@dataclass(frozen=True)
class Part:
    """A file of trajectories; `asked`: the skills that its scenes are asked about, all when empty."""

    split: str
    count: int
    seed: int = 101
    asked: tuple[str, ...] = ()


PARTS = {
    "train": Part("train", 8000),
    "val": Part("val", 1600),
    "test": Part("test", 3200),
    "fewer": Part("train", 1000),
    "more": Part("train", 3300, 102, SKILLS),
}


def make(folder: Path, workers: int) -> None:
    for name, part in PARTS.items():
        everything, kept = folder / "all" / f"{name}.parquet", folder / f"{name}.parquet"
        if kept.exists():
            continue
        subprocess.run(
            [
                sys.executable, "-m", "pearl.cli.gen", "trajectories", "--source", "scenes", "--split", part.split,
                "--count", str(part.count), "--size", str(SIZE), "--seed", str(part.seed),
                "--skill", ",".join(part.asked), "--tools", ",".join(TOOLS), "--out", str(everything), "--num-workers", str(workers), "--resume",
            ],
            check=True,
        )  # fmt: skip
        filter_data(everything, kept, Filter(skills=SKILLS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    make(options.out, options.workers)


if __name__ == "__main__":
    main()
