"""The transformer's modules for training on a processor: forward and backward passes by hand.

The same mathematics as in `ctf.models.transformer`, up to rounding. Under autograd each operator
reads and writes full-size tensors, mostly fresh memory that the system has to clear first. By
hand, a module computes in place where it can, and recomputes in the backward pass what is cheap.
Products with weights are oneDNN's, which are faster here than MKL's.

Under autocast, products are in bfloat16 (the processor sums them in float32), and so is what only
leads from one product to the next, as on a GPU. Weights, norms, rotations and the residual stream
stay in float32.

Shapes: B batch, T positions, D width, F hidden width of SwiGLU, N heads, E head dim, P rotated
pairs of a head (E / 2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctf.kernels.products import linear
from ctf.models import transformer


class Linear(nn.Linear):
    """A linear layer without bias."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear.forward`."""
        return _Linear.apply(x, self.weight, _precision(x))


class Attention(transformer.Attention):
    """Attention with one product for queries, keys and values, rotated in place."""

    def rotated_heads(self, x_BTD: Tensor, rotation_TP2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `transformer.Attention.rotated_heads`."""
        q_BNTE, k_BNTE, v_BNTE = _Heads.apply(
            x_BTD, self.qkv.weight, rotation_TP2, self.heads, _precision(x_BTD)
        )
        return q_BNTE, k_BNTE, v_BNTE


class SwiGLU(transformer.SwiGLU):
    """SwiGLU that keeps two hidden tensors for the backward pass instead of four."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """As `transformer.SwiGLU.forward`."""
        w1, w3, w2 = self.w1.weight, self.w3.weight, self.w2.weight
        return self.dropout(_SwiGLU.apply(x_BTD, w1, w3, w2, _precision(x_BTD)))


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """As `nn.RMSNorm.forward`."""
        return _RMSNorm.apply(x_BTD, self.weight, self.eps)


class Dropout(nn.Dropout):
    """Dropout with 16 random bits for each entry, in a tenth of the time.

    The probability is rounded to the nearest multiple of 2 ** -16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Dropout.forward`, with other masks."""
        threshold = round(self.p * 2**16)
        if not (self.training and threshold):
            return x
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        scale = 2**16 / (2**16 - threshold)
        return (x * scale).masked_fill_(bits < threshold - 2**15, 0)


FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.RMSNorm: RMSNorm,
    nn.Dropout: Dropout,
    transformer.Attention: Attention,
    transformer.SwiGLU: SwiGLU,
}


def _precision(x: Tensor) -> torch.dtype:
    """Precision of products with `x`: that of autocast, if it is enabled."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


# Gradients may be in the precision of products: autograd casts them to that of their tensor.


def _grad_input(grad: Tensor, weight_FD: Tensor) -> Tensor:
    return linear(grad, weight_FD.t())


def _grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return _grad_input(grad, weight), _grad_weight(grad, x), None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rotation_TP2: Tensor, heads: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x.to(dtype)
        ctx.save_for_backward(x, weight, rotation_TP2)
        qkv_BT3NE = linear(x, weight).unflatten(-1, (3, heads, -1))
        qk_BT2NE = qkv_BT3NE[:, :, :2].float()  # a view in float32: rotated in place
        _as_complex(qk_BT2NE).mul_(_angles(rotation_TP2))
        q, k = qk_BT2NE.to(dtype).permute(2, 0, 3, 1, 4)
        return q, k, qkv_BT3NE[:, :, 2].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_BNTE: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, rotation_TP2 = ctx.saved_tensors
        grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in grads_BNTE)
        inverse_TP = _angles(rotation_TP2)[:, 0].conj().resolve_conj()
        shape = *grad_q.shape[:2], 3, *grad_q.shape[2:]
        grad_BT3NE = grad_q.new_empty(shape, dtype=torch.float32)
        for i, grad in enumerate((grad_q, grad_k)):
            torch.mul(_as_complex(grad.float()), inverse_TP, out=_as_complex(grad_BT3NE[:, :, i]))
        grad_BT3NE[:, :, 2] = grad_v
        grad = grad_BT3NE.flatten(2).to(x.dtype)
        return _grad_input(grad, weight), _grad_weight(grad, x), None, None, None


def _as_complex(x: Tensor) -> Tensor:
    """Neighbours along the last dimension as complex numbers; a view where these are adjacent."""
    adjacent = x if x.stride(-1) == 1 else x.contiguous()
    return torch.view_as_complex(adjacent.unflatten(-1, (-1, 2)))


def _angles(rotation_TP2: Tensor) -> Tensor:
    """(T, 1, 1, P), complex: the same for all heads, and for queries and keys."""
    return torch.view_as_complex(rotation_TP2)[:, None, None]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, dtype: torch.dtype
    ) -> Tensor:
        x = x.to(dtype)
        gate, value = linear(x, w1), linear(x, w3)
        ctx.save_for_backward(x, w1, w3, w2, gate, value)
        return linear(F.silu(gate).mul_(value), w2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, w1, w3, w2, gate, value = ctx.saved_tensors
        grad_hidden = _grad_input(grad, w2)
        hidden = F.silu(gate)
        grad_value = grad_hidden * hidden
        grad_w2 = _grad_weight(grad, hidden.mul_(value))
        grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(value), gate)
        grad_x = _grad_input(grad_gate, w1).add_(_grad_input(grad_value, w3))
        return grad_x, _grad_weight(grad_gate, x), _grad_weight(grad_value, x), grad_w2, None


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + eps) ** -0.5."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        r = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        normed: Tensor = x * r
        return normed.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        products = (grad * x).flatten(0, -2)
        grad_weight = r.view(-1) @ products
        # grad_x = r (grad w) - x r^3 mean(grad w x)
        along = (products @ weight).view_as(r).mul_(r.pow(3)).div_(x.shape[-1])
        grad_x = torch.mul(grad, weight, out=products.view_as(grad)).mul_(r)
        return grad_x.addcmul_(x, along, value=-1), grad_weight, None
