"""Muon: orthogonal updates of hidden weights, AdamW for all others."""

import copy

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from ctf.models.coarse import CoarseModel
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.models.transformer import TransformerConfig
from ctf.training import muon, optim


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_updates_are_orthogonalized(count: int, rows: int, columns: int, seed: int) -> None:
    """The singular vectors stay, the singular values become nearly one."""
    torch.manual_seed(seed)
    matrices_NRC = torch.randn(count, rows, columns)
    u, s, vh = torch.linalg.svd(matrices_NRC, full_matrices=False)
    bound = s.pow(4).sum(1, keepdim=True).pow(0.25)
    assume(bool((s > 0.02 * bound).all()))  # three steps raise smaller ones less
    values = u.mT @ muon.orthogonalize(matrices_NRC) @ vh.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.65 and diagonal.max() < 1.25
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-3
    scaled = muon.orthogonalize(1e-12 * matrices_NRC)  # gradients may be as small
    torch.testing.assert_close(scaled, muon.orthogonalize(matrices_NRC))


def test_no_gradient_is_no_update() -> None:
    assert torch.equal(muon.orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_muon_moves_hidden_weights_and_adamw_the_others() -> None:
    """By hand: a stack of two matrices, a convolution, and a layer that is not hidden."""
    torch.manual_seed(0)
    stack, conv, other = nn.Linear(3, 4), nn.Conv2d(2, 4, 3), nn.Linear(3, 3)
    module = nn.ModuleList([stack, conv, other])
    hidden = {stack.weight: 2, conv.weight: 1}
    optimizer = optim.make_optimizer(module, 0.1, (0.9, 0.95), 0.5, hidden)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    reference = copy.deepcopy(other)
    adamw = optim.make_optimizer(reference, 0.1, (0.9, 0.95), 0.5)
    momentum = {p: torch.zeros_like(p) for p in hidden}
    for _ in range(3):
        gradients = {p: torch.randn_like(p) for p in module.parameters()}
        for parameter, gradient in gradients.items():
            parameter.grad = gradient.clone()
        for own, same in zip(reference.parameters(), other.parameters(), strict=True):
            own.grad = gradients[same].clone()
        optimizer.step()
        adamw.step()
        for name, weight, shape in (
            ("0.weight", stack.weight, (2, 2, 3)),
            ("1.weight", conv.weight, (1, 4, 18)),
        ):
            momentum[weight] = 0.95 * momentum[weight] + gradients[weight]
            update = gradients[weight] + 0.95 * momentum[weight]
            update = muon.orthogonalize(update.reshape(shape)).reshape(weight.shape)
            scale = 0.1 * 0.2 * max(shape[1:]) ** 0.5
            start[name] = start[name] * (1 - 0.1 * 0.5) - scale * update
            torch.testing.assert_close(weight.detach(), start[name])
    for own, same in zip(reference.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, same)


def test_hidden_weights_are_those_of_the_blocks() -> None:
    model = CoarseModel(TransformerConfig(width=8, layers=2, heads=2, grid=2, classes=3), 5)
    hidden = muon.hidden_weights(*model.backbone.layers)
    names = {name for name, p in model.named_parameters() if p in hidden}
    kinds = ("attention.qkv", "attention.out", "ffn.w1", "ffn.w2", "ffn.w3")
    assert names == {f"backbone.layers.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    for name, parameter in model.named_parameters():
        assert hidden.get(parameter, 3 if "qkv" in name else 1) == (3 if "qkv" in name else 1)
    tokenizer = VQModel(TokenizerConfig(image_size=8, channels=8, multipliers=(1, 2), groups=4))
    hidden = muon.hidden_weights(*tokenizer.blocks())
    left = {name for name, p in tokenizer.named_parameters() if p.dim() > 1 and p not in hidden}
    ends = {
        f"{half}.{end}.weight" for half in ("encoder", "decoder") for end in ("input", "output")
    }
    assert left == ends | {"embedding.weight", "to_code.weight", "from_code.weight"}
