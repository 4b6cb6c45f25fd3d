"""The parts by hand against autograd through the operators of PyTorch: values and gradients."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ctf.common.precision import supports_bf16
from ctf.kernels import sampling_cpu, train_cpu
from ctf.models.transformer import TransformerConfig, Trunk

CONFIG = TransformerConfig(
    width=48, layers=2, heads=3, grid=4, classes=3, ffn_multiple=16, dropout=0.0
)


def gradients(trunk: Trunk, *, causal: bool) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    labels_BT = torch.randint(7, (5, 15), generator=random)
    weights_BTD = torch.randn(5, 16, CONFIG.width, generator=random)
    trunk.zero_grad()
    out_BTD = trunk(labels_BT, torch.arange(5) % 4, causal=causal)
    (out_BTD * weights_BTD).sum().backward()
    found = {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}
    return {"out": out_BTD.detach(), **found}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("class_token", ["identity", "zero"])
def test_a_trunk_in_training_has_the_gradients_of_autograd(
    causal: bool, onednn: bool, class_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if onednn and not train_cpu._has_onednn(torch.float32):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(train_cpu, "_has_onednn", lambda _: onednn)
    torch.manual_seed(0)
    trunk = Trunk(dataclasses.replace(CONFIG, class_token_rope=class_token), 7)
    for p in trunk.parameters():
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, std=0.2)
    found = gradients(trunk, causal=causal)
    monkeypatch.setattr(train_cpu, "able", lambda *_: False)
    expected = gradients(trunk, causal=causal)
    assert found.keys() == expected.keys() and len(found) == 1 + 17
    assert any(not torch.equal(found[name], expected[name]) for name in found)  # another way
    for name in found:
        scale = expected[name].abs().max()
        torch.testing.assert_close(found[name] / scale, expected[name] / scale, atol=1e-5, rtol=0)


@pytest.mark.skipif(not supports_bf16(torch.device("cpu")), reason="no bfloat16 products")
@pytest.mark.parametrize("causal", [True, False])
def test_in_bfloat16_gradients_are_near_those_of_single_precision(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near as with autocast through the operators of PyTorch; what is kept is fp32."""
    torch.manual_seed(0)
    trunk = Trunk(CONFIG, 7)
    for p in trunk.parameters():
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, std=0.2)
    expected = gradients(trunk, causal=causal)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(trunk, causal=causal)
        monkeypatch.setattr(train_cpu, "able", lambda *_: False)
        plain = gradients(trunk, causal=causal)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].dtype == torch.float32
        off, plainly_off = (
            float((x[name] - wanted).norm() / wanted.norm()) for x in (found, plain)
        )
        assert 0 < off < 0.03 and off < 1.5 * plainly_off


def test_only_what_is_trained_computes_by_hand() -> None:
    layer, x = nn.Linear(4, 4, bias=False), torch.ones(1)
    assert train_cpu.able(x, layer)
    assert not train_cpu.able(x.double(), layer) and not train_cpu.able(x.to("meta"), layer)
    with torch.no_grad():
        assert not train_cpu.able(x, layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert train_cpu.able(x, layer) and not train_cpu.able(x.bfloat16(), layer)
    with torch.autocast("cpu", torch.float16):
        assert not train_cpu.able(x, layer)
    if sampling_cpu.available("auto", torch.device("cpu")):
        assert not train_cpu.able(x, layer, sampling_cpu.Packed(layer.weight))
    assert not train_cpu.able(x, layer.requires_grad_(False))


@pytest.mark.parametrize("part", ["rms_norm", "swiglu", "linear"])
def test_gradients_of_a_part_are_finite_differences(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_cpu, "_has_onednn", lambda _: False)  # in double precision
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()

    x, norm = numbers(2, 3, 8), nn.RMSNorm(8, eps=1e-5).double()
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "rms_norm": (lambda x: train_cpu.rms_norm(x, norm), (x,)),
        "swiglu": (train_cpu.swiglu, (x, numbers(6, 8), numbers(6, 8), numbers(8, 6))),
        "linear": (train_cpu.linear, (x, numbers(5, 8))),
    }
    assert torch.autograd.gradcheck(*calls[part])
