"""A planner: a vision-language model that decides the steps by tool calls and is shown what the tools really gave.

Calls are read from the protocol's `tool_calls`; or from the words of the turn, as servers without a parser for a
model's calls leave them there. An observation is the answer of role `tool`, where there is one to a call; its image
follows in a user's turn, as the role `tool` holds no image in most servers.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from pearl.images import decode, encode
from pearl.pipelines.checks import MAX_STEPS, states_answer
from pearl.pipelines.endpoint.replies import Reply, Unanswered
from pearl.pipelines.errors import ConfigError, Rejected, Unsolvable
from pearl.pipelines.experts.base import Act, Case, Conclusion, Expertise, Steps
from pearl.randomness import generator
from pearl.records import Sample, ToolCall
from pearl.tools import Toolbox, ToolResult, refused, spec
from pearl.tools.calls import Fault, named_call, read_turn

MAX_MISTAKES = 2
"""Mistakes of form in one try that the model may mend."""
MAX_EXCERPT = 500
INSTRUCTIONS = """\
You answer a question about an image by looking closer with tools. Images are numbered: image 0 is the given one, image \
i is what your i-th successful call returned. Coordinates are fractions, 0 to 1, of the image that the call names; y \
grows downwards.
In each turn say in one or two sentences what you want to find out and why, then make exactly one tool call. Make at \
least one call and at most {max_calls}, as few as you need.
When you have seen enough, make no call: say in one or two sentences what you saw, and end with a line
Answer: {form}"""

RESERVED = ("model", "messages", "tools", "stream", "n")

_ANSWER = re.compile(r"[\s*_#>]*answer[\s*_]*:[\s*_]*(?P<answer>[^\s*_].*)", re.IGNORECASE)

Ask = Callable[[Mapping[str, Any], int], Reply]
"""A request's body and the number of the try → the reply; may raise Unanswered."""
Transcript = list[dict[str, Any]]


@dataclass(frozen=True)
class PlannerSettings:
    """The model and how it is asked; all of it decides the data.

    Attributes:
        model: As the server names it.
        tries: At most so many for a sample; the shortest right one is kept.
        max_calls: A try that wants more is rejected.
        max_reply_tokens: Of each turn.
        image_side: Larger images are sent smaller, with this longest side in pixels.
        extra: More fields of every request, by name; null takes one away.
    """

    model: str
    tries: int = 3
    max_calls: int = MAX_STEPS
    temperature: float = 0.7
    max_reply_tokens: int = 1024
    image_side: int = 1536
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("a planner needs --endpoint URL and --model NAME")
        if self.tries < 1 or not 1 <= self.max_calls <= MAX_STEPS:
            raise ConfigError(f"a planner needs at least one try, and 1 to {MAX_STEPS} calls")
        if taken := [name for name in RESERVED if name in self.extra]:
            raise ConfigError(f"--request: {', '.join(taken)} cannot be set")
        if self.max_reply_tokens < 1 or self.image_side < 28 or not 0 <= self.temperature <= 2:
            raise ConfigError(
                "a planner needs a temperature of 0 to 2, images of at least 28 pixels a side, replies of at least 1 token"
            )


