"""What a perfect visual token would say: the object whose centre lies in its cell; and what each patch shows."""

from __future__ import annotations

import numpy as np

from pearl.scenes.layout import COLOURS, MATERIALS, SHAPES
from recipes.vlm_nano.data import COLUMNS, GRID

SIDE = GRID // 2
KINDS = (len(COLOURS), len(SHAPES), len(MATERIALS))
OCTAVES = 3
LOG_NEAR, LOG_FAR = np.log(1.2), np.log(9.0)
FEATURES = 1 + sum(KINDS) + 4 + 2 + 2 * OCTAVES
PRESENT, DEPTH = 0, 1 + sum(KINDS) + 5
MIN_SIDE, MIN_SEEN = 5 / 252, 0.3


def cell_features(table: np.ndarray, mirrored: bool) -> np.ndarray:
    """(SIDE², FEATURES): present; colour, shape, material (one-hot); centre within the cell, width, height; visible
    share; depth on a log scale, as it is and in `OCTAVES` sines and cosines. Zeros where no object is centred.

    Where two centres share a cell, the second goes to the nearest cell that is free.
    """
    cells = np.zeros((SIDE, SIDE, FEATURES), np.float32)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table if row[0] >= 0]
    for row in sorted(rows, key=lambda row: row["depth"]):
        x0, x1 = (1 - row["x1"], 1 - row["x0"]) if mirrored else (row["x0"], row["x1"])
        width, height = x1 - x0, row["y1"] - row["y0"]
        if min(width, height) < MIN_SIDE or row["visible"] < MIN_SEEN:
            continue
        x, y = (x0 + x1) / 2 * SIDE, (row["y0"] + row["y1"]) / 2 * SIDE
        free = np.argwhere(cells[..., PRESENT] == 0)
        i, j = free[np.argmin(((free + 0.5 - [y, x]) ** 2).sum(1))]
        hots = [np.eye(n)[int(row[k])] for n, k in zip(KINDS, ("colour", "shape", "material"), strict=True)]
        depth = (np.log(row["depth"]) - LOG_NEAR) / (LOG_FAR - LOG_NEAR)
        waves = [f(np.pi * 2.0**k * depth) for k in range(OCTAVES) for f in (np.sin, np.cos)]
        inside = [x - j - 0.5, y - i - 0.5, 4 * width, 4 * height]
        cells[i, j] = np.concatenate([[1], *hots, inside, [row["visible"], 2 * depth - 1], waves])
    return cells.reshape(-1, FEATURES)


def patch_labels(table: np.ndarray, owners: np.ndarray, depths: np.ndarray, mirrored: bool) -> np.ndarray:
    """(GRID², 3) float32 in the processor's order: colour and shape of the patch's object or -1, depth in metres."""
    there = owners >= 0
    rows = table[np.where(there, owners, 0)]
    labels = np.stack([np.where(there, rows[..., 0], -1), np.where(there, rows[..., 1], -1), depths], -1)
    labels = labels[:, ::-1] if mirrored else labels
    blocks = labels.reshape(SIDE, 2, SIDE, 2, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(blocks.reshape(-1, 3), dtype=np.float32)
