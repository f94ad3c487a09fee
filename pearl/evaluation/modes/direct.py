"""The answer straight from images and prompt: plain decoding, which is what Pearl is for."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pearl.evaluation.modes.base import DecodingMode, ask, message, pictures, told_before, too_long
from pearl.evaluation.records import Question, Reply
from pearl.evaluation.subject import Chat, Subject


class Direct(DecodingMode):
    """One user turn, the images and then the prompt; one assistant turn.

    Args:
        max_new_tokens, opening: Where a question's scoring has none of its own.
    """

    name = "direct"

    def __init__(self, max_new_tokens: int = 128, opening: str = "") -> None:
        self.max_new_tokens, self.opening = max_new_tokens, opening

    def answer(self, subject: Subject, questions: Sequence[Question]) -> list[Reply]:
        begin = time.perf_counter()
        conversations = [
            Chat(
                [*told_before(subject), message("user", *pictures(question), question.prompt)],
                question.opening or self.opening,
            )
            for question in questions
        ]
        limits = [question.max_new_tokens or self.max_new_tokens for question in questions]
        said = ask(subject, questions, conversations, limits)
        for question, one, limit in zip(questions, said, limits, strict=True):
            if one.ended == "too long":
                raise too_long(subject, question, one.prompt_tokens, limit)
        seconds = (time.perf_counter() - begin) / max(1, len(questions))
        return [Reply(one.text, (one.text,), one.prompt_tokens, one.new_tokens, seconds) for one in said]
