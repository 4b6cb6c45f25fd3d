"""Compiled steps, and the rotation in real numbers."""

import pytest
import torch
from torch import nn

from ctf import kernels
from ctf.kernels import compiled, logits
from ctf.kernels.replace import replace
from ctf.models.coarse import CoarseModel
from ctf.models.noise import noise_keys
from ctf.models.parallel import sample_coarse
from ctf.models.sampling import Sampling
from ctf.models.transformer import rotate, rotation_table
from tests.kernels.conftest import CONFIG, make_coarse

CPU = torch.device("cpu")


def test_the_rotation_in_real_numbers_is_the_same() -> None:
    x_BTZNE = torch.randn(2, 17, 2, CONFIG.heads, CONFIG.head_dim)
    rotation_TP2 = rotation_table(CONFIG, CPU)
    for x in (x_BTZNE, x_BTZNE.bfloat16()):
        torch.testing.assert_close(compiled.rotate(x, rotation_TP2), rotate(x, rotation_TP2))


@pytest.mark.skipif(not compiled.compiles("cpu"), reason="there is no compiler here")
def test_compiled_steps_sample_the_same() -> None:
    model, fast = make_coarse(), make_coarse()
    for each in (model, fast):
        del each.backbone.layers[1:]  # compiling is slow
    kernels.for_sampling(fast, None, None, "compile")
    assert model.state_dict().keys() == fast.state_dict().keys()
    keys_BL = noise_keys(range(5), 16)[:, 0]
    for settings in (
        Sampling(guidance=2.0),
        Sampling(guidance=2.0, top_k=1),
        # Halves that catch up, uncompiled.
        Sampling(guidance=1.5, guidance_window=(0.25, 0.75)),
    ):
        one, other = (sample_coarse(m, torch.arange(5), keys_BL, settings) for m in (model, fast))
        assert torch.equal(one, other)
        windows = sample_coarse(fast, torch.arange(5), keys_BL, settings, window=4)
        assert torch.equal(one, windows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_of_the_loss_is_pytorchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits_TV, t_T1 = (4 * torch.randn(7, 40)).to(dtype), torch.randint(40, (7, 1))
    x_TV = logits_TV.float().requires_grad_()
    expected = nn.functional.cross_entropy(x_TV, t_T1[:, 0], reduction="sum")
    (expected / 20).backward()
    loss, grad_TV = compiled.softmax_loss(logits_TV, t_T1, 20)  # what is compiled below
    torch.testing.assert_close(loss, expected)
    assert x_TV.grad is not None
    torch.testing.assert_close(grad_TV, x_TV.grad.to(dtype))


@pytest.mark.skipif(not compiled.compiles("cpu"), reason="there is no compiler here")
def test_the_compiled_loss_is_that_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    lean, fast = make_coarse(), make_coarse()
    for model in (lean, fast):
        kernels.for_evaluation(model)
        model.requires_grad_(True)
    monkeypatch.setattr(logits, "SLICE", 20 * lean.vocab_size)  # the last slice is shorter
    replace(fast, {logits.LeanCoarseModel: compiled.CoarseModel})
    assert isinstance(fast, CoarseModel)
    labels_BL, classes_B = torch.randint(lean.vocab_size, (3, 16)), torch.arange(3)
    losses = [model.loss(labels_BL, classes_B) for model in (fast, lean)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(fast.parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(fast.loss(labels_BL, classes_B), losses[0].detach())
