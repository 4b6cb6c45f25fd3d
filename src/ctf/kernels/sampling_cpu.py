"""The same models, faster to draw with: matrices and convolutions made ready for the processor.

A transformer that draws multiplies a few rows with every matrix, again and again. oneDNN's packed
layout reads the matrix once and in order; in int8 it is a quarter of the bytes. The tokenizer's
decoder has its own module (`fast_tokenizer`). On a GPU it is the single kernels' start that costs:
there the steps are compiled. All this replaces layers in place and needs no other package. What a
machine cannot do is left as it is.

Shapes: V rows of a matrix, D its columns; B batch, T positions.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.kernels import tokenizer_cpu
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.tokenizer import VQModel
from ctf.models.transformer import KVCache, SwiGLU, TransformerConfig, Trunk

Engine = Literal["auto", "eager", "compile", "int8"]

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
        self.size = weight_VD.numel() + 4 * len(weight_VD)  # bytes, about
        # Without VNNI, products of full range could overflow.
        self.reduced = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic(x, self.packed, self.reduced)
        return out


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
        if isinstance(self.first[0], Packed):  # int8 is not the model's own, see `is_exact`
            w1, w3 = self.first[0].weight().chunk(2)
            destination[f"{prefix}w1.weight"], destination[f"{prefix}w3.weight"] = w1, w3


def available(engine: Engine, device: torch.device) -> bool:
    """Whether this machine can do what `engine` asks for on `device`."""
    match engine:
        case "eager":
            return True
        case "compile":
            return _compiles(device.type)
        case "auto":
            return device.type == "cpu" and _works(Packed)
        case "int8":
            return device.type == "cpu" and _works(Int8)


@functools.cache
def _works(kind: type[Packed] | type[Int8]) -> bool:
    """Whether this build of PyTorch, on this processor, can do the products of a kind."""
    try:
        kind(torch.ones(16, 16))(torch.ones(2, 16))
    except Exception:  # no such operator, no such library, no such instruction
        return False
    return True


@functools.cache
def _compiles(device: str) -> bool:
    """Whether PyTorch finds what it needs to compile for a kind of device: a compiler, Triton."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception:  # each part that may be missing says so in its own way
        return False
    return True


@functools.cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def prepare(
    coarse: CoarseModel | None, fine: FineModel | None, tokenizer: VQModel | None, engine: Engine
) -> None:
    """Makes the models of a pipeline ready to draw, in place; each old layer is let go at once.

    Where the machine cannot do what is asked for, it says so once and leaves the models as they
    are.

    Args:
        engine: "eager" leaves all as it is. "auto" computes the same, up to rounding, as fast as
            is known here: packed on a processor, compiled on a GPU. "compile" compiles the steps
            of the coarse model. "int8" computes nearly the same: transformers in 8-bit integers,
            and, where the processor multiplies bfloat16, the cached keys and values and the
            decoder's convolutions in that.
    """
    models = [model for model in (coarse, fine, tokenizer) if model is not None]
    device = next(models[0].parameters()).device
    if engine == "auto" and device.type == "cuda":
        engine = "compile" if available("compile", device) else "eager"
    if not available(engine, device):
        if engine != "auto":
            _say_once(f"{engine} is not available for {device.type} here; computing without it")
        return
    if engine == "compile":
        if coarse is not None:
            coarse.trunk = CompiledTrunk(coarse.trunk)
        return
    if engine == "eager":
        return
    kind = Int8 if engine == "int8" else Packed
    low = torch.bfloat16 if engine == "int8" and multiplies_bfloat16() else None
    if coarse is not None:
        _pack(coarse, kind)
        coarse.trunk.cache_dtype = low
    if fine is not None:
        _pack(fine.trunk, kind)  # its head is read in slices, by cluster
    if tokenizer is not None:
        tokenizer_cpu.prepare(tokenizer, "decoder", low or torch.float32)


def multiplies_bfloat16() -> bool:
    """Whether the processor does so itself; where it does not, it would take longer."""
    return torch.cpu._is_avx512_bf16_supported()


def is_exact(model: nn.Module) -> bool:
    """Whether a model still has the weights that it was loaded with, so that it can be saved."""
    return not any(isinstance(part, Int8) for part in model.modules())


def _pack(module: nn.Module, kind: type[Packed] | type[Int8]) -> None:
    for name, child in module.named_children():
        if isinstance(child, SwiGLU):
            setattr(module, name, PackedSwiGLU(child, kind))
        elif isinstance(child, nn.Linear):
            setattr(module, name, kind(child.weight))
        else:
            _pack(child, kind)


# --- Compiled steps -------------------------------------------------------------------------------


class StaticCache(KVCache):
    """A cache with room for all positions from the start, so that all steps have one shape."""

    def __init__(
        self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config, batch, device, dtype)
        self.k = [self._grown(k, config.length) for k in self.k]
        self.v = [self._grown(v, config.length) for v in self.v]


class CompiledTrunk(Trunk):
    """A `Trunk` whose single steps of a whole batch are compiled, into CUDA graphs on a GPU.

    Every step attends to all positions and masks those that are not there yet: a fixed shape is
    worth more than the work that is saved.
    """

    def __init__(self, trunk: Trunk) -> None:
        nn.Module.__init__(self)
        self.config, self.cache_dtype = trunk.config, trunk.cache_dtype
        for name, child in trunk.named_children():
            setattr(self, name, child)
        graphs = next(trunk.parameters()).device.type == "cuda"
        self._step = torch.compile(
            self._through, mode="reduce-overhead" if graphs else None, fullgraph=True, dynamic=False
        )

    def cache(self, batch: int) -> KVCache:
        return StaticCache(self.config, batch, *self.cached_as())

    def step(
        self, inputs_BT: Tensor, start: int, cache: KVCache, images: slice = slice(None)
    ) -> Tensor:
        batch, count = inputs_BT.shape
        if count > 1 or batch < len(cache.k[0]):
            return super().step(inputs_BT, start, cache, images)
        position = torch.tensor([start], device=inputs_BT.device)
        torch.compiler.cudagraph_mark_step_begin()
        return self._step(
            self._embed(inputs_BT, start), self.rope.table, position, cache.k, cache.v
        )

    def _through(
        self,
        x_B1D: Tensor,
        table_TP2: Tensor,
        position: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        rotation_1P2 = table_TP2[position]
        seen_T = torch.arange(self.config.length, device=position.device) <= position

        def attend(layer: int, q_BN1E: Tensor, k_BN1E: Tensor, v_BN1E: Tensor) -> Tensor:
            keys[layer].index_copy_(2, position, k_BN1E)
            values[layer].index_copy_(2, position, v_BN1E)
            return F.scaled_dot_product_attention(
                q_BN1E, keys[layer], values[layer], attn_mask=seen_T[None]
            )

        for i, layer in enumerate(self.layers):
            x_B1D = layer(x_B1D, rotation_1P2, functools.partial(attend, i))
        out: Tensor = self.norm(x_B1D)
        return out
