"""Does Pearl's objective learn without collapsing? 200 updates, and their curves as a picture.

python -m benchmarks.curves --data demo/traj.parquet --out docs/images/pearl_curves.png
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pearl.trainer.config import TrainConfig
from pearl.trainer.train import train

PANELS = {
    "L_VLM": ("loss_vlm",),
    "L_JEPA": ("loss_jepa",),
    "L_NextLat": ("loss_nextlat", "loss_nextlat_token"),
    "retrieval of one's own target": ("retrieval", "retrieval_chance"),
    "effective rank": ("predicted_rank", "target_rank"),
    "spread": ("predicted_spread", "target_spread"),
}
WATCHED = ("retrieval of one's own target", "effective rank", "spread")
WINDOW = 20
"""Updates whose mean is drawn."""
DISTANCES = ("cosine", "infonce")


def figures_of(distance: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a training logged at each update; of what is watched for collapse, from when its window is full: among
    fewer pairs one's own is found more easily, and ranks are lower."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            data=options.data, model=options.model, out=f"{folder}/run", max_steps=options.steps,
            learning_rate=options.learning_rate, batch_size=8, save_steps=0,
            objective_options={"jepa_distance": distance},
        )  # fmt: skip
        train(config)
        lines = [json.loads(line) for line in Path(config.out, "log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    full = min(line.get("retrieval_chance", 1.0) for line in logged)
    watched = {name for title in WATCHED for name in PANELS[title]}
    return [
        line if line.get("retrieval_chance") == full else {k: v for k, v in line.items() if k not in watched}
        for line in logged
    ]


def mean_over(lines: Sequence[Mapping[str, float]], name: str, updates: slice) -> float:
    return fmean(line[name] for line in lines[updates] if name in line)


def draw(found: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Each panel's figures over the updates, a colour a distance; dotted: the second of a panel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for number, (distance, lines) in enumerate(found.items()):
            for name, style in zip(names, ("-", ":"), strict=False):
                logged = [line for line in lines if name in line]
                means = [mean_over(logged, name, slice(max(0, n - WINDOW), n)) for n in range(1, len(logged) + 1)]
                axis.plot(
                    [line["step"] for line in logged], means, style, color=f"C{number}", label=f"{name} ({distance})"
                )
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/traj.parquet")
    parser.add_argument("--model", help="default: vlm-nano")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--jepa-distance", nargs="+", default=DISTANCES)
    parser.add_argument("--out", type=Path, default=Path("docs/images/pearl_curves.png"))
    options = parser.parse_args()
    found = {distance: figures_of(distance, options) for distance in options.jepa_distance}
    draw(found, options.out)
    print(f"means over the first and the last {WINDOW} updates that have them")
    for distance, lines in found.items():
        for name in (name for names in PANELS.values() for name in names):
            logged = [line for line in lines if name in line]
            ends = (mean_over(logged, name, part) for part in (slice(WINDOW), slice(-WINDOW, None)))
            print(f"{distance} {name}: {' → '.join(f'{end:.3f}' for end in ends)}")
    print(f"the curves: {options.out}")


if __name__ == "__main__":
    main()
