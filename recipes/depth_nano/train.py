"""Trains depth-nano on the arrays of `data.py`: DepthAnything's architecture at 2 million parameters.

    torchrun --nproc-per-node 2 -m recipes.depth_nano.train --minutes 150 --out runs/depth_nano/model

Resolution grows with progress (168, then 224 pixels), the learning rate follows a cosine, and an average of the
weights is what is saved. A run that was stopped continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pearl.torch_setup import prepare_torchvision
from recipes.depth_nano.data import SIZE, Arrays, open_arrays
from recipes.depth_nano.metrics import PairCounts, Reading, abs_rel

SEED = 7
BATCH = 16
WARMUP_STEPS = 300
EPS = 0.03
HELD_OUT = 150
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = ((0.60, 168), (1.01, 224))


def build_model() -> Any:
    prepare_torchvision()
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=128, num_hidden_layers=8, num_attention_heads=4, image_size=SIZE, patch_size=14,
        reshape_hidden_states=False,
    )  # fmt: skip
    backbone.out_features = ["stage2", "stage4", "stage6", "stage8"]
    model: Any = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=128, patch_size=14, reassemble_factors=[2, 1, 1, 0.5],
            neck_hidden_sizes=[32, 48, 64, 96], fusion_hidden_size=32, head_hidden_size=16,
        )
    )  # fmt: skip
    model.set_attn_implementation("eager")  # on a CPU 1.4 times as fast to train as SDPA at these sizes
    torch.nn.init.constant_(model.head.conv3.bias, 0.3)  # the output passes a ReLU: start where it has a gradient
    return model


def depth_loss(predicted: Tensor, inverse_depth: Tensor, masks: Tensor) -> Tensor:
    """Scale-invariant L1 between log inverse depths (B, H, W), objects weighted up, plus multi-scale gradients."""
    error = torch.log((predicted + EPS) / (inverse_depth + EPS))
    weights = object_weights(masks)
    mean = (weights * error).sum((1, 2)) / weights.sum((1, 2))
    residual = error - mean[:, None, None]
    loss = (weights * residual.abs()).sum() / weights.sum() + 0.2 * mean.abs().mean()
    for _ in range(3):
        residual = F.avg_pool2d(residual[:, None], 2)[:, 0]
        loss = loss + 0.2 * (residual.diff(dim=1).abs().mean() + residual.diff(dim=2).abs().mean())
    return loss


def object_weights(masks: Tensor) -> Tensor:
    """1 on the background; on an object more, the smaller it is, so that small objects are not lost."""
    batch, height, width = masks.shape
    codes = masks.long() + 1 + 16 * torch.arange(batch)[:, None, None]
    area = torch.bincount(codes.flatten(), minlength=16 * batch).clamp(min=1)
    weights = 1 + (0.03 * height * width / area).clamp(max=30)
    weights[::16] = 1
    return weights[codes]


class Batches:
    """Draws, crops, flips and recolours batches; `rank` and `step` decide everything."""

    def __init__(self, arrays: Arrays, rank: int) -> None:
        self.arrays, self.rank = arrays, rank

    def draw(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([SEED, step, self.rank])
        picks = np.sort(rng.integers(0, len(self.arrays) - HELD_OUT, BATCH))
        crop = int(SIZE * rng.uniform(0.75, 1.0))
        images, inverse, masks = [], [], []
        for pick in picks:
            top, left = rng.integers(0, SIZE - crop + 1, 2)
            window = np.s_[pick, top : top + crop, left : left + crop]
            step_x = -1 if rng.random() < 0.5 else 1
            images.append(self.arrays.images[window][:, ::step_x])
            inverse.append(self.arrays.inverse_depth[window][:, ::step_x])
            masks.append(self.arrays.masks[window][:, ::step_x])
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        gain = torch.from_numpy(rng.uniform(0.7, 1.4, (BATCH, 1, 1, 1)) * rng.uniform(0.9, 1.1, (BATCH, 3, 1, 1)))
        gamma = torch.from_numpy(rng.uniform(0.7, 1.4, (BATCH, 1, 1, 1)))
        pixels = (pixels.clamp(1e-4, 1) ** gamma.float() * gain.float()).clamp(0, 1)

        def nearest(values: list[np.ndarray]) -> Tensor:
            tensor = torch.from_numpy(np.stack(values).astype(np.float32))[:, None]
            return F.interpolate(tensor, (size, size), mode="nearest")[:, 0]

        return normalise(pixels), nearest(inverse), nearest(masks)


def normalise(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def validate(model: torch.nn.Module, arrays: Arrays, size: int) -> dict[str, float]:
    """Quick figures on the last scenes, which are not trained on; `evaluate.py` has the real ones."""
    counts = PairCounts()
    for index in range(len(arrays) - HELD_OUT, len(arrays)):
        pixels = torch.from_numpy(arrays.images[index].copy()).permute(2, 0, 1)[None].float() / 255
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        output = model(normalise(pixels)).predicted_depth[:, None]
        nearness = F.interpolate(output, (SIZE, SIZE), mode="bilinear")[0, 0].numpy()
        with np.errstate(divide="ignore"):
            depth = 1 / arrays.inverse_depth[index].astype(np.float32)
        readings = []
        for code in range(arrays.masks[index].max() + 1):
            rows, columns = np.nonzero(arrays.masks[index] == code)
            if len(rows) >= 20:
                area = float(np.ptp(rows) * np.ptp(columns))
                truth, read = np.median(depth[rows, columns]), np.median(nearness[rows, columns])
                readings.append(Reading(float(truth), float(read), float(rows.max()), area))
        counts.add(readings, abs_rel(nearness, depth))
    return counts.figures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/depth_nano/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/depth_nano/model"))
    parser.add_argument("--minutes", type=float, default=150)
    parser.add_argument("--peak-rate", type=float, default=1e-3, help="3e-4 where --init continues a trained model")
    parser.add_argument("--init", type=Path, help="start from these weights, a folder that save_pretrained wrote")
    options = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(SEED)
    model = build_model().to(memory_format=torch.channels_last)
    if options.init:
        model.load_state_dict(type(model).from_pretrained(options.init, dtype=torch.float32).state_dict())
    average = build_model()
    average.load_state_dict(model.state_dict())
    compiled = torch.compile(model, dynamic=False)
    parallel = DistributedDataParallel(compiled, static_graph=True)  # some of the architecture is unused
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.peak_rate, betas=(0.9, 0.98), weight_decay=0.05)
    arrays = open_arrays(options.data)
    batches = Batches(arrays, rank)
    checkpoint, log = options.out / "checkpoint.pt", options.out / "log.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]

    budget, last_report, losses = options.minutes * 60, spent, list[float]()
    begin = time.monotonic() - spent
    while True:
        clock = torch.tensor(time.monotonic() - begin)
        dist.broadcast(clock, 0)  # all processes must see the same progress
        spent = float(clock)
        progress = min(spent / budget, 1.0)
        size = next(pixels for share, pixels in STAGES if progress < share)
        rate = (
            options.peak_rate
            * min(1, (step + 1) / WARMUP_STEPS)
            * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        if rank == 0 and (spent - last_report > 240 or progress >= 1):
            last_report = spent
            figures = validate(average.eval(), arrays, size)
            line = {"step": step, "images": step * BATCH * world, "minutes": round(spent / 60, 1), "size": size,
                    "loss": round(float(np.mean(losses or [0])), 4), "rate": rate,
                    **{k: round(v, 4) for k, v in figures.items()}}  # fmt: skip
            losses.clear()
            with log.open("a") as file:
                print(json.dumps(line), file=file)
            print(json.dumps(line), flush=True)
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step, "spent": spent}, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
        if progress >= 1:
            break
        pixels, inverse, masks = batches.draw(step, size)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = parallel(pixels).predicted_depth
        loss = depth_loss(predicted.float(), inverse, masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        step += 1
    if rank == 0:
        export(average, options.out / "export")
    dist.destroy_process_group()


def export(model: Any, folder: Path) -> None:
    """Half-precision safetensors with a processor, as `from_pretrained` reads them."""
    from transformers import DPTImageProcessor

    model.half().save_pretrained(folder)
    DPTImageProcessor(
        do_resize=True, size={"height": SIZE, "width": SIZE}, keep_aspect_ratio=True, ensure_multiple_of=14,
        resample=3, do_normalize=True, image_mean=list(MEAN), image_std=list(STD), do_rescale=True,
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    main()
