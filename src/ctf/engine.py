"""The same model, faster to sample: its matrices packed for the processor, in float32 or in int8.

A transformer that draws multiplies a few rows with every matrix, again and again. oneDNN's packed
layout reads the matrix once and in order; in int8 it is a quarter of the bytes. Packing replaces
layers in place and needs neither a compiler nor another package. What a processor cannot do is
left as it is.

Shapes: V rows of a matrix, D its columns.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.errors import UserError
from ctf.transformer import SwiGLU

Engine = Literal["auto", "eager", "int8"]

ROWS = 16  # that a packed layout is chosen for: 8 images and as many without their class


class Packed(nn.Module):
    """A linear layer without bias in oneDNN's own layout, float32. Equal up to rounding."""

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__()
        weight_VD = weight_VD.detach().float().contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_VD, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return out

    def weight(self) -> Tensor:
        """The matrix again, exactly."""
        dense: Tensor = self.packed.to_dense()
        return dense

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight()


class Int8(nn.Module):
    """A linear layer in int8: a scale for each row of the matrix, and one for each input, found
    when it comes (dynamic quantisation).
    """

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__()
        weight_VD = weight_VD.detach().float().contiguous()
        scale_V = (weight_VD.abs().amax(1) / 127).clamp(min=1e-12).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own announcement that it will move this
            quantised = torch.quantize_per_channel(
                weight_VD, scale_V, torch.zeros(len(scale_V), dtype=torch.int64), 0, torch.qint8
            )
            self.packed = torch.ops.quantized.linear_prepack(quantised, None)
        # Without VNNI, products of full range could overflow.
        self.reduced = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic(x, self.packed, self.reduced)
        return out

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise UserError(
            "weights in int8 cannot be saved: they are not those of the model any more\n"
            "load it with the engine auto or eager to save it"
        )


class PackedSwiGLU(nn.Module):
    """`SwiGLU` with its first two matrices as one product."""

    def __init__(self, ffn: SwiGLU, kind: type[Packed] | type[Int8]) -> None:
        super().__init__()
        # In a list, where it is no part of the state: there it is two matrices, as in `SwiGLU`.
        self.first = [kind(torch.cat([ffn.w1.weight, ffn.w3.weight]))]
        self.w2 = kind(ffn.w2.weight)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, value = self.first[0](x_BTD).chunk(2, -1)
        out: Tensor = self.w2(F.silu(gate) * value)
        return out

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if isinstance(self.first[0], Packed):  # the other kind refuses, as `w2` says
            w1, w3 = self.first[0].weight().chunk(2)
            destination[f"{prefix}w1.weight"], destination[f"{prefix}w3.weight"] = w1, w3


def available(engine: Engine, device: torch.device) -> bool:
    """Whether this machine can do better than single operators."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return engine != "int8" or bool(
        {"x86", "fbgemm"} & {*torch.backends.quantized.supported_engines}
    )


@functools.cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def pack(model: nn.Module, engine: Engine) -> None:
    """Replaces the linear layers of a model that draws, in place; each old one is let go at once.

    engine: "eager" leaves it as it is; "auto" computes the same in float32; "int8" computes nearly
        the same. Where the machine cannot, it says so once and leaves the model as it is.
    """
    device = next(model.parameters()).device
    if engine == "eager":
        return
    if not available(engine, device):
        if engine == "int8":
            _say_once(f"int8 is not available for {device.type} here; computing in float32")
        return
    _replace(model, Int8 if engine == "int8" else Packed)


def _replace(module: nn.Module, kind: type[Packed] | type[Int8]) -> None:
    for name, child in module.named_children():
        if isinstance(child, SwiGLU):
            setattr(module, name, PackedSwiGLU(child, kind))
        elif isinstance(child, nn.Linear):
            setattr(module, name, kind(child.weight))
        else:
            _replace(child, kind)
