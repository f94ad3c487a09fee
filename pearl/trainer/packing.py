"""The views of a batch of trajectories as rows of tokens: one forward instead of one for each view.

Views of a trajectory share what they begin with. In a *tree* the full view is a row's trunk, and every other view adds
only the tokens after what it shares, as a branch that sees its own ancestors and itself, at the positions that it
would have had alone. Without a tree each view is a row of its own; everything after that is the same.

Views whose states are only targets (`Batch.target_rows`) never take part in the row: they run later, without gradients, on
the cache of the trunk's keys and values, and cost a forward of their own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pearl.trainer.families import Family, Tokens
from pearl.trainer.views import ImageInputs, View, images_of_view


@dataclass(frozen=True)
class Example:
    """One trajectory as views of one model.

    Attributes:
        id: The trajectory's, for messages.
        views: By name; those of `targets` give targets only.
        extras: The objective's own tensors, by name; a batch concatenates them along the first dimension.
    """

    id: str
    images: tuple[ImageInputs, ...]
    views: Mapping[str, View]
    targets: frozenset[str] = frozenset()
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return max(len(view) for view in self.views.values())

    def silent(self) -> Example:
        """One that adds nothing to any term and to no count, in as many tokens."""
        views = {name: view.silent() for name, view in self.views.items()}
        return replace(self, views=views, extras={name: tensor[:0] for name, tensor in self.extras.items()})


@dataclass(frozen=True)
class Rows:
    """R rows of T tokens.

    Attributes:
        ids: (R, T); padding where no token stands.
        positions: (D, R, T).
        tokens: What decides who sees whom.
        visual_at: (M,) flat indices in R × T of visual tokens; `visual_of` (M,): which visual token of the batch.
        predictor_at: (P,) flat indices of predictor tokens; `predictor_of` (P,): which of the K each is.
        latent_at: (L,) flat indices of latent tokens; the visual token `latent_source[i]` of the batch is one of those
            whose mean is fed at the latent token `latent_group[i]` (0..L-1).
    """

    ids: Tensor
    positions: Tensor
    tokens: Tokens
    visual_at: Tensor
    visual_of: Tensor
    predictor_at: Tensor
    predictor_of: Tensor
    latent_at: Tensor
    latent_source: Tensor
    latent_group: Tensor


@dataclass(frozen=True)
class Places:
    """Where one view of every trajectory stands: their tokens, V in all, one view after the other.

    Attributes:
        ids: (V,) token ids.
        at: (V,) flat indices into the rows that hold the view; -1 for what a cache holds.
        sample: (V,) which trajectory a token belongs to.
        supervised: (U,) indices into V of the tokens that are to be predicted.
        followed: (W,) those of them whose next token is to be predicted too.
        latents: (L,) indices into V of latent tokens.
        marks: Indices into V of the tokens that the objective marked, by name.
    """

    ids: Tensor
    at: Tensor
    sample: Tensor
    supervised: Tensor
    followed: Tensor
    latents: Tensor
    marks: dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """What a step of training takes.

    Attributes:
        sample_ids: The trajectories' ids, for messages.
        images: The vision tower's input; each distinct image of a trajectory once.
        main: The rows that are learned from.
        target_rows: The rows of views that give targets only, if any.
        cached_tokens: How many of the first tokens of `main` they stand on, whose keys and values they take from its cache;
            0: they begin anew.
        places: Each view's, by name.
        extras: The objective's own tensors.
    """

    sample_ids: tuple[str, ...]
    images: dict[str, Tensor]
    main: Rows
    target_rows: Rows | None
    cached_tokens: int
    places: dict[str, Places]
    extras: dict[str, Tensor]

    def to(self, device: torch.device | str) -> Batch:
        moved: Batch = _map(self, lambda tensor: tensor.to(device, non_blocking=True))
        return moved

    def pin_memory(self) -> Batch:
        pinned: Batch = _map(self, lambda tensor: tensor.pin_memory())
        return pinned


@dataclass(frozen=True)
class Packer:
    """Lays out batches for one model.

    Args:
        core_config: The model's configuration, for positions.
        tree: Views share rows; else each has its own.
        reuse: The target view stands on the cache of the trunk; only in a tree, and only where there is one.
        multiple: Rows are padded to a multiple of this.
    """

    family: Family
    core_config: Any
    padding: int
    tree: bool = True
    reuse: bool = True
    multiple: int = 8

    def __call__(self, examples: Sequence[Example]) -> Batch:
        sources, start = list[_ExampleTables](), 0
        for example in examples:
            sources.append(_ExampleTables(self, example, start))
            start += sum(image.num_tokens for image in sources[-1].images)
        names = list(examples[0].views)
        learned = [name for name in names if name not in examples[0].targets]
        targets = [name for name in names if name in examples[0].targets]
        trunk = learned[0]
        if self.tree:
            rows = [
                [(name, 0 if name == trunk else source.shared(trunk, name)) for name in learned] for source in sources
            ]
            owners = list(range(len(sources)))
        else:
            rows = [[(name, 0)] for name in learned for _ in sources]
            owners = list(range(len(sources))) * len(learned)
        main, at = self._rows([sources[owner] for owner in owners], rows)
        places = {}
        for name in learned:
            found = [(owner, row[name]) for owner, row in zip(owners, at, strict=True) if name in row]
            places[name] = _places([(sources[owner].views[name], where) for owner, where in found])
        target_rows, cached_tokens = None, 0
        if targets:
            reuse = self.tree and self.reuse and len(targets) == 1
            rows = [[(name, source.cached(trunk, name) if reuse else 0)] for name in targets for source in sources]
            cached_tokens = max(prefix for ((_, prefix),) in rows)
            branch = len(learned) if cached_tokens else 0
            target_rows, at = self._rows(sources * len(targets), rows, branch)
            for number, name in enumerate(targets):
                mine = at[number * len(sources) :][: len(sources)]
                places[name] = _places([(s.views[name], row[name]) for s, row in zip(sources, mine, strict=True)])
        images = [image.tensors for source in sources for image in source.images]
        extras = {name: torch.cat([example.extras[name] for example in examples]) for name in examples[0].extras}
        return Batch(
            tuple(example.id for example in examples), self.family.collate_images(images), main, target_rows,
            cached_tokens, places, extras,
        )  # fmt: skip

    def _rows(
        self, sources: Sequence[_ExampleTables], rows: Sequence[Sequence[tuple[str, int]]], branch: int = 0
    ) -> tuple[Rows, list[dict[str, np.ndarray]]]:
        """Rows of (view, how much of it the trunk holds), the first of which is the trunk where `branch` is 0; and
        for each row where each view's tokens stand."""
        columns = [
            np.concatenate(
                [source.columns(name, prefix, branch + number) for number, (name, prefix) in enumerate(row)], 1
            )
            for source, row in zip(sources, rows, strict=True)
        ]
        length = max(-(-max(column.shape[1] for column in columns) // self.multiple), 1) * self.multiple
        table = np.full((columns[0].shape[0], len(rows), length), -1, np.int64)
        table[_PREFIX] = table[_ORDER] = 0
        table[_POSITIONS:] = 0
        table[_IDS] = self.padding
        table[_ORDER] = np.arange(length)
        at: list[dict[str, np.ndarray]] = []
        latent_sources = list[np.ndarray]()
        for number, (source, row, column) in enumerate(zip(sources, rows, columns, strict=True)):
            table[:, number, : column.shape[1]] = column
            at.append({})
            stop = number * length
            for name, prefix in row:
                own = np.arange(stop, stop + len(source.views[name]) - prefix)
                stop += len(own)
                trunk = at[number][row[0][0]][:prefix] if at[number] else np.full(prefix, -1)
                at[number][name] = np.concatenate([trunk, own])
                latent_sources += source.latents(name)
        flat = {name: torch.from_numpy(table[number].reshape(-1)) for number, name in enumerate(_NAMES)}
        visual_at, predictor_at = (torch.from_numpy(np.flatnonzero(table[kind] >= 0)) for kind in (_VISUAL, _PREDICTOR))
        ids, tokens = torch.from_numpy(table[_IDS]), [torch.from_numpy(table[k]) for k in range(_BRANCH, _BRANCH + 4)]
        return Rows(
            ids=ids,
            positions=torch.from_numpy(table[_POSITIONS:]),
            tokens=Tokens(*tokens),
            visual_at=visual_at,
            visual_of=flat["visual"][visual_at],
            predictor_at=predictor_at,
            predictor_of=flat["predictor"][predictor_at],
            latent_at=torch.from_numpy(np.flatnonzero(table[_LATENT] >= 0)),
            latent_source=_joined(latent_sources),
            latent_group=_joined([np.full(len(one), number) for number, one in enumerate(latent_sources)]),
        ), at


_NAMES = ("ids", "branch", "prefix", "order", "block", "visual", "predictor", "latent")
_IDS, _BRANCH, _PREFIX, _ORDER, _BLOCK, _VISUAL, _PREDICTOR, _LATENT = range(8)
_POSITIONS = 8


class _ExampleTables:
    """One example's views, with what each token is made of; `start` is its first visual token's number in the batch."""

    def __init__(self, packer: Packer, example: Example, start: int) -> None:
        self.views, self._example = example.views, example
        shown = [image for view in self.views.values() for image in images_of_view(example.images, view.images)]
        shown += [example.images[latent.image] for view in self.views.values() for latent in view.latents]
        self.images = list({id(image): image for image in shown}.values())
        starts = start + np.cumsum([0, *(image.num_tokens for image in self.images)])
        self._starts = {id(image): int(number) for image, number in zip(self.images, starts[:-1], strict=True)}
        self._tables = {name: self._table(packer, example, view) for name, view in example.views.items()}

    def _table(self, packer: Packer, example: Example, view: View) -> np.ndarray:
        """(8 + D, T): the rows that `_NAMES` says, then the positions."""
        images = images_of_view(example.images, view.images)
        positions = packer.family.positions(packer.core_config, view.visual, [image.tensors for image in images])
        table = np.full((_POSITIONS + len(positions), len(view)), -1, np.int64)
        table[_IDS], table[_ORDER], table[_POSITIONS:] = view.ids, np.arange(len(view)), positions
        if images:
            runs = np.cumsum(view.visual & ~np.concatenate([[False], view.visual[:-1]])) - 1
            table[_BLOCK, view.visual] = runs[view.visual]
            table[_VISUAL, view.visual] = np.concatenate(
                [self._starts[id(image)] + np.arange(image.num_tokens) for image in images]
            )
        table[_PREDICTOR] = view.predictors
        table[_LATENT, view.latent_slots] = np.arange(view.latent_slots.sum())
        return table

    def shared(self, trunk: str, name: str, before: Sequence[int] = ()) -> int:
        """How many tokens at its beginning a view has in common with the trunk: the same, at the same positions; none
        of those whose states are asked for anew (`before`), nor what follows them."""
        a, b = self._tables[trunk], self._tables[name]
        length = min(a.shape[1], b.shape[1])
        same = (a[:, :length] == b[:, :length]).all(0) & (a[_LATENT, :length] < 0)
        count = min([length if same.all() else int(np.argmin(same)), *before])
        while count and any(_inside_run(table[_BLOCK], count) for table in (a, b)):
            count -= 1  # an image's tokens may see each other
        return count

    def cached(self, trunk: str, name: str) -> int:
        """How much of a target view the trunk's cache serves."""
        return self.shared(trunk, name, [token for tokens in self.views[name].marks.values() for token in tokens])

    def columns(self, name: str, prefix: int, branch: int) -> np.ndarray:
        """A view's tokens after `prefix`, as a branch of a row."""
        columns = self._tables[name][:, prefix:].copy()
        columns[_BRANCH], columns[_PREFIX] = branch, prefix
        columns[_BLOCK][columns[_BLOCK] >= 0] += 1000 * branch
        return columns

    def latents(self, name: str) -> list[np.ndarray]:
        """For each latent token of a view, the numbers in the batch of the visual tokens whose mean it is fed with."""
        return [
            self._starts[id(self._example.images[latent.image])] + group
            for latent in self.views[name].latents
            for group in latent.groups
        ]


def _inside_run(block: np.ndarray, count: int) -> bool:
    """Whether a run of visual tokens goes on at this token."""
    return count < len(block) and block[count] >= 0 and bool(block[count] == block[count - 1])


def _places(views: Sequence[tuple[View, np.ndarray]]) -> Places:
    starts = np.cumsum([0, *(len(view) for view, _ in views)])[:-1]

    def found(where: Callable[[View], np.ndarray | Sequence[int]]) -> Tensor:
        return _joined([np.asarray(where(v), np.int64) + s for (v, _), s in zip(views, starts, strict=True)])

    return Places(
        ids=_joined([view.ids for view, _ in views]),
        at=_joined([at for _, at in views]),
        sample=_joined([np.full(len(view), number) for number, (view, _) in enumerate(views)]),
        supervised=found(lambda view: np.flatnonzero(view.supervised)),
        followed=found(lambda view: np.flatnonzero(view.supervised[:-1] & view.supervised[1:])),
        latents=found(lambda view: np.flatnonzero(view.latent_slots)),
        marks={name: found(lambda view: view.marks[name]) for name in views[0][0].marks},  # noqa: B023
    )


def _joined(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)) if arrays else torch.empty(0, dtype=torch.int64)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map(one, change) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_map(one, change) for one in value)
    if isinstance(value, Batch | Rows | Places | Tokens):
        return replace(value, **{f.name: _map(getattr(value, f.name), change) for f in fields(value)})
    return value
