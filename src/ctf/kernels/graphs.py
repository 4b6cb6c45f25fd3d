"""Sampling of coarse labels on a GPU: each step, from label to label, is one CUDA graph.

A step of a small batch is hundreds of kernels of a few microseconds each, and to launch one takes
as long. Recorded once, all of them are launched together. Nothing of a step comes from the
processor: position, labels, keys of the noise and guidance scales are on the GPU, so steps follow
each other without waiting.

Shapes: B batch, R its rows with both halves of guidance, T positions of the cache that a graph
reads, L labels of an image, D width, N heads, E head dim, K labels of the output layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctf.kernels import compiled
from ctf.kernels.replace import replace
from ctf.models.coarse import CoarseModel
from ctf.models.noise import gumbel_noise
from ctf.models.sampling import (
    Sampling,
    apply_guidance,
    guidance_scales,
    sample_logits,
    with_no_class,
)
from ctf.models.transformer import Attention

GRAPHS = 4  # of positions: each reads the cache up to the last of its own
WARM_UP = 3  # steps before a recording, in which libraries allocate what they need


class GraphedSampler:
    """Samples the coarse labels of batches of one size, one label after another.

    The labels are those of `models.parallel.sample_coarse`. On a processor, steps are computed one
    by one in the same way, so that this can be tested.

    Args:
        model: In evaluation mode.
        batch: Images at a time.
        settings: Of the coarse stage.
        compile: Compile the layers before they are recorded, so that their kernels are fewer.
    """

    @torch.inference_mode()
    def __init__(
        self, model: CoarseModel, batch: int, settings: Sampling, *, compile: bool = False
    ) -> None:
        self.model, self.settings = model, settings
        config, weight = model.config, model.head.weight
        device, self.length = weight.device, config.length
        scales = guidance_scales(settings, self.length)
        self.halves = 2 if any(scale != 1 for scale in scales) else 1
        self._scales_L = torch.tensor(scales, device=device)
        self._rotations = model.backbone.rotation(0, self.length)
        # What a step reads and writes, always at the same addresses.
        self._classes_R = torch.zeros(self.halves * batch, dtype=torch.int64, device=device)
        self._keys_BL = torch.zeros(batch, self.length, dtype=torch.int64, device=device)
        self._labels_BL = torch.zeros_like(self._keys_BL)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._cache = model.backbone.cache(len(self._classes_R))
        if self._cache.k[0].shape[2] != self.length:
            raise ValueError("expected a model whose cache has its full length from the start")
        self._layer: Callable[..., Tensor] = stored_layer
        if compile:
            # Not the noise: what the compiler of PyTorch 2.13 makes of it for a processor writes
            # beyond its memory. And not all layers in one: equal ones are compiled once.
            replace(model.backbone, {Attention: compiled.Attention})
            self._layer = torch.compile(stored_layer, fullgraph=True)
        each = -(-self.length // GRAPHS)
        ends = [min(start + each, self.length) for start in range(0, self.length, each)]
        self._steps = [(end, self._recorded(end)) for end in ends]

    @torch.inference_mode()
    def sample(self, classes_B: Tensor, keys_BL: Tensor) -> Tensor:
        """Sample labels: int64 (B, L).

        Args:
            classes_B: int64 in [0, classes], of the batch size of the sampler.
            keys_BL: Of the noise, row 0 of `noise_keys`.
        """
        if self.halves == 2:
            classes_B = with_no_class(classes_B, self.model.no_class)
        self._classes_R.copy_(classes_B)
        self._keys_BL.copy_(keys_BL)
        self._position.zero_()
        done = 0
        for end, step in self._steps:
            for _ in range(done, end):
                step()
            done = end
        return self._labels_BL.clone()

    def _recorded(self, end: int) -> Callable[[], None]:
        """A step that reads the cache up to a position, as a graph on a GPU."""
        step = functools.partial(self._step, end)
        if self._position.device.type != "cuda":
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._position.zero_()
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self._position.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def _step(self, end: int) -> None:
        """Sample the label at the position, from those before it, and go to the next."""
        backbone, position = self.model.backbone, self._position
        before_B = self._labels_BL.index_select(1, (position - 1).clamp(min=0))[:, 0]
        x_RD = torch.where(
            position == 0,
            backbone.class_embedding(self._classes_R),
            backbone.label_embedding(before_B.repeat(self.halves)),
        )
        x_R1D, rotation_1P2 = x_RD[:, None], self._rotations[position]
        stored = zip(backbone.layers, self._cache.k, self._cache.v, strict=True)
        for layer, keys, values in stored:
            x_R1D = self._layer(layer, x_R1D, rotation_1P2, keys, values, position, end)
        logits_RK = self.model.head(backbone.norm(x_R1D))[:, -1]
        if self.halves == 2:
            cond_BK, uncond_BK = logits_RK.chunk(2)
            logits_RK = apply_guidance(cond_BK, uncond_BK, self._scales_L[position])
        noise_BK = gumbel_noise(self._keys_BL.index_select(1, position)[:, 0], logits_RK.shape[1])
        s = self.settings
        labels_B = sample_logits(logits_RK, noise_BK, s.temperature, s.top_k, s.top_p)
        self._labels_BL.index_copy_(1, position, labels_B[:, None])
        position += 1


def stored_layer(
    layer: nn.Module,
    x_R1D: Tensor,
    rotation_1P2: Tensor,
    keys_RNLE: Tensor,
    values_RNLE: Tensor,
    position: Tensor,
    end: int,
) -> Tensor:
    """A block at one position, (1,), whose keys and values it stores, and of which it reads T."""
    mask_1T = torch.arange(end, device=position.device)[None] <= position

    def attend(q_RN1E: Tensor, k_RN1E: Tensor, v_RN1E: Tensor) -> Tensor:
        keys_RNLE.index_copy_(2, position, k_RN1E)
        values_RNLE.index_copy_(2, position, v_RN1E)
        return F.scaled_dot_product_attention(
            q_RN1E, keys_RNLE[:, :, :end], values_RNLE[:, :, :end], attn_mask=mask_1T
        )

    return layer(x_R1D, rotation_1P2, attend)
