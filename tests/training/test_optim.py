"""Optimization steps: every image once an epoch, decay, clipping, and no step on nan."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ctf.common.errors import UserError
from ctf.training import optim

IMAGES = np.arange(20, 32)


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 2**32),
    epochs=st.integers(1, 4),
)
@settings(max_examples=50)
def test_every_epoch_is_a_permutation(count: int, batch_size: int, seed: int, epochs: int) -> None:
    steps = -(-count * epochs // batch_size)
    indices = np.concatenate(
        [optim.batch_indices(count, batch_size, seed, step) for step in range(steps)]
    )
    assert len(indices) == steps * batch_size
    for epoch in range(epochs):
        part = indices[epoch * count : (epoch + 1) * count]
        assert sorted(part.tolist()) == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(optim.batch_indices(50, 50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)
    }
    assert len(orders) == 6


def test_learning_rate() -> None:
    def at(step: int, schedule: optim.Schedule = "cosine") -> float:
        return optim.learning_rate(step, 110, 2.0, 10, schedule, 0.1)

    assert [at(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert at(10) == pytest.approx(2.0)
    assert at(60) == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way
    assert at(35) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert at(110) == at(1000) == pytest.approx(0.2)
    assert [at(step, "constant") for step in (4, 10, 109)] == pytest.approx([1.0, 2.0, 2.0])
    assert optim.learning_rate(0, 1, 2.0, 0, "cosine", 0.1) == pytest.approx(2.0)


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Embedding(3, 4), nn.Conv2d(1, 2, 3), nn.LayerNorm(4))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    optimizer = optim.make_optimizer(module, 0.5, (0.9, 0.95), 0.25)
    sum((p * 0).sum() for p in module.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    for name, parameter in module.named_parameters():
        expected = 1 - 0.5 * 0.25 if name in ("0.weight", "1.weight") else 1.0
        assert torch.equal(parameter, torch.full_like(parameter, expected)), name


def test_frozen_weights_are_left_out() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    module.bias.requires_grad_(True)
    groups = optim.make_optimizer(module, 0.1, (0.9, 0.95), 0.1).param_groups
    assert [len(group["params"]) for group in groups] == [0, 1]


@pytest.mark.parametrize(("scale", "expected"), [(0.1, 0.5), (1.0, 1.0)])
def test_long_gradients_are_clipped(scale: float, expected: float) -> None:
    x = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([x], lr=123.0)
    loss = scale * (3 * x[0] + 4 * x[1])
    loss.backward()
    norm = optim.update(optimizer, loss.detach(), 0.5, 1.0, step=0, name="loss", images_B=IMAGES)
    assert float(norm) == pytest.approx(5 * scale)  # before clipping
    # At the requested rate, along (3, 4) / 5, by the clipped length.
    assert x.tolist() == pytest.approx([-0.5 * expected * 0.6, -0.5 * expected * 0.8])


def exploding(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "loss is nan", x.sum() * torch.nan
    yield "loss is inf", x.sum() + torch.inf
    yield "gradient norm of the loss is", x.sub(x.detach()).abs().sqrt().sum()  # of 0: inf * 0


@pytest.mark.parametrize("case", range(3))
def test_values_that_are_not_finite_stop_it_before_the_update(case: int) -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.AdamW([x], lr=0.1)
    first = x.square().sum()
    first.backward()
    optim.update(optimizer, first.detach(), 0.1, 1.0, step=0, name="loss", images_B=IMAGES)
    before = x.detach().clone(), {k: v.clone() for k, v in optimizer.state[x].items()}
    message, loss = list(exploding(x))[case]
    optimizer.zero_grad()
    loss.backward()
    named = r"on a batch of 12, the images 20, 21, 22, 23, 24, 25, 26, 27, \.\.\.; stopped"
    with pytest.raises(UserError, match=f"step 17: {message}.*{named}.*\n.*learning rate"):
        optim.update(optimizer, loss.detach(), 0.1, 1.0, step=17, name="loss", images_B=IMAGES)
    assert torch.equal(x, before[0])
    for name, value in before[1].items():
        assert torch.equal(optimizer.state[x][name], value)


def test_on_a_gpu_values_are_checked_later_and_the_first_bad_one_is_named() -> None:
    checks = optim.Checks(deferred=True)
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([x], lr=0.1)
    for step, scale in enumerate((1.0, math.inf, math.nan)):
        optimizer.zero_grad()
        loss = (scale * x).sum()
        loss.backward()
        optim.update(
            optimizer, loss.detach(), 0.1, 1.0,
            step=step, name="loss", images_B=IMAGES + step, checks=checks,
        )  # fmt: skip
    with pytest.raises(UserError, match=r"step 1: loss is inf .* images 21, .*; stopped, and the"):
        checks.check()
    checks.check()  # what was reported is forgotten
    checks.add(torch.tensor(3.0), "loss", 4, IMAGES)
    checks.check()


def test_moving_average() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema = {"weight": torch.zeros(1, 1)}
    expected = 0.0
    for step in range(60):
        value = float(step) + 1
        with torch.no_grad():
            module.weight.fill_(value)
        optim.update_ema(ema, module, 0.8, step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert float(ema["weight"]) == pytest.approx(expected, rel=1e-5)
    # At a constant decay, it lags decay / (1 - decay) steps behind a straight line.
    assert float(ema["weight"]) == pytest.approx(60 - 0.8 / 0.2, rel=1e-3)
