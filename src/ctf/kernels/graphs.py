"""Sampling of coarse labels on a GPU: each pass, from labels to labels, is one CUDA graph.

A pass over a small batch is hundreds of kernels of a few microseconds each, and to launch one takes
as long. Recorded once, all of them are launched together: embedding, layers, cache, guidance,
filters, noise and the choice. Positions, labels, keys of the noise and guidance scales are on the
GPU, at addresses that stay the same. A pass over one label waits for nothing; after one over
several, the processor reads how many of them are certain.

Shapes: B batch, R its rows with the computed halves of guidance, W positions of a window, T
positions of the cache that a graph reads, L labels of an image, D width, N heads, E head dim, P
rotated pairs of a head (E / 2), K labels of the output layer.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.common import memory
from ctf.kernels.logits import LeanCoarseModel
from ctf.models.coarse import CoarseModel
from ctf.models.noise import gumbel_noise
from ctf.models.parallel import CoarseDecoder, CoarseSampler
from ctf.models.sampling import CHOICES, apply_guidance, sample_logits
from ctf.models.transformer import Backbone

ENDS = 4  # positions that graphs read the cache up to: a quarter of it, a half, ...
WARM_UP = 3  # passes before a recording, in which libraries allocate what they need
SPARES = 3  # batches of other sizes or settings whose recordings are kept


class GraphedCoarseModel(LeanCoarseModel):
    """A coarse model that is sampled by `GraphedSampler`, with the recordings that are not in use.

    Its cache has its full length from the start, and its attention can be compiled.
    """

    compile_layers = False  # before they are recorded, so that their kernels are fewer

    @functools.cached_property
    def spares(self) -> dict[Key, Passes]:
        """Recordings that the next batch may take, the newest last."""
        return {}

    def spare_bytes(self) -> int:
        """Memory of the caches of recordings that are not in use."""
        return self.backbone.cache_bytes() * sum(key.rows for key in self.spares)

    def __getstate__(self) -> dict[str, Any]:  # a copy records its own passes
        return {name: value for name, value in vars(self).items() if name != "spares"}


class Key(NamedTuple):
    """What a recording is made for: anything else can change between its batches."""

    batch: int
    rows: int  # of the cache: `batch`, or twice as many under guidance
    temperature: float
    top_k: int
    top_p: float


class GraphedSampler(CoarseSampler):
    """A `CoarseSampler` whose passes are CUDA graphs, recorded when they are first needed.

    The labels and the passes are the same. What comes at other shapes, catching up with labels that
    are known, is computed eagerly. On a processor, passes are computed as they would be recorded,
    so that this can be tested.
    """

    model: GraphedCoarseModel
    _passes: Passes | None = None  # that this sampler uses alone, until it is done
    _give_back: Callable[[], object]
    _at: Sequence[int] | None = None  # where the starts are on the GPU

    @torch.inference_mode()
    def advance(self, window: int = 1) -> list[int]:
        """As `CoarseSampler.advance`."""
        made = super().advance(window)
        if self.done:
            with torch.inference_mode(False):
                self._buffer_BM = self._buffer_BM.clone()
            self._decoder = None
            self._leave()
        return made

    def select(self, rows: Sequence[int]) -> None:
        """As `CoarseSampler.select`; the recordings for fewer images are others."""
        if self._decoder is not None and self._passes is not None:
            cache = self._decoder.cache = copy.copy(self._passes.cache)
            cache.k, cache.v = list(cache.k), list(cache.v)
        super().select(rows)  # copies what is in the recordings' tensors
        self._leave()

    def _leave_out_done(self) -> None:
        """Nothing: passes are recorded for a number of images."""

    def _make_decoder(self) -> CoarseDecoder:
        decoder = CoarseDecoder(self.model, self._classes_B, self._scales, self._take().cache)
        self._fill(decoder)
        return decoder

    def _pass(self, decoder: CoarseDecoder, window: int) -> list[int]:
        starts = self.certain
        if self._passes is None:
            stored, decoder.cache = decoder.cache, self._take().cache
            pairs = zip(decoder.cache.k + decoder.cache.v, stored.k + stored.v, strict=True)
            for own, other in pairs:
                own.copy_(other)
            self._fill(decoder)
        assert self._passes is not None
        halves = decoder.halves(starts, window)
        if decoder.is_behind(starts, halves):
            self._at = None
            return super()._pass(decoder, window)
        if self._at != starts:
            self._passes.starts_B.copy_(torch.tensor(starts))
        self._passes.run(self.model, window, starts, halves)
        decoder.computed(starts, 0, halves)
        if window == 1:
            self._at = [min(start + 1, self.length) for start in starts]
            return [0] * len(starts)
        self._at = self._passes.starts_B.tolist()
        return [max(after - start - 1, 0) for after, start in zip(self._at, starts, strict=True)]

    def _take(self) -> Passes:
        """Take the recordings of a batch that is done, or new ones."""
        model, s = self.model, self.settings
        batch, halves = len(self._keys_BL), 1 + any(scale != 1 for scale in self._scales)
        key = Key(batch, halves * batch, s.temperature, s.top_k, s.top_p)
        passes = model.spares.pop(key, None)
        if passes is None:
            device = self._keys_BL.device
            if key.rows * model.backbone.cache_bytes() > memory.available(device) // 2:
                model.spares.clear()
            passes = Passes(model, key)
        self._passes = passes
        # Also if this sampler is left before it is done.
        finalizer = weakref.finalize(self, _keep, model.spares, key, passes)
        finalizer.atexit = False
        self._give_back = finalizer
        return passes

    def _fill(self, decoder: CoarseDecoder) -> None:
        """Copy what the passes read and write to where they expect it."""
        assert self._passes is not None
        passes, device = self._passes, self._keys_BL.device
        passes.classes_R.copy_(decoder.classes)
        passes.keys_BL.copy_(self._keys_BL)
        passes.scales_L.copy_(torch.tensor(self._scales, device=device))
        passes.buffer_BM.copy_(self._buffer_BM)
        self._buffer_BM, self._at = passes.buffer_BM, None
        passes.fixed_BM.zero_()
        if self._fixed_BM is not None:
            passes.fixed_BM.copy_(self._fixed_BM)

    def _leave(self) -> None:
        if self._passes is not None:
            self._passes = None
            self._give_back()


def _keep(spares: dict[Key, Passes], key: Key, passes: Passes) -> None:
    while len(spares) >= SPARES:
        spares.pop(next(iter(spares)))
    spares[key] = passes


class Passes:
    """The tensors of a batch at fixed addresses, and the passes that are recorded on them.

    buffer_BM: Labels, certain or guessed, and room for windows beyond the last, as a sampler has.
    fixed_BM: Which of these are known.
    starts_B: Of each image, how many labels are certain; the cache has all before. A pass goes on
        from there, and moves them.
    """

    @torch.inference_mode(False)  # these, too, are what a model may be trained on
    def __init__(self, model: GraphedCoarseModel, key: Key) -> None:
        device, self.length = model.head.weight.device, model.config.length
        self.key = key  # not the model, which has these: both are freed at once
        self.classes_R = torch.zeros(key.rows, dtype=torch.int64, device=device)
        self.keys_BL = torch.zeros(key.batch, self.length, dtype=torch.int64, device=device)
        self.buffer_BM = self.keys_BL.new_zeros(key.batch, 2 * self.length)
        self.fixed_BM = torch.zeros_like(self.buffer_BM, dtype=torch.bool)
        self.starts_B = self.keys_BL.new_zeros(key.batch)
        self.scales_L = torch.ones(self.length, device=device)
        self.rotations_TP2 = model.backbone.rotation(0, self.length)
        self.cache = model.backbone.cache(key.rows)
        if self.cache.k[0].shape[2] != self.length:
            raise ValueError("expected a model whose cache has its full length from the start")
        self._recorded: dict[tuple[int, int, int], Callable[[], None]] = {}
        # Nothing that a pass computes in passing is needed by another: all share their memory.
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._layer = compiled_layer() if model.compile_layers else stored_layer

    def run(
        self, model: GraphedCoarseModel, window: int, starts: Sequence[int], halves: int
    ) -> None:
        """Compute the labels of a window, and where the next one starts; both stay here.

        Args:
            model: That these are recordings of.
            window: W.
            starts: What `starts_B` is.
            halves: Of guidance, 1 if none of the labels is guided.
        """
        last = window + max(min(start, self.length - window) for start in starts)
        each = -(-self.length // ENDS)
        shape = window, min(-(-last // each) * each, self.length), halves
        if shape not in self._recorded:
            self._recorded[shape] = self._record(functools.partial(self.compute, model, *shape))
        self._recorded[shape]()

    def _record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Return a pass as a graph, where there are graphs; nothing is changed by that.

        Warns if it cannot be recorded; then it is computed eagerly.
        """
        if self.starts_B.device.type != "cuda":
            return compute
        before = [(tensor, tensor.clone()) for tensor in (self.starts_B, self.buffer_BM)]
        with torch.cuda.device(self.starts_B.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    compute()
                    for tensor, value in before:
                        tensor.copy_(value)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may use the GPU meanwhile, to read a batch or to show an image.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    compute()
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                text = f"a pass is computed without a CUDA graph, which is slower: {reason}"
                warnings.warn(text, stacklevel=2)
                return compute
        return graph.replay

    def compute(self, model: GraphedCoarseModel, window: int, end: int, halves: int) -> None:
        """Compute a pass that reads the cache up to a position: what is recorded."""
        rows = halves * self.key.batch
        # All in the grid: near the end, some labels that are certain are computed again.
        begins_B1 = self.starts_B.clamp(max=self.length - window)[:, None]
        positions_BW = begins_B1 + torch.arange(window, device=begins_B1.device)
        hidden_RWD = self._hidden(model.backbone, positions_BW, rows, end)
        logits_BWK: Tensor = model.head(hidden_RWD)
        if halves == 2:
            scales_BW1 = self.scales_L[positions_BW][..., None]
            cond_BWK, uncond_BWK = logits_BWK.chunk(2)
            logits_BWK = apply_guidance(cond_BWK, uncond_BWK, scales_BW1)
        before_BW = self.buffer_BM.gather(1, positions_BW)
        is_settled_BW = self.fixed_BM.gather(1, positions_BW) | (
            positions_BW < self.starts_B[:, None]
        )
        chosen_BW = self._choose(logits_BWK, self.keys_BL.gather(1, positions_BW))
        labels_BW = torch.where(is_settled_BW, before_BW, chosen_BW)
        self.buffer_BM.scatter_(1, positions_BW, labels_BW)
        right_B = (labels_BW == before_BW)[:, :-1].cumprod(1).sum(1)
        self.starts_B.copy_(begins_B1[:, 0] + right_B + 1)

    def _hidden(self, backbone: Backbone, positions_BW: Tensor, rows: int, end: int) -> Tensor:
        """Hidden vectors of positions, of one half or both: (R, W, D)."""
        batch = len(positions_BW)
        # The class token is at position 0, label i at i + 1.
        labels_BW = self.buffer_BM.gather(1, (positions_BW - 1).clamp(min=0))
        positions_RW = positions_BW.repeat(rows // batch, 1)
        x_RWD = torch.where(
            (positions_RW == 0)[..., None],
            backbone.class_embedding(self.classes_R[:rows, None]),
            backbone.label_embedding(labels_BW.repeat(rows // batch, 1)),
        )
        rotation_RWP2 = self.rotations_TP2[positions_RW]
        for layer, keys, values in zip(backbone.layers, self.cache.k, self.cache.v, strict=True):
            x_RWD = self._layer(
                layer, x_RWD, rotation_RWP2, keys[:rows], values[:rows], positions_RW, end
            )
        hidden_RWD: Tensor = backbone.norm(x_RWD)
        return hidden_RWD

    def _choose(self, logits_BWK: Tensor, keys_BW: Tensor) -> Tensor:
        """Labels from logits: int64 (B, W)."""
        limits = self.key.temperature, self.key.top_k, self.key.top_p
        images = max(1, CHOICES // logits_BWK[0].numel())
        parts = zip(logits_BWK.split(images), keys_BW.split(images), strict=True)
        chosen = [
            sample_logits(
                logits.flatten(0, 1), gumbel_noise(keys.flatten(), logits.shape[2]), *limits
            )
            for logits, keys in parts
        ]
        return torch.cat(chosen).view(keys_BW.shape)


def stored_layer(
    layer: nn.Module,
    x_RWD: Tensor,
    rotation_RWP2: Tensor,
    keys_RNLE: Tensor,
    values_RNLE: Tensor,
    positions_RW: Tensor,
    end: int,
) -> Tensor:
    """A block at some positions, whose keys and values it stores, and of which it reads T."""
    stored_R1W1 = positions_RW[:, None, :, None]
    mask_R1WT = torch.arange(end, device=x_RWD.device) <= stored_R1W1

    def attend(q_RNWE: Tensor, k_RNWE: Tensor, v_RNWE: Tensor) -> Tensor:
        index_RNWE = stored_R1W1.expand_as(k_RNWE)
        keys_RNLE.scatter_(2, index_RNWE, k_RNWE)
        values_RNLE.scatter_(2, index_RNWE, v_RNWE)
        keys_RNTE, values_RNTE = keys_RNLE[:, :, :end], values_RNLE[:, :, :end]
        return F.scaled_dot_product_attention(q_RNWE, keys_RNTE, values_RNTE, attn_mask=mask_R1WT)

    return layer(x_RWD, rotation_RWP2, attend)


@functools.cache
def compiled_layer() -> Callable[..., Tensor]:
    """`stored_layer`, compiled once for all equal layers.

    Not the noise: what the compiler of PyTorch 2.13 makes of it for a processor writes beyond its
    memory. And not all layers in one: that takes as many times as long as there are layers.
    """
    return torch.compile(stored_layer, dynamic=True)


def coarse_sampler(model: CoarseModel, *arguments: Any) -> CoarseSampler:
    """Return the sampler of a model, with the arguments of `CoarseSampler`."""
    kind = GraphedSampler if isinstance(model, GraphedCoarseModel) else CoarseSampler
    return kind(model, *arguments)
