"""Streaming, previews, members of a cluster, refining, encoding."""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ctf.common.errors import UserError
from ctf.data.image_set import Splits
from ctf.models.fine import FineModel
from ctf.models.transformer import KVCache
from ctf.pipelines import generation
from ctf.pipelines.editing import Event
from ctf.pipelines.generation import Samples
from ctf.pipelines.pipeline import Pipeline
from tests.pipelines.helpers import (
    ALL_L,
    CLASSES,
    CODES_BL,
    GRID,
    LENGTH,
    MASK_BL,
    SEED,
    pixels,
    same,
    same_up_to_rounding,
)

# --- Streaming ------------------------------------------------------------------------------------


def caches() -> int:
    """The number of caches of keys and values in memory."""
    # By type: isinstance asks weak proxies for their object, which may be gone.
    return sum(issubclass(type(o), KVCache) for o in gc.get_objects())


@pytest.mark.parametrize("preview", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": 3.0, "guidance_window": (0.3, 0.8), "fine_guidance": 2.0, "resize": 20},
        {"guidance_schedule": "cosine", "top_k": 1, "fine_top_k": 1},
        {"codes": CODES_BL, "known": MASK_BL, "temperature": 1.2},
    ],
)
def test_streaming_gives_what_sampling_gives(
    sharp: Pipeline, options: dict[str, Any], preview: bool
) -> None:
    expected = sharp.sample(CLASSES, SEED, **options)
    events = list(sharp.stream(CLASSES, SEED, preview=preview, **options))
    assert len(events) == GRID + 1
    for row, event in enumerate(events[:-1], start=1):
        assert (event.rows, event.total, event.samples) == (row, GRID, None)
        assert torch.equal(event.coarse, expected.coarse[:, : row * GRID])
        assert len(event.images) == (len(CLASSES) if preview else 0)
        assert all(i.size == expected.images[0].size and i.mode == "RGB" for i in event.images)
    last = events[-1]
    assert last.samples is not None and same_up_to_rounding(last.samples, expected)
    assert (last.rows, last.total) == (GRID, GRID)
    assert last.images == last.samples.images and torch.equal(last.coarse, expected.coarse)


