"""From classes and random numbers to labels and codes: free functions, nothing remembered.

Shapes: B batch, L tokens of an image, K choices (clusters, members or codes).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel

Schedule = Literal["constant", "linear", "cosine"]

FINE_TOKENS = 2048  # of the fine model at a time, with both halves of guidance


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
        if self.guidance_schedule not in (known := get_args(Schedule)):
            raise UserError(
                f"guidance_schedule: got {self.guidance_schedule!r}"
                f"{did_you_mean(str(self.guidance_schedule), known)}"
            )
        match self.guidance_window:
            case (start, stop) if 0 <= start < stop <= 1:
                pass
            case window:
                raise UserError(
                    f"guidance_window: got {window}, expected 0 <= start < stop <= 1, fractions "
                    "of the steps; set guidance to 1 for none"
                )


def in_words(settings: Mapping[str, Any]) -> str:
    """Fields of `Sampling` in a line, e.g. "guidance 2, top_k 0, guidance_window 0 to 1"."""
    said = []
    for name, value in settings.items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        said.append(f"{name} " + " to ".join(v if isinstance(v, str) else f"{v:g}" for v in values))
    return ", ".join(said)


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


def guidance_scales(settings: Sampling, length: int) -> list[float]:
    """The guidance scale of each of the `length` steps of the coarse stage.

    With g the scale of `settings`, and r going from 0 at the first step to 1 at the last one:
    "constant" is g, "linear" is 1 + (g - 1) r (Muse, arXiv 2301.00704, section 2.7), "cosine" is
    1 + (g - 1) (1 - cos(pi r)) / 2 (the power-cosine schedule of MDT, arXiv 2303.14389, of power
    1). Step i of L is in the window if start <= i / L < stop; else its scale is 1 (a limited
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


class CoarseDecoder:
    """The coarse model at work on a batch: here, and nowhere else, its transformer takes steps.

    Under guidance the batch has a second half, the same images without their class. Each half is
    computed only where it is needed. One that is needed again takes all positions that it missed,
    whose labels were drawn, or kept, meanwhile, in a single pass.
    """

    def __init__(self, model: CoarseModel, classes_B: Tensor, *, guided: bool) -> None:
        self.model = model
        self.classes = _with_no_class(classes_B, model.no_class) if guided else classes_B
        self.cache = model.backbone.cache(len(self.classes))
        self.cached = [0, 0]  # positions of each half

    @torch.inference_mode()
    def logits(self, labels_BL: Tensor, position: int, guidance: float) -> Tensor:
        """Logits (B, K) of label `position`, which follow from class and labels before it."""
        if guidance == 1:
            return self._step(0, 1, labels_BL, position)
        if self.cached[0] == self.cached[1]:
            cond, uncond = self._step(0, 2, labels_BL, position).chunk(2)
        else:
            cond, uncond = (self._step(h, h + 1, labels_BL, position) for h in (0, 1))
        return guide(cond, uncond, guidance)

    def _step(self, first: int, last: int, labels_BL: Tensor, position: int) -> Tensor:
        """Takes halves `first` to `last` from where they are up to `position`."""
        start = self.cached[first]
        images = slice(first * len(labels_BL), last * len(labels_BL))
        # The class token is at position 0, label i at i + 1.
        inputs_BT = labels_BL[:, max(start - 1, 0) : position].repeat(last - first, 1)
        if start == 0:
            inputs_BT = torch.cat([self.classes[images, None], inputs_BT], dim=1)
        self.cached[first:last] = [position + 1] * (last - first)
        return self.model.step(inputs_BT, start, self.cache, images)


def stream_coarse(
    model: CoarseModel,
    classes_B: Tensor,
    uniforms_BL: Tensor,
    settings: Sampling,
    kept_BL: Tensor | None = None,
) -> Generator[Tensor, None, None]:
    """Draws the labels of each image, one after another, and yields those so far after each.

    What is yielded is int64 (B, 1), (B, 2), ... (B, L), a view of what goes on to be filled. The
    model is used as it is: switch its dropout off with `eval()`. Closed, it takes no more steps.

    Args:
        classes_B: int64 in [0, classes], where the model is.
        uniforms_BL: in [0, 1], as row 0 of `uniforms`. Position i uses number i, whatever is kept.
        kept_BL: int64 (B, L), labels that are given, and -1 where one is to be drawn. Positions
            that are kept in all images take no step of their own.
    """
    uniforms_BL = uniforms_BL.to(classes_B.device)
    # Made out here, the labels are an ordinary tensor, that can go through a model again.
    if kept_BL is None:
        labels_BL = classes_B.new_full(uniforms_BL.shape, -1)
    else:
        labels_BL = kept_BL.to(classes_B.device, copy=True)
    drawn_BL = labels_BL < 0
    drawn_L = drawn_BL.any(0).tolist()
    scales = guidance_scales(settings, model.config.length)
    guided = any(scale != 1 and drawn for scale, drawn in zip(scales, drawn_L, strict=True))
    decoder = CoarseDecoder(model, classes_B, guided=guided)
    for position, scale in enumerate(scales):
        if drawn_L[position]:
            labels_B = choose(
                decoder.logits(labels_BL, position, scale),
                uniforms_BL[:, position],
                settings.temperature,
                settings.top_k,
                settings.top_p,
            )
            labels_BL[:, position] = torch.where(
                drawn_BL[:, position], labels_B, labels_BL[:, position]
            )
        yield labels_BL[:, : position + 1]


def sample_coarse(
    model: CoarseModel,
    classes_B: Tensor,
    uniforms_BL: Tensor,
    settings: Sampling,
    kept_BL: Tensor | None = None,
) -> Tensor:
    """The labels of each image, int64 (B, L): the last that `stream_coarse` yields."""
    *_, labels_BL = stream_coarse(model, classes_B, uniforms_BL, settings, kept_BL)
    return labels_BL


def sample_fine(
    model: FineModel | None,
    clusters: Clusters,
    labels_BL: Tensor,
    classes_B: Tensor,
    uniforms_BL: Tensor,
    settings: Sampling,
    kept_BL: Tensor | None = None,
) -> Tensor:
    """Draws the codes for given labels, all in one pass: int64 (B, L).

    The model is used as it is: switch its dropout off with `eval()`.

    Args:
        model: None where each cluster has one member (the full-vocabulary baseline).
        classes_B: int64 in [0, classes], where the model is.
        uniforms_BL: in [0, 1], as row 1 of `uniforms`.
        kept_BL: int64 (B, L), codes that are given, of these labels, and -1 where one is to be
            drawn.
    """
    if model is None:
        return clusters.members_KS.to(labels_BL.device)[labels_BL, 0]
    uniforms_BL = uniforms_BL.to(labels_BL.device)
    # In parts: the products of FINE_TOKENS are large enough to be fast, and fit into memory.
    halves = 1 if settings.fine_guidance == 1 else 2
    at_a_time = max(1, FINE_TOKENS // (halves * labels_BL.shape[1]))
    parts = zip(
        labels_BL.split(at_a_time),
        classes_B.split(at_a_time),
        uniforms_BL.split(at_a_time),
        strict=True,
    )
    choices_BL = torch.cat([_fine_choices(model, *part, settings) for part in parts])
    codes_BL = model.codes(labels_BL, choices_BL)
    if kept_BL is None:
        return codes_BL
    kept_BL = kept_BL.to(codes_BL.device)
    return torch.where(kept_BL < 0, codes_BL, kept_BL)


@torch.inference_mode()
def _fine_choices(
    model: FineModel,
    labels_BL: Tensor,
    classes_B: Tensor,
    uniforms_BL: Tensor,
    settings: Sampling,
) -> Tensor:
    if settings.fine_guidance == 1:
        logits_BLK = model(labels_BL, classes_B)
    else:
        both = model(labels_BL.repeat(2, 1), _with_no_class(classes_B, model.no_class))
        cond, uncond = both.chunk(2)
        logits_BLK = guide(cond, uncond, settings.fine_guidance)
    # Image by image: in float64 the choices of a whole batch may be large.
    return torch.stack(
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


def _with_no_class(classes_B: Tensor, no_class: int) -> Tensor:
    return torch.cat([classes_B, torch.full_like(classes_B, no_class)])
