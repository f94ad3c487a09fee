"""Loading a vision-language model, deciding what of it is trained, and saving it as the plain model that it was."""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from inspect import get_annotations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pearl.errors import PearlError
from pearl.images import encode
from pearl.machine import num_cores
from pearl.records import EncodedImage
from pearl.torch_setup import prepare_torchvision
from pearl.trainer.config import Precision, TrainConfig
from pearl.trainer.console import tell
from pearl.trainer.conversation import ImagePart, Turn
from pearl.trainer.families import FAMILIES, Family, Unknown, family_of
from pearl.trainer.objectives.base import Objective

if TYPE_CHECKING:
    from pearl.trainer.learner import Learner

FULL_BELOW = 100_000_000
BUILT_IN = "vlm-nano"
MOST_END_TOKENS = 8
"""Of a turn: a chat template may write more behind it than the views have."""


def place_of(model: str | None) -> str:
    """A model's folder or Hub id; None and `vlm-nano` are the model that ships with the package."""
    return str(files("pearl") / "assets" / BUILT_IN) if model in (None, BUILT_IN) else str(model)


class ModelError(PearlError, RuntimeError):
    """A model that cannot be loaded or trained; the message says why and what to do."""


@dataclass(frozen=True)
class Loaded:
    """A model with its processor and family, and the type in which its weights were stored."""

    vlm: nn.Module
    processor: Any
    family: Family
    stored_dtype: torch.dtype


def model_settings(config: TrainConfig) -> Any:
    """The model's configuration, without its weights.

    Raises:
        ModelError: it is not there, is no vision-language model, or its weights are quantized.
    """
    prepare_torchvision()
    from transformers import AutoConfig, AutoModelForImageTextToText

    name = place_of(config.model)
    with explained(name):
        settings = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
        if type(settings) not in AutoModelForImageTextToText._model_mapping and not config.trust_remote_code:
            raise ModelError(f"{name} is of the family {settings.model_type!r}, which is no vision-language model")
    if getattr(settings, "quantization_config", None) is not None:
        raise ModelError(f"{name} has quantized weights, which cannot be trained: give the model it was made from")
    return settings


def load(config: TrainConfig, objective: Objective) -> Loaded:
    """The model in fp32, with the objective's special tokens added.

    Raises:
        ModelError: it is not there, is no vision-language model, has pickle weights, or belongs to a family that
            cannot be trained.
    """
    settings, name = model_settings(config), place_of(config.model)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    refuse_pickle(name, config.allow_pickle)
    code = {"trust_remote_code": config.trust_remote_code}
    with explained(name):
        processor = AutoProcessor.from_pretrained(name, **code)
        with quiet_transformers():
            both: Any = AutoModelForImageTextToText.from_pretrained(
                name, dtype=torch.float32, attn_implementation=config.attention, output_loading_info=True,
                use_safetensors=None if config.allow_pickle else True, **code,
            )  # fmt: skip
    vlm, found = both
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"{name} lacks {len(missing)} of its model's weights, such as {missing[0]}")
    limit_pixels(processor, name, config.min_pixels, config.max_pixels)
    family = family_of(settings)()
    if isinstance(family, Unknown):
        check_unknown(vlm, processor, family, name)
    _add_tokens(vlm, processor, objective)
    stored = settings.dtype if isinstance(settings.dtype, torch.dtype) else torch.float32
    return Loaded(vlm, processor, family, stored)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """
    Raises:
        ModelError: in place of what transformers raises.
    """
    try:
        yield
    except PearlError:
        raise
    except Exception as error:  # a damaged folder makes transformers raise anything
        first = " ".join(str(error).split()) or type(error).__name__
        if (Path(name) / "model" / "config.json").exists():
            raise ModelError(f"{name} is the folder of a run; its model is {name}/model") from error
        here = "" if Path(name).exists() else " (there is no such folder)"
        raise ModelError(f"the model {name} cannot be loaded{here}: {first[:400]}") from error


