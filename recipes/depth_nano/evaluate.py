"""Measures a depth model on held-out scenes, as the depth tool reads it.

    python -m recipes.depth_nano.evaluate                          # the built-in weights, 300 scenes of the test split
    python -m recipes.depth_nano.evaluate --model some-folder-or-hub-id

Which of two objects is closer, over all pairs of clearly visible objects with a relative gap above 5%; the same over
the hard pairs, where "lower in the picture is closer" is wrong; AbsRel after scale-and-shift alignment in inverse depth.
The baselines "lower in the picture" and "bigger" are measured on the same pairs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from pearl.images import Picture
from pearl.scenes.layout import draw_layout, scene_rng
from pearl.scenes.questions import MIN_PIXELS, MIN_VISIBLE
from pearl.scenes.render import Scene, render
from pearl.tools.depth import BUILT_IN, Depth, read_box
from recipes.depth_nano.metrics import PairCounts, Reading, abs_rel

SEED = 1
SIZE = 384
BATCH = 10
BARS = {"pair_accuracy": 0.90, "hard_pair_accuracy": 0.75, "abs_rel": 0.15}


def evaluate(model: str, scenes: int) -> dict[str, float]:
    tool = Depth(model)
    counts = PairCounts()
    for start in range(0, scenes, BATCH):
        batch = [
            render(draw_layout(scene_rng("test", SEED, i)), SIZE) for i in range(start, min(start + BATCH, scenes))
        ]
        pictures = [Picture(scene.image, scene.depth) for scene in batch]
        for scene, nearness in zip(batch, tool.estimate(pictures), strict=True):
            assert nearness is not None
            counts.add(_readings(scene, nearness), abs_rel(nearness, scene.depth))
    return {**counts.figures(), "scenes": scenes}


def _readings(scene: Scene, nearness: np.ndarray) -> list[Reading]:
    return [
        Reading(
            depth=seen.depth,
            nearness=read_box(nearness, seen.box),
            bottom=seen.box[3],
            area=(seen.box[2] - seen.box[0]) * (seen.box[3] - seen.box[1]),
        )
        for seen in scene.seen
        if seen.pixels >= MIN_PIXELS and seen.visible >= MIN_VISIBLE
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    options = parser.parse_args()
    figures = evaluate(options.model, options.scenes)
    for name, value in figures.items():
        bar = f"   (bar: {BARS[name]})" if name in BARS else ""
        print(f"{name:22} {value:8.3f}{bar}" if isinstance(value, float) else f"{name:22} {value:8d}{bar}")
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
