"""Renders the scenes that depth-nano is trained on, once, into memory-mapped arrays.

    python -m recipes.depth_nano.data --count 24000 --out runs/depth_nano/data

Each scene gives an image (uint8), inverse depth (float16, 1/m, 0 in the sky) and object mask (int8, -1 elsewhere).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from pearl.scenes.layout import draw_layout, scene_rng
from pearl.scenes.render import render

SIZE = 224
SEED = 71
CHUNK = 50


@dataclass(frozen=True)
class Arrays:
    """(N, S, S, 3) uint8, (N, S, S) float16 in 1/m, (N, S, S) int8."""

    images: np.ndarray
    inverse_depth: np.ndarray
    masks: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def open_arrays(folder: Path, mode: str = "r", count: int | None = None) -> Arrays:
    def array(name: str, dtype: str, *channels: int) -> np.ndarray:
        shape = None if count is None else (count, SIZE, SIZE, *channels)
        return open_memmap(folder / f"{name}.npy", mode=mode, dtype=dtype, shape=shape)

    return Arrays(array("images", "uint8", 3), array("inverse_depth", "float16"), array("masks", "int8"))


def _fill(job: tuple[str, int, int]) -> int:
    folder, start, stop = job
    arrays = open_arrays(Path(folder), "r+")
    for index in range(start, stop):
        scene = render(draw_layout(scene_rng("train", SEED, index)), SIZE)
        arrays.images[index] = scene.image
        arrays.inverse_depth[index] = 1 / scene.depth
        arrays.masks[index] = scene.mask
    return stop - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=24_000)
    parser.add_argument("--out", type=Path, default=Path("runs/depth_nano/data"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    partial = options.out.with_name(options.out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    open_arrays(partial, "w+", options.count)
    jobs = [(str(partial), s, min(s + CHUNK, options.count)) for s in range(0, options.count, CHUNK)]
    done = 0
    with get_context("spawn").Pool(options.workers) as pool:
        for finished in pool.imap_unordered(_fill, jobs):
            done += finished
            if done % 1000 < CHUNK:
                print(f"{done}/{options.count} scenes", flush=True)
    partial.rename(options.out)


if __name__ == "__main__":
    main()
