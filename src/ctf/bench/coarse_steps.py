"""One step of the coarse model at any position, without the steps before it.

Shapes: B batch, L tokens of an image, K labels of the output layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn

from ctf.bench import llamagen_reference
from ctf.kernels.graphs import GraphedCoarseModel, Key, Passes
from ctf.kernels.products import Int8, Packed
from ctf.kernels.sampling_cpu import GrowingCache, PackedSwiGLU
from ctf.models import sampling
from ctf.models.coarse import CoarseModel
from ctf.models.noise import gumbel_noise
from ctf.models.parallel import CoarseDecoder
from ctf.models.sampling import Sampling, with_no_class

LAYERS_APART = 12  # layers with a cache of their own: more than fit into any processor's cache

# Given a position before which the cache is full, prepares the step there and returns it.
Steps = Callable[[int], Callable[[], Tensor]]


def engine_steps(
    model: CoarseModel, guidance: float, classes_B: Tensor, labels_BL: Tensor, keys_B: Tensor
) -> Steps:
    """The steps of a coarse model as the pipeline takes them."""
    if isinstance(model, GraphedCoarseModel):
        return _graphed_steps(model, guidance, classes_B, labels_BL, keys_B)

    def at(position: int) -> Callable[[], Tensor]:
        decoder = CoarseDecoder(model, classes_B, [guidance] * model.config.length)
        starts = [position] * len(classes_B)
        decoder.cached = [starts, starts]
        room = min(-(-position // GrowingCache.BLOCK) * GrowingCache.BLOCK, model.config.length)
        for stored in (decoder.cache.k, decoder.cache.v):
            room = max(room, stored[0].shape[2])  # all of it from the start, if it does not grow
            apart = [
                k.new_full((*k.shape[:2], room, k.shape[3]), 0.01) for k in stored[:LAYERS_APART]
            ]
            stored[:] = [apart[layer % len(apart)] for layer in range(len(stored))]
        return lambda: sampling.sample_logits(
            decoder.logits(labels_BL, starts, 1)[:, 0],
            gumbel_noise(keys_B, model.vocab_size),
            1.0,
            0,
            1.0,
        )

    return at


def _graphed_steps(
    model: GraphedCoarseModel, guidance: float, classes_B: Tensor, labels_BL: Tensor, keys_B: Tensor
) -> Steps:
    """The same on a GPU: one CUDA graph, with the whole cache."""
    batch, halves = len(classes_B), 1 if guidance == 1 else 2
    passes = Passes(model, Key(batch, halves * batch, 1.0, 0, 1.0))
    passes.classes_R.copy_(classes_B if halves == 1 else with_no_class(classes_B, model.no_class))
    passes.keys_BL.copy_(keys_B[:, None])
    passes.scales_L.fill_(guidance)
    passes.buffer_BM[:, : labels_BL.shape[1]] = labels_BL
    for stored in (*passes.cache.k, *passes.cache.v):
        stored.fill_(0.01)

    def at(position: int) -> Callable[[], Tensor]:
        starts = [position] * batch

        def step() -> Tensor:
            passes.starts_B.fill_(position)
            passes.run(model, 1, starts, halves)
            return passes.buffer_BM[:, position]

        return step

    return at


def plain_steps(
    model: CoarseModel, guidance: float, classes_B: Tensor, labels_BL: Tensor, keys_B: Tensor
) -> Steps:
    """The same steps in LlamaGen's way."""
    settings = Sampling(guidance=guidance)
    first_B = llamagen_reference.first_inputs(model, classes_B, settings)
    shallow = dataclasses.replace(model.config, layers=min(LAYERS_APART, model.config.layers))
    weight = model.head.weight
    apart, masks = llamagen_reference.make_caches(
        shallow, len(first_B), weight.device, weight.dtype
    )
    apart.fill_(0.01)
    caches = [apart[layer % len(apart)] for layer in range(model.config.layers)]

    def at(position: int) -> Callable[[], Tensor]:
        inputs_B = first_B
        if position:
            inputs_B = labels_BL[:, position - 1].repeat(len(first_B) // len(classes_B))
        return lambda: llamagen_reference.sample_step(
            model,
            inputs_B,
            position,
            caches,
            masks,
            gumbel_noise(keys_B, model.vocab_size),
            settings,
        )

    return at


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they are held, packed or not."""
    total = 0
    for part in model.modules():
        total += sum(p.numel() * p.element_size() for p in part.parameters(recurse=False))
        if isinstance(part, (Packed, Int8)):
            total += part.bytes()
        elif isinstance(part, PackedSwiGLU):
            total += weight_bytes(part.first[0])
    return total
