"""From classes and random numbers to labels and codes: free functions, nothing remembered.

Shapes: B batch, L tokens of an image, K choices (clusters, members or codes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctf.clusters import Clusters
from ctf.coarse import CoarseModel
from ctf.errors import UserError
from ctf.fine import FineModel
from ctf.transformer import KVCache


@dataclass(frozen=True)
class Sampling:
    """How to sample; settings with `fine_` are the fine stage's own.

    Args:
        guidance: scale g of classifier-free guidance, uncond + g * (cond - uncond) on the
            logits; 1 is none and costs nothing.
        temperature: divides the (guided) logits; below 1 for the likely, above 1 for variety.
        top_k: draw among the k most likely choices; 1 is greedy, 0 is no limit.
        top_p: draw among the fewest most likely choices that together have this probability;
            1 is no limit. Applied after top_k.

    Raises:
        UserError: a value out of its range.
    """

    guidance: float = 2.0
    fine_guidance: float = 1.0
    temperature: float = 1.0
    fine_temperature: float = 1.0
    top_k: int = 0
    fine_top_k: int = 0
    top_p: float = 1.0
    fine_top_p: float = 1.0

    def __post_init__(self) -> None:
        for stage in ("", "fine_"):
            guidance = getattr(self, f"{stage}guidance")
            if not math.isfinite(guidance):
                raise UserError(f"{stage}guidance: got {guidance}, expected a finite number")
            temperature = getattr(self, f"{stage}temperature")
            if not (math.isfinite(temperature) and temperature > 0):
                raise UserError(
                    f"{stage}temperature: got {temperature}, expected more than 0; "
                    f"set {stage}top_k to 1 for the most likely choice"
                )
            top_k = getattr(self, f"{stage}top_k")
            if top_k < 0:
                raise UserError(f"{stage}top_k: got {top_k}, expected 1 or more, or 0 for no limit")
            top_p = getattr(self, f"{stage}top_p")
            if not 0 < top_p <= 1:
                raise UserError(
                    f"{stage}top_p: got {top_p}, expected 0 < {stage}top_p <= 1; 1 is no limit"
                )


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Random numbers in [0, 1) of one generator per image: float64 (B, 2, L).

    Row 0 draws the coarse labels, row 1 the codes. An image's numbers depend on its seed alone
    (torch takes it modulo 2 ** 32).
    """
    return torch.stack(
        [
            torch.rand(2, length, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
            for s in seeds
        ]
    )


def guide(cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """uncond + guidance * (cond - uncond), at least in float32; -inf in `cond` stays -inf."""
    wide = torch.promote_types(cond.dtype, torch.float32)
    cond, uncond = cond.to(wide), uncond.to(wide)
    return (uncond + guidance * (cond - uncond)).masked_fill(cond.isneginf(), -torch.inf)


def keep_top_k(logits_BK: Tensor, top_k: int) -> Tensor:
    """All but the `top_k` largest become -inf; of equal ones the first are kept. 0 keeps all."""
    if top_k == 0 or top_k >= logits_BK.shape[-1]:
        return logits_BK
    smallest_B1 = logits_BK.topk(top_k).values[..., -1:]
    above = logits_BK > smallest_B1
    tied = logits_BK == smallest_B1
    room_B1 = top_k - above.sum(-1, keepdim=True)
    return logits_BK.masked_fill(~(above | (tied & (tied.cumsum(-1) <= room_B1))), -torch.inf)


def keep_top_p(logits_BK: Tensor, top_p: float) -> Tensor:
    """Nucleus sampling (arXiv 1904.09751): the fewest largest whose probabilities add up to
    `top_p` are kept, of equal ones the first; all others become -inf.
    """
    if top_p == 1:
        return logits_BK
    sorted_BK, order_BK = logits_BK.sort(descending=True, stable=True)
    probabilities_BK = sorted_BK.softmax(-1)
    before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
    drop_BK = torch.empty_like(order_BK, dtype=torch.bool)
    drop_BK.scatter_(-1, order_BK, before_BK >= top_p)
    return logits_BK.masked_fill(drop_BK, -torch.inf)


def draw(logits_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """One choice a row by inverting the distribution function, in float64: int64 (B,).

    A choice of probability zero is never drawn, at uniform 0 and 1 neither.
    """
    cdf_BK = logits_BK.double().softmax(-1).cumsum(-1)
    total_B1 = cdf_BK[:, -1:]
    # The first entry above the target is one where the function rises, and the target stays
    # below the function's end, which no rounding may reach.
    below_total_B1 = total_B1.nextafter(torch.zeros_like(total_B1))
    target_B1 = torch.minimum(uniform_B[:, None].double() * total_B1, below_total_B1)
    return torch.searchsorted(cdf_BK, target_B1, right=True)[:, 0]


def choose(
    logits_BK: Tensor, uniform_B: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Temperature, then top-k, then top-p, then a draw; top-k of 1 is the first largest."""
    if top_k == 1:
        return logits_BK.argmax(-1)
    kept_BK = keep_top_k(logits_BK.double() / temperature, top_k)
    return draw(keep_top_p(kept_BK, top_p), uniform_B)


def sample_coarse(
    model: CoarseModel, classes_B: Tensor, uniforms_BL: Tensor, settings: Sampling
) -> Tensor:
    """Draws the labels of each image, one after another: int64 (B, L).

    The model is used as it is: switch its dropout off with `eval()`.

    Args:
        classes_B: int64 in [0, classes], where the model is.
        uniforms_BL: in [0, 1], as row 0 of `uniforms`.
    """
    uniforms_BL = uniforms_BL.to(classes_B.device)
    # Made out here, the labels are an ordinary tensor, that can go through a model again.
    labels_BL = torch.empty(uniforms_BL.shape, dtype=torch.int64, device=classes_B.device)
    guided = settings.guidance != 1
    with torch.inference_mode():
        inputs = _with_no_class(classes_B, model.no_class) if guided else classes_B
        dtype = model.trunk.label_embedding.weight.dtype
        cache = KVCache(model.config, len(inputs), inputs.device, dtype)
        for position in range(model.config.length):
            logits = model.step(inputs, position, cache)
            if guided:
                cond, uncond = logits.chunk(2)
                logits = guide(cond, uncond, settings.guidance)
            labels_B = choose(
                logits,
                uniforms_BL[:, position],
                settings.temperature,
                settings.top_k,
                settings.top_p,
            )
            labels_BL[:, position] = labels_B
            inputs = labels_B.repeat(2) if guided else labels_B
    return labels_BL


def sample_fine(
    model: FineModel | None,
    clusters: Clusters,
    labels_BL: Tensor,
    classes_B: Tensor,
    uniforms_BL: Tensor,
    settings: Sampling,
) -> Tensor:
    """Draws the codes for given labels, all in one pass: int64 (B, L).

    The model is used as it is: switch its dropout off with `eval()`.

    Args:
        model: None where each cluster has one member (the full-vocabulary baseline).
        classes_B: int64 in [0, classes], where the model is.
        uniforms_BL: in [0, 1], as row 1 of `uniforms`.
    """
    if model is None:
        return clusters.members_KS.to(labels_BL.device)[labels_BL, 0]
    uniforms_BL = uniforms_BL.to(labels_BL.device)
    with torch.inference_mode():
        if settings.fine_guidance == 1:
            logits_BLK = model(labels_BL, classes_B)
        else:
            both = model(labels_BL.repeat(2, 1), _with_no_class(classes_B, model.no_class))
            cond, uncond = both.chunk(2)
            logits_BLK = guide(cond, uncond, settings.fine_guidance)
        # Image by image: in float64 the choices of a whole batch may be large.
        choices_BL = torch.stack(
            [
                choose(
                    logits_LK,
                    uniforms_L,
                    settings.fine_temperature,
                    settings.fine_top_k,
                    settings.fine_top_p,
                )
                for logits_LK, uniforms_L in zip(logits_BLK, uniforms_BL, strict=True)
            ]
        )
    return model.codes(labels_BL, choices_BL)


def _with_no_class(classes_B: Tensor, no_class: int) -> Tensor:
    return torch.cat([classes_B, torch.full_like(classes_B, no_class)])
