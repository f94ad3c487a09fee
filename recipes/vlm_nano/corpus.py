"""The text that vlm-nano's tokenizer is trained on: questions, thoughts, tool calls and what tools say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import numpy as np

from pearl.pipelines.experts.voice import FINDINGS, INTENTIONS
from pearl.scenes.layout import COLOURS, MATERIALS, SHAPES
from pearl.scenes.questions import PLURALS
from pearl.tools.base import as_text, spec
from pearl.tools.toolbox import tool_class
from recipes.vlm_nano.asks import Asked, ask_measure
from recipes.vlm_nano.model import prompt
from recipes.vlm_nano.things import MEASURES

REPEATS = 12
TOOLS = ["crop", "zoom", "depth", "highlight", "mark", "rotate", "flip", "edges", "ocr", "segment", "detect"]
SIDES = ("above", "below", "left", "right", "to the left of", "to the right of")
MEASURING = tuple(ask_measure("{name}", measure, 0).text for measure in MEASURES)
OBSERVATIONS = (
    "Cropped image {image} to {box}: {width}×{height} pixels.",
    "Zoomed into {box} of image {image}, {factor} times: {width}×{height} pixels.",
    "Depth map of image {image}; bright is near. Nearness from 0 (farthest) to 1 (nearest): point 1: {near}.",
    "Depth map of image {image}; bright is near. Nearness from 0 (farthest) to 1 (nearest): region 2: {near}.",
    "Error: the box is too small.",
)


def texts(questions: Sequence[Sequence[Asked]], seed: int = 0) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for scene in questions[:1500]:
        for asked in scene:
            yield prompt(asked.text, asked.choices if rng.random() < 0.5 else ())
            yield asked.answer
            yield f"\nAnswer: {asked.answer}"
    for _ in range(REPEATS):
        yield from _thoughts(rng)
        yield from (_call(name, rng) for name in TOOLS)
        yield from (_fill(sentence, rng) for sentence in OBSERVATIONS)
        yield from (_fill(text, rng) for text in MEASURING)
    for name in TOOLS:
        yield json.dumps(spec(tool_class(name)))
    for role in ("system", "user", "assistant", "tool"):
        yield from [f"{role}\n"] * 1000


def _thoughts(rng: np.random.Generator) -> Iterator[str]:
    for sentences in (*INTENTIONS.values(), *FINDINGS.values()):
        for sentence in sentences:
            said = _fill(sentence, rng)
            yield said[0].upper() + said[1:]
            yield " " + said[0].upper() + said[1:]


def _fill(sentence: str, rng: np.random.Generator) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: _slot(match[1], rng), sentence)


def _slot(name: str, rng: np.random.Generator) -> str:
    """Something that may stand in that slot of a sentence."""
    colour, shape, material = (str(rng.choice(list(words))) for words in (COLOURS, SHAPES, MATERIALS))
    if name in ("a", "b", "name", "near", "larger"):
        return str(rng.choice([f"the {shape}", f"the {colour} {shape}", f"the {material} {shape}", "the nearest one"]))
    if name in ("first", "second", "value", "own", "near"):
        return str(rng.choice([f"{rng.random():.2f}", colour]))
    if name in ("article", "other"):
        return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
    if name == "plural":
        return str(rng.choice([PLURALS[shape], f"{colour} objects"]))
    if name in ("number", "count", "image"):
        return str(rng.integers(0, 7))
    if name in ("width", "height"):
        return str(rng.integers(20, 400))
    if name == "box":
        return as_text(np.sort(rng.random(4)).tolist())
    if name == "factor":
        return f"{rng.uniform(1, 6):.1f}"
    return str(rng.choice([*SIDES, "yes", "no", colour, shape, *PLURALS.values()]))


def _call(tool: str, rng: np.random.Generator) -> str:
    box = [round(float(side), 4) for side in np.sort(rng.random(4))]
    arguments = [
        {"image": 0, "box": box}, {"image": 1, "box": box, "factor": 4.0}, {"image": 0, "boxes": [box, box]},
        {"image": 0, "points": [box[:2], box[2:]], "labels": ["A", "B"]}, {"image": 2},
    ][int(rng.integers(5))]  # fmt: skip
    return "\n<tool_call>\n" + json.dumps({"name": tool, "arguments": arguments}) + "\n</tool_call>"
