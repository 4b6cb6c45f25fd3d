"""Sampling: classes and random numbers -> coarse labels, one after another -> codes, in one pass.

Each image has its own noise, from its own seed, so it does not depend on its batch. In both stages
a choice is made from logits by guidance, temperature, top-k, top-p and noise.

Shapes: B batch, T positions, L tokens of an image, K choices (clusters, members or codes).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ctf.common.config import OMIT_DEFAULT, did_you_mean
from ctf.common.errors import UserError
from ctf.models.clusters import Clusters
from ctf.models.fine import FineModel
from ctf.models.noise import gumbel_noise

Schedule = Literal["constant", "linear", "cosine"]
FineChoice = Literal["sample", "mean"]

MAX_GUIDANCE = 1e6  # beyond, logits overflow
MIN_TEMPERATURE = 1e-250  # used for smaller ones, by which logits cannot be divided in float64
# In a pass of the fine model, with both halves of guidance: large enough that products are fast,
# and small enough for any memory.
FINE_TOKENS, FINE_TOKENS_GPU = 2048, 16384
CHOICES = 1 << 22  # logits in float64 at a time


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; those that begin with `fine_` are the fine stage's.

    The command line and the studio's API take their settings and descriptions from here. For the
    schedule and the window, see `guidance_scales`.

    Args:
        guidance: scale g of classifier-free guidance, uncond + g * (cond - uncond) on the logits; 1
            is none and costs nothing
        fine_guidance: the same in the fine stage
        temperature: divides the logits, after guidance; below 1 for less variety, above 1 for more
        fine_temperature: the same in the fine stage
        top_k: sample among the k most likely clusters; 1 is greedy, 0 is no limit
        fine_top_k: the same among the members of each cluster
        top_p: sample among the fewest most likely clusters with this total probability, after
            top-k; 1 is no limit
        fine_top_p: the same among the members of each cluster
        guidance_schedule: how the scale of the coarse stage grows from 1 to g over its steps
        guidance_window: the part of the coarse steps that uses guidance, as two fractions, e.g.
            0.2 0.8; steps without guidance cost less
        fine_choice: how a code is chosen among the members of its cluster: "sample" samples from
            the fine model's distribution, "mean" takes the member nearest to the mean of the
            distribution's code vectors, for the same details with less noise

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
    guidance_schedule: Schedule = "constant"
    guidance_window: tuple[float, float] = (0.0, 1.0)
    fine_choice: FineChoice = field(default="sample", metadata=OMIT_DEFAULT)

    def __post_init__(self) -> None:
        for name in ("guidance", "temperature", "top_p"):
            for stage in ("", "fine_"):
                self._convert(stage + name, float, "a number")
        for stage in ("", "fine_"):
            self._convert(f"{stage}top_k", operator.index, "a whole number")
            guidance = getattr(self, f"{stage}guidance")
            if not abs(guidance) <= MAX_GUIDANCE:
                raise UserError(
                    f"{stage}guidance: got {guidance:g}, expected a finite number, "
                    f"{MAX_GUIDANCE:,.0f} at most"
                )
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
        self._check_choice("guidance_schedule", get_args(Schedule))
        self._check_choice("fine_choice", get_args(FineChoice))
        match self.guidance_window:
            case (start, stop) if 0 <= start < stop <= 1:
                object.__setattr__(self, "guidance_window", (float(start), float(stop)))
            case window:
                raise UserError(
                    f"guidance_window: got {window}, expected 0 <= start < stop <= 1, fractions "
                    "of the steps; set guidance to 1 for none"
                )

    def _check_choice(self, name: str, known: tuple[str, ...]) -> None:
        if (value := getattr(self, name)) not in known:
            raise UserError(f"{name}: got {value!r}{did_you_mean(str(value), known)}")

    def _convert(self, name: str, kind: Callable[[Any], float], expected: str) -> None:
        """Make a field a plain number of Python, from one of NumPy or PyTorch, too."""
        value = getattr(self, name)
        try:
            if isinstance(value, (bool, str)):
                raise TypeError
            object.__setattr__(self, name, kind(value))
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{name}: got {value!r}, expected {expected}") from None


def format_settings(settings: Mapping[str, Any]) -> str:
    """Fields of `Sampling` in a line, e.g. "guidance 2, top_k 0, guidance_window 0 to 1"."""
    parts = []
    for name, value in settings.items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        text = " to ".join(v if isinstance(v, str) else f"{v:g}" for v in values)
        parts.append(f"{name} {text}")
    return ", ".join(parts)


# --- From logits to choices -----------------------------------------------------------------------


def apply_guidance(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance on logits: uncond + scale * (cond - uncond), at least in float32.

    Where `cond` is -inf the result is, too. Several scales are a tensor; where one of them is 1 the
    result is `cond`, to the bit.
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    cond, uncond = cond.to(wide), uncond.to(wide)
    guided = uncond + scale * (cond - uncond)
    if isinstance(scale, Tensor):
        guided = torch.where(scale == 1, cond, guided)
    return guided.masked_fill(cond.isneginf(), -torch.inf)


def guidance_scales(settings: Sampling, length: int) -> list[float]:
    """The guidance scale of each of the `length` steps of the coarse stage.

    With g the scale of `settings`, and r growing from 0 at the first step to 1 at the last one:
    "constant" is g, "linear" is 1 + (g - 1) r (Muse, arXiv 2301.00704, section 2.7), "cosine" is
    1 + (g - 1) (1 - cos(pi r)) / 2 (the power-cosine schedule of MDT, arXiv 2303.14389, of power
    1). Step i of L is in the window if start <= i / L < stop; outside the scale is 1 (a limited
    interval, arXiv 2404.07724).
    """
    g, (start, stop) = settings.guidance, settings.guidance_window
    scales = []
    for step in range(length):
        r = step / max(length - 1, 1)
        shares = {"constant": 1.0, "linear": r, "cosine": (1 - math.cos(math.pi * r)) / 2}
        share = shares[settings.guidance_schedule] if start <= step / length < stop else 0.0
        scales.append(g if share == 1 else 1 + (g - 1) * share)  # g itself, without rounding
    return scales


def top_k_filter(logits_BK: Tensor, top_k: int) -> Tensor:
    """Set all but the `top_k` largest logits to -inf; of equal ones the first stay. 0: no limit."""
    if top_k == 0 or top_k >= logits_BK.shape[-1]:
        return logits_BK
    smallest_B1 = logits_BK.topk(top_k).values[..., -1:]
    above = logits_BK > smallest_B1
    tied = logits_BK == smallest_B1
    room_B1 = top_k - above.sum(-1, keepdim=True)
    return logits_BK.masked_fill(~(above | (tied & (tied.cumsum(-1) <= room_B1))), -torch.inf)


def top_p_filter(logits_BK: Tensor, top_p: float) -> Tensor:
    """Nucleus sampling (arXiv 1904.09751): set all but the most likely choices to -inf.

    What remains are the fewest largest probabilities that add up to `top_p`, of equal ones the
    first. 1 is no limit.
    """
    if top_p == 1:
        return logits_BK
    sorted_BK, order_BK = logits_BK.sort(descending=True, stable=True)
    probabilities_BK = sorted_BK.softmax(-1)
    before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
    drop_BK = torch.empty_like(order_BK, dtype=torch.bool)
    drop_BK.scatter_(-1, order_BK, before_BK >= top_p)
    return logits_BK.masked_fill(drop_BK, -torch.inf)


def filter_logits(logits_BK: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Divide by the temperature, then apply top-k, then top-p: float64 (B, K)."""
    logits_BK = logits_BK.double() / max(temperature, MIN_TEMPERATURE)
    return top_p_filter(top_k_filter(logits_BK, top_k), top_p)


