"""Measures a VLM on held-out scenes, through its own processor and `generate`.

    python -m recipes.vlm_nano.evaluate --model runs/vlm_nano/model/export

Accuracy of the bare answer by family, beside the best blind guess; and on small objects, with and without a zoomed
crop in context. The crop is cut from the pixels that the model was given already.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pearl.boxes import longer_side, padded
from pearl.drawing import draw_points
from pearl.files import file_hash
from pearl.images import Picture
from pearl.scenes.layout import COLOURS, MATERIALS, SHAPES, draw_layout, scene_rng
from pearl.scenes.questions import FAMILIES, USUAL, View
from pearl.scenes.render import Scene, render
from pearl.tools.zoom import Zoom, ZoomArguments
from pearl.torch_setup import prepare_torchvision
from recipes.vlm_nano.asks import Asked, asked
from recipes.vlm_nano.model import SIZE, prompt

SEED = 1
BATCH = 25
SMALL = ("attribute", "shape")
LOOKING = "Let me take a closer look at it."
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A question and the picture that it is asked about, uint8 (SIZE, SIZE, 3)."""

    question: Asked
    picture: np.ndarray


def draw_cases(family: str, count: int, scenes: Sequence[Scene]) -> list[Case]:
    """Question `k` goes through the scenes until one fits, as `scene_sample` does, so that answers stay balanced."""
    ask, _ = FAMILIES[family]
    cases = []
    for index in range(count):
        for attempt in range(len(scenes)):
            scene = scenes[(7 * index + attempt) % len(scenes)]
            view = View(scene, scene_rng("test", SEED, index, f"question-{family}"))
            if question := ask(view):
                picture = scene.image
                if question.points:
                    picture = draw_points(picture, question.points, question.choices)
                cases.append(Case(asked(question, view), picture))
                break
    return cases


def blind_accuracy(cases: Sequence[Case]) -> float:
    """The best of three guesses that need no picture: the form's most frequent answer, its most frequent place among
    the choices, and of the choices the one that is right most often. Each half's frequencies guess the other half."""
    halves = [[case.question for case in cases[start::2]] for start in (0, 1)]
    found = [_guessed(known, asked) for known, asked in (halves, reversed(halves))]
    return float(max(sum(counts) for counts in zip(*found, strict=True)) / len(cases))


def _guessed(known: Sequence[Asked], asked: Sequence[Asked]) -> tuple[int, int, int]:
    """How many of `asked` each of the guesses gets right, from what is frequent in `known`."""
    answers = Counter((_form(q.text), q.answer) for q in known)
    places = Counter((_form(q.text), q.choices.index(q.answer)) for q in known)
    said = {answer for _, answer in answers}
    by_answer = by_place = by_choice = 0
    for question in asked:
        form = _form(question.text)
        by_answer += max(said, key=lambda one, f=form: answers[f, one]) == question.answer  # type: ignore[misc]
        place = max(range(len(question.choices)), key=lambda one, f=form: places[f, one])  # type: ignore[misc]
        by_place += question.choices[place] == question.answer
        by_choice += max(question.choices, key=lambda one, f=form: answers[f, one]) == question.answer  # type: ignore[misc]
    return by_answer, by_place, by_choice


def _form(text: str) -> str:
    words = "|".join([*COLOURS, *MATERIALS, *(f"{shape}s?" for shape in SHAPES), "object"])
    return re.sub(rf"\b(?:{words})\b( (?:{words})\b)*", "X", text)


class Subject:
    """A model and its processor, asked in batches, greedily."""

    def __init__(self, model: str, device: str) -> None:
        prepare_torchvision()
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(model)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        self.model = loaded.to(device).eval()
        self.device = device

    @torch.no_grad()
    def answers(self, conversations: Sequence[Messages]) -> list[str]:
        said = []
        for start in range(0, len(conversations), BATCH):
            batch = conversations[start : start + BATCH]
            texts = [self.processor.apply_chat_template(one, add_generation_prompt=True) for one in batch]
            images = [[p["image"] for m in one if not isinstance(m["content"], str) for p in m["content"]
                       if p["type"] == "image"] for one in batch]  # fmt: skip
            inputs = self.processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
            output = self.model.generate(**inputs.to(self.device), do_sample=False, max_new_tokens=12)
            new = output[:, inputs["input_ids"].shape[1] :]
            said += [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        return said

    def accuracy(self, cases: Sequence[Case], conversation: Callable[[Case], Messages]) -> float:
        said = self.answers([conversation(case) for case in cases])
        return float(np.mean([text == case.question.answer for text, case in zip(said, cases, strict=True)]))


def plain(case: Case, *, choices: bool = True) -> Messages:
    text = prompt(case.question.text, case.question.choices if choices else ())
    return [{"role": "user", "content": [_image(case.picture), {"type": "text", "text": text}]}]


def without_choices(case: Case) -> Messages:
    return plain(case, choices=False)


def with_crop(case: Case) -> Messages:
    """The target, enlarged as the experts of `pearl-gen` do, in a later turn."""
    assert case.question.target
    box = padded(case.question.target)
    factor = min(6, max(1, round(0.35 / longer_side(box))))
    result = Zoom().apply(Picture(case.picture), ZoomArguments(box=box, factor=factor))
    assert result.pixels is not None
    looking = {"role": "assistant", "content": LOOKING}
    return [*plain(case), looking, {"role": "user", "content": [_image(result.pixels)]}]


def _image(pixels: np.ndarray) -> dict[str, Any]:
    return {"type": "image", "image": Image.fromarray(pixels)}


def evaluate(model: str, count: int, device: str) -> dict[str, Any]:
    """Of a model's folder."""
    scenes = [render(draw_layout(scene_rng("test", SEED, i)), SIZE) for i in range(max(50, 2 * count))]
    subject = Subject(model, device)
    families: dict[str, dict[str, float]] = {}
    for family in USUAL:
        cases = draw_cases(family, count, scenes)
        row = {
            "questions": len(cases), "blind": blind_accuracy(cases), "accuracy": subject.accuracy(cases, plain),
            "without choices": subject.accuracy(cases, without_choices),
        }  # fmt: skip
        if family in SMALL:
            row["with the crop"] = subject.accuracy(cases, with_crop)
        families[family] = row
        print(f"{family:18}", "   ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    gains = [row["accuracy"] - row["blind"] for row in families.values()]
    return {
        "weights": file_hash(Path(model) / "model.safetensors"),
        "families": families, "mean gain": float(np.mean(gains)), "families that gain 0.25": sum(g >= 0.25 for g in gains)
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/vlm_nano/model/export")
    parser.add_argument("--count", type=int, default=300, help="questions a family")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    options = parser.parse_args()
    figures = evaluate(options.model, options.count, options.device)
    print(f"mean gain over blind {figures['mean gain']:.3f} (bar: 0.15); families that gain 0.25:"
          f" {figures['families that gain 0.25']} (bar: 3)")  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
