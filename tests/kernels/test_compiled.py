"""Compiled steps, and the rotation in real numbers."""

import pytest
import torch

from ctf import kernels
from ctf.kernels import compiled
from ctf.models.noise import noise_keys
from ctf.models.sampling import Sampling, sample_coarse
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