class Planner:
    """Experts whose steps a model plans.

    Args:
        ask: Sends a request.
        toolbox: What the model may call.
        seed: Of the run; each try has its own, made from it.
        max_pixels: Larger images are refused.
    """

    def __init__(self, settings: PlannerSettings, ask: Ask, toolbox: Toolbox, seed: int, max_pixels: int) -> None:
        self.settings, self.ask, self.seed, self.max_pixels = settings, ask, seed, max_pixels
        self.specs = [spec(toolbox[name]) for name in sorted(toolbox.names)]

    def solve(self, case: Case, number: int, transcript: Transcript) -> Expertise:
        """Try `number` at a sample; `transcript` receives what is said.

        Raises:
            Unsolvable: nobody knows the right answer.
        """
        if not case.sample.answer:
            raise Unsolvable("no known answer to hold the planner's against")
        return self._steps(case, number, transcript)

    def _steps(self, case: Case, number: int, transcript: Transcript) -> Expertise:
        """Asks, acts, and asks again; mistakes of form are told to the model and may be mended.

        Raises:
            Rejected: too many calls or mistakes, no answer, a wrong one.
        """
        pixels = decode(case.sample.image.data, self.max_pixels)
        talk = _Talk(self._opening(case.sample, pixels), self.settings.image_side, transcript)
        mistakes = 0
        while True:
            turn = _read(self._reply(talk, number))
            talk.hear(turn)
            if turn.answer:
                return _concluded(case, turn)
            result = refused(turn.mistake) if turn.mistake else (yield from self._act(case, turn))
            talk.show(turn, result, case.steps)
            mistakes += result.failed
            if mistakes > MAX_MISTAKES:
                raise Rejected(turn.reason, result.text)

    def _act(self, case: Case, turn: _Turn) -> Steps:
        """Carries out a turn's call; one that the tool refuses is no step."""
        assert turn.call is not None
        if case.steps == self.settings.max_calls:
            raise Rejected("too many calls", f"more than {self.settings.max_calls}")
        result = yield Act(turn.thought, turn.call)
        if not result.failed:
            case.steps += 1
        return result

    def _reply(self, talk: _Talk, number: int) -> Reply:
        settings = self.settings
        body = {
            "model": settings.model,
            "messages": talk.messages,
            "tools": self.specs,
            "temperature": settings.temperature,
            "max_tokens": settings.max_reply_tokens,
            "seed": int(generator("planner", self.seed, number).integers(2**31)),
            **settings.extra,
        }
        try:
            reply = self.ask({name: value for name, value in body.items() if value is not None}, number)
        except Unanswered as error:
            raise Rejected("no reply", error.reason) from error
        talk.transcript.append({"role": "assistant", **asdict(reply)})
        return reply

    def _opening(self, sample: Sample, pixels: np.ndarray) -> list[dict[str, Any]]:
        form = "followed by exactly one of the options" if sample.choices else "followed by the answer alone"
        options = "".join(f"\n- {choice}" for choice in sample.choices)
        question = f"{sample.question}\nOptions:{options}" if sample.choices else sample.question
        instructions = INSTRUCTIONS.format(max_calls=self.settings.max_calls, form=f"… ({form})")
        shown = _shown(pixels, self.settings.image_side)
        return [{"role": "system", "content": instructions}, {"role": "user", "content": [shown, _words(question)]}]


@dataclass(frozen=True)
class _Turn:
    """A reply, understood: a call, an answer, or a mistake of form.

    Attributes:
        called: By the protocol's `tool_calls`, not in words.
        written: The words to hand back to the model.
        mistake: What is wrong, for the model; a call that was understood may stand beside it.
        reason: What a try is rejected for that ends with this mistake.
    """

    written: str
    thought: str = ""
    call: ToolCall | None = None
    called: bool = False
    answer: str = ""
    mistake: str = ""
    reason: str = "malformed call"


def _read(reply: Reply) -> _Turn:
    """Understands a reply.

    Raises:
        Rejected: it was cut off before it came to a call or an answer.
    """
    content = reply.content.strip()
    call: ToolCall | Fault
    if reply.calls:
        named = reply.calls[0]
        call, called = named_call(named.name, named.arguments or "{}"), True
        thought = content or reply.thinking.strip()
        written = content if isinstance(call, ToolCall) else _quoted(content, named.name, named.arguments)
    elif (reading := read_turn(content)) is not None:
        call, called = reading.call, False
        thought, written = reading.thought or reply.thinking.strip(), reading.written
    else:
        return _answered(reply, content)
    if isinstance(call, Fault):
        if reply.cut_off:
            raise Rejected("malformed call", f"cut off by the limit of tokens: {call.message}")
        return _Turn(written, thought, mistake=call.message)
    if not thought:
        mistake = "say in a sentence what you want to find out, then make the call"
        return _Turn(written, "", call, called, mistake=mistake)
    return _Turn(written, thought, call, called)


