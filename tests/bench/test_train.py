"""`ctf bench train` at toy shapes: both ways compute the same, and what it says adds up."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctf.bench import llamagen_reference, measuring, report, train
from ctf.common.errors import UserError
from ctf.common.precision import supports_bf16
from ctf.models.coarse import CoarseModel
from ctf.models.sizes import TransformerShape
from ctf.models.transformer import TransformerConfig
from ctf.training import optim
from ctf.training.transformers import TrainingConfig
from tests.conftest import Command

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> train.Asked:
    """The benchmark at 16 tokens and 64 codes."""
    shape = TransformerShape(width=32, layers=2, heads=2, dropout=0.1)
    monkeypatch.setattr(train, "SIZES", dict.fromkeys(("S", "B", "L"), shape))
    for name, value in {"CODES": 64, "COUNT": 8, "CLASSES": 5, "GRID": 4, "LENGTH": 16}.items():
        monkeypatch.setattr(train, name, value)
    for name, value in {"SIDE": 64, "READ": 2**12}.items():
        monkeypatch.setattr(measuring, name, value)
    return train.Asked(sizes=("B",), batch=4, rounds=2)


def silent(done: int, total: int) -> None:
    pass


def test_the_plain_step_computes_what_ours_does() -> None:
    """Without dropout; at the class that is hidden by neither."""
    config = TransformerConfig(width=48, layers=2, heads=3, grid=4, classes=7, dropout=0.0)
    torch.manual_seed(0)
    model = CoarseModel(config, 40).train()
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, std=0.2)
    labels_BL, classes_B = torch.randint(40, (3, 16)), torch.full((3,), model.no_class)
    logits_BLK = model(labels_BL, classes_B)
    ours = F.cross_entropy(logits_BLK.flatten(0, 1), labels_BL.flatten())
    expected = torch.autograd.grad(ours, list(model.parameters()))
    theirs = llamagen_reference.loss(model, labels_BL, classes_B)
    torch.testing.assert_close(theirs, ours)
    for found, wanted in zip(
        torch.autograd.grad(theirs, list(model.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    # A whole step of it: clipped gradients, then AdamW.
    t = TrainingConfig()
    optimizer = optim.make_optimizer(model, 1e-3, t.betas, t.weight_decay)
    norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in expected]))
    before = model.head.weight.detach().clone()
    assert float(
        llamagen_reference.train_step(model, optimizer, labels_BL, classes_B)
    ) == pytest.approx(ours.item(), rel=1e-4)
    moment = optimizer.state[model.head.weight]["exp_avg"]
    clipped = expected[-1] * min(1.0, float(1 / norm))
    torch.testing.assert_close(moment, 0.1 * clipped, atol=1e-6, rtol=1e-3)
    assert not torch.equal(model.head.weight, before) and model.head.weight.grad is None


def test_every_way_is_timed_in_every_round(small: train.Asked, tmp_path: Path) -> None:
    result = train.run(small, tmp_path, CPU, silent)
    assert [*result.groups] == ["B round 1", "B round 2", "fine round 1", "fine round 2"]
    for group in result.groups.values():
        for timing in group.timings:
            assert min(timing.forward, timing.backward, timing.update) > 0
            assert timing.seconds == timing.forward + timing.backward + timing.update
    flops = {name: result.of("B", name)[0].flops for name in ("plain", "baseline", "coarse")}
    assert flops["plain"] == flops["baseline"]
    assert flops["baseline"] - flops["coarse"] == 4 * 6 * 16 * 32 * (64 - 8)
    columns, lines = train.rows(result, "B")
    low = supports_bf16(CPU)
    assert len(lines) == 5 + 2 * low and all(len(line) == len(columns) for line in lines)
    assert ("in bfloat16 the baseline is" in train.verdict(result, "B")) == low
    plainly, ours = (result.of("B", name) for name in ("plain", "baseline"))
    assert train.ratios(result, "B", "plain", "baseline") == [
        a.seconds / b.seconds for a, b in zip(plainly, ours, strict=True)
    ]
    assert report.as_markdown((columns, lines)) in (tmp_path / "train.md").read_text()


def test_without_bfloat16_there_are_no_rows_of_it(
    small: train.Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "supports_bf16", lambda _: False)
    result = train.run(dataclasses.replace(small, rounds=1), tmp_path, CPU, silent)
    assert len(train.rows(result, "B")[1]) == 5
    assert "bfloat16" not in train.verdict(result, "B")


def test_killed_it_goes_on_with_what_is_missing(
    small: train.Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "_fine", stop)
        with pytest.raises(KeyboardInterrupt):
            train.run(small, tmp_path, CPU, silent)
    before = json.loads((tmp_path / "train.json").read_text())["groups"]
    assert [*before] == ["B round 1", "B round 2"]
    train.run(small, tmp_path, CPU, silent)
    after = json.loads((tmp_path / "train.json").read_text())["groups"]
    assert {name: after[name] for name in before} == before and len(after) == 4
    with pytest.raises(UserError, match="another configuration"):
        train.run(train.Asked(("B",), 4, 3), tmp_path, CPU, silent)


def test_command(small: train.Asked, ctf: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ("bench", "train", "--sizes", "B", "--batch", 2, "--rounds", 1, "--out", out)
    result = ctf(*given, "--dry-run")
    assert result.code == 0 and "would measure B round 1, fine round 1" in result.out
    assert not out.exists()
    result = ctf(*given)
    assert result.code == 0, result.err
    assert "size B: the baseline is" in result.out and (out / "train.md").is_file()
    for wrong, said in (
        (("--sizes", "B,Q"), "unknown size 'Q'"),
        (("--batch", 0), "batch: got 0, expected 1 or more"),
    ):
        result = ctf("bench", "train", *wrong, "--out", tmp_path / "none")
        assert result.code == 2 and said in result.err and not (tmp_path / "none").exists()
