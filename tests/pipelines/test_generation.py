"""Batches: an image is the same in each; known codes, which stay."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ctf import kernels
from ctf.common import memory
from ctf.common.errors import UserError
from ctf.models import sampling
from ctf.models.fine import FineModel
from ctf.pipelines import generation
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
    UPPER_L,
    as_mask,
    same,
    same_up_to_rounding,
)

masks = st.integers(0, 2 ** (len(CLASSES) * LENGTH) - 1).map(as_mask)


@pytest.mark.parametrize(
    "options", [{}, {"guidance": 1.0, "fine_guidance": 3.0}, {"top_k": 3, "fine_top_p": 0.5}]
)
def test_an_image_is_the_same_in_any_batch(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    classes = [0, 1, 2, 2, 1, 0, 0]
    together = pipe.sample(classes, seed=10, **options)
    monkeypatch.setattr(generation, "BATCH_SIZE", 3)
    calls: list[tuple[int, int]] = []
    in_batches = pipe.sample(classes, seed=10, progress=lambda *c: calls.append(c), **options)
    assert calls == [(3, 7), (6, 7), (7, 7)]
    assert same_up_to_rounding(together, in_batches)
    alone = [pipe.sample([c], seed=10 + i, **options) for i, c in enumerate(classes)]
    one_by_one = Samples(
        [a.images[0] for a in alone],
        torch.cat([a.codes for a in alone]),
        torch.cat([a.coarse for a in alone]),
    )
    assert same_up_to_rounding(together, one_by_one)


@pytest.mark.usefixtures("three_threads")
def test_parts_of_a_batch_have_the_same_images(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = [0, 1, 2, 2, 1, 0, 0]
    whole = pipe.sample(classes, seed=10)
    monkeypatch.setattr(generation, "SMALLEST_PART", 2)
    calls: list[tuple[int, int]] = []
    in_parts = pipe.sample(classes, seed=10, progress=lambda *c: calls.append(c))
    assert calls == [(7, 7)]
    assert same_up_to_rounding(whole, in_parts)
    assert torch.get_num_threads() == 3


def test_images_have_seeds_of_their_own(sharp: Pipeline, samples: Samples) -> None:
    order = [2, 0, 3]
    seeds, classes = [SEED + i for i in order], [CLASSES[i] for i in order]
    out = sharp.sample(classes, seeds)
    assert torch.equal(out.codes, samples.codes[order])
    assert torch.equal(sharp.refine(classes, out.coarse, seeds).codes, out.codes)
    *_, last = sharp.stream(classes, seeds, preview=False)
    assert last.samples is not None and same(last.samples, out)


def test_decoded_separately_pixels_depend_on_the_codes_alone(
    sharp: Pipeline, samples: Samples
) -> None:
    out = sharp.sample(CLASSES, SEED, decode_separately=True)
    assert same_up_to_rounding(out, samples)
    for i, number in enumerate(CLASSES):
        alone = sharp.sample([number], SEED + i, decode_separately=True)
        assert (np.asarray(alone.images[0]) == np.asarray(out.images[i])).all()
        known = sharp.sample([0], codes=out.codes[i], known=ALL_L, decode_separately=True)
        assert (np.asarray(known.images[0]) == np.asarray(out.images[i])).all()


def test_batches_fit_into_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline.from_pretrained(run)
    pipe.window = 1
    classes = [0, 1, 2, 0, 1, 2, 0]
    expected = pipe.sample(classes, seed=3)
    rows: list[int] = []
    pipe.coarse.head.register_forward_hook(lambda _, x, __: rows.append(len(x[0])))
    shape = pipe.coarse.config
    cache_bytes = 2 * 4 * shape.layers * shape.length * shape.width  # of one image, no guidance
    monkeypatch.setattr(memory, "available", lambda device: 2 * 3 * 2 * cache_bytes)
    monkeypatch.setattr(sampling, "FINE_TOKENS", 2 * LENGTH)
    monkeypatch.setattr(generation, "DECODER_ELEMENTS", 1)
    assert same_up_to_rounding(pipe.sample(classes, seed=3), expected)
    assert rows[::LENGTH] == [2 * 3, 2 * 3, 2 * 1]
    rows.clear()
    pipe.sample(classes, seed=3, guidance=1.0)  # half the cache
    assert rows[::LENGTH] == [6, 1]
    monkeypatch.setattr(memory, "available", lambda device: 0)
    with pytest.raises(UserError, match="got 2 images to stream, expected 1 or fewer"):
        pipe.stream([0, 1])


# --- Known codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"guidance": 3.0, "guidance_window": (0.3, 0.8)}, {"codes": CODES_BL, "known": MASK_BL}],
)
def test_the_window_changes_how_many_passes_it_takes_and_nothing_else(
    sharp: Pipeline, options: dict[str, Any]
) -> None:
    expected = sharp.sample(CLASSES, SEED, window=1, **options)
    assert expected.passes is not None
    for window in (2, 5, LENGTH, "auto"):
        out = sharp.sample(CLASSES, SEED, window=window, **options)
        assert same(out, expected) and out.passes is not None
        assert out.passes.shape == (len(CLASSES),)
        assert bool((out.passes <= expected.passes).all())
        events = list(sharp.stream(CLASSES, SEED, window=window, preview=False, **options))
        assert [event.rows for event in events] == [*range(1, GRID + 1), GRID]
        assert events[-1].samples is not None and same(events[-1].samples, expected)
    if not options:
        assert expected.passes.tolist() == [LENGTH] * len(CLASSES)


@pytest.mark.parametrize("engine", ["eager", "auto"])
@pytest.mark.parametrize("options", [{}, {"codes": CODES_BL, "known": MASK_BL, "temperature": 0.7}])
def test_windows_of_the_full_vocabulary_sample_the_codes_of_one_by_one(
    baseline: Pipeline, tmp_path: Path, engine: kernels.Engine, options: dict[str, Any]
) -> None:
    """The baseline, whose labels are codes and which has no fine stage."""
    baseline.save_pretrained(tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path, engine=engine)
    assert pipe.fine is None and pipe.coarse.vocab_size == pipe.tokenizer.codebook().shape[0]
    expected = pipe.sample(CLASSES, SEED, window=1, **options)
    for window in (2, 5, LENGTH):
        out = pipe.sample(CLASSES, SEED, window=window, **options)
        assert same(out, expected) and torch.equal(out.coarse, out.codes)
        assert out.passes is not None and expected.passes is not None
        assert bool((out.passes <= expected.passes).all())


@pytest.mark.skipif(not kernels.available("int8", torch.device("cpu")), reason="no int8 here")
def test_in_int8_the_window_is_chosen_by_the_batch_and_not_by_time(run: Path) -> None:
    pipe = Pipeline.from_pretrained(run, engine="int8")
    for images, guidance, window in ((1, 2.0, 8), (1, 1.0, 16), (4, 2.0, 2), (9, 2.0, 1)):
        inputs = [0] * images, SEED
        out = pipe.sample(*inputs, window="auto", guidance=guidance)
        expected = pipe.sample(*inputs, window=window, guidance=guidance)
        assert same(out, expected) and out.passes is not None and expected.passes is not None
        assert torch.equal(out.passes, expected.passes)
    assert pipe.auto_window is None


@pytest.mark.parametrize("window", [0, -1, "fast", 1.5, True, "0", ""])
def test_windows_that_are_none_are_refused(sharp: Pipeline, window: Any) -> None:
    with pytest.raises(UserError, match=r"window: got .*, expected auto, or 1 or more labels"):
        sharp.sample(CLASSES, window=window)


@given(masks)
@settings(max_examples=25)
def test_known_codes_stay_and_other_codes_are_ignored(sharp: Pipeline, known_BL: Tensor) -> None:
    out = sharp.sample(CLASSES, SEED, codes=CODES_BL, known=known_BL)
    assert torch.equal(out.codes[known_BL], CODES_BL[known_BL])
    assert torch.equal(out.coarse, sharp.clusters.labels_V[out.codes])
    invalid_BL = CODES_BL.masked_fill(~known_BL, -1)
    assert same(out, sharp.sample(CLASSES, SEED, codes=invalid_BL, known=known_BL))


@given(masks)
@settings(max_examples=25)
def test_an_image_completed_from_its_own_codes_is_itself(
    sharp: Pipeline, samples: Samples, known_BL: Tensor
) -> None:
    """Each position has its own random numbers, whatever is known before it."""
    again = sharp.sample(CLASSES, SEED, codes=samples.codes, known=known_BL)
    assert same_up_to_rounding(again, samples)


@given(masks)
@settings(max_examples=10)
def test_a_completed_image_is_the_same_in_any_batch(sharp: Pipeline, known_BL: Tensor) -> None:
    together = sharp.sample(CLASSES, SEED, codes=CODES_BL, known=known_BL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "BATCH_SIZE", 3)
        in_batches = sharp.sample(CLASSES, SEED, codes=CODES_BL, known=known_BL)
    assert same_up_to_rounding(together, in_batches)
    for i, number in enumerate(CLASSES):
        alone = sharp.sample([number], SEED + i, codes=CODES_BL[i : i + 1], known=known_BL[i])
        assert torch.equal(alone.codes[0], together.codes[i])


def test_steps_are_taken_for_unknown_positions_only(
    sharp: Pipeline, baseline: Pipeline, samples: Samples, steps: list[int]
) -> None:
    assert same(sharp.sample(CLASSES, SEED, codes=CODES_BL, known=~ALL_L), samples)
    assert len(steps) == LENGTH
    for pipe in (sharp, baseline):
        out = pipe.sample(CLASSES, SEED, codes=CODES_BL, known=ALL_L)
        assert torch.equal(out.codes, CODES_BL)
        assert torch.equal(out.coarse, pipe.clusters.labels_V[CODES_BL])
    assert len(steps) == LENGTH


def test_an_upper_half_is_completed_in_many_ways(sharp: Pipeline, steps: list[int]) -> None:
    """Masks and codes for all images, in all shapes and types that are accepted."""
    classes = ["red"] * 8
    out = sharp.sample(classes, SEED, codes=CODES_BL[0], known=UPPER_L)
    assert len(steps) == LENGTH // 2
    assert bool((out.codes[:, UPPER_L] == CODES_BL[0, UPPER_L]).all())
    assert len(out.codes.unique(dim=0)) > 1
    for codes, known in (
        (CODES_BL[:1], UPPER_L[None]),
        (CODES_BL[0].byte(), UPPER_L.expand(8, -1)),
        (CODES_BL[:1].to(torch.uint16).expand(8, -1), UPPER_L[None]),
    ):
        assert same(sharp.sample(classes, SEED, codes=codes, known=known), out)
    other = sharp.sample(classes, SEED + 100, codes=CODES_BL[0], known=UPPER_L)
    assert torch.equal(other.codes[:, UPPER_L], out.codes[:, UPPER_L])
    assert not torch.equal(other.codes, out.codes)


def test_known_codes_stay_with_a_softmax_over_all_codes(sharp: Pipeline) -> None:
    assert sharp.fine is not None
    model = FineModel(sharp.fine.config, sharp.clusters, "full").eval().requires_grad_(False)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    pipe = dataclasses.replace(sharp, fine=model)
    out = pipe.sample(CLASSES, SEED, codes=CODES_BL, known=UPPER_L)
    labels_BL = pipe.clusters.labels_V[out.codes]
    assert torch.equal(out.codes[:, UPPER_L], CODES_BL[:, UPPER_L])
    assert torch.equal(out.coarse[:, UPPER_L], labels_BL[:, UPPER_L])
    assert not torch.equal(out.coarse, labels_BL)
