"""Checks that a step on this device is the step of a CPU in full precision.

    python -m recipes.vlm_nano.check_device --data runs/vlm_nano/data --device cuda

For each kind of step the loss, and the cosine between the gradients of the language model, and of the vision tower.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from recipes.vlm_nano.batches import Batch, Batches, Stock
from recipes.vlm_nano.corpus import texts
from recipes.vlm_nano.losses import Pupil
from recipes.vlm_nano.model import build_model, train_tokenizer

KINDS = ("objects", "places", "sight", "joint")
LEAST_COSINE = 0.98
"""What bf16 leaves; on a CPU it leaves 0.999."""


def gradients(pupil: Pupil, kind: str, batch: Batch, device: str, precise: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients of each part, end to end."""
    pupil.zero_grad()
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=not precise):
        loss: Tensor = getattr(pupil, f"{kind}_loss")(batch.to(device)).loss
    loss.backward()
    parts = {"language": pupil.model.model.language_model, "vision": pupil.model.model.visual}
    found = {
        name: torch.cat([p.grad.flatten().double().cpu() for p in part.parameters() if p.grad is not None])
        for name, part in parts.items()
        if any(p.grad is not None for p in part.parameters())
    }
    return loss.item(), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/vlm_nano/data"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()

    stock = Stock(options.data)
    tokenizer = train_tokenizer(texts(stock.questions[:100]))
    torch.manual_seed(0)
    exact = Pupil(build_model(tokenizer))
    exact.noise = 0.0
    tried = deepcopy(exact).to(options.device)
    worst = 1.0
    for kind in KINDS:
        seeing = kind in ("sight", "joint")
        batches = Batches(stock, tokenizer, options.batch, seeing=seeing, cropping=0.6, more=kind == "sight")
        batch = batches.draw(1)
        expected, right = gradients(exact, kind, batch, "cpu", precise=True)
        loss, found = gradients(tried, kind, batch, options.device, precise=False)
        cosines = {name: float(torch.cosine_similarity(found[name], right[name], dim=0)) for name in right}
        print(f"{kind}: loss {loss:.4f} for {expected:.4f}; cosines {cosines}", flush=True)
        worst = min(worst, *cosines.values())
    if not worst > LEAST_COSINE:
        raise SystemExit(f"a gradient is not that of the CPU: cosine {worst:.3f}")


if __name__ == "__main__":
    main()
