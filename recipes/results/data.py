"""The trajectories of the table: `python -m recipes.results.data`, five minutes on 2 cores, and 7.5 of one for `more`.

Crops of rendered scenes about a skill that the base was never taught, the colour or shape of what lies outermost
("What colour is the leftmost object?"): it knows colours, shapes and places, and has to learn where to look. The table
trains on the split `train`, chooses on `val`, and is measured on `test` and on the benchmark `scenes`, which is of that
split too. `fewer` are the first eighth of `train`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

DATA = Path("runs/results/data")
TOOLS, SKILL = ("crop",), "outermost"
SIZE, SEED = 252, 201
PARTS = {
    "train": ("train", 1200), "val": ("val", 250), "test": ("test", 520), "fewer": ("train", 150), "more": ("train", 4800),
}  # fmt: skip
"""Of each file the scenes' split, and how many trajectories."""


def make(folder: Path, workers: int) -> None:
    for name, (split, count) in PARTS.items():
        subprocess.run(
            [
                sys.executable, "-m", "pearl.cli.gen", "trajectories", "--source", "scenes", "--split", split,
                "--count", str(count), "--size", str(SIZE), "--seed", str(SEED), "--skill", SKILL,
                "--tools", ",".join(TOOLS), "--out", str(folder / f"{name}.parquet"), "--num-workers", str(workers), "--resume",
            ],
            check=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    make(options.out, options.workers)


if __name__ == "__main__":
    main()
