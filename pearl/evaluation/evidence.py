"""Evidence about latents as files: JSON, a Markdown table, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pearl.evaluation.latents import Evidence
from pearl.files import whole_file


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
    lines = [f"## {one.model} ({one.objective}, {one.questions} trajectories)", ""]
    lines += ["| its own output among | embedding | control | chance |", "|---|---|---|---|"]
    lines += [
        f"| {count} | {found.embedding:.3f} | {found.control:.3f} | {found.chance:.3f} |"
        for count, found in one.retrieval.items()
    ]
    apart = f"Distance from the target {one.distance:.3f} (control {one.distance_control:.3f})"
    rank = f"effective rank {one.ranks[0]:.1f} (targets {one.ranks[1]:.1f})"
    lines += ["", f"{apart}; {rank}; spread {one.spreads[0]:.3f} (targets {one.spreads[1]:.3f}).", ""]
    if one.accuracy is None:
        return lines
    lines += ["| latents | accuracy | answers changed |", "|---|---|---|", f"| its own | {one.accuracy:.3f} | |"]
    lines += [f"| {name} | {what.accuracy:.3f} | {what.changed:.3f} |" for name, what in one.replaced.items()]
    lines += ["", "| latents in a run | accuracy |", "|---|---|"]
    lines += [f"| {quota} | {accuracy:.3f} |" for quota, accuracy in one.by_quota.items()]
    return [*lines, ""]


def draw(found: Sequence[Evidence], path: Path) -> None:
    """Retrieval, answers with replaced latents, accuracy by their number; a colour a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    retrieval, replaced, quotas = figure.subplots(1, 3)
    for number, one in enumerate(found):
        colour, label = f"C{number}", f"{Path(one.model).name} ({one.objective})"
        counts = list(one.retrieval)
        retrieval.plot(counts, [f.embedding for f in one.retrieval.values()], "o-", color=colour, label=label)
        retrieval.plot(counts, [f.control for f in one.retrieval.values()], "x:", color=colour)
        if one.accuracy is None:
            continue
        values = [one.accuracy, *(what.accuracy for what in one.replaced.values())]
        width = 0.8 / len(found)
        replaced.bar([k + number * width for k in range(len(values))], values, width, color=colour, label=label)
        replaced.set_xticks(range(len(values)), ["its own", *one.replaced], rotation=30, ha="right")
        quotas.plot(list(one.by_quota), list(one.by_quota.values()), "o-", color=colour, label=label)
    counts = sorted({count for one in found for count in one.retrieval})
    retrieval.plot(counts, [1 / count for count in counts], "--", color="grey", label="chance")
    retrieval.set(xscale="log", xlabel="candidates", ylabel="finds its own tool output", ylim=(0, 1))
    retrieval.set_xticks(counts, [str(count) for count in counts])
    replaced.set(ylabel="accuracy", xlabel="what is fed in place of latents", ylim=(0, 1))
    quotas.set(ylabel="accuracy", xlabel="latents in a run", ylim=(0, 1))
    retrieval.set_title("dotted: control, what the model had before", fontsize=9)
    retrieval.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=110)
