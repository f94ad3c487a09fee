"""`torch.optim.Muon` that takes all matrices of one shape at once, which saves a GPU nine of ten launches."""

from __future__ import annotations

from collections import defaultdict
from math import sqrt
from typing import Any

import torch
from torch import Tensor


class BatchedMuon(torch.optim.Muon):
    """Steps and state are those of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` and Nesterov momentum."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            by_shape = defaultdict[torch.Size, list[Tensor]](list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, matrices in by_shape.items():
                gradients = [m.grad for m in matrices if m.grad is not None]
                moments = [self._momentum(matrix) for matrix in matrices]
                torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
                ahead = torch.stack(torch._foreach_lerp(gradients, moments, group["momentum"]))
                updates = orthogonal(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"]).float()
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, updates.unbind(), alpha=-group["lr"] * 0.2 * sqrt(max(shape)))

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Of each of (N, rows, columns) about its nearest orthogonal matrix, by Newton and Schulz's iteration in bf16."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.bfloat16().mT if tall else matrices.bfloat16()
    found = found / torch.linalg.vector_norm(found, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found
