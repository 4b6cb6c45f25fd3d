"""The training loop: resumed to the bit, logged once, stopped before it is too late."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ctf.common import rng, storage
from ctf.common.errors import Stopped, UserError
from ctf.training import loop, state
from ctf.training.state import collect, restore, save_state
from tests.conftest import without_times

PICTURES = np.arange(20, 32)


class Killed(Exception):
    """Stands for a SIGKILL: nothing is caught on its way out."""


class Line(nn.Module):
    """A line through noisy points, with dropout, learned by AdamW: a `loop.Trainable`."""

    def __init__(self, killed_after: float = math.inf) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 2)
        self.optimizer = loop.make_optimizer(self.line, 0.1, (0.9, 0.95), 0.05)
        self.killed_after = killed_after
        self.steps_made: list[int] = []
        self.evaluations = 0

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        if len(self.steps_made) >= self.killed_after:
            raise Killed
        self.steps_made.append(step)
        x = torch.from_numpy(rng.generator(7, step).normal(size=(4, 3))).float()
        rng.seed_dropout(7, 1, step)
        loss = (nn.functional.dropout(self.line(x)) - x.sum(1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = loop.update(self.optimizer, loss.detach(), 0.1, 1.0, step, "loss", PICTURES)
        return {"loss": loss.detach(), "norm": norm, "number": float(step)}

    def evaluate(self) -> Mapping[str, float]:
        self.evaluations += 1
        return {"bias": float(self.line.bias.detach().sum())}

    def state(self) -> Mapping[str, Tensor]:
        return collect(line=self.line, optimizer=self.optimizer)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        restore(tensors, line=self.line, optimizer=self.optimizer)


@pytest.fixture(autouse=True)
def save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# --- run ------------------------------------------------------------------------------------------


def test_lines_are_means_and_evaluations_fall_on_them(tmp_path: Path) -> None:
    line, reported = Line(), []
    loop.run(
        line, tmp_path, 70, evaluate_every=45, progress=lambda *given: reported.append(given[:2])
    )
    train = [entry for entry in lines(tmp_path) if entry["split"] == "train"]
    val = [entry for entry in lines(tmp_path) if entry["split"] == "val"]
    assert [entry["step"] for entry in train] == [20, 40, 60, 70]
    assert [entry["number"] for entry in train] == [9.5, 29.5, 49.5, 64.5]
    assert [entry["step"] for entry in val] == [40, 70]  # the whole lines nearest to 45, and last
    assert line.evaluations == 2
    assert reported == [(20, 70), (40, 70), (60, 70), (70, 70)]
    assert all(entry["seconds"] >= 0 for entry in lines(tmp_path))


@pytest.mark.parametrize("kills", [[1], [19], [20], [21], [45], [69], [25, 25], [20, 20, 20, 9]])
def test_resumed_equals_uninterrupted(tmp_path: Path, kills: list[int]) -> None:
    whole, resumed = Line(), Line()
    loop.run(whole, tmp_path / "whole", 70, evaluate_every=20)
    for kill in kills:
        with pytest.raises(Killed):
            loop.run(Line(kill), tmp_path / "killed", 70, evaluate_every=20)
    loop.run(resumed, tmp_path / "killed", 70, evaluate_every=20)
    for name, value in whole.state().items():
        assert torch.equal(resumed.state()[name], value), name
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")
    seconds = [entry["seconds"] for entry in lines(tmp_path / "killed")]
    assert seconds == sorted(seconds)


def test_at_most_one_line_of_work_is_lost(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        loop.run(Line(45), tmp_path, 70, evaluate_every=20)
    line = Line()
    loop.run(line, tmp_path, 70, evaluate_every=20)
    assert line.steps_made == list(range(40, 70))


def test_killed_after_its_last_state_it_makes_no_step(tmp_path: Path) -> None:
    loop.run(Line(), tmp_path, 40, evaluate_every=20)
    before = (tmp_path / "metrics.jsonl").read_text()
    line = Line()
    loop.run(line, tmp_path, 40, evaluate_every=20)
    assert line.steps_made == [] and (tmp_path / "metrics.jsonl").read_text() == before


def test_a_line_cut_short_is_written_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        loop.run(Line(45), tmp_path, 70, evaluate_every=20)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "spl')
    loop.run(Line(), tmp_path, 70, evaluate_every=20)
    loop.run(Line(), tmp_path / "whole", 70, evaluate_every=20)
    assert without_times(tmp_path) == without_times(tmp_path / "whole")


def test_a_damaged_state_costs_no_more_than_its_line(tmp_path: Path) -> None:
    whole, resumed = Line(), Line()
    loop.run(whole, tmp_path / "whole", 70, evaluate_every=20)
    with pytest.raises(Killed):
        loop.run(Line(45), tmp_path / "killed", 70, evaluate_every=20)
    newest = max((tmp_path / "killed" / "state").iterdir())
    newest.write_bytes(newest.read_bytes()[:-10])
    loop.run(resumed, tmp_path / "killed", 70, evaluate_every=20)
    assert resumed.steps_made == list(range(20, 70))
    for name, value in whole.state().items():
        assert torch.equal(resumed.state()[name], value), name
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")


class Terminated(Line):
    """Gets a SIGTERM in the middle of a step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(step)


