"""Shared by the tests of trainers: steps that a team of threads computes in parts."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from ctf.common import threads
from ctf.training.state import collect, restore


def assert_steps_agree(whole: Any, in_parts: Any, steps: Iterable[int], parts: int) -> None:
    """Take steps whole and in parts, each from the same state; all is equal up to rounding."""
    assert in_parts.in_parts
    for step in steps:
        before = {name: tensor.clone() for name, tensor in collect(whole.parts()).items()}
        restore(in_parts.parts(), before)
        available = torch.get_num_threads()
        torch.set_num_threads(1)  # operators round as in a team
        expected = whole.step(step)
        torch.set_num_threads(available)
        with threads.team(in_parts.in_parts):
            assert len(threads.parts(len(whole.read_batch(step)[0]), smallest=2)) == parts
            metrics = in_parts.step(step)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-6), name
        for gradient, other in zip(gradients(in_parts), gradients(whole), strict=True):
            if other is None:
                assert gradient is None
            else:
                assert (gradient - other).norm() <= 1e-3 * other.norm() + 1e-5
        after, expected_after = collect(in_parts.parts()), collect(whole.parts())
        for name, tensor in expected_after.items():
            change, difference = tensor - before[name], tensor - after[name]
            # Adam moves a weight by its rate even where the gradient is nothing but rounding, as
            # are all gradients of some biases.
            if tensor.dim() > 1:
                assert difference.abs().mean() <= 0.05 * change.abs().mean() + 1e-8, name


def gradients(trainer: Any) -> list[Tensor | None]:
    optimizers = [part for name, part in trainer.parts().items() if name.endswith("optimizer")]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [parameter.grad for group in groups for parameter in group["params"]]
