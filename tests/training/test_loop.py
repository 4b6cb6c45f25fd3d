"""The training loop: resumed to the bit, each step logged once, stopped by SIGTERM."""

import json
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctf.common import rng, storage
from ctf.common.errors import Stopped, UserError
from ctf.training import loop, metrics_log, optim, state
from ctf.training.state import Part, collect, save_state
from tests.conftest import without_times

IMAGES = np.arange(20, 32)


class Killed(Exception):
    """Stands for a SIGKILL: nothing is caught on its way out."""


class Line(nn.Module):
    """A linear map with dropout, trained by AdamW: a `loop.Trainable`."""

    in_parts = False

    def __init__(self, killed_after: float = math.inf) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 2)
        self.optimizer = optim.make_optimizer(self.line, 0.1, (0.9, 0.95), 0.05)
        self.killed_after = killed_after
        self.checks = optim.Checks()
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
        norm = optim.update(
            self.optimizer, loss.detach(), 0.1, 1.0,
            step=step, name="loss", images_B=IMAGES, checks=self.checks,
        )  # fmt: skip
        return {"loss": loss.detach(), "norm": norm, "number": float(step)}

    def check(self) -> None:
        self.checks.check()

    def evaluate(self) -> Mapping[str, float]:
        self.evaluations += 1
        return {"bias": float(self.line.bias.detach().sum())}

    def parts(self) -> Mapping[str, Part]:
        return {"line": self.line, "optimizer": self.optimizer}


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
        line, tmp_path, 70, evaluate_every=45, progress=lambda *args: reported.append(args[:2])
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
    for name, value in collect(whole.parts()).items():
        assert torch.equal(collect(resumed.parts())[name], value), name
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")
    seconds = [entry["seconds"] for entry in lines(tmp_path / "killed")]
    assert seconds == sorted(seconds)


class Exploding(Line):
    """Its loss is not finite from a step on; it is on a GPU, as it were."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.checks = optim.Checks(deferred=True)

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        metrics = dict(super().step(step))
        if step >= self.at:
            self.checks.add(torch.tensor(math.nan), "loss", step, IMAGES)
        return metrics


@pytest.mark.parametrize("at", [20, 33, 39])
def test_a_step_that_went_wrong_is_neither_logged_nor_saved(tmp_path: Path, at: int) -> None:
    with pytest.raises(UserError, match=f"step {at}: loss is nan"):
        loop.run(Exploding(at), tmp_path, 70, evaluate_every=20)
    assert state.latest_state(tmp_path / "state") == 20
    assert [entry["step"] for entry in lines(tmp_path)] == [20, 20]


def test_nor_is_it_saved_when_sigterm_comes(tmp_path: Path) -> None:
    class Both(Exploding):
        def step(self, step: int) -> Mapping[str, Tensor | float]:
            if step == self.at + 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(step)

    with pytest.raises(UserError, match="step 25: loss is nan"):
        loop.run(Both(25), tmp_path, 70, evaluate_every=20)
    assert state.latest_state(tmp_path / "state") == 20


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
    for name, value in collect(whole.parts()).items():
        assert torch.equal(collect(resumed.parts())[name], value), name
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
    """After the step, in the middle of a line; in the end the log is the same."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 3600.0)
    whole, resumed = Line(), Line()
    loop.run(whole, tmp_path / "whole", 70, evaluate_every=20)
    before = signal.getsignal(signal.SIGTERM)
    for stop in stops:
        message = rf"stopped: stopped after step {stop + 1} and saved; run it again to resume"
        with pytest.raises(Stopped, match=message):
            loop.run(Terminated(stop), tmp_path / "stopped", 70, evaluate_every=20)
        assert signal.getsignal(signal.SIGTERM) == before
    loop.run(resumed, tmp_path / "stopped", 70, evaluate_every=20)
    assert resumed.steps_made[0] == stops[-1] + 1  # no step is lost
    for name, value in collect(whole.parts()).items():
        assert torch.equal(collect(resumed.parts())[name], value), name
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "whole")


def test_sigterm_in_the_last_step_is_the_end(tmp_path: Path) -> None:
    line = Terminated(69)
    loop.run(line, tmp_path, 70, evaluate_every=20)
    assert len(line.steps_made) == 70


class Counting(Line):
    """Takes half a second for 512 tokens; its evaluations take long, which doesn't count."""

    now = 0.0

    def clock(self) -> float:
        return self.now

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        self.now += 0.5
        return {**super().step(step), "tokens": 512}

    def evaluate(self) -> Mapping[str, float]:
        self.now += 100.0
        return super().evaluate()


def test_counts_are_logged_per_second_of_training(tmp_path: Path) -> None:
    killed, resumed = Counting(45), Counting()
    with pytest.raises(Killed):
        loop.run(killed, tmp_path, 70, evaluate_every=20, clock=killed.clock)
    loop.run(resumed, tmp_path, 70, evaluate_every=20, clock=resumed.clock)
    train = [entry for entry in lines(tmp_path) if entry["split"] == "train"]
    assert [entry["tokens_per_second"] for entry in train] == [1024.0] * 4
    assert not any("tokens" in entry for entry in lines(tmp_path))


def test_states_are_saved_every_few_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 3600.0)
    saved = []
    monkeypatch.setattr(state, "save_state", lambda folder, step, *_: saved.append(step))
    loop.run(Line(), tmp_path, 70, evaluate_every=20)
    assert saved == [70]


def test_a_metrics_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(Is a directory\)"):
        loop.run(Line(), tmp_path, 20, evaluate_every=20)


def test_seconds_per_step_is_the_median_after_warm_up() -> None:
    now = 0.0

    class Slow(Line):
        def step(self, step: int) -> Mapping[str, Tensor | float]:
            nonlocal now
            now += (100.0, 1.0, 3.0, 2.0)[step]
            return super().step(step)

    line = Slow()
    assert loop.seconds_per_step(line, warm_up=1, timed=3, clock=lambda: now) == 2.0
    assert line.steps_made == [0, 1, 2, 3]


def test_last_metrics(tmp_path: Path) -> None:
    assert metrics_log.last_metrics(tmp_path, "val") == {}
    loop.run(Line(), tmp_path, 50, evaluate_every=20)
    assert metrics_log.last_metrics(tmp_path, "train")["number"] == 44.5
    assert metrics_log.last_metrics(tmp_path, "val").keys() == {"step", "split", "bias", "seconds"}


# --- begin and finish -----------------------------------------------------------------------------


def test_a_stage_from_begin_to_finish(tmp_path: Path) -> None:
    folder, config = tmp_path / "stage", {"model": {"width": 8}, "seed": 0}
    assert loop.begin(folder, config)
    assert not loop.is_finished(folder)
    line = Line()
    loop.run(line, folder, 20, evaluate_every=20)
    assert loop.begin(folder, config)
    assert (folder / "state").is_dir()
    loop.finish(folder, line.line.state_dict())
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