def sample_logits(
    logits_BK: Tensor, noise_BK: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Sample one choice a row, after temperature, top-k and top-p: int64 (B,).

    The choice is the largest sum of a logit and its noise, see `ctf.models.noise`. One of
    probability zero is never sampled. A `top_k` of 1 is greedy: the first of the largest logits,
    whatever the noise.
    """
    if top_k == 1:
        return logits_BK.argmax(-1)
    return (filter_logits(logits_BK, temperature, top_k, top_p) + noise_BK).argmax(-1)


def nearest_to_mean(logits_BK: Tensor, vectors_BKC: Tensor) -> Tensor:
    """The choice whose vector is nearest to the mean of all, by their probabilities: int64 (B,).

    Among possible choices it has the least expected squared distance to one that is sampled (the
    minimum Bayes risk). A choice of probability zero is never taken.

    Args:
        logits_BK: After all filters, float64.
        vectors_BKC: Code vectors; those of impossible choices do not matter.
    """
    vectors_BKC = vectors_BKC.to(logits_BK.dtype)
    probabilities_BK = logits_BK.softmax(-1)
    mean_BC = torch.einsum("bk,bkc->bc", probabilities_BK, vectors_BKC)
    # |v - m|^2 without |m|^2, which is the same for all.
    distances_BK = vectors_BKC.square().sum(-1) - 2 * torch.einsum(
        "bkc,bc->bk", vectors_BKC, mean_BC
    )
    return distances_BK.masked_fill(probabilities_BK == 0, torch.inf).argmin(-1)


# --- The fine stage -------------------------------------------------------------------------------


def sample_fine(
    model: FineModel | None,
    clusters: Clusters,
    labels_BL: Tensor,
    classes_B: Tensor,
    keys_BL: Tensor,
    settings: Sampling,
    known_codes_BL: Tensor | None = None,
    codebook_VC: Tensor | None = None,
) -> Tensor:
    """Sample the codes for given labels, all in one pass: int64 (B, L).

    Args:
        model: In evaluation mode; None if each cluster has one member (the full-vocabulary
            baseline).
        clusters: Those of the labels.
        labels_BL: int64 in [0, K).
        classes_B: int64 in [0, classes], on the model's device.
        keys_BL: Of the noise, row 1 of `noise_keys`.
        settings: Of the fine stage.
        known_codes_BL: int64 (B, L), codes of these labels, -1 where one is to be sampled.
        codebook_VC: Needed for the `fine_choice` "mean".
    """
    if model is None:
        return clusters.members_KS.to(labels_BL.device)[labels_BL, 0]
    keys_BL = keys_BL.to(labels_BL.device)
    tokens = FINE_TOKENS if labels_BL.device.type == "cpu" else FINE_TOKENS_GPU
    halves = 1 if settings.fine_guidance == 1 else 2
    images = max(1, tokens // (halves * labels_BL.shape[1]))
    parts = zip(
        labels_BL.split(images), classes_B.split(images), keys_BL.split(images), strict=True
    )
    choices_BL = torch.cat([_sample_choices(model, *part, settings, codebook_VC) for part in parts])
    codes_BL = model.codes(labels_BL, choices_BL)
    if known_codes_BL is None:
        return codes_BL
    known_codes_BL = known_codes_BL.to(codes_BL.device)
    return torch.where(known_codes_BL < 0, codes_BL, known_codes_BL)


@torch.inference_mode()
def _sample_choices(
    model: FineModel,
    labels_BL: Tensor,
    classes_B: Tensor,
    keys_BL: Tensor,
    settings: Sampling,
    codebook_VC: Tensor | None,
) -> Tensor:
    if settings.fine_guidance == 1:
        logits_BLK = model(labels_BL, classes_B)
    else:
        both = model(labels_BL.repeat(2, 1), with_no_class(classes_B, model.no_class))
        cond, uncond = both.chunk(2)
        logits_BLK = apply_guidance(cond, uncond, settings.fine_guidance)
    limits = settings.fine_temperature, settings.fine_top_k, settings.fine_top_p

    def choose(logits_TK: Tensor, labels_T: Tensor, keys_T: Tensor) -> Tensor:
        if settings.fine_choice == "sample":
            return sample_logits(logits_TK, gumbel_noise(keys_T, logits_TK.shape[-1]), *limits)
        assert codebook_VC is not None, 'the choice "mean" needs the codebook'
        vectors_TKC = codebook_VC[model.candidates(labels_T)]
        return nearest_to_mean(filter_logits(logits_TK, *limits), vectors_TKC)

    # In float64, the logits of a whole batch may be large. A processor takes image by image; on a
    # GPU, launching the kernels of each would take longer than they do.
    on_cpu = logits_BLK.device.type == "cpu"
    images = 1 if on_cpu else max(1, CHOICES // logits_BLK[0].numel())
    parts = zip(
        *(each_BL.split(images) for each_BL in (logits_BLK, labels_BL, keys_BL)), strict=True
    )
    chosen = [choose(*(each_BL.flatten(0, 1) for each_BL in part)) for part in parts]
    return torch.cat(chosen).view(labels_BL.shape)


def with_no_class(classes_B: Tensor, no_class: int) -> Tensor:
    """The classes of both halves under guidance: these, then as often none."""
    return torch.cat([classes_B, torch.full_like(classes_B, no_class)])