def _answered(reply: Reply, content: str) -> _Turn:
    if reply.cut_off:
        raise Rejected("no answer", "cut off by the limit of tokens")
    lines = content.splitlines()
    for number in reversed(range(len(lines))):
        if found := _ANSWER.fullmatch(lines[number]):
            return _Turn(content, "\n".join(lines[:number]).strip(), answer=found["answer"].strip())
    mistake = "there is neither a tool call nor a line that begins with “Answer:”"
    return _Turn(content[:MAX_EXCERPT], mistake=mistake, reason="no answer")


def _quoted(content: str, name: str, arguments: str) -> str:
    """A call that is no JSON, as words: many servers cannot read it back as a call."""
    return f"{content}\n{name} {arguments[:MAX_EXCERPT]}".strip()


def _concluded(case: Case, turn: _Turn) -> Conclusion:
    """The conclusion with the annotated answer, in its spelling.

    Raises:
        Rejected: it is another answer, or nothing was looked at.
    """
    answer = case.sample.answer
    if _plain(turn.answer) != _plain(answer):
        raise Rejected("wrong answer", f"{turn.answer[:MAX_EXCERPT]!r}, not {answer!r}")
    if not case.steps:
        raise Rejected("no tool call", "the answer is right, but nothing was looked at")
    if states_answer(turn.thought, answer):
        return Conclusion(turn.thought, answer)
    return Conclusion(f"{turn.thought} The answer is {answer}.".strip(), answer)


def _plain(answer: str) -> str:
    """Without case, surrounding marks and full stop."""
    return " ".join(answer.casefold().strip(" \t*_`'\"“”‘’.").split())


class _Talk:
    """The conversation so far, as messages of the protocol, and as a transcript without images."""

    def __init__(self, messages: list[dict[str, Any]], image_side: int, transcript: Transcript) -> None:
        self.messages, self.image_side, self.transcript = messages, image_side, transcript
        self.turns = 0

    def hear(self, turn: _Turn) -> None:
        """Takes the model's turn, with its first call alone."""
        self.turns += 1
        message: dict[str, Any] = {"role": "assistant", "content": turn.written or "…"}
        if turn.call is not None and turn.called:
            arguments = json.dumps(dict(turn.call.arguments), ensure_ascii=False)
            function = {"name": turn.call.tool, "arguments": arguments}
            message["tool_calls"] = [{"id": self._name, "type": "function", "function": function}]
        self.messages.append(message)

    def show(self, turn: _Turn, result: ToolResult, step: int) -> None:
        """Hands over what a call gave, or what is wrong with the turn; `step` is the number of the call's image."""
        text = result.text[:MAX_EXCERPT] if result.failed else result.text
        self.transcript.append({"role": "observation", "content": text})
        if turn.called:
            self.messages.append({"role": "tool", "tool_call_id": self._name, "content": text})
        if result.pixels is not None:
            words = f"Image {step}:" if turn.called else f"{text}\nImage {step}:"
            self.messages.append({"role": "user", "content": [_words(words), _shown(result.pixels, self.image_side)]})
        elif not turn.called:
            self.messages.append({"role": "user", "content": text})

    @property
    def _name(self) -> str:
        """Of the last turn's call: the server's own may be random, and would make every request a new one."""
        return f"call{self.turns:05d}"


def _words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _shown(pixels: np.ndarray, longest: int) -> dict[str, Any]:
    """A picture as a data URI, JPEG, with at most this longest side."""
    height, width = pixels.shape[:2]
    if max(height, width) > longest:
        scale = longest / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
    uri = f"data:image/jpeg;base64,{base64.b64encode(encode(pixels)).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}
