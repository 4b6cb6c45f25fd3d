"""The arguments of `Pipeline`'s methods, checked: mistakes are errors before any computation.

Shapes: N images of a call, L tokens of an image.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.data.images import MAX_IMAGE_SIZE
from ctf.models.sampling import Sampling

if TYPE_CHECKING:
    from ctf.pipelines.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Request:
    """N images to sample; known codes and labels are int64, and -1 where one is to be sampled."""

    classes: Sequence[int]
    seeds: Sequence[int]
    sampling: Sampling
    known_codes_NL: Tensor
    known_labels_NL: Tensor
    resize: int | None
    decode_separately: bool


def check_request(
    pipe: Pipeline,
    classes: Sequence[int | str],
    seed: int | Sequence[int],
    settings: Mapping[str, Any],
    *,
    codes: Tensor | None = None,
    known: Tensor | None = None,
    coarse: Tensor | None = None,
    resize: int | None = None,
    decode_separately: bool = False,
) -> Request:
    """Check the arguments of `Pipeline.sample` and `refine`, which document them."""
    sampling = update_sampling(pipe.sampling, settings)
    numbers = class_numbers(pipe.class_names, classes)
    if not numbers:
        raise UserError("got 0 images to sample, expected 1 or more")
    check_resize(resize)
    seeds = seed_per_image(seed, len(numbers))
    codes_NL = known_codes(pipe, codes, known, len(numbers))
    if coarse is not None:
        labels_NL = coarse_labels(pipe, coarse, len(numbers))
    else:
        labels_NL = torch.where(codes_NL < 0, -1, pipe.clusters.labels_V[codes_NL])
    return Request(numbers, seeds, sampling, codes_NL, labels_NL, resize, decode_separately)


def update_sampling(default: Sampling, settings: Mapping[str, Any]) -> Sampling:
    """Return `default` with some fields replaced."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    for name in settings:
        if name not in names:
            raise UserError(f"unknown setting {name!r}{did_you_mean(name, names)}")
    return dataclasses.replace(default, **settings)


def class_numbers(names: Sequence[str], classes: Sequence[int | str]) -> list[int]:
    """Return the numbers of classes that are given by number or by name; names take precedence."""
    return [_class_number(names, chosen) for chosen in classes]


def _class_number(names: Sequence[str], chosen: int | str) -> int:
    if isinstance(chosen, str) and chosen in names:
        return names.index(chosen)
    try:
        number = int(chosen) if isinstance(chosen, str) else operator.index(chosen)
    except ValueError:
        raise UserError(f"unknown class {chosen!r}{did_you_mean(str(chosen), names)}") from None
    if not 0 <= number < len(names):
        raise UserError(
            f"class {number} of {len(names)}: expected 0 to {len(names) - 1}, "
            "or a name: " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        )
    return number


def seed_per_image(seed: int | Sequence[int], count: int) -> Sequence[int]:
    """Return seed, seed + 1, ... for a single seed, and a sequence of seeds as it is."""
    if isinstance(seed, int):
        check_seed(seed, count)
        return range(seed, seed + count)
    if len(seed) != count:
        raise UserError(f"got {len(seed)} seeds, expected {count}: one for each image")
    for one in seed:
        check_seed(one, 1)
    return seed


def check_seed(seed: int, count: int) -> None:
    """Raise a UserError unless seed to seed + count - 1 are integers of 64 bits."""
    if not -(2**63) <= seed <= 2**63 - count:
        raise UserError(f"seed: got {seed}, expected a whole number of 64 bits")


def check_resize(resize: int | None) -> None:
    """Raise a UserError if no image can have this many pixels per side."""
    if resize is not None and not 1 <= resize <= MAX_IMAGE_SIZE:
        raise UserError(f"resize: got {resize}, expected 1 to {MAX_IMAGE_SIZE} pixels a side")


def known_codes(pipe: Pipeline, codes: Tensor | None, known: Tensor | None, count: int) -> Tensor:
    """Return the codes where `known` is true, and -1 elsewhere: int64 (count, L)."""
    if codes is None and known is None:
        return torch.full((count, pipe.coarse.config.length), -1, device=pipe.device)
    if codes is None or known is None:
        raise UserError("codes and known: got one of them, expected both or neither")
    if known.dtype != torch.bool:
        raise UserError(
            f"known: got {known.dtype}, expected torch.bool, true where a code is known"
        )
    known_NL = _for_all(pipe, "known", known, count)
    codes_NL = _integers(pipe, "codes", codes, count)
    check_range("codes", codes_NL[known_NL], pipe.clusters.codebook_size)
    return codes_NL.masked_fill(~known_NL, -1)


def coarse_labels(pipe: Pipeline, coarse: Tensor, count: int) -> Tensor:
    """Return the coarse labels of `count` images: int64 (count, L) in [0, K)."""
    labels_NL = _integers(pipe, "coarse", coarse, count)
    check_range("coarse", labels_NL, pipe.clusters.count)
    return labels_NL


def _integers(pipe: Pipeline, name: str, values: Tensor, count: int) -> Tensor:
    check_integers(name, values)
    return _for_all(pipe, name, values, count).long()


def _for_all(pipe: Pipeline, name: str, values: Tensor, count: int) -> Tensor:
    length = pipe.coarse.config.length
    if values.shape not in ((count, length), (1, length), (length,)):
        raise UserError(
            f"{name}: got shape {tuple(values.shape)}, expected {(count, length)}, or "
            f"{(length,)} for all images"
        )
    return values.to(pipe.device).expand(count, length)


def check_integers(name: str, values: Tensor) -> None:
    """Raise a UserError unless `values` is a tensor of integers."""
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise UserError(f"{name}: got {values.dtype}, expected integers, e.g. torch.int64")


def check_range(name: str, values: Tensor, stop: int) -> None:
    """Raise a UserError unless all values are in [0, stop)."""
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < stop:
        raise UserError(
            f"{name}: got {int(values.min())} to {int(values.max())}, expected 0 to {stop - 1}"
        )
