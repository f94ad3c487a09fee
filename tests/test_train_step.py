"""The benchmark of a training step: all variants do the same, and the packed one saves what is claimed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import train_step
from benchmarks.train_step import Shape, Variants, work
from pearl.records import Trajectory
from tests.plain import picture, step, trajectory

VISION = {
    "depth": 2, "hidden_size": 128, "intermediate_size": 352, "num_heads": 2, "fullatt_block_indexes": [1]
}  # fmt: skip


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Variants:
    """The small shape's proportions, a twentieth of its width and depth; two crops, as the demo has them."""
    torch.set_num_threads(1)
    monkeypatch.setitem(train_step.SHAPES, "small", Shape(192, 512, 4, 3, 1, 8192, VISION, torch.float32, lora=False))
    return Variants("small", [two_crops()], 512 * 512, "cpu")


def two_crops() -> Trajectory:
    thought = "Let me take a closer look at the cup on the left, of which this view shows the colour. " * 2
    steps = [step(thought, picture(number, 224, 196)) for number in (1, 2)]
    return trajectory(*steps, image=picture(0, 384, 384), question="What colour is the cup on the left of the table?")


def test_three_forwards_have_the_loss_of_the_packed_one(variants: Variants) -> None:
    assert variants.step("three") == pytest.approx(variants.step("pearl"), rel=1e-4)
    assert variants.step("sft") < variants.step("pearl")


def test_the_packed_forward_saves_operations(variants: Variants) -> None:
    """Operations can be counted on a machine that is not quiet; docs/performance.md has the seconds."""
    counted = work(variants.step)
    assert counted["pearl"] <= 1.3 * counted["sft"]
    assert counted["three"] >= 2.5 * counted["pearl"]
