"""From checked arguments to images, batch by batch: coarse stage, fine stage, decoder.

Shapes: N images of a call, B of a batch, L tokens of an image, C code dimension.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ctf import kernels
from ctf.common import memory, threads
from ctf.common.progress import Progress
from ctf.data.transforms import as_pil
from ctf.models import sampling
from ctf.models.noise import noise_keys
from ctf.models.parallel import CoarseSampler
from ctf.models.sampling import Sampling
from ctf.models.tokenizer import VQModel
from ctf.pipelines import windows
from ctf.pipelines.arguments import Request
from ctf.pipelines.windows import AutoWindow

if TYPE_CHECKING:
    from ctf.pipelines.pipeline import Pipeline

BATCH_SIZE = 64  # images per batch at most
# Images that a thread samples at least: for fewer, calling operators takes as long as computing.
# These take one label a pass in int8, as a larger batch does.
SMALLEST_PART = 16
NARROW = 256  # width of a coarse model whose operators are too short to be spread over cores
INT8_ROWS, BF16_ROWS = 16, 32  # of a pass in int8 on a processor, and in bfloat16 on a GPU
# At most, in the largest layer of the decoder: an image of VQ-16, or 16 of them on a GPU.
DECODER_ELEMENTS, DECODER_ELEMENTS_GPU = 2**23, 2**27


@dataclasses.dataclass(frozen=True)
class Samples:
    """What `Pipeline.sample` and `Pipeline.refine` return: N images.

    images: N PIL images, RGB.
    codes: (N, L), int64 in [0, V), row by row.
    coarse: (N, L), int64 in [0, K), their coarse labels.
    passes: (N,), int64, how many passes of the coarse model each image took; 0 by `refine`.
    """

    images: list[Image.Image]
    codes: Tensor
    coarse: Tensor
    passes: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """B images that are sampled together.

    numbers: Which of the request's images these are.
    keys_B2L: What the noise of both stages is made from, see `noise_keys`.
    """

    numbers: Sequence[int]
    classes_B: Tensor
    keys_B2L: Tensor
    known_codes_BL: Tensor
    known_labels_BL: Tensor

    def select(self, rows: list[int]) -> Batch:
        """Return some rows of the batch."""
        return Batch(
            [self.numbers[row] for row in rows],
            self.classes_B[rows],
            self.keys_B2L[rows],
            self.known_codes_BL[rows],
            self.known_labels_BL[rows],
        )


def batches(pipe: Pipeline, request: Request) -> Iterator[Batch]:
    """Yield the images of a request in batches that fit into memory."""
    count, size = len(request.classes), max_batch(pipe, request.sampling)
    for start in range(0, count, size):
        rows = slice(start, start + size)
        yield Batch(
            range(count)[rows],
            torch.tensor(request.classes[rows], device=pipe.device),
            noise_keys(request.seeds[rows], pipe.coarse.config.length),
            request.known_codes_NL[rows],
            request.known_labels_NL[rows],
        )


def max_batch(pipe: Pipeline, settings: Sampling) -> int:
    """Return BATCH_SIZE, or less if the cache of keys and values would take half the memory."""
    cache_bytes = pipe.coarse.backbone.cache_bytes()
    halves = 1 if settings.guidance == 1 else 2
    available = memory.available(pipe.device) + kernels.spare_bytes(pipe.coarse)
    return min(BATCH_SIZE, max(1, available // 2 // (halves * cache_bytes)))


def generate(pipe: Pipeline, request: Request, progress: Progress | None = None) -> Samples:
    """Sample all images of a request, on a processor in threads of a core each.

    A wide model samples few images with all cores together, since it reads its weights sooner so.
    """
    done: list[Samples] = []
    count = len(request.classes)
    pays = count >= 2 * SMALLEST_PART or pipe.coarse.config.width <= NARROW
    # A tokenizer of somebody's own might not be made for several threads.
    smallest = SMALLEST_PART if isinstance(pipe.tokenizer, VQModel) else BATCH_SIZE
    with threads.team(pays and threads.pays(pipe.device)):
        for batch in batches(pipe, request):
            sample = functools.partial(_sample, pipe, request, batch)
            rows = [*range(len(batch.numbers))]
            done += threads.over_parts(sample, rows, smallest=smallest)
            if progress is not None:
                progress(batch.numbers[-1] + 1, count)
    return Samples(
        [image for samples in done for image in samples.images],
        torch.cat([samples.codes for samples in done]),
        torch.cat([samples.coarse for samples in done]),
        torch.cat([samples.passes for samples in done if samples.passes is not None]),
    )


def _sample(pipe: Pipeline, request: Request, batch: Batch, rows: list[int]) -> Samples:
    part = batch if len(rows) == len(batch.numbers) else batch.select(rows)
    sampler = coarse_sampler(pipe, request, part)
    while not sampler.done:
        advance(pipe, request, sampler)
    return finish(pipe, request, part, sampler)


def coarse_sampler(pipe: Pipeline, request: Request, batch: Batch) -> CoarseSampler:
    """Return what samples the coarse labels of a batch, none of which is sampled yet."""
    return kernels.coarse_sampler(
        pipe.coarse,
        batch.classes_B,
        batch.keys_B2L[:, 0],
        request.sampling,
        batch.known_labels_BL,
    )


def advance(pipe: Pipeline, request: Request, sampler: CoarseSampler) -> None:
    """Take a pass of the coarse model over the requested window.

    In int8 and bfloat16 a label may depend on the window, so "auto" must not depend on measured
    times there: it is as many labels as make a pass of 16 rows, or 32 on a GPU, which takes hardly
    longer than one of 2.
    """
    if request.window != "auto":
        sampler.advance(request.window)
        return
    if not kernels.is_exact(pipe.coarse):
        rows = INT8_ROWS if pipe.device.type == "cpu" else BF16_ROWS
        halves = 1 if request.sampling.guidance == 1 else 2
        sampler.advance(max(1, rows // (len(sampler.certain) * halves)))
        return
    if pipe.auto_window is None:
        pipe.auto_window = AutoWindow.of(pipe.coarse)
    windows.advance(sampler, pipe.auto_window)


def finish(pipe: Pipeline, request: Request, batch: Batch, sampler: CoarseSampler) -> Samples:
    """Sample the codes of coarse labels and decode them."""
    labels_BL = sampler.labels_BT
    codes_BL = sampling.sample_fine(
        pipe.fine,
        pipe.clusters,
        labels_BL,
        batch.classes_B,
        batch.keys_B2L[:, 1],
        request.sampling,
        batch.known_codes_BL,
        pipe.tokenizer.codebook(),
    )
    parts = torch.split(codes_BL, 1 if request.decode_separately else len(codes_BL))
    images = [image for part in parts for image in as_pil(pipe.decode(part, request.resize))]
    return Samples(images, codes_BL.cpu(), labels_BL.cpu(), torch.tensor(sampler.passes))


@torch.inference_mode()
def decode_vectors(pipe: Pipeline, vectors_BLC: Tensor, resize: int | None) -> Tensor:
    """Decode code vectors into images in [-1, 1]: (B, 3, H, W), resized before clipping."""
    tokenizer = pipe.tokenizer
    channels = tokenizer.config.channels if isinstance(tokenizer, VQModel) else 3
    elements = DECODER_ELEMENTS if vectors_BLC.device.type == "cpu" else DECODER_ELEMENTS_GPU
    at_a_time = max(1, elements // (channels * tokenizer.image_size**2))
    parts = torch.split(vectors_BLC, at_a_time)
    images_BCHW = torch.cat([tokenizer.decode_vectors(part) for part in parts])
    if resize is not None:
        size = (resize, resize)
        images_BCHW = torch.nn.functional.interpolate(images_BCHW, size=size, mode="bicubic")
    return images_BCHW.clamp(-1, 1)
