"""What a step of `pearl` costs beside a step of `sft`, and beside three padded forwards as published code makes them.

    python -m benchmarks.train_step --data demo/traj.parquet                 # a CPU: hidden 768, vocabulary 32,768
    python -m benchmarks.train_step --data demo/traj.parquet --shape 3b      # a GPU: Qwen2.5-VL-3B's shape, LoRA, bf16

All three take the same trajectories (those with two tool images) and the same random model, in turn, in one run; the
ratios are of medians. The small shape keeps Qwen2.5-VL-3B's proportion between vision tower and language model (about
0.9 of the work of a visual token). How far a step is from the limit is its work, as PyTorch counts it, against what a
large matrix product reaches on this machine. `three` is one batch of the full, source and target view, each padded to the longest, images
through the vision tower for each view, logits everywhere, backward through all.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from pearl.images import header
from pearl.parquet import read_trajectories
from pearl.records import Trajectory
from pearl.torch_setup import prepare_torchvision
from pearl.trainer.conversation import Conversation, load_template
from pearl.trainer.families import QwenVL
from pearl.trainer.learner import Learner
from pearl.trainer.objectives.base import Objective
from pearl.trainer.objectives.pearl import Pearl, distance
from pearl.trainer.objectives.sft import Sft
from pearl.trainer.packing import Batch, Example, Packer
from pearl.trainer.views import ViewEncoder

VARIANTS = ("sft", "pearl", "three")


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5-VL's size; heads are 64 or 128 wide."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    vision: dict[str, Any]
    dtype: torch.dtype
    lora: bool


SHAPES = {
    "small": Shape(
        768, 2048, 10, 12, 4, 32_768, {"depth": 6, "hidden_size": 448, "intermediate_size": 1232, "num_heads": 7,
        "fullatt_block_indexes": [1, 3, 5]}, torch.float32, False,
    ),
    "3b": Shape(
        2048, 11_008, 36, 16, 2, 151_936, {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420,
        "num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31]}, torch.bfloat16, True,
    ),
}  # fmt: skip


def build(shape: Shape, texts: Iterable[str], max_pixels: int, device: str) -> tuple[Any, Any]:
    """A model of this shape with random weights, on `device`, and its processor."""
    prepare_torchvision()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from recipes.vlm_nano.model import SPECIAL, build_processor, train_tokenizer

    processor = build_processor(train_tokenizer(texts))
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": max_pixels}
    ids = dict(zip(SPECIAL, processor.tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    width = shape.hidden // shape.heads // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.groups, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                "mrope_section": [width // 4, width * 3 // 8, width - width // 4 - width * 3 // 8]},
        },
        vision_config={"out_hidden_size": shape.hidden, "patch_size": 14, **shape.vision},
        image_token_id=ids["<|image_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(shape.dtype)
    with torch.device(device):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    if shape.lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=64, lora_alpha=128, target_modules=r".*(proj|qkv|fc1|fc2|mlp\.0|mlp\.2)")
        model = get_peft_model(model, lora)
    return model, processor


class Variants:
    """One step, forward and backward, of each variant, on the same trajectories."""

    def __init__(self, shape: str, trajectories: list[Trajectory], max_pixels: int, device: str) -> None:
        self.shape, self.device = SHAPES[shape], device
        texts = [f"{t.question} {t.answer} {t.conclusion} {s.thought} {s.observation.text} {json.dumps(s.call.arguments)}"
                 for t in trajectories for s in t.steps]  # fmt: skip
        self.vlm, self.processor = build(self.shape, texts, max_pixels, device)
        self.vlm.to(device)
        family = QwenVL()
        self.encoder = ViewEncoder(self.processor, family)
        base = self.vlm.get_base_model() if self.shape.lora else self.vlm
        packer = Packer(family, base.config, self.encoder.padding)
        objectives: dict[str, Objective] = {"sft": Sft(), "pearl": Pearl()}
        self.learners, self.batches = dict[str, Learner](), dict[str, Batch]()
        for name, objective in objectives.items():
            self.learners[name] = Learner(self.vlm, family, objective.losses(self.shape.hidden)).to(device).train()
            self.batches[name] = packer(list(self._examples(objective, trajectories))).to(device)
        self.three = list(self._examples(objectives["pearl"], trajectories))
        self.base = base

    def _examples(self, objective: Objective, trajectories: list[Trajectory]) -> Iterable[Example]:
        template = load_template("pearl")
        for trajectory in trajectories:
            conversation = Conversation(trajectory, template)
            images = [self.encoder.image(image) for image in conversation.images]
            yield objective.example(conversation, images, self.encoder)

    def step(self, name: str) -> float:
        """The loss; gradients are left behind."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self._three() if name == "three" else self._packed(name)
        loss.backward()
        value = loss.item()
        self.vlm.zero_grad(set_to_none=True)
        for learner in self.learners.values():
            learner.zero_grad(set_to_none=True)
        return value

    def _packed(self, name: str) -> Tensor:
        learner, batch = self.learners[name], self.batches[name]
        counts = learner.losses.counts(batch)
        weights = learner.losses.weights
        return torch.stack([weights[k] * v / counts[k] for k, v in learner(batch).items() if k in weights]).sum()

    def _three(self) -> Tensor:
        views = [example.views[name] for name in ("full", "source", "target") for example in self.three]
        images = [example.images for _ in range(3) for example in self.three]
        length = max(len(view) for view in views)
        ids = torch.full((len(views), length), self.encoder.padding)
        attention = torch.zeros_like(ids)
        for row, view in enumerate(views):
            ids[row, : len(view)], attention[row, : len(view)] = torch.from_numpy(view.ids), 1
        ids, attention = ids.to(self.device), attention.to(self.device)
        shown = [image[index].tensors for view, image in zip(views, images, strict=True) for index in view.images]
        pixels = {name: torch.cat([one[name] for one in shown]).to(self.device) for name in shown[0]}
        kinds = (ids == self.base.config.image_token_id).int()
        output = self.vlm(
            input_ids=ids, attention_mask=attention, mm_token_type_ids=kinds, output_hidden_states=True,
            use_cache=False, **pixels,
        )  # fmt: skip
        states, count = output.hidden_states[-1], len(self.three)
        learned = torch.zeros_like(ids, dtype=torch.bool)
        for row, view in enumerate(views[:count]):
            learned[row, : len(view)] = torch.from_numpy(view.supervised)
        rows, tokens = learned.nonzero(as_tuple=True)
        vlm = F.cross_entropy(output.logits[rows, tokens - 1].float(), ids[rows, tokens])
        ends = torch.tensor([len(view) - 1 for view in views], device=self.device)
        last = states[torch.arange(len(views), device=self.device), ends]
        jepa = distance(last[count : 2 * count].float(), last[2 * count :].detach().float(), "cosine").mean()
        losses: Any = self.learners["pearl"].losses
        ahead = losses.dynamics(states[rows, tokens - 1], self.base.get_input_embeddings()(ids[rows, tokens]))
        drift = F.smooth_l1_loss(ahead.float(), states[rows, tokens].detach().float())
        head = self.base.get_output_embeddings().weight.detach()
        token = F.cross_entropy(F.linear(ahead.to(head.dtype), head)[:-1].float(), ids[rows, tokens][1:])
        return vlm + 0.2 * (jepa + drift + token)


