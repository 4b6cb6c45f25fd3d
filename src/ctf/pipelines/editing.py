"""Following, previewing and editing images; each function here is a method of `Pipeline`, too.

Shapes: B images, T labels sampled so far, L tokens of an image, S members of a cluster, C code
dimension.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctf.common.defaults import steps_with_torch_defaults, with_torch_defaults
from ctf.common.deprecation import renamed_keywords
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.data.decode import ImageLike, UnreadableImageError, parse_colour, read_image
from ctf.data.transforms import as_pil, as_tensor, crop
from ctf.models import sampling
from ctf.pipelines import arguments, generation
from ctf.pipelines.arguments import Request, Window
from ctf.pipelines.generation import Batch, Samples

if TYPE_CHECKING:
    from ctf.pipelines.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Event:
    """What `Pipeline.stream` yields after each row of coarse labels, and once more at the end.

    rows, total: Rows of labels sampled so far, and in all.
    coarse: (B, rows * grid), int64 in [0, K), the labels so far, row by row.
    images: B PIL images, RGB: previews of `labels` (none without `preview`, RGBA with
        `transparent`); in the last event, the results, RGB.
    samples: What `Pipeline.sample` returns, in the last event; otherwise None.
    numbers: Which images of the call these B are.
    labels: (B, L), int64, all labels so far, -1 where there is none yet: with several labels in a
        pass, images can be further than `rows`.
    """

    rows: int
    total: int
    coarse: Tensor
    images: list[Image.Image]
    samples: Samples | None = None
    numbers: tuple[int, ...] = ()
    labels: Tensor = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class Members:
    """What `Pipeline.members` returns: the codes that a token with its coarse label can have.

    cluster: The label, in [0, K).
    codes: (S,), int64 in [0, V), the most likely first.
    probabilities: (S,), float64.
    """

    cluster: int
    codes: Tensor
    probabilities: Tensor


@renamed_keywords(apart="decode_separately", report="progress")
@with_torch_defaults
def refine(
    pipe: Pipeline,
    classes: Sequence[int | str],
    coarse: Tensor,
    seed: int | Sequence[int] = 0,
    *,
    resize: int | None = None,
    decode_separately: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Samples:
    """Sample the fine stage alone, for given coarse labels.

    With the `coarse` that `Pipeline.sample` returned, and the same classes, seed and settings, the
    codes are the same as well; another seed gives other codes of the same clusters. Without a fine
    stage (the full-vocabulary baseline), they are the same for any seed.

    `coarse` is (B, L) of integers in [0, K), or (L,) or (1, L) for all images. The other arguments
    are those of `Pipeline.sample`.

    Raises:
        UserError: As for `Pipeline.sample`; labels of another shape, type or range.
    """
    request = arguments.check_request(
        pipe, classes, seed, settings,
        coarse=coarse, resize=resize, decode_separately=decode_separately,
    )  # fmt: skip
    return generation.generate(pipe, request, progress)


@renamed_keywords(keep="known", apart="decode_separately", wanted="active")
@with_torch_defaults
def stream(
    pipe: Pipeline,
    classes: Sequence[int | str],
    seed: int | Sequence[int] = 0,
    *,
    codes: Tensor | None = None,
    known: Tensor | None = None,
    resize: int | None = None,
    decode_separately: bool = False,
    preview: bool = True,
    transparent: bool = False,
    active: Callable[[], Collection[int]] | None = None,
    window: Window | None = None,
    **settings: Any,
) -> Generator[Event, None, None]:
    """Sample as `Pipeline.sample` does, and yield an `Event` after each row of coarse labels.

    The last event has `samples`, which equal what `Pipeline.sample` returns. When the generator is
    closed, or its loop left, sampling stops and its memory is freed.

    A preview (see `Pipeline.preview`, also for `transparent`) costs a pass of the decoder per row;
    with `preview=False`, events have the labels only. If `active` is given, it is called before
    each pass and returns the indices in `classes` of the images that are still needed: the others
    leave the batch, and if there are none, the generator ends. At most `Pipeline.largest_batch`
    images can be streamed at a time. The other arguments are those of `Pipeline.sample`.

    Raises:
        UserError: As for `Pipeline.sample`; more images than fit into one batch. It is raised by
            the call, not by the first event.
    """
    request = arguments.check_request(
        pipe, classes, seed, settings,
        codes=codes, known=known, resize=resize, decode_separately=decode_separately,
        window=window,
    )  # fmt: skip
    if len(request.classes) > (most := generation.max_batch(pipe, request.sampling)):
        raise UserError(
            f"got {len(request.classes)} images to stream, expected {most} or fewer: one batch; "
            "Pipeline.sample takes any number"
        )
    (batch,) = generation.batches(pipe, request)
    events = _events(pipe, request, batch, preview, transparent, active)
    return steps_with_torch_defaults(events)


def _events(
    pipe: Pipeline,
    request: Request,
    batch: Batch,
    preview: bool,
    transparent: bool,
    active: Callable[[], Collection[int]] | None,
) -> Generator[Event, None, None]:
    grid = pipe.coarse.config.grid
    sampler = generation.coarse_sampler(pipe, request, batch)
    images: list[Image.Image] | None = None  # previews of what is certain, from the first time on
    for rows_done in range(1, grid + 1):
        while sampler.labels_BT.shape[1] < rows_done * grid:
            if active is not None:
                indices = active()
                rows = [row for row, number in enumerate(batch.numbers) if number in indices]
                if not rows:
                    return
                if len(rows) < len(batch.numbers):
                    batch = batch.select(rows)
                    sampler.select(rows)
            generation.advance(pipe, request, sampler)
            images = None
        labels_BL = sampler.certain_BL
        if images is None:
            known_BL = batch.known_codes_BL
            images = (
                _preview(pipe, labels_BL, known_BL, request.resize, transparent) if preview else []
            )
        coarse_BT, numbers = labels_BL[:, : rows_done * grid].clone().cpu(), tuple(batch.numbers)
        yield Event(rows_done, grid, coarse_BT, [*images], None, numbers, labels=labels_BL.cpu())
    samples = generation.finish(pipe, request, batch, sampler)
    numbers, labels_BL = tuple(batch.numbers), samples.coarse
    yield Event(grid, grid, labels_BL, samples.images, samples, numbers, labels=labels_BL.clone())


@renamed_keywords(keep="known")
@with_torch_defaults
def preview(
    pipe: Pipeline,
    coarse: Tensor,
    *,
    codes: Tensor | None = None,
    known: Tensor | None = None,
    resize: int | None = None,
    transparent: bool = False,
) -> list[Image.Image]:
    """Decode coarse labels alone: each token has the mean code vector of its cluster.

    `coarse` are the first T labels of each image, 1 <= T <= L: (B, T) of integers in [0, K), or -1
    where there is none. All other tokens have the mean vector of all clusters; known codes (see
    `Pipeline.sample`) are shown as they are. With `transparent`, images are RGBA, and tokens that
    are neither sampled nor known are transparent.

    Raises:
        UserError: Labels of another shape, type or range; as for `Pipeline.sample`.
    """
    arguments.check_resize(resize)
    length = pipe.coarse.config.length
    if coarse.ndim != 2 or not len(coarse) or not 1 <= coarse.shape[1] <= length:
        raise UserError(
            f"coarse: got shape {tuple(coarse.shape)}, expected (B, T) with 1 to {length} "
            "labels of each image"
        )
    arguments.check_integers("coarse", coarse)
    arguments.check_range("coarse", coarse, pipe.clusters.count, start=-1)
    known_BL = arguments.known_codes(pipe, codes, known, len(coarse))
    return _preview(pipe, coarse.to(pipe.device).long(), known_BL, resize, transparent)


@torch.inference_mode()
def _preview(
    pipe: Pipeline, labels_BT: Tensor, known_BL: Tensor, resize: int | None, transparent: bool
) -> list[Image.Image]:
    """Decode T labels, -1 for none, and all known codes; the rest is transparent, or the mean."""
    codebook_VC = pipe.tokenizer.codebook()
    means_KC = codebook_VC.new_zeros(pipe.clusters.count, codebook_VC.shape[1])
    means_KC.index_add_(0, pipe.clusters.labels_V, codebook_VC)
    means_KC /= pipe.clusters.sizes_K[:, None]
    # Not normalised again: members are close, so it makes no difference to the known part, and
    # the shorter the vectors of the unknown part are, the less they disturb it.
    vectors_BLC = means_KC.mean(0).repeat(*known_BL.shape, 1)
    first_BTC, has_label_BT = vectors_BLC[:, : labels_BT.shape[1]], labels_BT >= 0
    first_BTC[has_label_BT] = means_KC[labels_BT[has_label_BT]]
    vectors_BLC = torch.where((known_BL >= 0)[..., None], codebook_VC[known_BL], vectors_BLC)
    images = as_pil(generation.decode_vectors(pipe, vectors_BLC, resize))
    if transparent:
        visible_BL = known_BL >= 0
        visible_BL[:, : labels_BT.shape[1]] |= has_label_BT
        grid = pipe.coarse.config.grid
        for image, visible_HW in zip(images, visible_BL.view(-1, grid, grid).cpu(), strict=True):
            alpha = Image.fromarray(visible_HW.numpy())
            image.putalpha(alpha.convert("L").resize(image.size, Image.Resampling.NEAREST))
    return images


@renamed_keywords(chosen="class_id")
@with_torch_defaults
@torch.inference_mode()
def members(
    pipe: Pipeline, class_id: int | str, coarse: Tensor, position: int, **settings: Any
) -> Members:
    """Return the codes that the fine stage chooses from for a token, and their probabilities.

    The probabilities include guidance, temperature, top-k and top-p of the fine stage. They may
    add up to less than 1 for a fine model with a softmax over all codes.

    Args:
        pipe: The models.
        class_id: The class of the image, a number or name.
        coarse: (L,) of integers in [0, K), the labels of the whole image.
        position: Index of the token, in [0, L).
        settings: See `Pipeline.sample`.

    Raises:
        UserError: As for `Pipeline.sample`; labels or a position of another shape, type or range.
    """
    request = arguments.check_request(pipe, [class_id], 0, settings, coarse=coarse)
    labels_1L, used = request.known_labels_NL, request.sampling
    if not 0 <= position < labels_1L.shape[1]:
        raise UserError(f"position: got {position}, expected 0 to {labels_1L.shape[1] - 1}")
    label = int(labels_1L[0, position])
    members_S = pipe.clusters.members_KS[label, : int(pipe.clusters.sizes_K[label])]
    if pipe.fine is None:
        return Members(label, members_S.cpu(), torch.ones(1, dtype=torch.float64))
    classes_1 = torch.tensor(request.classes, device=pipe.device)
    logits_1K = pipe.fine(labels_1L, classes_1)[:, position]
    if used.fine_guidance != 1:
        no_class_1 = torch.full_like(classes_1, pipe.fine.no_class)
        uncond_1K = pipe.fine(labels_1L, no_class_1)[:, position]
        logits_1K = sampling.apply_guidance(logits_1K, uncond_1K, used.fine_guidance)
    logits_1K = sampling.filter_logits(
        logits_1K, used.fine_temperature, used.fine_top_k, used.fine_top_p
    )
    probabilities_K = logits_1K.softmax(-1)[0]
    probabilities_S = probabilities_K[pipe.fine.choices(members_S)]
    order_S = probabilities_S.argsort(descending=True, stable=True)
    return Members(label, members_S[order_S].cpu(), probabilities_S[order_S].cpu())


@with_torch_defaults
@torch.no_grad()
def encode(pipe: Pipeline, images: Sequence[ImageLike] | ImageLike) -> Tensor:
    """Encode images of any size, format and mode, read and cropped as in training.

    Each image is a path, the bytes of a file, an array of uint8, (H, W) or (H, W, 3 or 4), or an
    image of Pillow. All are read alike; but an image of Pillow that was loaded, copied or edited
    may have lost what its file said: see `ctf.data.decode.to_rgb`. Transparent pixels get the
    background that the pipeline was trained with, white by default.

    Returns:
        Codes (B, L), int64; for a single image without a list, (1, L).

    Raises:
        UserError: There are no images, or one cannot be read.
    """
    if isinstance(images, str | os.PathLike | bytes | Image.Image) or (
        isinstance(images, np.ndarray) and images.ndim < 4
    ):
        images = [images]
    if len(images) == 0:
        raise UserError("got 0 images to encode, expected 1 or more")
    size = pipe.tokenizer.image_size
    crops = []
    for i, image in enumerate(images):
        try:
            rgb = read_image(image, background(pipe))
        except UnreadableImageError as reason:
            name = str(image) if isinstance(image, str | os.PathLike) else f"image {i}"
            raise UserError(f"{name}: {reason}") from None
        crops.append(np.asarray(crop(rgb, size)))
    parts = np.split(
        np.stack(crops), range(generation.BATCH_SIZE, len(crops), generation.BATCH_SIZE)
    )
    codes = [pipe.tokenizer.encode(as_tensor(part, pipe.device)) for part in parts]
    return torch.cat(codes).cpu()


def background(pipe: Pipeline) -> tuple[int, ...]:
    """Return the RGB colour behind transparent pixels that a pipeline was trained with."""
    return parse_colour(str(pipe.origin.get("background", "white")))
