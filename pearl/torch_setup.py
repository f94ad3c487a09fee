"""Import this before torchvision, timm or a transformers model.

torchvision's compiled operators are built against CUDA; on a CPU-only torch their registration fails and with it
`import torchvision`. Declaring the schemas that torchvision's Python side refers to is enough for transforms and
image processors, which is all that is used here (`torchvision.ops.nms` itself stays unavailable).
"""

from __future__ import annotations

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _declare_torchvision_operators() -> torch.library.Library | None:
    if torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        try:
            library.define(operator + _NMS)
        except RuntimeError:  # a CPU build of torchvision that brings them itself
            return None
    return library


_KEPT_ALIVE = _declare_torchvision_operators()
