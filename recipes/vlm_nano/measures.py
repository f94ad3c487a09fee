"""What an object measures, asked of it alone: what comparing two objects has to know of each.

"Is the cone to the left of the cube?" is answered right no more often by a model that has found one of the two than by
one that has found none, so nothing leads there. Where one object is, how large and how far away, can be learned by
itself, in tenths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from pearl.scenes.layout import COLOURS, SHAPES
from recipes.vlm_nano.data import COLUMNS
from recipes.vlm_nano.things import LOG_FAR, LOG_NEAR, MIN_SEEN

MEASURE = "measure"
QUESTIONS = {
    "across": "How far to the right is the {name}?",
    "down": "How far down is the {name}?",
    "size": "How large is the {name}?",
    "depth": "How far away is the {name}?",
}
SMALLEST, LARGEST = np.log(0.02), np.log(0.6)


def measures(table: np.ndarray, mirrored: bool, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Questions about the objects of a scene that a name fits alone, in random order, with their answers, 0 to 9."""
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table if row[0] >= 0]
    names = [
        (SHAPES[int(row["shape"])], f"{list(COLOURS)[int(row['colour'])]} {SHAPES[int(row['shape'])]}") for row in rows
    ]
    said = Counter(name for both in names for name in both)
    asked = [(row, name) for row, both in zip(rows, names, strict=True) for name in both[: 1 if said[both[0]] == 1 else 2]
             if said[name] == 1 and row["visible"] >= MIN_SEEN]  # fmt: skip
    for number in rng.permutation(len(asked)):
        row, name = asked[number]
        kind = str(rng.choice(list(QUESTIONS)))
        yield QUESTIONS[kind].format(name=name), str(int(min(9, max(0, 10 * _share(row, kind, mirrored)))))


def _share(row: dict[str, float], kind: str, mirrored: bool) -> float:
    if kind == "across":
        x = (row["x0"] + row["x1"]) / 2
        return 1 - x if mirrored else x
    if kind == "down":
        return (row["y0"] + row["y1"]) / 2
    if kind == "size":
        side = np.sqrt((row["x1"] - row["x0"]) * (row["y1"] - row["y0"]))
        return float((np.log(side) - SMALLEST) / (LARGEST - SMALLEST))
    return float((np.log(row["depth"]) - LOG_NEAR) / (LOG_FAR - LOG_NEAR))
