"""A model's tool calls, carried out by the tools that make the data; how they are read stands in `pearl.tools.calls`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pearl.images import Picture
from pearl.records import ToolCall
from pearl.tools import Toolbox, ToolError, ToolResult, ToolUnavailable, refused
from pearl.torch_setup import is_out_of_memory

FaultKind = Literal[
    "malformed",  # not one JSON object with a name and arguments, too long or too deep
    "several calls",  # more than one in a turn
    "unknown tool",
    "bad arguments",  # the tool's argument model refuses them
    "refused",  # the tool cannot do it: no such image, too large a box, …
    "tool failed",  # a fault of the tool, not of the call
    "image limit",  # its image is one too many, or of a shape that the model cannot take
    "too many calls",  # more than the mode allows
    "too long",  # its observation leaves no room for an answer
]
MAX_ERROR = 500
"""Characters of an error observation, which may quote the call."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call; `fault` is None where it was run."""

    result: ToolResult
    fault: FaultKind | None = None


def run_calls(toolbox: Toolbox, calls: Sequence[tuple[ToolCall, Sequence[Picture | None]]]) -> list[Outcome]:
    """Carries out calls with the images that each has so far (see `Toolbox.execute`); a tool's calls are one batch.

    Raises:
        ToolUnavailable: a tool's package or model is missing.
        RuntimeError, MemoryError: out of memory.
    """
    return [_outcome(toolbox, call, result) for (call, _), result in zip(calls, _execute(toolbox, calls), strict=True)]


def _execute(toolbox: Toolbox, calls: Sequence[tuple[ToolCall, Sequence[Picture | None]]]) -> list[ToolResult | None]:
    """The results; None for a call that breaks its tool. A batch that fails is run call by call."""
    try:
        return list(toolbox.execute(calls))
    except ToolUnavailable:
        raise
    except Exception as error:  # whatever else a tool raises is this call's alone
        if is_out_of_memory(error):
            raise
        if len(calls) == 1:
            return [None]
        return [result for call in calls for result in _execute(toolbox, [call])]


def _outcome(toolbox: Toolbox, call: ToolCall, result: ToolResult | None) -> Outcome:
    if result is None:
        return Outcome(refused(f"the tool {call.tool} failed"), "tool failed")
    if not result.failed:
        return Outcome(result)
    return Outcome(ToolResult(shortened(result.text), failed=True), _kind(toolbox, call))


def _kind(toolbox: Toolbox, call: ToolCall) -> FaultKind:
    if call.tool not in toolbox.names:
        return "unknown tool"
    try:
        toolbox.parse(call)
    except ToolError:
        return "bad arguments"
    return "refused"


def shortened(message: str) -> str:
    return message if len(message) <= MAX_ERROR else message[: MAX_ERROR - 1] + "…"
