"""States of a training on the disk: the newest complete one is what it resumes from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ctf.common import storage
from ctf.training import optim, state


def test_the_newest_states_are_kept(tmp_path: Path) -> None:
    assert state.latest_state(tmp_path) == 0
    for step in (9, 20, 100):
        state.save_state(tmp_path, step, {"x": torch.tensor(step)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000020.safetensors",
        "step-00000100.safetensors",
    ]
    assert state.latest_state(tmp_path) == 100
    assert int(state.load_state(tmp_path, 100)["x"]) == 100


def test_a_damaged_state_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (20, 40):
        state.save_state(tmp_path, step, {"x": torch.tensor(step)})
    newest = tmp_path / "step-00000040.safetensors"
    newest.write_bytes(newest.read_bytes()[:50])
    assert state.latest_state(tmp_path) == 20
    assert "resuming from the state before it" in capsys.readouterr().out
    (tmp_path / "step-00000020.safetensors").write_bytes(b"")
    assert state.latest_state(tmp_path) == 0


def test_an_optimizer_goes_on_with_its_moments(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.AdamW]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module, optim.make_optimizer(module, 0.1, (0.9, 0.95), 0.05)

    def train(module: nn.Module, optimizer: torch.optim.AdamW, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = module(torch.randn(2, 3, 5, 5)).square().mean()
            loss.backward()
            optim.update(
                optimizer, loss.detach(), 0.1, 1.0, step=step, name="loss", images_B=np.arange(2)
            )

    module, optimizer = make()
    train(module, optimizer, range(3))
    parts: dict[str, state.Part] = {"m": module, "o": optimizer, "count": torch.tensor(3)}
    storage.save_tensors(tmp_path / "state", state.collect(parts))
    tensors, _ = storage.load_tensors(tmp_path / "state")
    again, its_optimizer = make()
    count = torch.tensor(0)
    state.restore({"m": again, "o": its_optimizer, "count": count}, tensors)
    assert count == 3
    for trained in ((module, optimizer), (again, its_optimizer)):
        train(*trained, range(3, 6))
    for mine, other in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)