@pytest.mark.parametrize("stops", [[0], [19], [20], [44], [68], [3, 9, 40, 41]])
def test_sigterm_saves_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: list[int]
) -> None:
    """After the step, in the middle of a line; what is logged in the end is the same."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 3600.0)
    whole, resumed = Line(), Line()
    loop.run(whole, tmp_path / "whole", 70, evaluate_every=20)
    before = signal.getsignal(signal.SIGTERM)
    for stop in stops:
        said = rf"stopped: stopped after step {stop + 1} and saved; run it again to resume"
        with pytest.raises(Stopped, match=said):
            loop.run(Terminated(stop), tmp_path / "stopped", 70, evaluate_every=20)
        assert signal.getsignal(signal.SIGTERM) == before
    loop.run(resumed, tmp_path / "stopped", 70, evaluate_every=20)
    assert resumed.steps_made[0] == stops[-1] + 1  # not a step is lost
    for name, value in whole.state().items():
        assert torch.equal(resumed.state()[name], value), name
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "whole")


def test_sigterm_in_the_last_step_is_the_end(tmp_path: Path) -> None:
    line = Terminated(69)
    loop.run(line, tmp_path, 70, evaluate_every=20)
    assert len(line.steps_made) == 70


class Counting(Line):
    """Sees 512 tokens in half a second; its evaluations take long, which is not its speed."""

    now = 0.0

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        Counting.now += 0.5
        return {**super().step(step), "tokens": 512}

    def evaluate(self) -> Mapping[str, float]:
        Counting.now += 100.0
        return super().evaluate()


def test_what_is_counted_is_logged_per_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: Counting.now)
    with pytest.raises(Killed):
        loop.run(Counting(45), tmp_path, 70, evaluate_every=20)
    loop.run(Counting(), tmp_path, 70, evaluate_every=20)
    train = [entry for entry in lines(tmp_path) if entry["split"] == "train"]
    assert [entry["tokens_per_second"] for entry in train] == [1024.0] * 4
    assert not any("tokens" in entry for entry in lines(tmp_path))


def test_states_are_saved_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 3600.0)
    saved = []
    monkeypatch.setattr(state, "save_state", lambda folder, step, *_: saved.append(step))
    loop.run(Line(), tmp_path, 70, evaluate_every=20)
    assert saved == [70]


def test_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(Is a directory\)"):
        loop.run(Line(), tmp_path, 20, evaluate_every=20)


def test_seconds_per_step() -> None:
    line = Line()
    assert 0 < loop.seconds_per_step(line, warm_up=1, timed=3) < 5
    assert line.steps_made == [0, 1, 2, 3]


def test_last_metrics(tmp_path: Path) -> None:
    assert loop.last_metrics(tmp_path, "val") == {}
    loop.run(Line(), tmp_path, 50, evaluate_every=20)
    assert loop.last_metrics(tmp_path, "train")["number"] == 44.5
    assert loop.last_metrics(tmp_path, "val").keys() == {"step", "split", "bias", "seconds"}


# --- begin and finish -----------------------------------------------------------------------------


def test_a_stage_from_begin_to_finish(tmp_path: Path) -> None:
    folder, config = tmp_path / "stage", {"model": {"width": 8}, "seed": 0}
    assert loop.begin(folder, config)
    assert not loop.is_finished(folder)
    line = Line()
    loop.run(line, folder, 20, evaluate_every=20)
    assert loop.begin(folder, config)
    assert (folder / "state").is_dir()
    loop.finish(folder, line.line.state_dict(), {"a": "b"})
    assert loop.is_finished(folder)
    assert not loop.begin(folder, config)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "metrics.jsonl", "model.safetensors",
    ]  # fmt: skip


def test_a_state_that_a_kill_left_beside_finished_weights_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    loop.begin(folder, {"a": 1})
    (folder / ".model.safetensors.124.tmp").write_text("half")
    save_state(folder / "state", 20, {"x": torch.zeros(1)})
    storage.save_tensors(folder / "model.safetensors", {"x": torch.zeros(1)})
    assert not loop.begin(folder, {"a": 1})
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


# --- one step -------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 2**32),
    epochs=st.integers(1, 4),
)
@settings(deadline=None, max_examples=50)
def test_every_epoch_is_a_permutation(count: int, batch_size: int, seed: int, epochs: int) -> None:
    steps = -(-count * epochs // batch_size)
    drawn = np.concatenate(
        [loop.batch_indices(count, batch_size, seed, step) for step in range(steps)]
    )
    assert len(drawn) == steps * batch_size
    for epoch in range(epochs):
        part = drawn[epoch * count : (epoch + 1) * count]
        assert sorted(part.tolist()) == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(loop.batch_indices(50, 50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)
    }
    assert len(orders) == 6


def test_randomness_depends_on_the_key_alone() -> None:
    first = rng.generator(0, 3, 5).random(4)
    rng.generator(9).random(100)
    assert (rng.generator(0, 3, 5).random(4) == first).all()
    assert not np.isclose(rng.generator(0, 5, 3).random(4), first).any()
    rng.seed_dropout(0, 4, 1)
    mask = torch.rand(4)
    torch.rand(100)
    rng.seed_dropout(0, 4, 1)
    assert torch.equal(torch.rand(4), mask)


def test_learning_rate() -> None:
    def at(step: int, schedule: loop.Schedule = "cosine") -> float:
        return loop.learning_rate(step, 110, 2.0, 10, schedule, 0.1)

    assert [at(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert at(10) == pytest.approx(2.0)
    assert at(60) == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way
    assert at(35) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert at(110) == at(1000) == pytest.approx(0.2)
    assert [at(step, "constant") for step in (4, 10, 109)] == pytest.approx([1.0, 2.0, 2.0])
    assert loop.learning_rate(0, 1, 2.0, 0, "cosine", 0.1) == pytest.approx(2.0)


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Embedding(3, 4), nn.Conv2d(1, 2, 3), nn.LayerNorm(4))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    optimizer = loop.make_optimizer(module, 0.5, (0.9, 0.95), 0.25)
    sum((p * 0).sum() for p in module.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    for name, parameter in module.named_parameters():
        expected = 1 - 0.5 * 0.25 if name in ("0.weight", "1.weight") else 1.0
        assert torch.equal(parameter, torch.full_like(parameter, expected)), name


def test_frozen_weights_are_not_the_optimisers() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    module.bias.requires_grad_(True)
    groups = loop.make_optimizer(module, 0.1, (0.9, 0.95), 0.1).param_groups
    assert [len(group["params"]) for group in groups] == [0, 1]


@pytest.mark.parametrize(("scale", "expected"), [(0.1, 0.5), (1.0, 1.0)])
def test_long_gradients_are_clipped(scale: float, expected: float) -> None:
    x = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([x], lr=123.0)
    loss = scale * (3 * x[0] + 4 * x[1])
    loss.backward()
    norm = loop.update(optimizer, loss.detach(), 0.5, 1.0, 0, "loss", PICTURES)
    assert float(norm) == pytest.approx(5 * scale)  # before clipping
    # By the given rate, along (3, 4) / 5, of the length that is left.
    assert x.tolist() == pytest.approx([-0.5 * expected * 0.6, -0.5 * expected * 0.8])


def exploding(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "loss is nan", x.sum() * torch.nan
    yield "loss is inf", x.sum() + torch.inf
    yield "gradient norm of the loss is", x.sub(x.detach()).abs().sqrt().sum()  # of 0: inf * 0


@pytest.mark.parametrize("case", range(3))
def test_it_stops_before_what_is_not_finite(case: int) -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.AdamW([x], lr=0.1)
    first = x.square().sum()
    first.backward()
    loop.update(optimizer, first.detach(), 0.1, 1.0, 0, "loss", PICTURES)
    before = x.detach().clone(), {k: v.clone() for k, v in optimizer.state[x].items()}
    message, loss = list(exploding(x))[case]
    optimizer.zero_grad()
    loss.backward()
    named = r"on a batch of 12, the pictures 20, 21, 22, 23, 24, 25, 26, 27, \.\.\.; stopped"
    with pytest.raises(UserError, match=f"step 17: {message}.*{named}.*\n.*learning rate"):
        loop.update(optimizer, loss.detach(), 0.1, 1.0, 17, "loss", PICTURES)
    assert torch.equal(x, before[0])
    for name, value in before[1].items():
        assert torch.equal(optimizer.state[x][name], value)


def test_moving_average() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema = {"weight": torch.zeros(1, 1)}
    expected = 0.0
    for step in range(60):
        value = float(step) + 1
        with torch.no_grad():
            module.weight.fill_(value)
        loop.update_ema(ema, module, 0.8, step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert float(ema["weight"]) == pytest.approx(expected, rel=1e-5)
    # Once the decay stands still, it lags decay / (1 - decay) steps behind a straight line.
    assert float(ema["weight"]) == pytest.approx(60 - 0.8 / 0.2, rel=1e-3)
