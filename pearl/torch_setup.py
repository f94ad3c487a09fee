"""torch's own oddities: torchvision on a CPU-only build, the ways in which it says that memory is used up."""

from __future__ import annotations

from functools import cache

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@cache
def prepare_torchvision() -> torch.library.Library | None:
    """Call this before torchvision, timm or a transformers model is imported.

    torchvision's compiled operators are built against CUDA; without it their registration fails and with it
    `import torchvision`. Declaring the schemas that its Python side refers to is enough for transforms and image
    processors, which is all that is used here (`torchvision.ops.nms` itself stays unavailable).
    """
    if torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        for operator in ("nms", "qnms"):
            library.define(operator + _SCHEMA)
    except RuntimeError:  # a CPU build of torchvision, which brings them itself
        return None
    return library  # the declarations live as long as this object


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the machine, which torch says in a RuntimeError."""
    said = ("out of memory", "not enough memory", "allocate memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in said)
