"""Trajectories as messages, in a template's words, and back: what every export format has in common."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Template as Words
from typing import Any, Literal

from pearl.errors import PearlError
from pearl.records import EncodedImage, Observation, Step, ToolCall, Trajectory
from pearl.trainer.conversation import Conversation, ImagePart, Template, Turn

Role = Literal["system", "user", "assistant", "tool"]
Part = str | EncodedImage


class ExportError(PearlError, ValueError):
    """An export that cannot be made or read; the message names the place and the reason."""


@dataclass(frozen=True, slots=True)
class Message:
    """Who speaks, text and images in their order, and the call where it is not said in words."""

    role: Role
    parts: tuple[Part, ...]
    supervised: bool = False
    call: ToolCall | None = None

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[EncodedImage, ...]:
        return tuple(part for part in self.parts if isinstance(part, EncodedImage))


@dataclass(frozen=True, slots=True)
class Row:
    """A trajectory in messages, and the `facts` that no message says (see `facts_of`)."""

    messages: tuple[Message, ...]
    facts: Mapping[str, Any]

    @property
    def images(self) -> tuple[EncodedImage, ...]:
        """As often as they are shown, in order."""
        return tuple(image for message in self.messages for image in message.images)


@dataclass(frozen=True)
class Form:
    """How trajectories become messages.

    Attributes:
        native_calls: Calls and what tools returned stand in turns of their own kind, not in the template's words.
    """

    template: Template
    native_calls: bool = False

    def lost(self) -> list[str]:
        """What a trajectory holds and these messages do not say."""
        spoken = {"question": ["question"], "observation": ["text"], "conclusion": ["conclusion"]}
        if not self.native_calls:
            spoken["step"] = ["thought", "call"]
        return [
            name
            for entry, names in spoken.items()
            for name in names
            if name not in Words(getattr(self.template, entry)).get_identifiers()
        ]

    def row(self, trajectory: Trajectory) -> Row:
        conversation = Conversation(trajectory, self.template)
        turns = [*conversation.question(), *self._steps(conversation), conversation.conclusion()]
        messages = [_message(turn, conversation.images) if isinstance(turn, Turn) else turn for turn in turns]
        facts = facts_of(trajectory)
        return Row(named(messages, facts["paths"]), facts)

    def _steps(self, conversation: Conversation) -> Iterator[Turn | Message]:
        turns = conversation.steps()
        if not self.native_calls:
            yield from turns
            return
        learned = self.template.supervise == "all"
        for step, result in zip(conversation.trajectory.steps, turns[1::2], strict=True):
            yield Message("assistant", (step.thought,) if step.thought else (), learned, step.call)
            yield Message("tool", _message(result, conversation.images).parts)

    def trajectory(self, row: Row) -> Trajectory:
        """The trajectory whose messages these are.

        Raises:
            ExportError: the form does not say all of it, or the messages are not in its words.
        """
        facts, where = row.facts, f"row {row.facts.get('id')!r}"
        _check_facts(facts, where)
        if lost := self.lost():
            raise ExportError(f"the export's template does not say ${', $'.join(lost)}: no trajectory can be read back")
        said = [message for message in row.messages if message.role != "system"]
        if len(said) % 2 or [message.role == "assistant" for message in said] != [False, True] * (len(said) // 2):
            raise ExportError(f"{where}: the turns of user (or tool) and assistant do not alternate")
        first, *between, last = said
        if len(first.images) != 1:
            raise ExportError(f"{where}: the question has {len(first.images)} images")
        choices, answer = tuple(facts["choices"]), facts["answer"]
        options = Words(self.template.choices).substitute(choices=", ".join(choices)) if choices else ""
        asked = recovered(self.template.question, first.text, ["question"], f"{where}: the question", choices=options)
        concluded = recovered(
            self.template.conclusion, last.text, ["conclusion"], f"{where}: the conclusion", answer=answer
        )
        return Trajectory(
            id=facts["id"], image=first.images[0], question=asked["question"], choices=choices, answer=answer,
            steps=tuple(
                self._step(message, result, f"{where} step {number}")
                for number, (message, result) in enumerate(zip(between[::2], between[1::2], strict=True), start=1)
            ),
            conclusion=concluded["conclusion"], expert=facts["expert"], skill=facts["skill"], source=facts["source"],
            license=facts["license"], seed=facts["seed"],
        )  # fmt: skip

    def _step(self, said: Message, result: Message, where: str) -> Step:
        if len(result.images) > 1:
            raise ExportError(f"{where}: the observation has {len(result.images)} images")
        seen = recovered(self.template.observation, result.text, ["text"], f"{where}: the observation")["text"]
        observation = Observation(seen, result.images[0] if result.images else None)
        if said.call is not None:
            return Step(said.text, said.call, observation)
        found = recovered(self.template.step, said.text, ["thought", "call"], f"{where}: the assistant's turn")
        return Step(found["thought"], call_of(found["call"], where), observation)


def _check_facts(facts: Mapping[str, Any], where: str) -> None:
    """
    Raises:
        ExportError: what the messages do not say is missing, or of another type.
    """
    kinds = dict.fromkeys(("id", "answer", "expert", "skill", "source", "license"), str) | {
        "seed": int,
        "choices": list,
    }
    for name, kind in kinds.items():
        if not isinstance(facts.get(name), kind):
            raise ExportError(f"{where}: {name} is {facts.get(name)!r:.60}; expected {kind.__name__}")
    if not all(isinstance(choice, str) for choice in facts["choices"]):
        raise ExportError(f"{where}: one of the choices is no text")


def _message(turn: Turn, images: Sequence[EncodedImage]) -> Message:
    parts = tuple(images[part.index] if isinstance(part, ImagePart) else part for part in turn.parts)
    return Message(turn.role, parts, turn.supervised)


def named(messages: Iterable[Message], paths: Sequence[str | None]) -> tuple[Message, ...]:
    """The messages with other names for their images, as they are shown."""
    left = iter(paths)

    def part_named(part: Part) -> Part:
        return part if isinstance(part, str) else EncodedImage(part.data, next(left, None))

    return tuple(replace(message, parts=tuple(map(part_named, message.parts))) for message in messages)


def facts_of(trajectory: Trajectory) -> dict[str, Any]:
    """What the messages of a trajectory do not say; JSON values. `paths` are the names of its images as shown."""
    names = ("id", "answer", "expert", "skill", "source", "license", "seed")
    shown = [trajectory.image, *(step.observation.image for step in trajectory.steps)]
    return {
        **{name: getattr(trajectory, name) for name in names},
        "choices": list(trajectory.choices),
        "paths": [image.path for image in shown if image is not None],
    }


def call_json(call: ToolCall) -> str:
    return json.dumps({"name": call.tool, "arguments": dict(call.arguments)}, ensure_ascii=False)


def call_of(text: str, where: str) -> ToolCall:
    """
    Raises:
        ExportError: it is no call.
    """
    try:
        said = json.loads(text)
        name, arguments = said["name"], said["arguments"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExportError(f"{where}: {text!r:.80} is no tool call") from error
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ExportError(f"{where}: {text!r:.80} is no tool call")
    return ToolCall(name, arguments)


def recovered(words: str, said: str, wanted: Sequence[str], where: str, **known: str) -> dict[str, str]:
    """What stood for `$name` in `words` when they became `said`: `wanted`, with `known` values for others.

    Raises:
        ExportError: it cannot have become that.
    """
    for pattern in _patterns(words, known):
        if match := re.fullmatch(pattern, said, re.DOTALL):
            return {name: match.groupdict().get(name, "") for name in wanted}
    raise ExportError(f"{where} is not in the template's words: {said!r:.80}")


def _patterns(words: str, known: Mapping[str, str]) -> Iterator[str]:
    """As the words stand, and as they are stripped when what they begin with is empty."""
    literals, names = _pieces(words)
    yield _pattern(literals, names, known)
    if names and not literals[0]:
        yield _pattern([literals[1].lstrip(), *literals[2:]], names[1:], known)


def _pieces(words: str) -> tuple[list[str], list[str]]:
    """The texts around the names, one more than names; outer white space is stripped, as conversations strip it."""
    literals, names, begin = [""], list[str](), 0
    for match in Words.pattern.finditer(words):
        literals[-1] += words[begin : match.start()]
        begin = match.end()
        if match["escaped"] is not None:
            literals[-1] += "$"
        else:
            names.append(match["named"] or match["braced"])
            literals.append("")
    literals[-1] += words[begin:]
    literals[0], literals[-1] = literals[0].lstrip(), literals[-1].rstrip()
    return literals, names


def _pattern(literals: Sequence[str], names: Sequence[str], known: Mapping[str, str]) -> str:
    pattern, seen = re.escape(literals[0]), set[str]()
    for name, literal in zip(names, literals[1:], strict=True):
        if name in known:
            pattern += re.escape(known[name])
        elif name in seen:
            pattern += f"(?P={name})"
        else:
            pattern += f"(?P<{name}>.*)"
            seen.add(name)
        pattern += re.escape(literal)
    return pattern
