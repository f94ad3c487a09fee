"""What a model replied, and the folder that keeps it by the content of the request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pearl.errors import PearlError
from pearl.pipelines.run_directory import read_json, write_json


class MalformedReply(ValueError):
    """Not what the protocol says; the message says why."""


class Unanswered(PearlError):
    """The server refuses this request, or fails at it again and again, while it answers others."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class NamedCall:
    """A call as the server sends it: nothing of it is checked."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """One turn of the model.

    Attributes:
        id: The server's name for it.
        thinking: What a server with a parser for reasoning keeps apart from the content.
        cut_off: The limit of tokens ended it.
        tokens: In and out; None where the server does not count.
    """

    id: str
    content: str
    thinking: str
    calls: tuple[NamedCall, ...]
    cut_off: bool
    tokens: tuple[int, int] | None


def read_reply(body: bytes) -> Reply:
    """The reply in a response's body.

    Raises:
        MalformedReply: it is something else.
    """
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        message = choice["message"]
        calls = tuple(_call(one["function"]) for one in message.get("tool_calls") or ())
        content, thinking = (_text(message.get(name)) for name in ("content", "reasoning_content"))
        reply = Reply(
            str(value.get("id", "")), content, thinking or _text(message.get("reasoning")), calls,
            choice.get("finish_reason") == "length", _tokens(value.get("usage")),
        )  # fmt: skip
        json.dumps(asdict(reply), ensure_ascii=False).encode()
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise MalformedReply(f"{type(error).__name__}: {error}") from error
    return reply


def _call(function: Mapping[str, Any]) -> NamedCall:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments)
    return NamedCall(str(function["name"]), arguments)


def _text(content: Any) -> str:
    """Content is text, parts of text, or nothing."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content if part.get("type") == "text")


def _tokens(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    counted = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not all(isinstance(count, int) and count >= 0 for count in counted):
        return None
    return counted  # type: ignore[return-value]


def content_key(body: Mapping[str, Any], number: int) -> str:
    """What a request's reply is kept under: all of the request, images included, and the number of the try."""
    return hashlib.sha256(json.dumps([number, body], sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """A folder of replies, each file written whole. Several processes, and several runs, may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def read(self, key: str) -> Reply | None:
        """The reply to a request; None when it has not been asked, or the file is damaged.

        Raises:
            Unanswered: it was asked, and there was no reply.
        """
        kept = read_json(self.path(key)) or {}
        if "unanswered" in kept:
            raise Unanswered(str(kept["unanswered"]))
        try:
            calls = tuple(NamedCall(**call) for call in kept["calls"])
            tokens = kept["tokens"] and tuple(kept["tokens"])
            return Reply(**{**kept, "calls": calls, "tokens": tokens})
        except (KeyError, TypeError):
            return None

    def keep(self, key: str, reply: Reply) -> None:
        write_json(self.path(key), asdict(reply))

    def keep_unanswered(self, key: str, reason: str) -> None:
        write_json(self.path(key), {"unanswered": reason})
