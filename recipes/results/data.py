"""The trajectories of the table: `python -m recipes.results.data`, about a quarter of an hour on 2 cores.

Crops of rendered scenes, of which only the questions are kept that a crop helps the base to answer (colours and shapes
of small objects; `pearl-eval gain` says by how much, see docs/results.md). The table trains on the split `train`,
chooses on `val`, and is measured on `test` and on the benchmark `scenes`, which is of that split too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from pearl.pipelines.curation.filtering import Filter, filter_data

DATA = Path("runs/results/data")
TOOLS, SKILLS = ("crop",), ("attribute", "shape")
SIZE, SEED = 252, 101
COUNTS = {"train": 8000, "val": 1600, "test": 3200}


def make(folder: Path, workers: int) -> None:
    for split, count in COUNTS.items():
        everything, kept = folder / "all" / f"{split}.parquet", folder / f"{split}.parquet"
        subprocess.run(
            [
                sys.executable, "-m", "pearl.cli.gen", "trajectories", "--source", "scenes", "--split", split,
                "--count", str(count), "--size", str(SIZE), "--seed", str(SEED), "--tools", ",".join(TOOLS),
                "--out", str(everything), "--num-workers", str(workers), "--resume",
            ],
            check=True,
        )  # fmt: skip
        kept.unlink(missing_ok=True)
        filter_data(everything, kept, Filter(skills=SKILLS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    make(options.out, options.workers)


if __name__ == "__main__":
    main()
