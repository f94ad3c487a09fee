"""The base of the table, vlm-nano with fewer pixels: `python -m recipes.results.base`.

An image of 252 pixels a side (81 visual tokens) becomes one of 168 (36), so that small objects are hard to see and a
crop, which tools cut from the original, shows what the model's own view does not.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from pearl.torch_setup import prepare_torchvision
from pearl.trainer.models import limit_pixels, place_of

BASE = Path("runs/results/base")
SIDE = 168
"""Of the images that it is given, in pixels."""


def make(out: Path) -> None:
    prepare_torchvision()
    from transformers import AutoProcessor

    place = place_of(None)
    processor = AutoProcessor.from_pretrained(place)
    limit_pixels(processor, place, None, SIDE * SIDE)
    shutil.copytree(place, out, dirs_exist_ok=True)
    processor.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BASE)
    make(parser.parse_args().out)


if __name__ == "__main__":
    main()
