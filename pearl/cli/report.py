"""What the command lines print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pearl.pipelines.inspection import Inspection
from pearl.pipelines.rollout import Refusal
from pearl.pipelines.run_directory import RunDirectory
from pearl.pipelines.sources import annotators_of
from pearl.records import Trajectory


def print_summary(console: Console, manifest: Mapping[str, Any], out: Path) -> None:
    """What a run made, and how to go on."""
    rejected, kept = sum(manifest["rejected"].values()), manifest["kept"]
    console.print(
        f"{kept} trajectories in {out} ({manifest['bytes'] / 1e6:.1f} MB):"
        f" {manifest['planned']} planned = {kept} kept + {rejected} rejected + {manifest['quarantined']} quarantined"
    )
    if manifest["rejected"]:
        console.print(f"rejected: {_listed(manifest['rejected'])}")
    if "costs" in manifest:
        console.print(_costs(manifest["costs"]))
    if not kept:
        console.print(f"nothing was kept; every reason stands in {RunDirectory(out).run / 'refused'}")
        return
    several = sum(n for steps, n in manifest["steps"].items() if int(steps) > 1)
    console.print(f"steps: {_listed(manifest['steps'])}; {several / kept:.0%} have two or more")
    console.print(f"tools: {_listed(manifest['tools'])}")
    console.print(f"skills: {_listed(manifest['skills'])}")
    console.print(f"look at them:  pearl-gen view {out}")
    console.print(f"load them:     datasets.load_dataset('parquet', data_files='{_glob(out)}', split='train')")


def _costs(costs: Mapping[str, Any]) -> str:
    asked = f"{costs['requests']} requests ({costs['retries']} repeated), {costs['cached']} replies from the cache"
    used = f"{costs['tokens_in']} tokens in, {costs['tokens_out']} out"
    faults = f"; faults: {_listed(costs['faults'])}" if costs["faults"] else ""
    given_up = f"; {costs['unanswered']} requests given up" if costs["unanswered"] else ""
    return f"planner: {asked}; {used}; cost {costs['money']:g}{given_up}{faults}"


def _glob(out: Path) -> str:
    return str(out) if out.suffix == ".parquet" else f"{out}/data/*.parquet"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def print_preview(console: Console, found: Mapping[str, Any]) -> None:
    console.print(f"would write {found['planned']} samples as {found['shards']} shards to {found['out']}")
    console.print(f"sources: {_listed(found['by_source'])}")
    console.print(f"fingerprint: {found['fingerprint'][:16]}")
    rows = size = 0.0
    first: Trajectory | None = None
    for source, outcomes in found["outcomes"].items():
        kept = [outcome for outcome in outcomes if isinstance(outcome, Trajectory)]
        reasons = sorted({f"{o.reason}: {o.detail}".strip(": ") for o in outcomes if isinstance(o, Refusal)})
        console.print(
            f"{source}: of the first {len(outcomes)} samples {len(kept)} give trajectories", *reasons, sep="\n  "
        )
        scale = found["by_source"][source] / len(outcomes)
        rows, size = rows + scale * len(kept), size + scale * sum(map(_bytes, kept))
        first = first or next(iter(kept), None)
    if first:
        console.print(f"in all about {rows:.0f} trajectories, {size / 1e6:.1f} MB. The first one:\n")
        print_trajectory(console, first)


def _bytes(trajectory: Trajectory) -> int:
    images = [step.observation.image for step in trajectory.steps]
    return len(trajectory.image.data) + sum(len(image.data) for image in images if image)


def print_trajectory(console: Console, trajectory: Trajectory) -> None:
    """A trajectory as text."""
    options = f" ({' / '.join(trajectory.choices)})" if trajectory.choices else ""
    say = console.print
    say(f"question:    {trajectory.question}{options}")
    for number, step in enumerate(trajectory.steps, start=1):
        say(f"thought:     {step.thought}")
        say(f"call:        {step.call.tool} {json.dumps(step.call.arguments)}")
        picture = " [image]" if step.observation.image else ""
        say(f"observation: {step.observation.text}{picture}  ({number})")
    say(f"conclusion:  {trajectory.conclusion}")
    say(f"answer:      {trajectory.answer}")


def print_inspection(console: Console, found: Inspection) -> None:
    console.print(
        f"{found.rows} trajectories in {found.files} file(s), {found.bytes / 1e6:.1f} MB"
        f" ({found.bytes / max(found.rows, 1) / 1e3:.0f} kB each, {found.image_bytes / max(found.bytes, 1):.0%} images)"
    )
    for title, counts in (
        ("skill", found.skills), ("source", found.sources), ("license", found.licenses),
        ("steps", {str(n): c for n, c in sorted(found.steps.items())}), ("tools used", found.combinations),
    ):  # fmt: skip
        _print_counts(console, title, counts, found.rows)
    _print_counts(console, "calls by tool", found.tools, sum(found.tools.values()))
    by_machine = {"+".join(annotators_of(name)): n for name, n in found.sources.items() if annotators_of(name)}
    if by_machine:
        console.print(f"annotated by tools, not by people: {_listed(by_machine)}")
    if found.refusals:
        table = Table("refused because", "samples", "for example")
        for reason, (count, example) in sorted(found.refusals.items(), key=lambda item: -item[1][0]):
            table.add_row(reason, str(count), example[:120])
        console.print(table)
    if found.manifest and "costs" in found.manifest:
        console.print(_costs(found.manifest["costs"]))
    if found.manifest:
        total = sum(found.manifest["seconds"].values())
        console.print(f"seconds of work: {total:.0f}, of which {_shares(found.manifest['seconds'], total)}")


def _shares(seconds: Mapping[str, float], total: float) -> str:
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value / max(total, 1e-9):.0%}" for name, value in ordered)


def _print_counts(console: Console, title: str, counts: Mapping[str, int], total: int) -> None:
    table = Table(title, "count", "share")
    for name, count in counts.items() if title == "steps" else sorted(counts.items(), key=lambda item: -item[1]):
        table.add_row(name, str(count), f"{count / max(total, 1):.0%}")
    console.print(table)
