"""The model calls real tools until it answers: the comparison that Pearl, which calls none, is held against.

A call is run by the `Toolbox` that makes the training data, and what it returned comes back as a user turn, text and
then image, as in `pearl-train`'s conversations. (A role `tool`, where a chat template has one, mostly cannot hold an
image.) A scoring's opening and its limit of new tokens are about a direct answer and do not apply: a turn that has to
begin with the answer cannot hold a call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Template as Words
from typing import Any, Literal

import numpy as np
from PIL import Image

from pearl.errors import PearlError
from pearl.evaluation.calls import FaultKind, Outcome, run_calls, shortened
from pearl.evaluation.modes.base import DecodingMode, ask, message, pictures, too_long
from pearl.evaluation.records import CallMade, Question, Reply
from pearl.evaluation.subject import Chat, Message, Said, Subject, enough_memory
from pearl.images import Picture
from pearl.records import ToolCall
from pearl.tools import Toolbox, refused, spec
from pearl.tools.calls import FORM, Fault, Reading, read_turn
from pearl.trainer.objectives.registry import make_objective

Prompt = Literal["auto", "spec", "json", "none"]
TOOLS = ("crop", "zoom", "depth")
NO_MORE = "No more calls; answer now."


@dataclass(frozen=True)
class Announcement:
    """How a model learns of the tools.

    Attributes:
        instruction: Words that a system message holds, or the user's before the question unless `system`.
        numbered: Whether it is told how images are counted, where the question has several; a tool's specification
            says it for one.
        tools: Specifications for the chat template.
        observation: The words of an observation, where `$text` is what the tool said.
    """

    instruction: str = ""
    system: bool = True
    numbered: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    observation: str = "$text"

    def open(self, images: Sequence[np.ndarray], prompt: str) -> list[Message]:
        """The messages that a conversation starts with."""
        words = self.instruction
        if self.numbered and len(images) > 1:
            words = f"{words}\n{_numbering(len(images))}".strip()
        if words and self.system:
            return [message("system", words), message("user", *images, prompt)]
        return [message("user", *images, f"{words}\n\n{prompt}" if words else prompt)]


class ToolUse(DecodingMode):
    """Runs a model's calls until it answers; the questions of a batch go in lockstep.

    A bad call gets an error as its observation and is recorded with its kind of fault. A call beyond `max_calls` gets
    `NO_MORE`, and the turn after that is the last.

    Args:
        tools: Which tools; `settings` are their constructors' arguments by name, as for `Toolbox`.
        max_calls: How many calls of a question are looked at, bad ones included.
        max_pixels: Of all images together that a question's calls may bring.
        max_new_tokens: In each turn.
        opening: What the turn begins with that must answer, after a call beyond `max_calls`.
        prompt: How the tools are announced. "none": not at all, as a model expects that `pearl-train` taught to call;
            its template's system text and words for observations are used. "spec": by the chat template's own function
            calling. "json": by a system message, or before the question where the template has no such role. "auto":
            "none" for a model of `pearl-train`, else "spec" if the template can, else "json".

    Raises:
        ToolUnavailable: a tool is unknown, or its package or model is missing.
        PearlError: a limit is negative.
    """

    name = "tools"

    def __init__(
        self,
        tools: Iterable[str] = TOOLS,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        max_calls: int = 6,
        max_pixels: int = 16_000_000,
        max_new_tokens: int = 512,
        opening: str = "",
        prompt: Prompt = "auto",
    ) -> None:
        if min(max_calls, max_pixels) < 0 or max_new_tokens < 1:
            raise PearlError("limits of tool use must not be negative, and a turn needs at least one new token")
        names = list(tools)
        self.toolbox = Toolbox(names, settings)
        self.specs = tuple(spec(self.toolbox[name]) for name in names)
        self.max_calls, self.max_pixels, self.max_new_tokens = max_calls, max_pixels, max_new_tokens
        self.opening = opening
        self.prompt: Prompt = prompt

    def check(self, subject: Subject) -> None:
        self.announcement(subject)

    def identity(self) -> dict[str, Any]:
        return {"tool versions": self.toolbox.fingerprint()}

    def answer(self, subject: Subject, questions: Sequence[Question]) -> list[Reply]:
        begin = time.perf_counter()
        announced = self.announcement(subject)
        dialogues = [_Dialogue(self, subject, announced, question) for question in questions]
        running = dialogues
        while running:
            self._turn(subject, running)
            running = [dialogue for dialogue in running if not dialogue.done]
        seconds = (time.perf_counter() - begin) / max(1, len(questions))
        return [dialogue.reply(seconds) for dialogue in dialogues]

    def _turn(self, subject: Subject, running: Sequence[_Dialogue]) -> None:
        """Each dialogue's next turn of the model, and what its call returned."""
        questions = [dialogue.question for dialogue in running]
        conversations = [dialogue.conversation for dialogue in running]
        said = ask(subject, questions, conversations, [self.max_new_tokens] * len(running))
        waiting = []
        for dialogue, one in zip(running, said, strict=True):
            if call := dialogue.hear(one):
                waiting.append((dialogue, call))
        with enough_memory(f"the calls of {len(waiting)} questions at once: lower --batch-size"):
            outcomes = run_calls(self.toolbox, [(call, dialogue.pictures) for dialogue, call in waiting])
        for (dialogue, call), outcome in zip(waiting, outcomes, strict=True):
            dialogue.observe(call, outcome)

    def announcement(self, subject: Subject) -> Announcement:
        """What a subject is told of the tools.

        Raises:
            PearlError: the prompt is "spec", but the chat template announces no tools; or the model was trained without
                calls: by its template's words, or its objective.
        """
        prompt = self.prompt
        if prompt in ("auto", "spec"):
            can = subject.announces(self.specs, Image.new("RGB", (64, 64)))
            if prompt == "spec" and not can:
                raise PearlError(f"the chat template of {subject.name} does not announce tools: take the json prompt")
            prompt = "none" if prompt == "auto" and subject.training else "spec" if can else "json"
        if prompt == "spec":
            return Announcement(tools=self.specs, system=False, numbered=True)
        if prompt == "json":
            return Announcement(self._listed(), subject.has_system_role(), numbered=True)
        if subject.training is None:
            return Announcement()
        template = subject.training.template
        objective = make_objective(subject.training.objective, subject.training.options)
        if not objective.step_images or "call" not in Words(template.step).get_identifiers():
            raise PearlError(
                f"the training of {subject.name} held no calls, so it has learned none: take the json prompt"
            )
        return Announcement(template.system, observation=template.observation)

    def _listed(self) -> str:
        tools = "\n".join(json.dumps(one["function"], ensure_ascii=False) for one in self.specs)
        return (
            f"You can call tools to look closer. To call one, write one JSON object {FORM} and stop; what it returned is"
            f" then shown to you. Make one call at a time and at most {self.max_calls}. When you know the answer, give"
            f" it as the question asks, without a call.\nTools:\n{tools}"
        )


