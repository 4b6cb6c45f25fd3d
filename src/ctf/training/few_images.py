"""What `ctf fit` chooses for few images where the user says nothing.

What was tried, and what it was worth, is in docs/log.md, 2026-11-28.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctf.common import storage
from ctf.data.image_set import Splits
from ctf.data.transforms import VIEWS
from ctf.training import recipes
from ctf.training.recipes import Recipe
from ctf.training.stages import FIT
from ctf.training.start import DEFAULT_PRESET

FEW = 1000  # training images; nothing is chosen for as many
VIEWS_KEY = "tokens.views"
SIZE_KEYS = CODES_KEY, CLUSTERS_KEY = "tokenizer.codebook_size", "clusters.count"
VECTORS_PER_CODE = 16  # at least, of all training images
LEAST_CODES = 64
PIXELS_PER_SECOND = 400_000  # that a slow processor encodes: 100 images of 64 pixels

Choices = Mapping[str, Any]  # values of a recipe by their keys, as of `config.override`


def changes(
    recipe: Recipe,
    images: int,
    image_size: int,
    *,
    mirrors: bool,
    minutes: float | None = None,
    sizes: bool = True,
) -> Choices:
    """Return what to change in a recipe for a number of training images.

    Args:
        recipe: One for many images.
        images: Number of training images.
        image_size: Their side in pixels.
        mirrors: Whether mirrored images are as plausible as the originals.
        minutes: Time budget of all stages. If it is too short to encode many views of all images,
            views stay as they are, rather than that images are left out.
        sizes: Whether codebook and clusters may change.
    """
    if images >= FEW:
        return {}
    changed: dict[str, Any] = {}
    views = "ten-crop" if mirrors else "five-crop"
    seconds = images * len(VIEWS[views]) * image_size**2 / PIXELS_PER_SECOND
    if minutes is None or seconds <= 60 * minutes * recipe.time_shares.tokens:
        changed[VIEWS_KEY] = views
    if sizes:
        codes = recipe.tokenizer.codebook_size
        vectors = images * recipe.tokenizer.config(image_size).grid ** 2
        fitting = max(LEAST_CODES, power_of_two(vectors // VECTORS_PER_CODE))
        if fitting < codes:
            changed[CODES_KEY] = fitting
            changed[CLUSTERS_KEY] = recipe.clusters.count * fitting // codes
    return changed


def power_of_two(limit: int) -> int:
    """Return the largest power of two that is at most `limit`, or 0."""
    return 1 << limit.bit_length() - 1 if limit else 0


def choose(
    images: Splits,
    run: Path,
    *,
    preset: str | None = None,
    views: str | None = None,
    overrides: Sequence[str] = (),
    minutes: float | None = None,
    started: bool = False,
) -> Choices:
    """Return what `ctf fit` changes in a recipe for the number of training images.

    A run that was begun keeps what was chosen then: fit.json has it.

    Args:
        images: What to train on.
        run: Folder of the run; may be missing.
        preset: The user's; nothing is chosen then.
        views: The user's, which stay.
        overrides: The user's, as `config.override` takes them. What they set stays; codebook and
            clusters fit each other, so neither is chosen if something of the other is set.
        minutes: Time budget of all stages.
        started: Whether the run starts from a pipeline, which has its own sizes.
    """
    if preset is not None:
        return {}
    told = {assignment.partition("=")[0] for assignment in overrides}
    told |= {VIEWS_KEY} if views is not None else set()
    if started or any(key.startswith(("tokenizer.", "clusters.")) for key in told):
        told |= {*SIZE_KEYS}
    if (path := run / FIT).is_file():
        chosen = storage.load_object(path).get("chosen", {})
    else:
        train, recipe = images.train, recipes.preset(DEFAULT_PRESET)
        chosen = changes(
            recipe, len(train), train.image_size,
            mirrors=train.mirrors, minutes=minutes, sizes=not told & {*SIZE_KEYS},
        )  # fmt: skip
    return {key: value for key, value in chosen.items() if key not in told}


def assignments(chosen: Choices) -> list[str]:
    """Return what was chosen as `config.override` takes it."""
    return [f"{key}={json.dumps(value)}" for key, value in chosen.items()]


def advice(images: Splits, chosen: Choices, *, started: bool) -> str | None:
    """Return a line for people about few images, or None if there are many.

    Args:
        images: What is trained on.
        chosen: What was chosen.
        started: Whether the run starts from a pipeline.
    """
    count = len(images.train)
    if count >= FEW:
        return None
    parts = []
    if VIEWS_KEY in chosen:
        views = len(VIEWS[chosen[VIEWS_KEY]])
        parts.append(f"{views} views of each (--views {chosen[VIEWS_KEY]})")
    if CODES_KEY in chosen:
        sizes = " ".join(assignments({key: chosen[key] for key in SIZE_KEYS}))
        parts.append(
            f"{chosen[CLUSTERS_KEY]} clusters of {chosen[CODES_KEY]:,} codes (--set {sizes})"
        )
    if not started:
        parts.append("consider starting from a trained pipeline of similar images (--from)")
    return f"{count:,} training images are few: {'; '.join(parts)}" if parts else None
