"""One step of the coarse model at any position, without the steps before it.

Shapes: B batch, L tokens of an image, K labels of the output layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn

from ctf.bench import llamagen_reference
from ctf.kernels.products import Int8, Packed
from ctf.kernels.sampling_cpu import GrowingCache, PackedSwiGLU
from ctf.models import sampling
from ctf.models.coarse import CoarseModel
from ctf.models.noise import gumbel_noise
from ctf.models.parallel import CoarseDecoder
from ctf.models.sampling import Sampling

LAYERS_APART = 12  # layers with a cache of their own: more than fit into any processor's cache

# Given a position before which the cache is full, prepares the step there and returns it.
Steps = Callable[[int], Callable[[], Tensor]]


def engine_steps(
    model: CoarseModel, guidance: float, classes_B: Tensor, labels_BL: Tensor, keys_B: Tensor
) -> Steps:
    """The steps of a coarse model as the pipeline takes them."""

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
