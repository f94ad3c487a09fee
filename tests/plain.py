"""The plain implementation that the packed one is held against: every view as an ordinary conversation that goes
through the model's public calls alone, the losses written down from their formulas. It shares no code with `packing`,
`views` or `learner`.

Images are those of one conversation, nested, as `apply_chat_template(tokenize=True)` hands them to the processor at
inference. (LLaVA-OneVision then takes one view of each where there are several; the other families make no difference
between that and each image alone, but for Idefics3's and SmolVLM's padding with empty tiles, which the model drops.)
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pearl.records import EncodedImage, Observation, Step, ToolCall, Trajectory
from pearl.torch_setup import prepare_torchvision
from pearl.trainer.families import FAMILIES as FAMILY_CLASSES
from pearl.trainer.families import Family
from pearl.trainer.views import ViewEncoder
from tests.tiny_vlms import build_tiny_vlm

torch.set_num_threads(1)

Message = dict[str, Any]

# What the families' chat templates write around the words of a user and of an assistant; group 1 is the turn.
CHATML = (r"<\|im_start\|>user\n(.*?<\|im_end\|>)", r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)")
UTTERANCES = (r"User:(.*?<end_of_utterance>)", r"Assistant:(.*?<end_of_utterance>)")
VICUNA = (r"USER:(.*?)(?=\s*ASSISTANT:|$)", r"ASSISTANT:(.*?)(?=\s*USER:|$)")
TURNS = (r"<start_of_turn>user\n(.*?<end_of_turn>)", r"<start_of_turn>model\n(.*?<end_of_turn>)")
FORMS = {
    "qwen2_5_vl": CHATML,
    "qwen3_vl": CHATML,
    "smolvlm": UTTERANCES,
    "idefics3": UTTERANCES,
    "llava": VICUNA,
    "llava_onevision": CHATML,
    "internvl": CHATML,
    "gemma3": TURNS,
}


@dataclass(frozen=True)
class Tiny:
    """A tiny random model in evaluation mode (no dropout), and what its batches are made with."""

    name: str
    vlm: Any
    processor: Any
    family: Family
    encoder: ViewEncoder

    @property
    def hidden_size(self) -> int:
        return int(self.vlm.config.get_text_config().hidden_size)


@cache
def tiny(name: str) -> Tiny:
    prepare_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with tempfile.TemporaryDirectory() as folder:
        build_tiny_vlm(name, Path(folder))
        vlm: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
        processor: Any = AutoProcessor.from_pretrained(folder)
    family = FAMILY_CLASSES[vlm.config.model_type]()
    return Tiny(name, vlm, processor, family, ViewEncoder(processor, family))


# trajectories


def picture(seed: int, width: int = 48, height: int = 40) -> EncodedImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return EncodedImage(file.getvalue())


def opened(image: EncodedImage) -> Image.Image:
    return Image.open(io.BytesIO(image.data))


def cropped(image: EncodedImage, left: int, top: int, right: int, bottom: int) -> EncodedImage:
    file = io.BytesIO()
    opened(image).crop((left, top, right, bottom)).save(file, "PNG")
    return EncodedImage(file.getvalue())


def step(thought: str, image: EncodedImage | None = None, text: str = "", tool: str = "crop", **arguments: Any) -> Step:
    return Step(thought, ToolCall(tool, arguments or {"box": [0, 0, 1, 1]}), Observation(text, image))


def trajectory(
    *steps: Step,
    image: EncodedImage | None = None,
    question: str = "Where is the red cup?",
    answer: str = "left",
    choices: tuple[str, ...] = (),
    conclusion: str = "It is at the left.",
) -> Trajectory:
    return Trajectory(
        id="t", image=image or picture(0), question=question, choices=choices, answer=answer, steps=steps,
        conclusion=conclusion, expert="test", skill="test", source="test", license="CC0-1.0", seed=0,
    )  # fmt: skip


def trajectories() -> list[Trajectory]:
    """0 to 5 steps; images of different sizes; one that repeats the original and one that repeats an earlier step's;
    one step without an image; a thought that repeats the question and one that is empty."""
    a, b, c, d = picture(1, 64, 48), picture(2, 33, 90), picture(3, 70, 30), picture(4, 40, 40)
    part = cropped(b, 5, 20, 30, 60)
    return [
        trajectory(image=picture(5, 50, 30), question="How far is the cup?", answer="12"),
        trajectory(step("I look.", cropped(a, 10, 10, 40, 44), "The region."), image=a),
        trajectory(step("Where?", part), step("Again.", b, "all of it"), image=b, question="What?", choices=("x", "y")),
        trajectory(step("One.", d), step("Two.", None, "near 0.25"), step("", d, "so"), image=c, question="Far?"),
        trajectory(*(step(f"Look {n}.", picture(10 + n, 30 + 9 * n, 60 - 8 * n)) for n in range(4)), image=picture(31)),
        trajectory(*(step("Far?", picture(20 + n), str(n)) for n in range(5)), image=picture(30), question="Far?"),
    ]


# views as conversations


def says(role: str, *parts: str | EncodedImage) -> Message:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": opened(part)}
        for part in parts
    ]
    return {"role": role, "content": content}


def asks(t: Trajectory) -> str:
    return t.question + (f"\nOptions: {', '.join(t.choices)}." if t.choices else "")


def ends(t: Trajectory) -> list[Message]:
    """The steps and the conclusion, in the words of the template `pearl`."""
    messages: list[Message] = []
    for one in t.steps:
        call = json.dumps({"name": one.call.tool, "arguments": one.call.arguments})
        messages.append(says("assistant", f"{one.thought}\n<tool_call>\n{call}\n</tool_call>".strip()))
        shown = [one.observation.image] if one.observation.image else []
        messages.append(says("user", *([one.observation.text] if one.observation.text else []), *shown))
    return [*messages, says("assistant", f"{t.conclusion}\nAnswer: {t.answer}")]


def conversation(t: Trajectory, view: str, filler: str = "") -> list[Message]:
    """`filler` stands where the predictor tokens do."""
    if view == "full":
        return [says("user", t.image, asks(t)), *ends(t)]
    if view == "target":
        return [says("user", t.image), *ends(t)]
    if view == "source":
        return [says("user", t.image, asks(t) + filler)]
    return [says("user", t.image, asks(t)), says("assistant", t.answer)]


@dataclass(frozen=True)
class Plain:
    """One view after its own forward.

    Attributes:
        ids: (T,).
        states: (T, H), final layer, after its norm.
        supervised: Indices of the assistant's tokens.
        user_ends: The last token of each of the user's turns.
        fillers: Where the predictor tokens stand.
    """

    ids: Tensor
    states: Tensor
    supervised: list[int]
    user_ends: list[int]
    fillers: list[int]


def inputs_of(t: Tiny, messages: list[Message]) -> dict[str, Tensor]:
    """What the processor gives for a conversation; an answer that its template leaves open is ended."""
    tokenizer = t.processor.tokenizer
    text = t.processor.apply_chat_template(messages, tokenize=False).rstrip()
    if messages[-1]["role"] == "assistant" and t.name == "llava":
        text += tokenizer.eos_token
    images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    inputs = t.processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=special)
    return dict(inputs)


def spans_of(t: Tiny, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text that the tokens spell, and where each stands in it; for texts of ASCII characters."""
    pieces = [t.processor.tokenizer.decode([token]) for token in ids]
    stops = np.cumsum([len(piece) for piece in pieces]).tolist()
    return "".join(pieces), list(zip([0, *stops], stops, strict=False))


