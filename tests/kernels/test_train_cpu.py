"""The parts by hand against autograd through the operators of PyTorch: values and gradients."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from ctf import kernels
from ctf.common.precision import supports_bf16
from ctf.kernels import products, train_cpu
from ctf.kernels.train_cpu import Dropout
from ctf.models.transformer import Backbone, Block, TransformerConfig, rotation_table

CONFIG = TransformerConfig(
    width=48, layers=2, heads=3, grid=4, classes=3, ffn_multiple=16, dropout=0.0
)


def gradients(backbone: Backbone, *, causal: bool) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    labels_BT = torch.randint(7, (5, 15), generator=random)
    weights_BTD = torch.randn(5, 16, CONFIG.width, generator=random)
    backbone.zero_grad()
    out_BTD = backbone(labels_BT, torch.arange(5) % 4, causal=causal)
    (out_BTD * weights_BTD).sum().backward()
    found = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return {"out": out_BTD.detach(), **found}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("class_token", ["identity", "zero"])
def test_a_trunk_in_training_has_the_gradients_of_autograd(
    causal: bool, onednn: bool, class_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if onednn and not products.has_linear(torch.float32):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(products, "has_linear", lambda _: onednn)
    torch.manual_seed(0)
    backbone = Backbone(dataclasses.replace(CONFIG, class_token_rope=class_token), 7)
    for p in backbone.parameters():
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, std=0.2)
    expected = gradients(backbone, causal=causal)
    kernels.replace(backbone, train_cpu.FASTER)
    found = gradients(backbone, causal=causal)
    assert found.keys() == expected.keys() and len(found) == 1 + 17
    assert any(not torch.equal(found[name], expected[name]) for name in found)  # computed otherwise
    for name in found:
        scale = expected[name].abs().max()
        torch.testing.assert_close(found[name] / scale, expected[name] / scale, atol=1e-5, rtol=0)


@pytest.mark.skipif(not supports_bf16(torch.device("cpu")), reason="no bfloat16 products")
@pytest.mark.parametrize("causal", [True, False])
def test_in_bfloat16_gradients_are_near_those_of_single_precision(causal: bool) -> None:
    """As near as with autocast through the operators of PyTorch; gradients are in float32."""
    torch.manual_seed(0)
    backbone = Backbone(CONFIG, 7)
    for p in backbone.parameters():
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, std=0.2)
    expected = gradients(backbone, causal=causal)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(backbone, causal=causal)
        kernels.replace(backbone, train_cpu.FASTER)
        found = gradients(backbone, causal=causal)
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        assert found[name].dtype == torch.float32
        off, plainly_off = (float((x[name] - exact).norm() / exact.norm()) for x in (found, plain))
        assert 0 < off < 0.03 and off < 1.5 * plainly_off


def test_without_gradients_it_is_the_same() -> None:
    backbone = Backbone(dataclasses.replace(CONFIG, dropout=0.3), 7).eval()
    labels_BT, classes_B = torch.arange(14).view(2, 7) % 7, torch.arange(2)
    with torch.no_grad():
        expected = backbone(labels_BT, classes_B, causal=True)
        kernels.replace(backbone, train_cpu.FASTER)
        found = backbone(labels_BT, classes_B, causal=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["norm", "swiglu", "linear", "heads"])
def test_gradients_of_a_module_are_finite_differences(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "has_linear", lambda _: False)  # in double precision
    torch.manual_seed(0)
    config = TransformerConfig(width=8, layers=1, heads=1, grid=2, classes=1, dropout=0.0)
    config = dataclasses.replace(config, ffn_multiple=2)
    block = Block(config).double()
    kernels.replace(block, train_cpu.FASTER)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    rotation_TP2 = rotation_table(config, torch.device("cpu"))[:3]
    module, call = {
        "norm": (block.ffn_norm, block.ffn_norm),
        "swiglu": (block.ffn, block.ffn),
        "linear": (block.attention.out, block.attention.out),
        "heads": (block.attention, lambda x: block.attention.rotated_heads(x, rotation_TP2)),
    }[part]
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    used = [w for name, w in module.named_parameters() if part != "heads" or "qkv" in name]
    # Rotations are in single precision.
    close = {"eps": 1e-3, "atol": 1e-3} if part == "heads" else {}
    assert torch.autograd.gradcheck(lambda x, *_: call(x), (x, *used), **close)


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_drops_that_share_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(0)
    dropout = Dropout(probability)
    x = torch.ones(401, 503, requires_grad=True)
    y = dropout(x)
    kept = y != 0
    # Within 4 standard deviations, also of each row and column, and of neighbours together.
    share, deviation = 1 - probability, (probability * (1 - probability)) ** 0.5
    assert abs(float(kept.float().mean()) - share) < 4 * deviation / x.numel() ** 0.5
    for axis in (0, 1):
        spread = kept.float().mean(axis) - share
        assert float(spread.abs().max()) < 5 * deviation / x.shape[axis] ** 0.5
        both = (kept.roll(1, axis) & kept).float().mean() - share**2
        assert abs(float(both)) < 0.01
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / share), rtol=2e-4, atol=0)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y)
    assert not torch.equal(dropout(x), y)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)


def test_no_dropout_where_there_is_none() -> None:
    x = torch.randn(3, 5)
    assert Dropout(0.5).eval()(x) is x and Dropout(0.0)(x) is x
    assert Dropout(0.5)(torch.ones(0)).shape == (0,)
