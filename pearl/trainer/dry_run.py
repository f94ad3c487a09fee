"""What a run would do, without doing it: sizes, what is trained, memory, a batch, and an example as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pearl.trainer.config import TrainConfig
from pearl.trainer.families import Unknown
from pearl.trainer.models import trainable_text
from pearl.trainer.preparation import Prepared, prepare
from pearl.trainer.views import View


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        trained: What of the model is, in a few lines.
        gigabytes: Of weights, gradients and optimizer, per process without sharding.
        activations: Gigabytes that a forward of the longest examples keeps, about.
        batch: Rows and tokens in a row of a forward of the first trajectories, and the share of it that is padding.
        texts: Each view of one example as the model reads it, what is learned in 【brackets】.
        tokens: Of each view of that example.
        row: Tokens of its row: what a forward takes.
    """

    trajectories: int
    held_out: int
    updates: int
    trained: str
    gigabytes: float
    activations: float
    batch: tuple[int, int, float]
    texts: dict[str, str]
    tokens: dict[str, int]
    row: int


def dry_run(config: TrainConfig, processes: int = 1) -> DryRun:
    """What a run in so many processes would do.

    Raises:
        PearlError: as `train`, before any work.
    """
    prepared = prepare(config)
    first = [prepared.training[number].example for number in range(min(config.batch_size, len(prepared.training)))]
    example, batch = first[0], prepared.packer(first).main
    parameters = list(prepared.learner.parameters())
    kept = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    forwards = math.ceil(len(prepared.training) / (config.batch_size * processes))
    updates = math.ceil(math.ceil(forwards / config.accumulation) * config.epochs)
    return DryRun(
        trajectories=len(prepared.training),
        held_out=len(prepared.held_out),
        updates=config.max_steps or updates,
        trained=trainable_text(prepared.learner),
        gigabytes=(kept + 12 * trained) / 1e9,
        activations=_activations(prepared) / 1e9,
        batch=(*batch.ids.shape, float((batch.tokens.branch < 0).float().mean())),
        texts={name: _shown(prepared, view) for name, view in example.views.items()},
        tokens={name: len(view) for name, view in example.views.items()},
        row=prepared.packer([example]).main.ids.shape[1],
    )


def _activations(prepared: Prepared) -> float:
    """Bytes that a forward keeps for the backward pass: 34 a token (or patch), layer and unit of width at 16 bits
    (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1, without the attention matrix, which SDPA does not keep), and
    the logits, their softmax and its gradient where a label stands. Of an unknown family without the vision tower."""
    config = prepared.config
    settings: Any = prepared.loaded.vlm.config
    text = settings.get_text_config()
    longest = prepared.training[max(range(len(prepared.lengths)), key=prepared.lengths.__getitem__)].example
    batch = prepared.packer([longest] * config.batch_size)

    def kept(tokens: int, width: int, layers: int) -> int:
        return (layers + 17 if config.gradient_checkpointing else 17 * layers) * tokens * width

    units = kept(batch.main.ids.numel(), text.hidden_size, text.num_hidden_layers)
    if "vision" not in config.freeze and not isinstance(prepared.loaded.family, Unknown):
        vision = settings.vision_config
        depth = getattr(vision, "depth", None) or vision.num_hidden_layers
        units += kept(_patches(batch.images["pixel_values"], vision.patch_size), vision.hidden_size, depth)
    labels = sum(len(places.supervised) for places in batch.places.values())
    return float((2 if config.precision == "bf16" else 4) * units + 3 * 4 * labels * text.vocab_size)


def _patches(pixels: torch.Tensor, size: int | Sequence[int]) -> int:
    """Of images as a vision tower takes them: patches (N, D), or (…, height, width)."""
    if pixels.ndim == 2:
        return len(pixels)
    side = size if isinstance(size, int) else size[0]
    return pixels[..., 0, :, :].numel() // side**2


def _shown(prepared: Prepared, view: View) -> str:
    """Its text, runs of visual tokens shortened, what is learned in brackets."""
    tokenizer = prepared.loaded.processor.tokenizer
    pieces: list[str] = []
    start = 0
    for stop in range(1, len(view) + 1):
        same = stop < len(view) and (view.visual[stop], view.supervised[stop]) == (
            view.visual[start],
            view.supervised[start],
        )
        if not same:
            words = tokenizer.decode(view.ids[start:stop])
            if view.visual[start]:
                words = f"⟨{stop - start} visual tokens⟩"
            pieces.append(f"【{words}】" if view.supervised[start] else words)
            start = stop
    return "".join(pieces)
