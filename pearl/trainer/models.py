"""Loading a vision-language model, deciding what of it is trained, and saving it as the plain model that it was."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pearl.errors import PearlError
from pearl.torch_setup import prepare_torchvision
from pearl.trainer.config import TrainConfig
from pearl.trainer.families import FAMILIES, Family
from pearl.trainer.objectives.base import Objective

if TYPE_CHECKING:
    from pearl.trainer.learner import Learner

FULL_BELOW = 100_000_000


class ModelError(PearlError, RuntimeError):
    """A model that cannot be loaded or trained; the message says why and what to do."""


@dataclass(frozen=True)
class Loaded:
    """A model with its processor and family, and the type in which its weights were stored."""

    vlm: nn.Module
    processor: Any
    family: Family
    stored_dtype: torch.dtype


def load(config: TrainConfig, objective: Objective) -> Loaded:
    """The model in fp32 or bf16 as its weights are to be kept, with the objective's special tokens added.

    Raises:
        ModelError: it is not there, is no vision-language model, has pickle weights, or belongs to a family that
            cannot be trained.
    """
    prepare_torchvision()
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    name = config.model or str(files("pearl") / "assets" / "vlm-nano")
    refuse_pickle(name, config.allow_pickle)
    code = {"trust_remote_code": config.trust_remote_code}
    try:
        settings = AutoConfig.from_pretrained(name, **code)
        if settings.model_type not in FAMILIES:
            there = ", ".join(FAMILIES)
            raise ModelError(f"{name} is of the family {settings.model_type!r}; those that can be trained: {there}")
        if getattr(settings, "quantization_config", None) is not None:
            raise ModelError(f"{name} has quantized weights, which cannot be trained: give the model it was made from")
        processor = AutoProcessor.from_pretrained(name, **code)
        with quiet_transformers():
            both: Any = AutoModelForImageTextToText.from_pretrained(
                name, dtype=torch.float32, attn_implementation=config.attention, output_loading_info=True,
                use_safetensors=None if config.allow_pickle else True, **code,
            )  # fmt: skip
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, PearlError):
            raise
        first = " ".join(str(error).split())
        raise ModelError(f"the model {name} cannot be loaded: {first[:400]}") from error
    vlm, found = both
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"{name} lacks {len(missing)} of its model's weights, such as {missing[0]}")
    pixels = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    family = FAMILIES[settings.model_type](image_options={k: v for k, v in pixels.items() if v is not None})
    family.check_options()
    _add_tokens(vlm, processor, objective)
    stored = settings.dtype if isinstance(settings.dtype, torch.dtype) else torch.float32
    return Loaded(vlm, processor, family, stored)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' bars and notes on reading and writing weights; the bars of downloads stay."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def refuse_pickle(name: str, allowed: bool) -> None:
    """
    Raises:
        ModelError: a folder has weights only as pickle, which may run code when it is read.
    """
    folder = Path(name)
    if allowed or not folder.is_dir() or list(folder.glob("*.safetensors")):
        return
    if found := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)):
        raise ModelError(
            f"{name} has its weights as pickle ({found[0]}), which may run code: convert them to safetensors, or say "
            "--allow-pickle if you trust whoever made them"
        )


def _add_tokens(vlm: Any, processor: Any, objective: Objective) -> None:
    if not objective.special_tokens:
        return
    processor.tokenizer.add_special_tokens({"additional_special_tokens": list(objective.special_tokens)})
    if len(processor.tokenizer) > vlm.get_input_embeddings().num_embeddings:
        vlm.resize_token_embeddings(len(processor.tokenizer), mean_resizing=True)


def make_trainable(loaded: Loaded, config: TrainConfig, objective: Objective) -> nn.Module:
    """Decides for every weight whether it is trained; under LoRA the model comes back wrapped by PEFT.

    All linear layers of the parts that are not frozen get adapters, the head excepted. The rows of an objective's
    special tokens are trained in either case.
    """
    vlm: Any = loaded.vlm
    for name, parameter in vlm.named_parameters():
        parameter.requires_grad_(part_of(name, loaded.family) not in config.freeze)
    total = sum(parameter.numel() for parameter in vlm.parameters())
    tune = config.tune if config.tune != "auto" else "full" if total < FULL_BELOW else "lora"
    if not any(parameter.requires_grad for parameter in vlm.parameters()):
        raise ModelError("nothing of the model is left to train: freeze less")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # methods that transformers 6 will have renamed
        vlm = vlm if tune == "full" else _with_adapters(loaded, config, objective)
        if config.gradient_checkpointing:
            vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made: nn.Module = vlm
    return made


def _with_adapters(loaded: Loaded, config: TrainConfig, objective: Objective) -> Any:
    from peft import LoraConfig, get_peft_model

    vlm: Any = loaded.vlm
    head = vlm.get_output_embeddings()
    targets = [
        name
        for name, module in vlm.named_modules()
        if isinstance(module, nn.Linear) and module is not head and part_of(name, loaded.family) not in config.freeze
    ]
    if not targets:
        raise ModelError("no linear layer is left for adapters: freeze less, or --tune full")
    tokens = loaded.processor.tokenizer.convert_tokens_to_ids(list(objective.special_tokens))
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="|".join(re.escape(name) for name in targets),
        trainable_token_indices=tokens or None,
    )
    return get_peft_model(vlm, lora)


def part_of(name: str, family: Family) -> str | None:
    """Whether a weight or module belongs to vision, projector or language; a projector may lie inside of vision."""
    parts = {
        "projector": family.projector_parts,
        "vision": family.vision_parts,
        "language": (family.language_part, "lm_head"),
    }
    inner = name.removeprefix("model.") + "."
    return next((part for part, names in parts.items() if inner.startswith(tuple(f"{n}." for n in names))), None)


def describe_trainable(learner: Learner) -> list[tuple[str, int, int]]:
    """For each part of what is trained, the model's and the objective's: its name, trained and all parameters."""
    counts: dict[str, list[int]] = {}
    for name, parameter in learner.named_parameters():
        inner = name.removeprefix("vlm.").removeprefix("base_model.model.")
        part = "objective" if name.startswith("losses.") else part_of(inner, learner.family) or "other"
        counts.setdefault(part, [0, 0])
        counts[part][0] += parameter.numel() * parameter.requires_grad
        counts[part][1] += parameter.numel()
    return [(part, trained, total) for part, (trained, total) in counts.items()]


def trainable_text(learner: Learner) -> str:
    """The same in a line a part."""
    parts = describe_trainable(learner)
    adapters = " as LoRA adapters" if learner.base is not learner.vlm else ""
    lines = [f"trained parameters: {sum(part[1] for part in parts):,} of {sum(part[2] for part in parts):,}{adapters}"]
    notes = {"objective": "  (kept in checkpoints, not in the model)"}
    lines += [f"  {part:<10} {trained:>14,} of {total:>14,}{notes.get(part, '')}" for part, trained, total in parts]
    return "\n".join(lines)


def trained_state(learner: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name; what a checkpoint holds beside the base model's name."""
    return {name: p.detach().cpu().contiguous() for name, p in learner.named_parameters() if p.requires_grad}


def load_trained_state(learner: nn.Module, state: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ModelError: the weights are not those of this model and these settings.
    """
    mine = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    if mine.keys() != state.keys():
        odd = sorted(mine.keys() ^ state.keys())
        raise ModelError(f"the checkpoint does not fit: {len(odd)} weights are in one only, such as {odd[0]}")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(state[name])


def merged(vlm: nn.Module) -> Any:
    """The plain model of transformers, adapters merged into it."""
    wrapped: Any = vlm
    return wrapped.merge_and_unload() if hasattr(wrapped, "merge_and_unload") else wrapped
