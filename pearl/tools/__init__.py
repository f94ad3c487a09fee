"""Tools: crop, zoom, depth, … One file a tool; `base` says what a tool is, `toolbox` carries out calls."""

from pearl.tools.base import (
    BoxArgument,
    PictureTool,
    PointArgument,
    Tool,
    ToolArguments,
    ToolError,
    ToolResult,
    ToolUnavailable,
    refused,
    spec,
)
from pearl.tools.toolbox import Toolbox, parse_arguments, tool_class, tool_names

__all__ = [
    "BoxArgument",
    "PictureTool",
    "PointArgument",
    "Tool",
    "ToolArguments",
    "ToolError",
    "ToolResult",
    "ToolUnavailable",
    "Toolbox",
    "parse_arguments",
    "refused",
    "spec",
    "tool_class",
    "tool_names",
]