def forward(t: Tiny, messages: list[Message], predictors: Tensor | None = None) -> Plain:
    inputs = inputs_of(t, messages)
    ids = inputs["input_ids"][0]
    filler = t.processor.tokenizer.pad_token_id
    fillers = (ids == filler).nonzero()[:, 0].tolist() if predictors is not None else []

    def fill(module: Any, given: Any, embeds: Tensor) -> Tensor:
        return embeds if predictors is None else embeds.index_copy(1, torch.tensor(fillers), predictors[None])

    handle = t.vlm.get_input_embeddings().register_forward_hook(fill)
    states = t.vlm.model(**inputs).last_hidden_state[0]
    handle.remove()
    text, spans = spans_of(t, ids.tolist())
    user, assistant = FORMS[t.name]
    said = [match.span(1) for match in re.finditer(assistant, text, re.DOTALL)]
    asked = [(match.start(1), match.start(1) + len(match[1].rstrip())) for match in re.finditer(user, text, re.DOTALL)]
    tokens = [[n for n, (a, b) in enumerate(spans) if a < stop and b > start] for start, stop in said]
    return Plain(
        ids=ids,
        states=states,
        supervised=[token for turn in tokens for token in turn],
        user_ends=[max(n for n, (a, b) in enumerate(spans) if a < stop and b > a) for _, stop in asked],
        fillers=fillers,
    )


