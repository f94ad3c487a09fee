"""Steps, tools, and the boxes that calls name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pearl.boxes import as_box
from pearl.pipelines.stats.counters import Spread, Tally
from pearl.records import Box

CELLS = 16
MAX_TOOLS = 200
OTHER_TOOLS = "(other tools)"
MAX_NAMED = 8


@dataclass(slots=True)
class Use:
    """Of one tool: calls, trajectories with such a call, images it returned and their bytes."""

    calls: int = 0
    trajectories: int = 0
    images: int = 0
    image_bytes: int = 0


class Calls:
    def __init__(self) -> None:
        self._steps = Counter[int]()
        self._sequences = Tally()
        self._uses = dict[str, Use]()
        self._unreadable = 0
        self._boxes = Boxes()

    def add(self, steps: Sequence[Mapping[str, Any]], size: tuple[int, int] | None) -> None:
        """The steps of one trajectory; `size` is its original image's width and height in pixels, where known."""
        names = [str(step["tool"]) for step in steps]
        self._steps[len(names)] += 1
        shown = [*names[:MAX_NAMED], "…"] if len(names) > MAX_NAMED else names
        self._sequences.add(" → ".join(shown) or "(no tool)")
        for name in set(names):
            self._use(name).trajectories += 1
        for name, step in zip(names, steps, strict=True):
            self._add_call(self._use(name), step, size)

    def _use(self, name: str) -> Use:
        known = name in self._uses or len(self._uses) < MAX_TOOLS
        return self._uses.setdefault(name if known else OTHER_TOOLS, Use())

    def _add_call(self, use: Use, step: Mapping[str, Any], size: tuple[int, int] | None) -> None:
        use.calls += 1
        data = (step["image"] or {}).get("bytes")
        if data is not None:
            use.images += 1
            use.image_bytes += len(data)
        arguments = _arguments(step["arguments"])
        if arguments is None:
            self._unreadable += 1
        else:
            self._boxes.add(arguments, size)

    def to_json(self) -> dict[str, Any]:
        ordered = sorted(self._uses.items(), key=lambda pair: (-pair[1].calls, pair[0]))
        return {
            "steps": sorted(self._steps.items()),
            "calls": sum(use.calls for use in self._uses.values()),
            "sequences": self._sequences.to_json(12),
            "unreadable": self._unreadable,
            "tools": [
                {
                    "tool": name,
                    "calls": use.calls,
                    "trajectories": use.trajectories,
                    "images": use.images,
                    "image_bytes": use.image_bytes / use.images if use.images else 0.0,
                }
                for name, use in ordered
            ],
            "boxes": self._boxes.to_json(),
        }


class Boxes:
    """Boxes that calls name, under `box` or `boxes`. Sizes and positions are of those in the original image."""

    def __init__(self) -> None:
        self._later = self._unusable = 0
        self._area, self._side, self._aspect = Spread(), Spread(), Spread()
        self._positions = [[0] * CELLS for _ in range(CELLS)]

    def add(self, arguments: Mapping[str, Any], size: tuple[int, int] | None) -> None:
        for value in _values(arguments):
            box = as_box(value)
            if box is None:
                self._unusable += 1
            elif arguments.get("image", 0) != 0:
                self._later += 1
            else:
                self._add_box(box, size)

    def _add_box(self, box: Box, size: tuple[int, int] | None) -> None:
        x0, y0, x1, y1 = box
        self._area.add((x1 - x0) * (y1 - y0))
        self._positions[_cell((y0 + y1) / 2)][_cell((x0 + x1) / 2)] += 1
        if size is not None:
            width, height = (x1 - x0) * size[0], (y1 - y0) * size[1]
            self._side.add(min(width, height))
            self._aspect.add(width / height)

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self._area.count,
            "later": self._later,
            "unusable": self._unusable,
            "area": self._area.to_json(),
            "side": self._side.to_json(),
            "aspect": self._aspect.to_json(),
            "positions": self._positions,
        }


def _arguments(text: str | None) -> Mapping[str, Any] | None:
    try:
        arguments = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) else None


def _values(arguments: Mapping[str, Any]) -> Iterator[object]:
    if "box" in arguments:
        yield arguments["box"]
    several = arguments.get("boxes")
    if isinstance(several, list):
        yield from several


def _cell(share: float) -> int:
    return min(int(share * CELLS), CELLS - 1)
