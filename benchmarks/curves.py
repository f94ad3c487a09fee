"""Does Pearl's objective learn without collapsing? 200 updates, and their curves as a picture.

python -m benchmarks.curves --data demo/traj.parquet --out docs/images/pearl_curves.png
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
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


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Each panel's figures over the updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), label=name)
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/traj.parquet")
    parser.add_argument("--model", help="default: vlm-nano")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, default=Path("docs/images/pearl_curves.png"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            data=options.data, model=options.model, out=f"{folder}/run", max_steps=options.steps,
            learning_rate=options.learning_rate, batch_size=8, save_steps=0,
        )  # fmt: skip
        train(config)
        lines = [json.loads(line) for line in Path(config.out, "log.jsonl").read_text().splitlines()]
    draw([line for line in lines if "loss" in line], options.out)
    print(f"the curves: {options.out}")


if __name__ == "__main__":
    main()
