"""The table as a picture: a ring for each seed, their mean with its 95% t interval, the base as a dotted line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pearl.files import whole_file
from recipes.results.seeds import half_width

COLOURS = {"base": "grey", "tools": "C2", "pearl": "C1"}
"""By the first word of a row; all others are baselines."""
BASELINE = "C0"


def draw(accuracies: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """
    Args:
        accuracies: By panel and row, of each seed, from 0 to 1; each panel has the same rows, the base among them.
    """
    from matplotlib.figure import Figure

    rows = list(next(iter(accuracies.values())))
    figure = Figure(figsize=(9, 1 + 0.26 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(accuracies), sharey=True, squeeze=False)[0]
    for axes, (title, by_row) in zip(panels, accuracies.items(), strict=True):
        axes.axvline(100 * by_row["base"][0], linestyle=":", color=COLOURS["base"], linewidth=1)
        for place, (row, values) in enumerate(by_row.items()):
            colour = COLOURS.get(row.partition(",")[0], BASELINE)
            seeds, half = [100 * one for one in values], 100 * (half_width(values) or 0)
            axes.plot(seeds, [place] * len(seeds), "o", color=colour, fillstyle="none", markersize=4, alpha=0.6)
            axes.errorbar(sum(seeds) / len(seeds), place, xerr=half or None, fmt="o", color=colour, capsize=2)
        axes.set(xlabel=f"{title}: right answers, %")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
