"""`pearl-gen push`: a dataset to the Hub. It parses and calls two functions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pearl.cli.options import console, errors

if TYPE_CHECKING:
    from pearl.pipelines.publishing import Publication


def push(
    data: Annotated[
        str,
        typer.Argument(
            help="A Parquet file, a folder, a glob, or a Hub dataset id; or several splits: train=DATA,test=DATA."
        ),
    ],
    repo: Annotated[str, typer.Option(help="Where it goes: ORG/NAME.")],
    split: Annotated[
        str | None,
        typer.Option(
            help="Name for a dataset of one split. Default: from the file names, else train. Refused where the names say several."
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Everyone may read it; private without this.")] = False,
    credits: Annotated[
        Path | None, typer.Option(help="Markdown that names who made what the sources hold; goes into the card.")
    ] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="A single file above this many megabytes is cut.")] = 500,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate, show the card and what would be sent; ask no one.")
    ] = False,
) -> None:
    """Publishes a dataset on the Hub: shards with splits, a card with samples, sources, licences and limits.

    Nothing is sent that fails `pearl-gen validate`. The repository is made private. The token is the one of
    `hf auth login`, or HF_TOKEN. A push that was interrupted goes on with the same command.

        pearl-gen push traj.parquet --repo ORG/NAME --dry-run
        pearl-gen push train=run,test=test.parquet --repo ORG/NAME --credits CREDITS.md
    """
    if not errors.is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from pearl.pipelines.publishing import make_plan, prepare
    from pearl.pipelines.publishing import push as push_to_hub

    plan = make_plan(data, split, shard_mb * 1_000_000)
    publication = prepare(repo, plan, credits.read_text(encoding="utf-8") if credits else "")
    print_plan(publication, public)
    if dry_run:
        typer.echo(f"\n{publication.card.text}")
        return
    try:
        done = push_to_hub(publication, public, errors.print)
    except KeyboardInterrupt:
        errors.print("stopped; the same command goes on where it stopped")
        raise typer.Exit(130) from None
    removed = f", {done.removed} old ones removed" if done.removed else ""
    console.print(
        f"{done.files} files ({done.unchanged} unchanged{removed}) in {done.url}, commit {done.revision[:12]}"
    )
    console.print(f"load them:  datasets.load_dataset('{repo}')")


def print_plan(publication: Publication, public: bool) -> None:
    """What goes where, and what the user should know before it does."""
    plan, card = publication.plan, publication.card
    visibility = "public" if public else "private"
    console.print(f"{plan.rows} trajectories, {plan.size / 1e6:.1f} MB, to the {visibility} dataset {publication.repo}")
    for one in plan.splits:
        first, last = one.shards[0].path, one.shards[-1].path
        files = first if first == last else f"{first} … {last}"
        console.print(f"  {one.name}: {one.rows} trajectories, {one.size / 1e6:.1f} MB as {files}")
    console.print(f"  README.md and {len(card.pictures)} sample pictures")
    if publication.local_paths:
        console.print(f"note: the files' metadata, sent as it is, names {', '.join(publication.local_paths)}")
