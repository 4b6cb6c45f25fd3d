"""The transformer's parts for training on a processor: forward and backward passes by hand.

The same mathematics as the modules of `transformer`, up to rounding. Left to autograd, each
operator reads and writes tensors of whole size, on a processor mostly memory that is fresh and has
to be cleared by the system first. By hand, a part computes in place where it can, and again in the
backward pass what is cheap. Products with weights are oneDNN's where PyTorch has it, which
is faster here than MKL.

Under autocast, products are taken in bfloat16 (the processor sums them in single precision), and
what only leads from one product to the next stays in it, as on a GPU. Weights, their moments,
norms, rotations and the sums between blocks are in single precision always.

Shapes: B batch, T positions, D width, F hidden width of SwiGLU, N heads, E head width, P rotated
pairs of a head (E / 2).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def able(x: Tensor, *layers: nn.Module) -> bool:
    """Whether these layers, which get `x`, should compute by this file: their weights are trained,
    on a processor, in single precision or in bfloat16 by autocast, and nothing else rewrites their
    operators.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.is_grad_enabled()
        and _precision(x) in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and all(_is_trained(layer) for layer in layers)
    )


def _is_trained(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)  # no tensor where it was made ready to draw
    return isinstance(weight, Tensor) and weight.requires_grad


def _precision(x: Tensor) -> torch.dtype:
    """Of products with `x`, at this place of the program."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def linear(x_BTD: Tensor, weight_FD: Tensor) -> Tensor:
    out: Tensor = _Linear.apply(x_BTD, weight_FD, _precision(x_BTD))
    return out


def heads(
    x_BTD: Tensor, weight_3DD: Tensor, rotation_TP2: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, N, T, E), the first two rotated as by `transformer.rotate`.

    Args:
        count: N.
    """
    q, k, v = _Heads.apply(x_BTD, weight_3DD, rotation_TP2, count, _precision(x_BTD))
    return q, k, v


def swiglu(x_BTD: Tensor, w1_FD: Tensor, w3_FD: Tensor, w2_DF: Tensor) -> Tensor:
    out: Tensor = _SwiGLU.apply(x_BTD, w1_FD, w3_FD, w2_DF, _precision(x_BTD))
    return out


def rms_norm(x_BTD: Tensor, norm: nn.RMSNorm) -> Tensor:
    assert norm.eps is not None
    out: Tensor = _RMSNorm.apply(x_BTD, norm.weight, norm.eps)
    return out


# --- Products -------------------------------------------------------------------------------------


def _product(x: Tensor, weight_FD: Tensor) -> Tensor:
    """x @ weight.T for x of (..., D), in the precision of x."""
    weight_FD = weight_FD.to(x.dtype)
    if not _has_onednn(x.dtype):
        return F.linear(x, weight_FD)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_FD, None, "none", [], "")
    return out


@functools.cache
def _has_onednn(dtype: torch.dtype) -> bool:
    x = torch.ones(2, 16, dtype=dtype)
    try:
        torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")
    except Exception:  # no such operator, no such library, no such instruction
        return False
    return True


# Gradients may be in the precision of products: autograd turns them into that of what they are of.


def _back(grad: Tensor, weight_FD: Tensor) -> Tensor:
    """The gradient of x, grad @ weight."""
    return _product(grad, weight_FD.t())


def _of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of the weight, from those of all positions together."""
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return _back(grad, weight), _of_weight(grad, x), None


# --- Parts of a block -----------------------------------------------------------------------------


class _Heads(torch.autograd.Function):
    """One product, and a rotation in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rotation_TP2: Tensor, count: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x.to(dtype)
        ctx.save_for_backward(x, weight, rotation_TP2)
        qkv_BT3NE = _product(x, weight).unflatten(-1, (3, count, -1))
        turned_BT2NE = qkv_BT3NE[:, :, :2].float()  # a view, where that is its precision
        _pairs(turned_BT2NE).mul_(_angles(rotation_TP2))
        q, k = turned_BT2NE.to(dtype).permute(2, 0, 3, 1, 4)
        return q, k, qkv_BT3NE[:, :, 2].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_BNTE: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, rotation_TP2 = ctx.saved_tensors
        grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in grads_BNTE)
        back_TP = _angles(rotation_TP2)[:, 0].conj().resolve_conj()
        shape = *grad_q.shape[:2], 3, *grad_q.shape[2:]
        grad_BT3NE = grad_q.new_empty(shape, dtype=torch.float32)
        for place, grad in enumerate((grad_q, grad_k)):
            torch.mul(_pairs(grad.float()), back_TP, out=_pairs(grad_BT3NE[:, :, place]))
        grad_BT3NE[:, :, 2] = grad_v
        grad = grad_BT3NE.flatten(2).to(x.dtype)
        return _back(grad, weight), _of_weight(grad, x), None, None, None


def _pairs(x: Tensor) -> Tensor:
    """Neighbours along E as one complex number; a view, where they lie beside each other."""
    beside = x if x.stride(-1) == 1 else x.contiguous()
    return torch.view_as_complex(beside.unflatten(-1, (-1, 2)))


def _angles(rotation_TP2: Tensor) -> Tensor:
    """(T, 1, 1, P), complex: for all heads, of queries and keys."""
    return torch.view_as_complex(rotation_TP2)[:, None, None]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, dtype: torch.dtype
    ) -> Tensor:
        x = x.to(dtype)
        gate, value = _product(x, w1), _product(x, w3)
        ctx.save_for_backward(x, w1, w3, w2, gate, value)
        return _product(F.silu(gate).mul_(value), w2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, w1, w3, w2, gate, value = ctx.saved_tensors
        grad_hidden = _back(grad, w2)
        hidden = F.silu(gate)
        grad_value = grad_hidden * hidden
        grad_w2 = _of_weight(grad, hidden.mul_(value))
        grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(value), gate)
        grad_x = _back(grad_gate, w1).add_(_back(grad_value, w3))
        return grad_x, _of_weight(grad_gate, x), _of_weight(grad_value, x), grad_w2, None


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + eps) ** -0.5."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        r = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        width = x.shape[-1]
        products = (grad * x).flatten(0, -2)
        grad_weight = r.view(-1) @ products
        # grad_x = r (grad w) - x r^3 mean(grad w x)
        along = (products @ weight).view_as(r).mul_(r.pow(3)).div_(width)
        grad_x = torch.mul(grad, weight, out=products.view_as(grad)).mul_(r)
        return grad_x.addcmul_(x, along, value=-1), grad_weight, None