class _Dialogue:
    """One question on its way to an answer.

    Attributes:
        pictures: The question's images, then one entry a step, None where it gave no image.
        own_tokens: Of the model's own turns as they stand in the conversation.
        done: The last turn was said.
    """

    def __init__(self, mode: ToolUse, subject: Subject, announced: Announcement, question: Question) -> None:
        self.mode, self.subject, self.announced, self.question = mode, subject, announced, question
        images = pictures(question)
        self.pictures: list[Picture | None] = [Picture(pixels) for pixels in images]
        self.messages = announced.open(images, question.prompt)
        self.turns: list[str] = []
        self.calls: list[CallMade] = []
        self.prompt_tokens = self.new_tokens = self.own_tokens = self.steps = self.pixels = 0
        self.last = self.done = False

    @property
    def conversation(self) -> Chat:
        return Chat(self.messages, self.mode.opening if self.last else "", self.announced.tools)

    def hear(self, said: Said) -> ToolCall | None:
        """Takes the model's turn; the call to run, if it holds one."""
        if said.ended == "too long":
            self._end_too_long(said)
            return None
        self.prompt_tokens = said.prompt_tokens - self.own_tokens
        self.new_tokens += said.new_tokens
        self.turns.append(said.text)
        reading = read_turn(said.text)
        if reading is None:
            self.done = True
            return None
        return self._take(reading)

    def _take(self, reading: Reading) -> ToolCall | None:
        self.messages.append(message("assistant", reading.written))
        self.own_tokens += self.subject.count_tokens(reading.written)
        if reading.more:
            self.calls.append(CallMade("", "{}", "several calls", ""))
        if self.last or self.steps == self.mode.max_calls:
            self._refuse_more(reading)
            return None
        self.steps += 1
        if isinstance(reading.call, ToolCall):
            return reading.call
        self._record(None, reading.call.kind, refused(shortened(reading.call.message)).text)
        return None

    def observe(self, call: ToolCall, outcome: Outcome) -> None:
        """Takes what a call returned."""
        result, fault = outcome.result, outcome.fault
        pixels, text = result.pixels, result.text
        if pixels is not None and (reason := self._why_unseen(pixels)):
            pixels, fault, text = None, "image limit", refused(reason).text
        if pixels is not None:
            self.pixels += pixels.shape[0] * pixels.shape[1]
        self._record(call, fault, text, pixels)

    def _why_unseen(self, pixels: np.ndarray) -> str:
        height, width = pixels.shape[:2]
        if self.pixels + height * width > self.mode.max_pixels:
            return f"with {width}×{height} pixels more the images would exceed {self.mode.max_pixels:,} in all"
        if self.subject.refusal(Image.fromarray(pixels)):
            return f"an image of {width}×{height} pixels cannot be looked at; take another part"
        return ""

    def _record(
        self, call: ToolCall | None, fault: FaultKind | None, text: str, pixels: np.ndarray | None = None
    ) -> None:
        """A step is over: the model gets its observation."""
        if fault is None:
            text = Words(self.announced.observation).substitute(text=text).strip()
        parts: list[str | np.ndarray] = [text] if text or pixels is None else []
        self.messages.append(message("user", *parts, *([] if pixels is None else [pixels])))
        self.pictures.append(None if pixels is None else Picture(pixels))
        self.calls.append(_made(call, fault, text))

    def _refuse_more(self, reading: Reading) -> None:
        call = None if isinstance(reading.call, Fault) else reading.call
        self.calls.append(_made(call, "too many calls", "" if self.last else NO_MORE))
        self.messages.append(message("user", NO_MORE))
        self.last, self.done = True, self.last

    def _end_too_long(self, said: Said) -> None:
        if not self.turns:
            raise too_long(self.subject, self.question, said.prompt_tokens, self.mode.max_new_tokens)
        self.calls[-1] = replace(self.calls[-1], fault="too long", observation="")
        self.done = True

    def reply(self, seconds: float) -> Reply:
        """All that was said. Tokens that were given are those of the last prompt, less what in it the model said itself."""
        return Reply(self.turns[-1], tuple(self.turns), self.prompt_tokens, self.new_tokens, seconds, tuple(self.calls))


def _made(call: ToolCall | None, fault: FaultKind | None, observation: str) -> CallMade:
    if call is None:
        return CallMade("", "{}", fault or "", observation)
    return CallMade(call.tool, json.dumps(dict(call.arguments), ensure_ascii=False), fault or "", observation)


def _numbering(count: int) -> str:
    """How a question's images and those of its calls are counted: a call's argument `image`."""
    return f"Images 0 to {count - 1} are the given ones; image {count - 1} + i is the output of call i."
