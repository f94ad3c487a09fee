"""Evidence about latents as files: JSON, a Markdown table, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pearl.evaluation.latents import Compared, Evidence
from pearl.evaluation.statistics import Estimate
from pearl.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_evidence(found: Sequence[Evidence], out: Path) -> None:
    """Leaves `latents.json`, `latents.md` and `latents.png` in a folder."""
    with whole_file(out / "latents.json") as partial:
        partial.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    with whole_file(out / "latents.md") as partial:
        partial.write_text(markdown(found), encoding="utf-8")
    with whole_file(out / "latents.png") as partial:
        draw(found, partial)


def markdown(found: Sequence[Evidence]) -> str:
    """One section a model."""
    return "\n".join(line for one in found for line in _section(one)) + "\n"


def _section(one: Evidence) -> list[str]:
    lines = [f"## {one.model} ({one.objective}, {one.questions} trajectories, {one.embeddings.count} embeddings)", ""]
    lines += [f"Left out: {count}: {reason}." for reason, count in one.left_out.items()]
    lines += [""] * bool(one.left_out)
    lines += ["| its own target among | embedding | control | chance |", "|---|---|---|---|"]
    lines += [
        f"| {count} | {_shown(found.embedding)} | {_shown(found.control)} | {found.chance:.3f} |"
        for count, found in one.retrieval.items()
    ]
    lines += ["", "| | | distance from the target | control | effective rank | targets | spread | targets |"]
    lines += ["|---|---|---|---|---|---|---|---|", _compared("embeddings", one.embeddings)]
    lines += [_compared("latents, one by one", one.latents)] if one.latents else []
    lines += [""]
    if (read := one.answers) is not None:
        lines += [f"| the answer, read from {read.judged} of them | embedding | control | target | chance |"]
        lines += ["|---|---|---|---|---|"]
        shown = " | ".join(_shown(side) for side in (read.embedding, read.control, read.target))
        lines += [f"| | {shown} | {read.chance:.3f} |", ""]
    if one.accuracy is None:
        return lines
    lines += ["| latents | accuracy | answers changed |", "|---|---|---|", f"| its own | {_shown(one.accuracy)} | |"]
    lines += [f"| {name} | {_shown(what.accuracy)} | {_shown(what.changed)} |" for name, what in one.replaced.items()]
    lines += ["", "| latents in a run | accuracy |", "|---|---|"]
    lines += [f"| {quota} | {_shown(accuracy)} |" for quota, accuracy in one.by_quota.items()]
    return [*lines, ""]


def _compared(name: str, one: Compared) -> str:
    ranks = " | ".join(f"{rank:.1f}" for rank in one.ranks)
    spreads = " | ".join(f"{spread:.3f}" for spread in one.spreads)
    return f"| {name} | {one.count} | {one.distance:.3f} | {one.distance_control:.3f} | {ranks} | {spreads} |"


def _shown(one: Estimate) -> str:
    return f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"


def draw(found: Sequence[Evidence], path: Path) -> None:
    """Retrieval and, where models make latents, answers with replaced ones and accuracy by their number; a colour a
    model."""
    from matplotlib.figure import Figure

    panels = 3 if any(one.accuracy is not None for one in found) else 1
    figure = Figure(figsize=(4 * panels, 3.8 + 0.2 * len(found) / panels), layout="constrained")
    retrieval, *used = figure.subplots(1, panels, squeeze=False)[0]
    _draw_retrieval(found, retrieval)
    if used:
        _draw_use(found, *used)
    figure.legend(*retrieval.get_legend_handles_labels(), loc="outside lower center", ncols=panels, fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def _labels(found: Sequence[Evidence]) -> list[str]:
    """By as much of the ends of the models' names as tells them apart."""
    parts, count = [Path(one.model).parts for one in found], 1
    while len({part[-count:] for part in parts}) < len({*parts}):
        count += 1
    return [f"{'/'.join(part[-count:])} ({one.objective})" for part, one in zip(parts, found, strict=True)]


def _draw_retrieval(found: Sequence[Evidence], axes: Axes) -> None:
    for number, (label, one) in enumerate(zip(_labels(found), found, strict=True)):
        colour = f"C{number}"
        counts = list(one.retrieval)
        axes.plot(counts, [f.embedding.value for f in one.retrieval.values()], "o-", color=colour, label=label)
        axes.plot(counts, [f.control.value for f in one.retrieval.values()], "x:", color=colour)
    counts = sorted({count for one in found for count in one.retrieval})
    axes.plot(counts, [1 / count for count in counts], "--", color="grey", label="chance")
    axes.set(xscale="log", xlabel="candidates", ylabel="finds its own target", ylim=(0, 1))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_title("dotted: control, what the model had before", fontsize=9)


def _draw_use(found: Sequence[Evidence], replaced: Axes, quotas: Axes) -> None:
    labelled = zip(_labels(found), found, strict=True)
    answered = [(f"C{number}", *pair) for number, pair in enumerate(labelled) if pair[1].accuracy is not None]
    for place, (colour, label, one) in enumerate(answered):
        assert one.accuracy is not None
        values = [one.accuracy.value, *(what.accuracy.value for what in one.replaced.values())]
        width = 0.8 / len(answered)
        left = (width - 0.8) / 2 + place * width
        replaced.bar([k + left for k in range(len(values))], values, width, color=colour, label=label)
        replaced.set_xticks(range(len(values)), ["its own", *one.replaced], rotation=30, ha="right")
        quotas.plot(
            list(one.by_quota), [accuracy.value for accuracy in one.by_quota.values()], "o-", color=colour, label=label
        )
    replaced.set(ylabel="accuracy", xlabel="what is fed in place of latents", ylim=(0, 1))
    quotas.set(ylabel="accuracy", xlabel="latents in a run", ylim=(0, 1))
