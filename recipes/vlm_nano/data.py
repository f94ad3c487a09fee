"""Renders the scenes that vlm-nano is trained on, once, with what stands where and questions about them.

    python -m recipes.vlm_nano.data --count 24000 --out runs/vlm_nano/data

Each scene gives an image, a table of its visible objects, what each of the vision tower's patches shows, and
a line of questions (JSON).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from pearl.scenes.layout import COLOURS, MATERIALS, SHAPES, draw_layout, scene_rng
from pearl.scenes.render import Scene, render
from recipes.vlm_nano.asks import Asked, ask_all

SIZE, PATCH = 252, 14
GRID = SIZE // PATCH
SEED = 83
CHUNK = 50
MAX_OBJECTS = 12
COLUMNS = ("colour", "shape", "material", "x0", "y0", "x1", "y1", "visible", "depth")
MIN_COVER = 0.15
FARTHEST = 20.0


@dataclass(frozen=True)
class Arrays:
    """Of N scenes, S pixels and G patches a side.

    Attributes:
        images: (N, S, S, 3) uint8.
        objects: (N, MAX_OBJECTS, len(COLUMNS)) float32: indices into `COLOURS`, `SHAPES`, `MATERIALS`; box in 0..1;
            visible share; depth in metres. A colour of -1: no such object.
        patch_objects: (N, G, G) int8: the row of the object that covers most of the patch, or -1.
        patch_depths: (N, G, G) float16: median depth in metres, at most `FARTHEST`.
    """

    images: np.ndarray
    objects: np.ndarray
    patch_objects: np.ndarray
    patch_depths: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def open_arrays(folder: Path, mode: str = "r", count: int | None = None) -> Arrays:
    def array(name: str, dtype: str, *shape: int) -> np.ndarray:
        full = None if count is None else (count, *shape)
        return open_memmap(folder / f"{name}.npy", mode=mode, dtype=dtype, shape=full)

    return Arrays(
        array("images", "uint8", SIZE, SIZE, 3),
        array("objects", "float32", MAX_OBJECTS, len(COLUMNS)),
        array("patch_objects", "int8", GRID, GRID),
        array("patch_depths", "float16", GRID, GRID),
    )


def object_table(scene: Scene) -> np.ndarray:
    table = np.full((MAX_OBJECTS, len(COLUMNS)), -1, np.float32)
    for row, seen in enumerate(scene.seen):
        thing = seen.thing
        codes = list(COLOURS).index(thing.colour), SHAPES.index(thing.shape), MATERIALS.index(thing.material)
        table[row] = [*codes, *seen.box, seen.visible, seen.depth]
    return table


def patch_maps(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Which object each patch shows, as a row of the table, and how far away its middle pixel value is."""

    def patches(pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID, GRID, -1)

    mask = patches(scene.mask)
    owners = np.full((GRID, GRID), -1, np.int8)
    best = np.full((GRID, GRID), MIN_COVER)
    for row, seen in enumerate(scene.seen):
        thing = next(i for i, other in enumerate(scene.layout.things) if other is seen.thing)
        share = (mask == thing).mean(-1)
        owners[share > best] = row
        best = np.maximum(best, share)
    return owners, np.minimum(np.median(patches(scene.depth), -1), FARTHEST)


def _fill(job: tuple[str, int, int]) -> int:
    folder, start, stop = Path(job[0]), job[1], job[2]
    arrays = open_arrays(folder, "r+")
    lines = []
    for index in range(start, stop):
        scene = render(draw_layout(scene_rng("train", SEED, index)), SIZE)
        arrays.images[index] = scene.image
        arrays.objects[index] = object_table(scene)
        arrays.patch_objects[index], arrays.patch_depths[index] = patch_maps(scene)
        lines.append(json.dumps([a.record() for a in ask_all(scene, "train", SEED, index)]))
    (folder / "questions" / f"{start:07d}.jsonl").write_text("\n".join(lines) + "\n")
    return stop - start


class Questions(Sequence[list[Asked]]):
    """For each scene its questions, which stay JSON until they are asked for."""

    def __init__(self, folder: Path) -> None:
        files = sorted((folder / "questions").glob("*.jsonl"))
        self.lines = [line for file in files for line in file.read_bytes().splitlines()]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return [Asked.read(record) for record in json.loads(self.lines[index])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=24_000)
    parser.add_argument("--out", type=Path, default=Path("runs/vlm_nano/data"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    partial = options.out.with_name(options.out.name + ".partial")
    (partial / "questions").mkdir(parents=True, exist_ok=True)
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
