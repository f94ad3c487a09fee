"""What a perfect visual token would say: the object whose centre lies in its cell; where objects are and how far away;
what each patch shows."""

from __future__ import annotations

import numpy as np

from pearl.scenes.layout import COLOURS, MATERIALS, SHAPES
from recipes.vlm_nano.data import COLUMNS, GRID

SIDE = GRID // 2
KINDS = (len(COLOURS), len(SHAPES), len(MATERIALS))
OCTAVES = 3
LOG_NEAR, LOG_FAR = np.log(1.2), np.log(9.0)
FEATURES = 1 + sum(KINDS) + 4 + 2 + 2 * OCTAVES
PRESENT = 0
MEASURES = ("left", "top", "right", "bottom", "far")
"""The sides of an object's box, in 0..1 of the image; its depth, in 0..1 on a log scale."""
LEVELS = 10
MIN_SIDE, MIN_SEEN = 5 / 252, 0.3


def measured(table: np.ndarray, mirrored: bool) -> np.ndarray:
    """(N, len(MEASURES)) of the objects of a table."""
    rows = table[table[:, 0] >= 0]
    x0, y0, x1, y1, _, depth = rows[:, 3:].T
    left, right = (1 - x1, 1 - x0) if mirrored else (x0, x1)
    return np.stack([left, y0, right, y1, (np.log(depth) - LOG_NEAR) / (LOG_FAR - LOG_NEAR)], 1)


def levels(measures: np.ndarray) -> np.ndarray:
    """In which of `LEVELS` equal parts of 0..1 each lies."""
    found: np.ndarray = np.clip((measures * LEVELS).astype(np.int64), 0, LEVELS - 1)
    return found


def cell_features(table: np.ndarray, mirrored: bool) -> tuple[np.ndarray, np.ndarray]:
    """(SIDE², FEATURES): present; colour, shape, material (one-hot); centre within the cell, width, height; visible
    share; depth on a log scale, as it is and in `OCTAVES` sines and cosines. Zeros where no object is centred. And
    (SIDE², len(MEASURES)) its `levels`.

    Where two centres share a cell, the second goes to the nearest cell that is free.
    """
    cells = np.zeros((SIDE, SIDE, FEATURES), np.float32)
    known = np.zeros((SIDE, SIDE, len(MEASURES)), np.int64)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table if row[0] >= 0]
    objects = zip(rows, measured(table, mirrored), strict=True)
    for row, measures in sorted(objects, key=lambda pair: pair[0]["depth"]):
        left, top, right, bottom, depth = measures
        width, height = right - left, bottom - top
        if min(width, height) < MIN_SIDE or row["visible"] < MIN_SEEN:
            continue
        x, y = (left + right) / 2 * SIDE, (top + bottom) / 2 * SIDE
        free = np.argwhere(cells[..., PRESENT] == 0)
        i, j = free[np.argmin(((free + 0.5 - [y, x]) ** 2).sum(1))]
        hots = [np.eye(n)[int(row[k])] for n, k in zip(KINDS, ("colour", "shape", "material"), strict=True)]
        waves = [f(np.pi * 2.0**k * depth) for k in range(OCTAVES) for f in (np.sin, np.cos)]
        inside = [x - j - 0.5, y - i - 0.5, 4 * width, 4 * height]
        cells[i, j] = np.concatenate([[1], *hots, inside, [row["visible"], 2 * depth - 1], waves])
        known[i, j] = levels(measures)
    return cells.reshape(-1, FEATURES), known.reshape(-1, len(MEASURES))


def patch_labels(table: np.ndarray, owners: np.ndarray, depths: np.ndarray, mirrored: bool) -> np.ndarray:
    """(GRID², 3) float32 in the processor's order: colour and shape of the patch's object or -1, depth in metres."""
    there = owners >= 0
    rows = table[np.where(there, owners, 0)]
    labels = np.stack([np.where(there, rows[..., 0], -1), np.where(there, rows[..., 1], -1), depths], -1)
    labels = labels[:, ::-1] if mirrored else labels
    blocks = labels.reshape(SIDE, 2, SIDE, 2, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(blocks.reshape(-1, 3), dtype=np.float32)
