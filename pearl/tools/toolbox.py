"""The tools that are known, the ones that a run may use, and carrying out calls in batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from pearl.images import Picture
from pearl.plugins import Plugins
from pearl.records import ToolCall
from pearl.tools.base import Tool, ToolArguments, ToolError, ToolResult, ToolUnavailable, refused

TOOLS = Plugins(
    "tool",
    "pearl.tools",
    {
        "crop": "pearl.tools.crop:Crop",
        "zoom": "pearl.tools.zoom:Zoom",
        "depth": "pearl.tools.depth:Depth",
        "highlight": "pearl.tools.highlight:Highlight",
        "mark": "pearl.tools.mark:Mark",
        "rotate": "pearl.tools.rotate:Rotate",
        "flip": "pearl.tools.flip:Flip",
        "edges": "pearl.tools.edges:Edges",
        "ocr": "pearl.tools.ocr:Ocr",
        "segment": "pearl.tools.segment:Segment",
        "detect": "pearl.tools.detect:Detect",
    },
    "pearl.tools.base:Tool",
    ToolUnavailable,
)


def tool_names() -> list[str]:
    """Built-in tools, then those of installed packages (entry-point group `pearl.tools`)."""
    return TOOLS.names()


def tool_class(name: str) -> type[Tool]:
    """The class behind a name, imported now.

    Raises:
        ToolUnavailable: no such tool, or its package does not load.
    """
    return TOOLS.find(name)


class Toolbox:
    """The tools of a run, by name, with their settings.

    Args:
        names: Which tools.
        settings: Constructor arguments by tool, for example `{"depth": {"model": "sensor"}}`.

    Raises:
        ToolUnavailable: a tool is unknown, or its package or model is missing.
    """

    def __init__(self, names: Iterable[str], settings: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._settings = {name: dict((settings or {}).get(name, {})) for name in names}
        self._tools = {name: tool_class(name)(**own) for name, own in self._settings.items()}
        for name, tool in self._tools.items():
            if reason := tool.missing():
                raise ToolUnavailable(f"{name}: {reason}")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tools)

    def __getitem__(self, name: str) -> Tool:
        return self._tools[name]

    def adopt(self, other: Toolbox) -> None:
        """Takes over the other's tools that have the same settings, so that their models are loaded once."""
        for name in self.names & other.names:
            if self._settings[name] == other._settings[name]:
                self._tools[name] = other._tools[name]

    def fingerprint(self) -> dict[str, Any]:
        return {name: dict(tool.fingerprint()) for name, tool in sorted(self._tools.items())}

    def execute(self, calls: Sequence[tuple[ToolCall, Sequence[Picture | None]]]) -> list[ToolResult]:
        """Carries out calls, all those of one tool as one batch.

        Args:
            calls: Each with the images that its trajectory has so far: the original, then one entry a step
                (None where a step gave no image).

        Returns:
            One result a call, in order; a call that names no tool, no image or bad arguments is refused.
        """
        results: list[ToolResult | None] = [None] * len(calls)
        batches: dict[str, list[tuple[int, Picture, ToolArguments]]] = {}
        for index, (call, pictures) in enumerate(calls):
            try:
                arguments = self.parse(call)
                batches.setdefault(call.tool, []).append((index, _picture(arguments, pictures), arguments))
            except ToolError as error:
                results[index] = refused(str(error))
        for name, batch in batches.items():
            outputs = self._tools[name].run([picture for _, picture, _ in batch], [one for _, _, one in batch])
            for (index, _, _), output in zip(batch, outputs, strict=True):
                results[index] = output
        finished = [result for result in results if result is not None]
        assert len(finished) == len(calls), "a call has no result"
        return finished

    def parse(self, call: ToolCall) -> ToolArguments:
        """Validates a call's arguments.

        Raises:
            ToolError: which argument is wrong, and how.
        """
        tool = self._tools.get(call.tool)
        if tool is None:
            raise ToolError(f"there is no tool {call.tool!r}; there are: {', '.join(sorted(self._tools))}")
        return parse_arguments(type(tool), call.arguments)

    def normal(self, call: ToolCall) -> ToolCall:
        """The call with its arguments converted to their declared types (`"2"` becomes `2`); unchanged if they already fit.
        Only for calls that were carried out."""
        arguments = dict(call.arguments)
        try:
            type(self._tools[call.tool]).Arguments.model_validate_json(json.dumps(arguments), strict=True)
        except ValidationError:
            parsed = self.parse(call).model_dump(mode="json", by_alias=True)
            return ToolCall(call.tool, {name: parsed.get(name, given) for name, given in arguments.items()})
        return call


def parse_arguments(tool: type[Tool], arguments: Mapping[str, Any]) -> ToolArguments:
    """Validates arguments without opening the tool.

    Raises:
        ToolError: which argument is wrong, and how.
    """
    try:
        return tool.Arguments.model_validate(dict(arguments))
    except ValidationError as error:
        raise ToolError(_explain(tool.name, error)) from error


def _picture(arguments: ToolArguments, pictures: Sequence[Picture | None]) -> Picture:
    if arguments.image >= len(pictures):
        raise ToolError(f"there is no image {arguments.image}; images 0 to {len(pictures) - 1} exist")
    picture = pictures[arguments.image]
    if picture is None:
        raise ToolError(f"step {arguments.image} gave no image")
    return picture


def _explain(tool: str, error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False)[:4]:
        where = ".".join(str(part) for part in problem["loc"])
        problems.append(f"{where}: {problem['msg']}" if where else str(problem["msg"]))
    return f"bad arguments for {tool}: {'; '.join(problems)}"