@pytest.mark.parametrize("how", ["closed", "break"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_stream_that_is_left_takes_no_more_steps_and_frees_its_cache(
    sharp: Pipeline, steps: list[int], how: str, rows: int
) -> None:
    before = caches()
    if how == "closed":
        events = sharp.stream(CLASSES, SEED)
        assert len(steps) == 0
        for _ in range(rows):
            next(events)
        assert caches() == before + 1
        events.close()
        assert list(events) == []
    else:
        for event in sharp.stream(CLASSES, SEED):
            if event.rows == rows:
                break
    assert len(steps) == rows * GRID
    assert caches() == before


def test_streaming_is_independent_of_its_caller(sharp: Pipeline, samples: Samples) -> None:
    """It does not change PyTorch's modes, and events can be changed."""
    last: Event | None = None
    for event in sharp.stream(CLASSES, SEED):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not event.coarse.is_inference()
        last = dataclasses.replace(event, coarse=event.coarse.clone())
        event.coarse.zero_()
    assert last is not None and torch.equal(last.coarse, samples.coarse)


def test_streams_can_be_interleaved(sharp: Pipeline, samples: Samples) -> None:
    streams = [sharp.stream([c], SEED + i) for i, c in enumerate(CLASSES)]
    for events in zip(*streams, strict=True):
        together = torch.cat([event.coarse for event in events])
        assert torch.equal(together, samples.coarse[:, : together.shape[1]])


def test_at_most_one_batch_is_streamed(sharp: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "BATCH_SIZE", 3)
    assert len(list(sharp.stream(CLASSES[:3], SEED, preview=False))) == GRID + 1
    with pytest.raises(UserError, match="got 4 images to stream, expected 3 or fewer"):
        sharp.stream(CLASSES, SEED)


@pytest.mark.parametrize("options", [{}, {"codes": CODES_BL, "known": MASK_BL}])
@pytest.mark.parametrize("at", [0, 1, 6, LENGTH - 1])
def test_inactive_images_leave_the_batch(
    sharp: Pipeline, steps: list[int], options: dict[str, Any], at: int
) -> None:
    expected = sharp.sample(CLASSES, SEED, **options)
    steps.clear()
    calls = 0

    def active() -> list[int]:
        nonlocal calls
        calls += 1
        return [0, 1, 2, 3] if calls <= at else [1, 3]

    *_, last = sharp.stream(CLASSES, SEED, active=active, preview=False, **options)
    assert calls == LENGTH
    assert last.numbers == (1, 3) and last.samples is not None
    assert torch.equal(last.samples.codes, expected.codes[[1, 3]])
    if not options:  # no step is taken twice; with guidance, two rows for each image
        assert steps == [8] * at + [4] * (LENGTH - at)


def test_a_stream_ends_when_no_image_is_active(sharp: Pipeline, steps: list[int]) -> None:
    before = caches()
    active = iter([CLASSES] * 3)
    assert list(sharp.stream([0, 1, 2], SEED, active=lambda: next(active, []))) == []
    assert len(steps) == 3 and caches() == before


# --- Previews -------------------------------------------------------------------------------------


def test_previews_are_decoded_from_mean_vectors(sharp: Pipeline, samples: Samples) -> None:
    codebook_VC = sharp.tokenizer.codebook()
    means = [
        torch.stack([codebook_VC[m] for m in row if m >= 0]).mean(0)
        for row in sharp.clusters.members_KS
    ]
    unknown = torch.stack(means).mean(0)
    for event in sharp.stream(CLASSES, SEED):
        if event.samples is not None:
            break
        known = [[means[label] for label in row] for row in samples.coarse[:, : event.rows * GRID]]
        vectors_BLC = torch.stack(
            [torch.stack(row + [unknown] * (LENGTH - len(row))) for row in known]
        )
        expected = sharp.tokenizer.decode_vectors(vectors_BLC).clamp(-1, 1)
        expected = ((expected + 1) * 127.5).permute(0, 2, 3, 1)
        assert float((torch.from_numpy(pixels(event.images)) - expected).abs().max()) < 0.6


def test_previews_show_known_codes(sharp: Pipeline, samples: Samples) -> None:
    events = list(sharp.stream(CLASSES, codes=samples.codes, known=ALL_L))
    for event in events:
        assert (pixels(event.images) == pixels(samples.images)).all()


def test_the_baselines_last_preview_is_the_image(baseline: Pipeline) -> None:
    events = list(baseline.stream(CLASSES, SEED))
    expected = baseline.sample(CLASSES, SEED)
    assert events[-1].samples is not None and same(events[-1].samples, expected)
    assert np.abs(pixels(events[-2].images).astype(int) - pixels(expected.images)).max() <= 1


def test_preview_of_labels_is_that_of_the_event(sharp: Pipeline, samples: Samples) -> None:
    events = list(sharp.stream(CLASSES, SEED))
    for event in events[:-1]:
        assert (pixels(sharp.preview(event.coarse)) == pixels(event.images)).all()
    known = sharp.preview(samples.coarse[:, :3], codes=samples.codes, known=ALL_L, resize=20)
    assert (pixels(known) == pixels(sharp.sample(CLASSES, SEED, resize=20).images)).all()


def test_images_of_a_stream_grow_by_what_is_certain_of_each(sharp: Pipeline) -> None:
    expected, further = sharp.sample(CLASSES, SEED).coarse, 0
    events = list(sharp.stream(CLASSES, SEED, window=5, transparent=True))
    for event in events[:-1]:
        certain_BL = event.labels >= 0
        assert bool(certain_BL[:, : event.rows * GRID].all())
        assert torch.equal(event.labels, expected.where(certain_BL, torch.tensor(-1)))
        assert torch.equal(certain_BL, certain_BL.cummin(1).values)
        further += int(certain_BL[:, event.rows * GRID :].sum())
        previews = sharp.preview(event.labels, transparent=True)
        assert (pixels(event.images) == pixels(previews)).all()
        for image, visible_L in zip(event.images, certain_BL, strict=True):
            alpha = np.asarray(image)[..., 3].reshape(GRID, image.width // GRID, GRID, -1)
            assert (alpha == 255 * visible_L.view(GRID, 1, GRID, 1).numpy()).all()
    assert further > 0
    assert torch.equal(events[-1].labels, expected)


def test_what_is_not_sampled_yet_can_be_transparent(sharp: Pipeline, samples: Samples) -> None:
    for known in ({}, {"codes": samples.codes, "known": MASK_BL}):
        events = list(sharp.stream(CLASSES, SEED, transparent=True, **known))
        opaque = list(sharp.stream(CLASSES, SEED, **known))
        for event, other in zip(events[:-1], opaque[:-1], strict=True):
            is_visible_BL = event.labels >= 0
            assert bool(is_visible_BL[:, : event.rows * GRID].all())
            is_visible_BL = is_visible_BL | MASK_BL if known else is_visible_BL
            for image, plain, is_visible_L in zip(
                event.images, other.images, is_visible_BL, strict=True
            ):
                assert image.mode == "RGBA" and image.convert("RGB") == plain
                cell = image.width // GRID
                alpha = np.asarray(image)[..., 3].reshape(GRID, cell, GRID, cell)
                expected = 255 * is_visible_L.view(GRID, 1, GRID, 1).numpy()
                assert (alpha == expected).all()
        assert events[-1].images == opaque[-1].images
        (image,) = sharp.preview(samples.coarse[:1, :5], transparent=True, resize=50)
        assert image.size == (50, 50) and image.getpixel((0, 0))[3] == 255  # type: ignore[index]
        assert image.getpixel((49, 49))[3] == 0  # type: ignore[index]


# --- Members of a cluster -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"fine_temperature": 0.5}, {"fine_guidance": 3.0}, {"fine_top_k": 2}, {"fine_top_p": 0.5}],
)
def test_members_have_the_probabilities_of_sampling(
    sharp: Pipeline, samples: Samples, options: dict[str, Any]
) -> None:
    labels_L, count = samples.coarse[0], 600
    codes_NL = sharp.refine([CLASSES[0]] * count, labels_L, 0, **options).codes
    for position in (0, 5, LENGTH - 1):
        members = sharp.members(CLASSES[0], labels_L, position, **options)
        assert members.cluster == int(labels_L[position])
        row = sharp.clusters.members_KS[members.cluster].tolist()
        assert sorted(members.codes.tolist()) == [code for code in row if code >= 0]
        probabilities = members.probabilities.tolist()
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)
        for code, p in zip(members.codes.tolist(), probabilities, strict=True):
            share = float((codes_NL[:, position] == code).double().mean())
            assert abs(share - p) <= 5 * (p * (1 - p) / count) ** 0.5


def test_members_of_a_baseline_and_of_a_full_softmax(
    sharp: Pipeline, baseline: Pipeline, samples: Samples
) -> None:
    only = baseline.members("red", torch.arange(LENGTH), 3)
    assert (only.cluster, only.codes.tolist(), only.probabilities.tolist()) == (3, [3], [1.0])
    assert sharp.fine is not None
    model = FineModel(sharp.fine.config, sharp.clusters, "full").eval().requires_grad_(False)
    untrained = dataclasses.replace(sharp, fine=model)  # all codes are equally likely
    members = untrained.members(0, samples.coarse[0], 3)
    assert members.probabilities.tolist() == pytest.approx([1 / 64] * len(members.codes))


# --- Refining -------------------------------------------------------------------------------------


def test_refining_with_the_same_seed_gives_the_same(
    sharp: Pipeline, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    options: dict[str, Any] = {"guidance": 3.0, "fine_guidance": 2.0, "fine_top_p": 0.9}
    out = sharp.sample(CLASSES, SEED, resize=20, **options)
    steps.clear()
    assert same(sharp.refine(CLASSES, out.coarse, SEED, resize=20, **options), out)
    # Settings of the coarse stage have no effect.
    options["top_k"] = 1
    assert same(sharp.refine(CLASSES, out.coarse, SEED, resize=20, **options), out)
    monkeypatch.setattr(generation, "BATCH_SIZE", 3)
    calls: list[tuple[int, int]] = []
    again = sharp.refine(
        CLASSES, out.coarse, SEED, resize=20, progress=lambda *c: calls.append(c), **options
    )
    assert same_up_to_rounding(again, out)
    assert calls == [(3, 4), (4, 4)]
    assert steps == []


def test_refining_with_another_seed_gives_other_members(sharp: Pipeline, samples: Samples) -> None:
    other = sharp.refine(CLASSES, samples.coarse, SEED + 100)
    assert torch.equal(other.coarse, samples.coarse)
    assert torch.equal(sharp.clusters.labels_V[other.codes], samples.coarse)
    assert not torch.equal(other.codes, samples.codes)
    many = sharp.refine(["green"] * 5, samples.coarse[1].int(), SEED)
    assert torch.equal(many.coarse, samples.coarse[1].expand(5, -1))
    assert len(many.codes.unique(dim=0)) > 1
    greedy = sharp.refine(["green"] * 5, samples.coarse[1:2], SEED, fine_top_k=1)
    assert len(greedy.codes.unique(dim=0)) == 1


def test_refining_changes_nothing_in_a_baseline(baseline: Pipeline) -> None:
    out = baseline.sample(CLASSES, SEED)
    assert same(baseline.refine(CLASSES, out.coarse, SEED + 100), out)


# --- Encoding -------------------------------------------------------------------------------------


def test_images_are_encoded_as_in_training(
    sharp: Pipeline, splits: Splits, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (splits.train, splits.val)
    crops = [image for part in sets for image in part.read(np.arange(len(part)))]
    expected = sharp.encode([Image.fromarray(image) for image in crops])
    assert expected.shape == (24, LENGTH) and expected.dtype == torch.int64
    assert not expected.is_inference()
    as_tensor = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(expected, sharp.tokenizer.encode(as_tensor))
    # The files are of all modes, not square, some rotated by EXIF, some transparent.
    files = sorted(path for path in image_folder.rglob("*") if path.is_file())
    opened = [Image.open(path) for path in files]
    assert {image.mode for image in opened} >= {"RGB", "RGBA", "CMYK"}
    from_files = sharp.encode(opened)
    rows = {tuple(row) for row in expected.tolist()}
    assert {tuple(row) for row in from_files.tolist()} == rows
    # In any form that an image can be handed over, and once more, when it is loaded.
    assert torch.equal(sharp.encode(files), from_files)
    assert torch.equal(sharp.encode([path.read_bytes() for path in files]), from_files)
    assert torch.equal(sharp.encode(opened), from_files)
    assert torch.equal(sharp.encode([Image.open(path).copy() for path in files]), from_files)
    assert torch.equal(sharp.encode(str(files[0])), from_files[:1])
    assert torch.equal(sharp.encode(crops), expected)
    assert torch.equal(sharp.encode(np.stack(crops)), expected)
    assert torch.equal(sharp.encode(crops[0]), expected[:1])
    monkeypatch.setattr(generation, "BATCH_SIZE", 7)
    assert torch.equal(sharp.encode(opened), from_files)


def test_transparent_images_are_encoded_on_the_background_of_the_training(
    sharp: Pipeline,
) -> None:
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    white, red = Image.new("RGB", (16, 16), "white"), Image.new("RGB", (16, 16), "red")
    assert torch.equal(sharp.encode([clear]), sharp.encode([white]))
    trained_on_red = dataclasses.replace(sharp, origin={**sharp.origin, "background": "#ff0000"})
    assert torch.equal(trained_on_red.encode([clear]), sharp.encode([red]))
    assert not torch.equal(sharp.encode([white]), sharp.encode([red]))


@pytest.mark.parametrize(("image", "message"), [
    (Image.new("F", (16, 16)), "image 1: .*range is not known"),
    (np.zeros((16, 16, 3), np.float32), "image 1: array of float32"), (None, "image 1: NoneType"),
    (b"not an image", "image 1: corrupt"), ("no/such.png", "no/such.png: not a file"),
])  # fmt: skip
def test_what_cannot_be_encoded_is_named(sharp: Pipeline, image: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sharp.encode([Image.new("RGB", (16, 16)), image])
