"""What a worker computes: a batch of tasks in, events out.

Shapes: N images of a batch, L tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctf import Samples
from ctf.data.decode import decode
from ctf.data.transforms import as_pil, crop
from ctf.pipelines import export
from ctf.pipelines.editing import background
from ctf.studio.tasks import Encode, Event, Generate, Job, Members, ServedModel


def run(model: ServedModel, jobs: Sequence[Job]) -> None:
    """Compute the tasks of one batch, and send events about them.

    Raises:
        UserError: A task cannot be computed.
        UnreadableImageError: A file cannot be decoded.
    """
    match jobs[0].task:
        case Encode() as task:
            jobs[0].send(Event("done", _encode(model, task)))
        case Members() as task:
            _members(model, task, jobs[0])
        case Generate():
            batch = _concatenate([job.task for job in jobs if isinstance(job.task, Generate)])
            owners = [job for job in jobs for _ in range(job.task.size)]  # of each image
            _generate(model, batch, owners)


def _concatenate(tasks: Sequence[Generate]) -> Generate:
    """Join tasks with equal batch keys."""
    known = [task.known_BL for task in tasks if task.known_BL is not None]
    coarse = [task.coarse_BL for task in tasks if task.coarse_BL is not None]
    return Generate(
        tuple(number for task in tasks for number in task.classes),
        tuple(seed for task in tasks for seed in task.seeds),
        tasks[0].sampling,
        torch.cat(known) if known else None,
        torch.cat(coarse) if coarse else None,
    )


def _generate(model: ServedModel, batch: Generate, owners: Sequence[Job]) -> None:
    options: dict[str, Any] = {"decode_separately": True, **vars(batch.sampling)}
    classes: Any = np.array(batch.classes)  # numbers, whatever the names are
    if batch.coarse_BL is not None:
        samples = model.pipe.refine(classes, batch.coarse_BL, batch.seeds, **options)
        _send_samples(model, batch, owners, range(batch.size), samples)
        return
    shown_BL = torch.empty(0)
    previews: dict[int, bytes] = {}  # of these labels, by row
    for event in model.pipe.stream(
        classes,
        batch.seeds,
        **_known(batch, range(batch.size)),
        preview=False,  # made below, for those who watch
        active=lambda: [n for n, job in enumerate(owners) if not job.cancelled],
        **options,
    ):
        if event.samples is not None:
            _send_samples(model, batch, owners, event.numbers, event.samples)
            continue
        watched = [row for row, n in enumerate(event.numbers) if owners[n].task.previews]
        if not torch.equal(event.labels, shown_BL):  # a pass may complete more than one row
            shown_BL, previews = event.labels, {}
            if watched:
                known = _known(batch, [event.numbers[row] for row in watched])
                images = model.pipe.preview(event.labels[watched], **known)
                previews = dict(zip(watched, map(export.png, images), strict=True))
        labels = (event.labels >= 0).sum(1).tolist()
        for job, rows in _rows(owners, event.numbers):
            data = {
                "rows": event.rows,
                "total": event.total,
                "images": [previews[row] for row in rows if row in previews],
                "labels": [labels[row] for row in rows],
            }
            job.send(Event("row", data))


def _encode(model: ServedModel, task: Encode) -> dict[str, Any]:
    pipe = model.pipe
    upload = decode(task.data, 1, background(pipe), task.max_pixels)
    codes_1L = pipe.encode([upload])
    labels_1L = pipe.clusters.labels_V[codes_1L.to(pipe.device)].cpu()
    samples = Samples(_decode(model, codes_1L), codes_1L, labels_1L)
    (coarse,) = pipe.preview(labels_1L)
    known = Generate((task.class_number,), (0,), pipe.sampling, known_BL=codes_1L)
    return {
        "original": export.png(crop(upload, pipe.tokenizer.image_size)),
        "coarse": export.png(coarse),
        "picture": _image_json(model, known, 0, samples, 0),
    }


def _members(model: ServedModel, task: Members, job: Job) -> None:
    """Decode the image with each member of the token's cluster, until the client leaves."""
    labels_L = model.pipe.clusters.labels_V[task.codes_L.to(model.pipe.device)]
    cluster = model.pipe.members(task.class_number, labels_L, task.position, **vars(task.sampling))
    members = []
    for code, probability in zip(
        cluster.codes.tolist(), cluster.probabilities.tolist(), strict=True
    ):
        if job.cancelled:
            return
        codes_1L = task.codes_L[None].clone()
        codes_1L[0, task.position] = code
        (image,) = _decode(model, codes_1L)
        members.append({"code": code, "probability": probability, "image": export.png(image)})
    data = {"cluster": cluster.cluster, "position": task.position, "members": members}
    job.send(Event("done", data))


def _send_samples(
    model: ServedModel,
    batch: Generate,
    owners: Sequence[Job],
    numbers: Sequence[int],
    samples: Samples,
) -> None:
    for job, rows in _rows(owners, numbers):
        pictures = [_image_json(model, batch, numbers[row], samples, row) for row in rows]
        job.send(Event("done", {"pictures": pictures}))


def _rows(owners: Sequence[Job], numbers: Sequence[int]) -> list[tuple[Job, list[int]]]:
    """Return each job that waits, with the rows of its images; row i is image `numbers[i]`."""
    rows: dict[Job, list[int]] = {}
    for row, n in enumerate(numbers):
        rows.setdefault(owners[n], []).append(row)
    return [(job, rows_of_job) for job, rows_of_job in rows.items() if not job.cancelled]


def _known(batch: Generate, numbers: Sequence[int]) -> dict[str, Any]:
    """Return the known codes of some images, as keyword arguments of `Pipeline.stream`."""
    if batch.known_BL is None:
        return {}
    known_NL = batch.known_BL[list(numbers)]
    return {"codes": known_NL, "known": known_NL >= 0}


def _image_json(
    model: ServedModel, batch: Generate, n: int, samples: Samples, row: int
) -> dict[str, Any]:
    """Describe image `n` of a batch, which is in row `row` of `samples`: schema.Picture."""
    given: dict[str, Any] = {}
    if batch.known_BL is not None:
        given["codes"] = tuple(batch.known_BL[n].clamp(min=0).tolist())
        given["keep"] = tuple((batch.known_BL[n] >= 0).tolist())
    if batch.coarse_BL is not None:
        given["coarse"] = tuple(batch.coarse_BL[n].tolist())
    number, seed = batch.classes[n], batch.seeds[n]
    settings = export.Settings(
        (number,), 1, seed, batch.sampling, model=model.name, weights=model.weights, **given
    )
    return {
        "model": model.name,
        "class_number": number,
        "class_name": model.pipe.class_names[number],
        "seed": seed,
        "image": export.png(samples.images[row]),
        "codes": samples.codes[row].tolist(),
        "coarse": samples.coarse[row].tolist(),
        "passes": None if samples.passes is None else int(samples.passes[row]),
        "settings": settings.to_json(),
    }


def _decode(model: ServedModel, codes_BL: Tensor) -> list[Image.Image]:
    return as_pil(model.pipe.decode(codes_BL.to(model.pipe.device)))
