"""What the tests of objectives with latents share: tiny models that know the objective's tokens, trajectories, and the
plain forward of one sample through the model of transformers alone."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pearl.images import encode
from pearl.records import EncodedImage, Observation, Step, ToolCall, Trajectory
from pearl.torch_setup import prepare_torchvision
from pearl.trainer.conversation import Conversation, load_template
from pearl.trainer.families import FAMILIES, Family
from pearl.trainer.learner import Learner
from pearl.trainer.objectives.base import Objective
from pearl.trainer.packing import Batch, Example, Packer
from pearl.trainer.views import View, ViewEncoder
from tests.tiny_vlms import HIDDEN, build_tiny_vlm


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a family, with what turns trajectories into its batches."""

    vlm: Any
    family: Family
    encoder: ViewEncoder
    packer: Packer

    def example(self, objective: Objective, trajectory: Trajectory) -> Example:
        conversation = Conversation(trajectory, load_template("pearl"))
        return objective.example(conversation, [self.encoder.image(i) for i in conversation.images], self.encoder)

    def batch(self, objective: Objective, trajectories: Sequence[Trajectory]) -> Batch:
        return self.packer([self.example(objective, trajectory) for trajectory in trajectories])

    def learner(self, objective: Objective) -> Learner:
        """With weights of its own."""
        torch.manual_seed(0)
        return Learner(copy.deepcopy(self.vlm), self.family, objective.losses(HIDDEN))


@cache
def tiny(name: str, objective: type[Objective]) -> Tiny:
    prepare_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with tempfile.TemporaryDirectory() as folder:
        build_tiny_vlm(name, Path(folder))
        vlm: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
        processor: Any = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": list(objective.special_tokens)})
    torch.manual_seed(0)
    vlm.resize_token_embeddings(max(len(processor.tokenizer), vlm.get_input_embeddings().num_embeddings))
    family = FAMILIES[name]()
    encoder = ViewEncoder(processor, family, objective.latent_token, vlm.config)
    return Tiny(vlm, family, encoder, Packer(family, vlm.config, encoder.padding))


def picture(seed: int, width: int = 64, height: int = 48) -> EncodedImage:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return EncodedImage(encode(coarse.repeat(4, 0).repeat(4, 1), "png"))


def step(tool: str, seed: int | None = None, *, thought: str = "I look.", text: str = "", **arguments: Any) -> Step:
    """A call that was answered by the picture of this seed, or without one."""
    return Step(thought, ToolCall(tool, arguments), Observation(text, None if seed is None else picture(seed)))


def trajectory(
    *steps: Step, seed: int = 0, size: tuple[int, int] = (64, 48), question: str = "Where is the cup?"
) -> Trajectory:
    return Trajectory(
        id=f"t{seed}",
        image=picture(seed, *size),
        question=question,
        choices=("left", "right"),
        answer="left",
        steps=steps,
        conclusion="The cup stands at the left.",
        expert="test",
        skill="test",
        source="test",
        license="CC0-1.0",
        seed=seed,
    )


def view_of(example: Example) -> View:
    """The only view of an objective with latents."""
    (view,) = example.views.values()
    return view


def visual_tokens_of(vlm: Any, family: Family, example: Example, image: int) -> Tensor:
    """(N, H) of one image, as the model's own public method gives them."""
    features = vlm.model.get_image_features(
        **family.collate_images([example.images[image].tensors]), return_dict=True
    ).pooler_output
    return torch.cat([each.reshape(-1, HIDDEN) for each in features])


def plain_states(vlm: Any, family: Family, example: Example, latents: Tensor, stop: int | None = None) -> Tensor:
    """Final-layer states (T, H) of one sample's first `stop` tokens, by the model of transformers alone."""
    view = view_of(example)
    ids = torch.from_numpy(view.ids)[None, :stop]
    visual = torch.from_numpy(view.visual).long()[None, :stop]
    slots = torch.from_numpy(np.flatnonzero(view.latent_slots[:stop]))
    with _fed(vlm, slots, latents[: len(slots)]):
        states: Tensor = vlm.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **family.collate_images([example.images[index].tensors for index in view.images]),
            **_kinds(vlm, visual),
        ).last_hidden_state
    return states[0]


def plain_next_token(vlm: Any, example: Example, states: Tensor) -> Tensor:
    """The summed cross-entropy of the supervised tokens."""
    view = view_of(example)
    shares = torch.log_softmax(vlm.get_output_embeddings()(states), -1)
    return -torch.stack([shares[t - 1, view.ids[t]] for t in np.flatnonzero(view.supervised)]).sum()


def gradients(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Gradients agree, in units of the largest."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < tolerance * largest, name


@contextmanager
def _fed(vlm: Any, slots: Tensor, latents: Tensor) -> Iterator[None]:
    """While it lasts, the input embeddings give these latents at these tokens."""
    if not len(slots):
        yield
        return

    def hook(module: Any, inputs: Any, embeds: Tensor) -> Tensor:
        return embeds.index_copy(1, slots, latents[None].to(embeds.dtype))

    handle = vlm.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _kinds(vlm: Any, visual: Tensor) -> dict[str, Tensor]:
    """What some models are told of where images stand."""
    if vlm.config.model_type.startswith("qwen"):
        return {"mm_token_type_ids": visual}
    return {"token_type_ids": visual} if vlm.config.model_type == "gemma3" else {}
