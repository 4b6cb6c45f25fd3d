"""Cross-entropy by slices: against PyTorch's own, in value, gradients and memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ctf.kernels import losses
from ctf.kernels.losses import cross_entropy

B, L, D, K = 3, 7, 16, 40


def problem() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden_BLD, weight_KD = torch.randn(B, L, D), torch.randn(K, D)
    return hidden_BLD.requires_grad_(), weight_KD.requires_grad_(), torch.randint(K, (B, L))


def plain(hidden_BLD: Tensor, weight_KD: Tensor, targets_BL: Tensor) -> Tensor:
    logits_BLK = hidden_BLD @ weight_KD.T
    return F.cross_entropy(logits_BLK.float().flatten(0, 1), targets_BL.flatten())


@pytest.mark.parametrize("slice_", [1, K, 4 * K + 1, 10 * K, 2**24])
@pytest.mark.parametrize("factor", [1.0, -0.25])
def test_it_is_pytorchs_in_any_slices(
    monkeypatch: pytest.MonkeyPatch, slice_: int, factor: float
) -> None:
    monkeypatch.setattr(losses, "SLICE", slice_)
    hidden_BLD, weight_KD, targets_BL = problem()
    got, wanted = (f(hidden_BLD, weight_KD, targets_BL) for f in (cross_entropy, plain))
    assert got.shape == ()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    for x in (hidden_BLD, weight_KD):
        (a,), (b,) = (torch.autograd.grad(factor * y, x, retain_graph=True) for y in (got, wanted))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    with torch.no_grad():  # as it is evaluated
        assert torch.equal(cross_entropy(hidden_BLD, weight_KD, targets_BL), got)


def test_only_what_is_wanted_gets_a_gradient() -> None:
    hidden_BLD, weight_KD, targets_BL = problem()
    cross_entropy(hidden_BLD, weight_KD.detach(), targets_BL).backward()
    assert hidden_BLD.grad is not None
    cross_entropy(hidden_BLD.detach(), weight_KD, targets_BL).backward()
    hidden, weight, targets = problem()
    plain(hidden, weight, targets).backward()
    for x, y in ((hidden_BLD, hidden), (weight_KD, weight)):
        torch.testing.assert_close(x.grad, y.grad)


def test_large_logits_and_impossible_targets() -> None:
    hidden_BLD, weight_KD, targets_BL = problem()
    with torch.no_grad():
        hidden_BLD *= 1000
    got = cross_entropy(hidden_BLD, weight_KD, targets_BL)
    torch.testing.assert_close(got, plain(hidden_BLD, weight_KD, targets_BL), rtol=1e-6, atol=0)
    got.backward()
    assert hidden_BLD.grad is not None and bool(hidden_BLD.grad.isfinite().all())


def test_under_autocast_as_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "SLICE", 4 * K)
    gradients = []
    for f in (cross_entropy, plain):
        hidden_BLD, weight_KD, targets_BL = problem()
        with torch.autocast("cpu", torch.bfloat16):
            loss = f(hidden_BLD, weight_KD, targets_BL)
        assert loss.dtype == torch.float32
        loss.backward()
        gradients.append((loss.detach(), hidden_BLD.grad, weight_KD.grad))
    for got, wanted in zip(*gradients, strict=True):
        assert got is not None and wanted is not None and got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=2e-3)


def test_nothing_of_the_size_of_all_logits_is_kept() -> None:
    hidden_BLD, weight_KD, targets_BL = problem()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy(hidden_BLD, weight_KD, targets_BL)
    assert sum(kept) == B * L * D + K * D < B * L * K + K * D