@torch.no_grad()
def check_unknown(vlm: Any, processor: Any, family: Unknown, name: str) -> None:
    """Runs a conversation with two images of different shapes our way and the model's own, and says on stderr what follows.

    Raises:
        ModelError: the states or logits differ, or our way fails: the model cannot be trained here.
    """
    from pearl.trainer.learner import Learner
    from pearl.trainer.objectives.sft import NextToken
    from pearl.trainer.packing import Example, Packer
    from pearl.trainer.views import ViewEncoder

    kind, known = vlm.config.model_type, ", ".join(FAMILIES)
    try:
        encoder = ViewEncoder(processor, family)
        pictures = [
            Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 50).convert("RGB") for size in ((96, 64), (64, 96))
        ]
        images = [encoder.image(EncodedImage(encode(np.array(picture), "png"))) for picture in pictures]
        turns = [Turn("user", (ImagePart(0), "One?")), Turn("assistant", ("Two.",), True)]
        turns += [Turn("user", (ImagePart(1), "Three?")), Turn("assistant", ("Four.",), True)]
        view = encoder.view(turns, images)
        batch = Packer(family, vlm.config, encoder.padding, tree=False)([Example("", tuple(images), {"full": view})])
        ours = Learner(vlm, family, NextToken("full")).eval().states(batch).of("full", torch.arange(len(view)))
        content = [{"role": t.role, "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"}
                    for p in t.parts]} for t in turns]  # fmt: skip
        text = processor.apply_chat_template(content, tokenize=False)
        inputs = processor(text=[text], images=[pictures], return_tensors="pt")
        theirs = vlm.model(**inputs).last_hidden_state[0]
        apart = _apart(ours, theirs)
        head_apart = _apart(vlm.get_output_embeddings()(theirs), vlm(**inputs).logits[0])
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ModelError(
            f"{name} is of the family {kind!r}, which cannot be trained here ({reason}); known: {known}"
        ) from error
    if not apart <= 1e-3:
        raise ModelError(
            f"{name} is of the family {kind!r}, whose positions or images work in a way of their own (states differ "
            f"by {apart:.0%}): it cannot be trained here; known: {known}"
        )
    if not head_apart <= 1e-3:
        raise ModelError(
            f"{name} is of the family {kind!r}, whose logits are not its head's alone (they differ by {head_apart:.0%}, "
            f"as where they are scaled or capped): it cannot be trained here; known: {known}"
        )
    tell(
        f"note: nothing is known about the family {kind!r} (or its layers), so each view has a row of its own: slower; "
        "on an example its states and logits are right"
    )


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of (T, N) and (T', N) on the tokens that both have, but for the last, since turns may end
    differently; relative to the largest of `theirs`."""
    shared = min(len(ours), len(theirs)) - 1
    if abs(len(ours) - len(theirs)) > MOST_END_TOKENS:
        return math.inf
    return float((ours[:shared] - theirs[:shared]).abs().max() / theirs.abs().max())


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


def limit_pixels(processor: Any, name: str, smallest: int | None, largest: int | None) -> None:
    """Sets the processor's own limits, so that the model is saved with them and sees as large when it is used.

    Raises:
        ModelError: its image processor takes no such limits, or no size fits them.
    """
    limits = {k: v for k, v in {"min_pixels": smallest, "max_pixels": largest}.items() if v is not None}
    if not limits:
        return
    given = processor.image_processor
    if not limits.keys() <= get_annotations(getattr(given, "valid_kwargs", object)).keys():
        raise ModelError(f"{name}: its image processor takes no {' or '.join(limits)}; leave out the limits")
    limited = type(given).from_dict({**given.to_dict(), **limits})
    least, most = limited.size["shortest_edge"], limited.size["longest_edge"]
    if least > most:
        raise ModelError(f"{name}: images of at least {least:,} and at most {most:,} pixels: give both limits")
    processor.image_processor = limited


def _add_tokens(vlm: Any, processor: Any, objective: Objective) -> None:
    if not objective.special_tokens:
        return
    processor.tokenizer.add_tokens(list(objective.special_tokens), special_tokens=True)
    if len(processor.tokenizer) > vlm.get_input_embeddings().num_embeddings:
        vlm.resize_token_embeddings(len(processor.tokenizer), mean_resizing=True)


def make_trainable(loaded: Loaded, config: TrainConfig, objective: Objective) -> nn.Module:
    """Decides for every weight whether it is trained; under LoRA the model comes back wrapped by PEFT.

    All linear layers of the parts that are not frozen get adapters, the head excepted, and the rows of an objective's
    special tokens are trained beside them. What is trained is fp32; what is not stays bf16 in a bf16 run, where it
    is stored so.
    """
    vlm: Any = loaded.vlm
    for name, parameter in vlm.named_parameters():
        parameter.requires_grad_(part_of(name, loaded.family) not in config.freeze)
    total = sum(parameter.numel() for parameter in vlm.parameters())
    tune = config.tune if config.tune != "auto" else "full" if total < FULL_BELOW else "lora"
    if tune == "full" and "language" in config.freeze and objective.special_tokens:
        raise ModelError(
            f"{objective.name} has tokens of its own, whose rows are the language part's: do not freeze language, or "
            "--tune lora, which trains them alone"
        )
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
    if precision(config) == "bf16" and loaded.stored_dtype is torch.bfloat16:  # then nothing is lost by it
        for parameter in vlm.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    tokens = loaded.processor.tokenizer.convert_tokens_to_ids(list(objective.special_tokens))
    embeddings = vlm.get_input_embeddings()
    with_rows = [embeddings] if head.weight is embeddings.weight else [embeddings, head]
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="|".join(re.escape(name) for name in targets),
        trainable_token_indices={
            name: tokens for name, module in vlm.named_modules() if tokens and any(module is one for one in with_rows)
        }
        or None,
    )
    wrapped = get_peft_model(vlm, lora)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def precision(config: TrainConfig) -> Precision:
    if config.precision != "auto":
        return config.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def data_workers(config: TrainConfig) -> int:
    """Of a process; on a CPU they would take the cores that train."""
    if config.data_workers is not None:
        return config.data_workers
    cores = num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(4, max(0, cores - 1)) if torch.cuda.is_available() else 0


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
    notes = {"objective": "  (kept beside the model, which does not need it)"}
    lines += [f"  {part:<10} {trained:>14,} of {total:>14,}{notes.get(part, '')}" for part, trained, total in parts]
    return "\n".join(lines)


@torch.no_grad()
def trained_state(learner: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name; what a checkpoint holds beside the base model's name.

    Where each process has a shard of them, all must call this, and all get them whole.
    """
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    return {name: _gathered(weight).detach().cpu().contiguous() for name, weight in trained.items()}


@torch.no_grad()
def frozen_digest(learner: nn.Module) -> str:
    """Of the weights that are not trained, which a checkpoint does not hold: of each its name, and some of it."""
    digest = hashlib.sha256()
    for name, weight in learner.named_parameters():
        if not weight.requires_grad:
            digest.update(f"{name} {tuple(weight.shape)} ".encode())
            digest.update(weight.detach().flatten()[: 1 << 12].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _gathered(weight: Tensor) -> Tensor:
    """A weight whole, of the shards that FSDP or DeepSpeed made of it, if any; of DeepSpeed, the one in fp32."""
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    if hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        whole: Tensor = safe_get_full_fp32_param(weight)
        return whole
    return weight


def load_trained_state(learner: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Takes whole weights, on every process of several that have a shard each.

    Raises:
        ModelError: the weights are not those of this model and these settings.
    """
    mine = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    if mine.keys() != state.keys():
        odd = sorted(mine.keys() ^ state.keys())
        raise ModelError(f"the checkpoint does not fit: {len(odd)} weights are in one only, such as {odd[0]}")
    with torch.no_grad():
        for name, parameter in mine.items():
            weight = state[name]
            if isinstance(parameter, DTensor):
                weight = distribute_tensor(weight.to(parameter.device), parameter.device_mesh, parameter.placements)
            parameter.copy_(weight)


def merged(vlm: nn.Module) -> Any:
    """The plain model of transformers, adapters merged into it."""
    wrapped: Any = vlm
    return wrapped.merge_and_unload() if hasattr(wrapped, "merge_and_unload") else wrapped
