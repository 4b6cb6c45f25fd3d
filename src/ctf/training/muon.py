"""Muon: an optimizer that orthogonalizes the updates of hidden weights.

Shapes: N matrices of R rows and C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ctf.common import threads
from ctf.common.distributed import distribute_like, full_tensor
from ctf.models.transformer import Attention

MOMENTUM = 0.95  # as its authors have it
STEPS = 3  # of the iteration


def hidden_weights(*blocks: nn.Module) -> dict[nn.Parameter, int]:
    """Return the matrices and convolutions of blocks, for `Muon`: how many each is a stack of.

    Not the first and the last layer of a model: what they read or write are no hidden features, so
    their blocks are not to be among `blocks`.
    """
    stacked = {
        module.qkv.weight: 3
        for block in blocks
        for module in block.modules()
        if isinstance(module, Attention)
    }
    weights = [p for block in blocks for p in block.parameters() if p.dim() >= 2]
    return {weight: stacked.get(weight, 1) for weight in weights}


class Muon(torch.optim.AdamW):
    """AdamW whose groups with "stacked" have orthogonalized updates (Muon).

    The momentum of a matrix, U S V^T, is replaced by about U V^T: all directions move alike, not
    only those of large gradients (Jordan et al. 2024, kellerjordan.github.io/posts/muon). Times
    0.2 sqrt(max(rows, columns)), an entry moves about as far as by AdamW, and learning rate and
    weight decay can be the same (arXiv 2502.16982, section 2.2). A convolution is the matrix of
    its output channels; a weight that stacks several matrices is several.

    `torch.optim.Muon` knows no convolutions and no stacks, rounds to bfloat16 on processors that
    are slow at it, and takes one matrix at a time; here matrices of one shape are a batch.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; the gradients of the weights that are orthogonalized are used up."""
        for group in self.param_groups:
            if "stacked" in group:
                self._orthogonalized(group)
        return super().step(closure)  # passes over what has no gradient

    def _orthogonalized(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            updates: list[Tensor] = []
            for parameter in parameters:
                gradient, own = parameter.grad, self.state[parameter]["momentum"]
                assert gradient is not None
                own.mul_(MOMENTUM).add_(gradient)
                # Nesterov's: as the momentum will be after another such gradient.
                update = full_tensor(gradient.add(own, alpha=MOMENTUM))
                updates.append(update.reshape(group["stacked"], -1, shape[1:].numel()))
                parameter.grad = None
            matrices_NRC = torch.cat(threads.over_parts(orthogonalize, torch.cat(updates)))
            scale = 0.2 * max(matrices_NRC.shape[1:]) ** 0.5 * group["lr"]
            for parameter, update in zip(
                parameters, matrices_NRC.chunk(len(parameters)), strict=True
            ):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                change = distribute_like(update.reshape(shape), parameter)
                parameter.add_(change, alpha=-scale)


def orthogonalize(matrices_NRC: Tensor) -> Tensor:
    """Return matrices (N, R, C) with the same singular vectors, and singular values of about 1.

    Three steps of a Newton-Schulz iteration with the coefficients of Muon's authors, which raise
    small singular values fast: to 0.65 to 1.25 if they were a fiftieth of the bound or more. The
    authors' bound is the Frobenius norm, and they take five steps. That of X X^T, whose root is a
    bound too, is nearer to the largest singular value. In bfloat16 on a GPU.
    """
    dtype = torch.bfloat16 if matrices_NRC.is_cuda else torch.float32
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.mT if tall else matrices_NRC
    # First by the Frobenius norm, or small gradients have no gram matrix in floating point.
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)).to(dtype)
    for step in range(STEPS):
        gram = x @ x.mT
        if step == 0:
            square = gram.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
            x, gram = x / square.sqrt(), gram / square
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if tall else x).to(matrices_NRC.dtype)