# losses


def distance(predicted: Tensor, target: Tensor, kind: str) -> Tensor:
    """Of two (H,)."""
    difference = predicted - target
    if kind == "cosine":
        return 1 - predicted @ target / (predicted @ predicted * (target @ target)).sqrt()
    if kind == "l2":
        return difference.square().sum().sqrt()
    return smooth_l1(difference) if kind == "smooth-l1" else difference.square().mean()


def smooth_l1(difference: Tensor) -> Tensor:
    """β = 1; the mean over the last dimension."""
    size = difference.abs()
    return torch.where(size < 1, size**2 / 2, size - 0.5).mean(-1)


def next_token(t: Tiny, views: list[Plain]) -> Tensor:
    head = t.vlm.get_output_embeddings()
    losses: list[Tensor] = [
        cross_entropy(head(v.states[[token - 1 for token in v.supervised]]), v.ids[v.supervised]) for v in views
    ]
    return torch.cat(losses).mean()


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    return -torch.log_softmax(logits, -1)[torch.arange(len(ids)), ids]


def jepa(source: list[Plain], target: list[Plain], kind: str, targets: str) -> Tensor:
    losses = []
    for one, other in zip(source, target, strict=True):
        goal = other.states.detach()
        if targets == "trajectory":
            losses.append(distance(one.states[-1], goal[-1], kind))
        else:
            pairs = zip(one.fillers, other.user_ends[1:], strict=False)
            losses += [distance(one.states[k], goal[token], kind) for k, token in pairs]
    return torch.stack(losses).mean()


def nextlat(t: Tiny, weights: Mapping[str, Tensor], full: list[Plain], which: str) -> tuple[Tensor, Tensor]:
    """Both terms; `weights` are the dynamics head's."""
    drifts, tokens = [], []
    frozen = t.vlm.get_output_embeddings().weight.detach()
    for view in full:
        known = [token - 1 for token in view.supervised]  # t in the formula; the supervised token is t + 1
        state, embedding = view.states[known], t.vlm.get_input_embeddings()(view.ids[view.supervised])
        inner = torch.cat([state, embedding], -1)
        inner = F.layer_norm(inner, inner.shape[-1:], weights["norm.weight"], weights["norm.bias"])
        for layer in (0, 2, 4):
            inner = F.gelu(inner) if layer else inner
            inner = inner @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
        ahead = state + inner
        drifts.append(smooth_l1(ahead - view.states[view.supervised].detach()))
        shift = 1 if which == "next" else 0
        goals = [n for n, token in enumerate(view.supervised) if token + shift in view.supervised]
        tokens.append(cross_entropy(ahead[goals] @ frozen.T, view.ids[[view.supervised[n] + shift for n in goals]]))
    return torch.cat(drifts).mean(), torch.cat(tokens).mean()