def work(step: Callable[[str], float]) -> dict[str, int]:
    """Floating-point operations of each step, forward and backward."""
    counted = {}
    for name in VARIANTS:
        with FlopCounterMode(display=False) as counter:
            step(name)
        counted[name] = counter.get_total_flops()
    return counted


def matmul_speed(dtype: torch.dtype, device: str, size: int) -> float:
    """Operations a second of a product of two square matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock: dict[str, Any] = {} if device == "cuda" else {"timer": time.process_time}  # as of the steps
    timed = Timer("left @ right", globals={"left": left, "right": right}, num_threads=1, **clock)
    return 2 * size**3 / timed.blocked_autorange(min_run_time=2).median


def measure(step: Callable[[str], float], repeats: int, on_gpu: bool) -> dict[str, list[float]]:
    """Seconds of each step: of the clock on a GPU, of the processor on a CPU, where others may be at work too."""
    clock = time.perf_counter if on_gpu else time.process_time
    synchronise: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats + 1):
        for name in VARIANTS if repeat % 2 else reversed(VARIANTS):
            gc.collect()
            synchronise()
            start = clock()
            step(name)
            synchronise()
            if repeat:  # the first is for warming up
                seconds[name].append(clock() - start)
    return seconds


def peak_megabytes(options: argparse.Namespace, name: str) -> float:
    """Of a process of its own that makes two steps (CPU), beyond what it holds before the first."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, options, name).result()


def _peak(options: argparse.Namespace, name: str) -> float:
    torch.set_num_threads(1)
    variants = _variants(options)
    variants.step(name)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    variants.step(name)
    return _memory("VmHWM") - before


def _memory(kind: str) -> float:
    """Megabytes of this process: `VmRSS` now, `VmHWM` at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


def _variants(options: argparse.Namespace) -> Variants:
    chosen = [
        trajectory
        for trajectory in read_trajectories(options.data)
        if sum(step.observation.image is not None for step in trajectory.steps) == 2
        and math.prod(header(trajectory.image.data)) >= options.image_pixels
    ]
    if len(chosen) < options.batch_size:
        raise SystemExit(f"{options.data} has only {len(chosen)} such trajectories with two tool images")
    step = max(1, len(chosen) // options.batch_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Variants(options.shape, chosen[::step][: options.batch_size], options.max_pixels, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/traj.parquet")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--image-pixels", type=int, default=0, help="only trajectories whose image has as many")
    parser.add_argument(
        "--max-pixels", type=int, default=512 * 512, help="of an image; those of the demo have 384 × 384"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(1)
    variants = _variants(options)
    on_gpu = variants.device == "cuda"
    memory = {name: _gpu_peak(variants, name) if on_gpu else peak_megabytes(options, name) for name in VARIANTS}
    seconds = measure(variants.step, options.repeats, on_gpu)
    times = {name: median(found) for name, found in seconds.items()}
    rows = {name: tuple(variants.batches[name].main.ids.shape) for name in ("sft", "pearl")}
    operations = work(variants.step)
    limit = matmul_speed(SHAPES[options.shape].dtype, variants.device, 8192 if on_gpu else 2048)
    tokens = sum(len(example.views["full"]) for example in variants.three)
    figures = {
        "seconds": {name: round(value, 4) for name, value in times.items()},
        "pearl_of_sft": round(times["pearl"] / times["sft"], 3),
        "three_of_pearl": round(times["three"] / times["pearl"], 3),
        "three_of_sft": round(times["three"] / times["sft"], 3),
        "tokens_per_second": {name: round(tokens / times[name]) for name in VARIANTS},
        "teraflop": {name: round(operations[name] / 1e12, 4) for name in VARIANTS},
        "of_matmul_speed": {name: round(operations[name] / times[name] / limit, 3) for name in VARIANTS},
        "peak_megabytes": {name: round(value) for name, value in memory.items()},
        "rows": rows,
        "shape": options.shape,
        "batch_size": options.batch_size,
        "repeats": options.repeats,
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, one thread",
    }
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


def _gpu_peak(variants: Variants, name: str) -> float:
    variants.step(name)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variants.step(name)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


if __name__ == "__main__":
    main()
