"""The arguments of `Pipeline`'s methods, checked: mistakes are errors before any computation.

Shapes: N images of a call, L tokens of an image.
"""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ctf.common.config import did_you_mean, list_names
from ctf.common.errors import UserError
from ctf.data.transforms import MAX_IMAGE_SIZE
from ctf.models.sampling import Sampling

if TYPE_CHECKING:
    from ctf.pipelines.pipeline import Pipeline


Window = int | Literal["auto"]  # labels of an image in a pass of the coarse model


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
    window: Window


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
    window: Window | None = None,
) -> Request:
    """Check the arguments of `Pipeline.sample` and `refine`, which document them."""
    sampling = update_sampling(pipe.sampling, settings)
    if isinstance(classes, (str, int)):
        raise UserError(f"classes: got {classes!r}, expected a list, e.g. [{classes!r}]")
    numbers = class_numbers(pipe.class_names, classes)
    _warn_of_ambiguous(pipe.class_names, classes)
    if not numbers:
        raise UserError("got 0 images to sample, expected 1 or more")
    check_resize(resize)
    seeds = seed_per_image(seed, len(numbers))
    codes_NL = known_codes(pipe, codes, known, len(numbers))
    if coarse is not None:
        labels_NL = coarse_labels(pipe, coarse, len(numbers))
    else:
        labels_NL = torch.where(codes_NL < 0, -1, pipe.clusters.labels_V[codes_NL])
    window = check_window(pipe.window if window is None else window)
    return Request(numbers, seeds, sampling, codes_NL, labels_NL, resize, decode_separately, window)


def check_window(window: Window | str) -> Window:
    """Return "auto", or a number of labels, which may be text.

    Raises:
        UserError: It is neither.
    """
    if isinstance(window, str) and window == "auto":
        return "auto"
    try:
        if not isinstance(window, (bool, np.bool_)):
            number = int(window) if isinstance(window, str) else operator.index(window)
            if number >= 1:
                return number
    except (TypeError, ValueError):
        pass
    raise UserError(f"window: got {window!r}, expected auto, or 1 or more labels in a pass")


def update_sampling(default: Sampling, settings: Mapping[str, Any]) -> Sampling:
    """Return `default` with some fields replaced."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    for name in settings:
        if name not in names:
            raise UserError(f"unknown setting {name!r}{did_you_mean(name, names)}")
    return dataclasses.replace(default, **settings)


def class_numbers(names: Sequence[str], classes: Sequence[int | str]) -> list[int]:
    """Return the numbers of classes, in [0, len(names)).

    Text is the name of a class or, if no class has that name, a number; integers are numbers.
    A number is the position among the names, from 0.
    """
    return [_class_number(names, chosen) for chosen in classes]


def _class_number(names: Sequence[str], chosen: int | str) -> int:
    if isinstance(chosen, str) and chosen in names:
        return names.index(chosen)
    if isinstance(chosen, (bool, np.bool_)):
        raise TypeError(f"classes: got {chosen}, expected names or numbers")
    try:
        number = int(chosen) if isinstance(chosen, str) else operator.index(chosen)
    except ValueError:
        raise UserError(f"unknown class {chosen!r}{did_you_mean(str(chosen), names)}") from None
    if not 0 <= number < len(names):
        hint = f"; as text, {str(number)!r} is a name" if str(number) in names else ""
        raise UserError(
            f"class {number} of {len(names)}: expected 0 to {len(names) - 1}, "
            f"or a name: {list_names(names)}{hint}"
        )
    return number


def ambiguous(names: Sequence[str], number: int) -> bool:
    """Return whether a number is the name of another class than the one at that position."""
    return str(number) in names and names.index(str(number)) != number


def _warn_of_ambiguous(names: Sequence[str], classes: Sequence[int | str]) -> None:
    # Programs that count classes may pass arrays or ranges of them: only a number that somebody
    # may have written for a name is one of Python's.
    if isinstance(classes, range):
        return
    for number in classes:
        if type(number) is int and ambiguous(names, number):
            warnings.warn(
                f"class {number} is the one at position {number}, {names[number]!r}; "
                f"for the class named {str(number)!r}, write {str(number)!r}",
                UserWarning,
                stacklevel=4,
            )
            return


def split_class_names(names: Sequence[str], text: str) -> list[str]:
    """Split classes at commas, but for those in a class's name: the longest name wins.

    "tench, Tinca tinca,3" are two classes if one has the name "tench, Tinca tinca".
    """
    parts, found = text.split(","), []
    while parts:
        for count in range(len(parts), 0, -1):
            name = ",".join(parts[:count])
            if count == 1 or name in names or name.strip() in names:
                break
        found.append(name if name in names else name.strip())
        parts = parts[count:]
    return found


def seed_per_image(seed: int | Sequence[int], count: int) -> Sequence[int]:
    """Return seed, seed + 1, ... for a single seed, and a sequence of seeds as integers.

    Integers of NumPy and PyTorch are taken, too; truth values and fractions are not.
    """
    several: Any = seed
    if not isinstance(seed, str) and getattr(seed, "ndim", 1) == 1 and hasattr(seed, "__len__"):
        seeds = [_whole(one) for one in several]
        if len(seeds) != count:
            raise UserError(f"got {len(seeds)} seeds, expected {count}: one for each image")
        for one in seeds:
            check_seed(one, 1)
        return seeds
    first = _whole(seed)
    check_seed(first, count)
    return range(first, first + count)


def _whole(seed: Any) -> int:
    try:
        if not isinstance(seed, (bool, np.bool_)) and getattr(seed, "dtype", None) != torch.bool:
            return operator.index(seed)
    except TypeError:
        pass
    raise UserError(f"seed: got {seed!r}, expected a whole number, or one for each image")


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


def check_range(name: str, values: Tensor, stop: int, start: int = 0) -> None:
    """Raise a UserError unless all values are in [start, stop)."""
    if values.numel() and not start <= int(values.min()) <= int(values.max()) < stop:
        raise UserError(
            f"{name}: got {int(values.min())} to {int(values.max())}, "
            f"expected {start} to {stop - 1}"
        )
