"""Images that grow, that are given in part, or whose details are drawn again: the same images."""

import dataclasses
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from ctf.common.errors import UserError
from ctf.data.image_set import Splits
from ctf.models import clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.transformer import KVCache
from ctf.pipelines import generation
from ctf.pipelines.editing import Event
from ctf.pipelines.generation import Samples
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import Command

GRID, LENGTH = 4, 16  # of the run's tokens
CLASSES = [0, 1, 2, 1]
SEED = 7


@pytest.fixture(scope="module")
def pipe(run: Path) -> Pipeline:
    """Loaded once, as nothing here changes it. Training of seconds leaves it nearly blind to
    classes and labels; so its logits are stretched."""
    loaded = Pipeline.from_pretrained(run)
    assert loaded.fine is not None
    for model in (loaded.coarse, loaded.fine):
        model.head.weight.mul_(8)
    return loaded


@pytest.fixture(scope="module")
def baseline(pipe: Pipeline) -> Pipeline:
    """The same tokenizer with a cluster for each code, and a coarse model that knows nothing."""
    parts = clusters.identity(pipe.clusters.codebook_size)
    model = CoarseModel(pipe.coarse.config, parts.count).eval().requires_grad_(False)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(pipe, clusters=parts, coarse=model, fine=None)


@pytest.fixture(scope="module")
def whole(pipe: Pipeline) -> Samples:
    return pipe.sample(CLASSES, SEED)


@pytest.fixture
def steps(pipe: Pipeline) -> Iterator[list[int]]:
    """Grows by one for each step of the coarse transformer."""
    taken: list[int] = []
    hook = pipe.coarse.head.register_forward_hook(lambda *_: taken.append(1))
    yield taken
    hook.remove()


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def same(one: Samples, other: Samples) -> bool:
    return (
        torch.equal(one.codes, other.codes)
        and torch.equal(one.coarse, other.coarse)
        and bool((pixels(one.images) == pixels(other.images)).all())
    )


def same_but_rounding(one: Samples, other: Samples) -> bool:
    """As after other kernels, or the same ones at other places of a batch."""
    distance = np.abs(pixels(one.images).astype(int) - pixels(other.images))
    return (
        torch.equal(one.codes, other.codes)
        and torch.equal(one.coarse, other.coarse)
        and int(distance.max()) <= 1
    )


def caches() -> int:
    """Those of keys and values that are in memory."""
    return sum(isinstance(o, KVCache) for o in gc.get_objects())


def as_mask(bits: int, images: int = len(CLASSES)) -> Tensor:
    return torch.tensor([bool(bits >> i & 1) for i in range(images * LENGTH)]).view(images, LENGTH)


masks = st.integers(0, 2 ** (len(CLASSES) * LENGTH) - 1).map(as_mask)
UPPER = torch.arange(LENGTH) < LENGTH // 2
ALL = torch.ones(LENGTH, dtype=torch.bool)
OTHER_BL = torch.arange(len(CLASSES) * LENGTH).view(-1, LENGTH) * 5 % 64  # codes of no image


# --- streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preview", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"guidance": 3.0, "guidance_window": (0.3, 0.8), "fine_guidance": 2.0, "resize": 20},
        {"guidance_schedule": "cosine", "top_k": 1, "fine_top_k": 1},
        {"codes": OTHER_BL, "known": as_mask(0xF0F0_1234_0000_FFFF), "temperature": 1.2},
    ],
)
def test_streamed_is_sampled(pipe: Pipeline, given: dict[str, Any], preview: bool) -> None:
    expected = pipe.sample(CLASSES, SEED, **given)
    events = list(pipe.stream(CLASSES, SEED, preview=preview, **given))
    assert len(events) == GRID + 1
    for row, event in enumerate(events[:-1], start=1):
        assert (event.rows, event.total, event.samples) == (row, GRID, None)
        assert torch.equal(event.coarse, expected.coarse[:, : row * GRID])
        assert len(event.images) == (len(CLASSES) if preview else 0)
        assert all(i.size == expected.images[0].size and i.mode == "RGB" for i in event.images)
    last = events[-1]
    assert last.samples is not None and same(last.samples, expected)
    assert (last.rows, last.total) == (GRID, GRID)
    assert last.images == last.samples.images and torch.equal(last.coarse, expected.coarse)


def test_previews_are_of_mean_vectors(pipe: Pipeline, whole: Samples) -> None:
    codebook_VC = pipe.tokenizer.codebook()
    means = [
        torch.stack([codebook_VC[m] for m in row if m >= 0]).mean(0)
        for row in pipe.clusters.members_KS
    ]
    unknown = torch.stack(means).mean(0)
    for event in pipe.stream(CLASSES, SEED):
        if event.samples is not None:
            break
        known = [[means[label] for label in row] for row in whole.coarse[:, : event.rows * GRID]]
        vectors_BLC = torch.stack(
            [torch.stack(row + [unknown] * (LENGTH - len(row))) for row in known]
        )
        expected = pipe.tokenizer.decode_vectors(vectors_BLC).clamp(-1, 1)
        expected = ((expected + 1) * 127.5).permute(0, 2, 3, 1)
        assert float((torch.from_numpy(pixels(event.images)) - expected).abs().max()) < 0.6


def test_previews_show_what_is_kept(pipe: Pipeline, whole: Samples) -> None:
    events = list(pipe.stream(CLASSES, codes=whole.codes, known=ALL))
    for event in events:
        assert (pixels(event.images) == pixels(whole.images)).all()


def test_the_baselines_last_preview_is_the_image(baseline: Pipeline) -> None:
    events = list(baseline.stream(CLASSES, SEED))
    expected = baseline.sample(CLASSES, SEED)
    assert events[-1].samples is not None and same(events[-1].samples, expected)
    assert np.abs(pixels(events[-2].images).astype(int) - pixels(expected.images)).max() <= 1


@pytest.mark.parametrize("how", ["closed", "break"])
@pytest.mark.parametrize("rows", [1, 3])
def test_left_early_no_step_is_taken_and_nothing_stays(
    pipe: Pipeline, steps: list[int], how: str, rows: int
) -> None:
    before = caches()
    if how == "closed":
        events = pipe.stream(CLASSES, SEED)
        assert len(steps) == 0
        for _ in range(rows):
            next(events)
        assert caches() == before + 1
        events.close()
        assert list(events) == []
    else:
        for event in pipe.stream(CLASSES, SEED):
            if event.rows == rows:
                break
    assert len(steps) == rows * GRID
    assert caches() == before


def test_who_streams_is_left_alone(pipe: Pipeline, whole: Samples) -> None:
    """Neither torch's modes nor what is done with an event have a say in what follows."""
    last: Event | None = None
    for event in pipe.stream(CLASSES, SEED):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not event.coarse.is_inference()
        last = dataclasses.replace(event, coarse=event.coarse.clone())
        event.coarse.zero_()
    assert last is not None and torch.equal(last.coarse, whole.coarse)


def test_streams_side_by_side(pipe: Pipeline, whole: Samples) -> None:
    streams = [pipe.stream([c], SEED + i) for i, c in enumerate(CLASSES)]
    for events in zip(*streams, strict=True):
        together = torch.cat([event.coarse for event in events])
        assert torch.equal(together, whole.coarse[:, : together.shape[1]])


def test_one_batch_at_most_is_streamed(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "BATCH_SIZE", 3)
    assert len(list(pipe.stream(CLASSES[:3], SEED, preview=False))) == GRID + 1
    with pytest.raises(UserError, match="got 4 images to stream, expected 3 or fewer"):
        pipe.stream(CLASSES, SEED)


def test_a_seed_for_each_image(pipe: Pipeline, whole: Samples) -> None:
    order = [2, 0, 3]
    seeds = [SEED + i for i in order]
    classes = [CLASSES[i] for i in order]
    drawn = pipe.sample(classes, seeds)
    assert torch.equal(drawn.codes, whole.codes[order])
    again = pipe.refine(classes, drawn.coarse, seeds)
    assert torch.equal(again.codes, drawn.codes)
    *_, last = pipe.stream(classes, seeds, preview=False)
    assert last.samples is not None and same(last.samples, drawn)
    with pytest.raises(UserError, match="got 2 seeds, expected 3: one for each image"):
        pipe.sample(classes, seeds[:2])
    with pytest.raises(UserError, match="seed: got"):
        pipe.sample([0], [2**64])


def test_apart_pixels_follow_from_codes_alone(pipe: Pipeline, whole: Samples) -> None:
    apart = pipe.sample(CLASSES, SEED, decode_separately=True)
    assert same_but_rounding(apart, whole)
    for i, number in enumerate(CLASSES):
        alone = pipe.sample([number], SEED + i, decode_separately=True)
        assert (np.asarray(alone.images[0]) == np.asarray(apart.images[i])).all()
        given = pipe.sample([0], 0, codes=apart.codes[i], known=ALL, decode_separately=True)
        assert (np.asarray(given.images[0]) == np.asarray(apart.images[i])).all()


@pytest.mark.parametrize(
    "given", [{}, {"codes": OTHER_BL, "known": as_mask(0xF0F0_1234_0000_FFFF)}]
)
@pytest.mark.parametrize("at", [0, 1, 6, LENGTH - 1])
def test_images_that_are_not_wanted_leave_the_batch(
    pipe: Pipeline, steps: list[int], given: dict[str, Any], at: int
) -> None:
    expected = pipe.sample(CLASSES, SEED, **given)
    steps.clear()
    asked: list[int] = []
    rows: list[int] = []
    hook = pipe.coarse.head.register_forward_hook(lambda _, x, __: rows.append(len(x[0])))

    def wanted() -> list[int]:
        asked.append(1)
        return [0, 1, 2, 3] if len(asked) <= at else [1, 3]

    *_, last = pipe.stream(CLASSES, SEED, active=wanted, preview=False, **given)
    hook.remove()
    assert len(asked) == LENGTH
    assert last.numbers == (1, 3) and last.samples is not None
    assert torch.equal(last.samples.codes, expected.codes[[1, 3]])
    if not given:
        assert len(steps) == LENGTH  # none is taken again
        assert rows == [8] * at + [4] * (LENGTH - at)  # with guidance, two for each image


def test_nobody_wants_any(pipe: Pipeline, steps: list[int]) -> None:
    left = [3]

    def wanted() -> list[int]:
        left[0] -= 1
        return CLASSES if left[0] >= 0 else []

    before = caches()
    assert list(pipe.stream([0, 1, 2], SEED, active=wanted)) == []
    assert len(steps) == 3 and caches() == before


def test_previews_of_given_labels(pipe: Pipeline, whole: Samples) -> None:
    events = list(pipe.stream(CLASSES, SEED))
    for event in events[:-1]:
        shown = pipe.preview(event.coarse)
        assert (pixels(shown) == pixels(event.images)).all()
    kept = pipe.preview(whole.coarse[:, :3], codes=whole.codes, known=ALL, resize=20)
    assert (pixels(kept) == pixels(pipe.sample(CLASSES, SEED, resize=20).images)).all()
    for labels, message in (
        (whole.coarse[0], "coarse: got shape (16,), expected (B, T) with 1 to 16 labels"),
        (whole.coarse[:, :0], "coarse: got shape (4, 0)"),
        (whole.coarse.float(), "coarse: got torch.float32, expected integers"),
        (whole.coarse + 8, "expected 0 to 7"),
    ):
        with pytest.raises(UserError) as caught:
            pipe.preview(labels)
        assert message in str(caught.value)


# --- inside a cluster -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{}, {"fine_temperature": 0.5}, {"fine_guidance": 3.0}, {"fine_top_k": 2}, {"fine_top_p": 0.5}],
)
def test_members_are_as_likely_as_they_are_drawn(
    pipe: Pipeline, whole: Samples, given: dict[str, Any]
) -> None:
    labels_L, count = whole.coarse[0], 600
    drawn_NL = pipe.refine([CLASSES[0]] * count, labels_L, 0, **given).codes
    for position in (0, 5, LENGTH - 1):
        found = pipe.members(CLASSES[0], labels_L, position, **given)
        assert found.cluster == int(labels_L[position])
        members = pipe.clusters.members_KS[found.cluster]
        assert sorted(found.codes.tolist()) == [code for code in members.tolist() if code >= 0]
        chances = found.probabilities.tolist()
        assert chances == sorted(chances, reverse=True) and sum(chances) == pytest.approx(1)
        for code, chance in zip(found.codes.tolist(), chances, strict=True):
            share = float((drawn_NL[:, position] == code).double().mean())
            assert abs(share - chance) <= 5 * (chance * (1 - chance) / count) ** 0.5


def test_members_of_other_models(pipe: Pipeline, baseline: Pipeline, whole: Samples) -> None:
    labels_L = torch.arange(LENGTH)
    alone = baseline.members("red", labels_L, 3)
    assert (alone.cluster, alone.codes.tolist(), alone.probabilities.tolist()) == (3, [3], [1.0])
    assert pipe.fine is not None
    model = FineModel(pipe.fine.config, pipe.clusters, "full").eval().requires_grad_(False)
    free = dataclasses.replace(pipe, fine=model)  # which knows nothing: all codes are as likely
    found = free.members(0, whole.coarse[0], 3)
    assert found.probabilities.tolist() == pytest.approx([1 / 64] * len(found.codes))
    for asked, message in (
        ((0, whole.coarse[0], 16), "position: got 16, expected 0 to 15"),
        ((0, whole.coarse[0], -1), "position: got -1"),
        ((0, whole.coarse[0, :5], 0), "coarse: got shape (5,)"),
        (("violet", whole.coarse[0], 0), "unknown class 'violet'"),
    ):
        with pytest.raises(UserError) as caught:
            pipe.members(*asked)  # type: ignore[arg-type]
        assert message in str(caught.value)


# --- what is kept ---------------------------------------------------------------------------------


@given(masks)
@settings(max_examples=25, deadline=None)
def test_kept_codes_stay_to_the_last(pipe: Pipeline, keep_BL: Tensor) -> None:
    drawn = pipe.sample(CLASSES, SEED, codes=OTHER_BL, known=keep_BL)
    assert torch.equal(drawn.codes[keep_BL], OTHER_BL[keep_BL])
    assert torch.equal(drawn.coarse, pipe.clusters.labels_V[drawn.codes])
    # What is not kept says nothing, and need not even be a code.
    other = pipe.sample(CLASSES, SEED, codes=OTHER_BL.masked_fill(~keep_BL, -1), known=keep_BL)
    assert same(drawn, other)


@given(masks)
@settings(max_examples=25, deadline=None)
def test_an_image_around_its_own_codes_is_itself(
    pipe: Pipeline, whole: Samples, keep_BL: Tensor
) -> None:
    """Each position has its own random numbers, whatever is kept before it."""
    again = pipe.sample(CLASSES, SEED, codes=whole.codes, known=keep_BL)
    assert same_but_rounding(again, whole)


@given(masks)
@settings(max_examples=10, deadline=None)
def test_an_image_with_kept_codes_is_the_same_in_any_batch(pipe: Pipeline, keep_BL: Tensor) -> None:
    together = pipe.sample(CLASSES, SEED, codes=OTHER_BL, known=keep_BL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "BATCH_SIZE", 3)
        in_batches = pipe.sample(CLASSES, SEED, codes=OTHER_BL, known=keep_BL)
    assert same_but_rounding(together, in_batches)
    for i, number in enumerate(CLASSES):
        alone = pipe.sample([number], SEED + i, codes=OTHER_BL[i : i + 1], known=keep_BL[i])
        assert torch.equal(alone.codes[0], together.codes[i])


def test_all_or_nothing_kept(
    pipe: Pipeline, baseline: Pipeline, whole: Samples, steps: list[int]
) -> None:
    assert same(pipe.sample(CLASSES, SEED, codes=OTHER_BL, known=~ALL), whole)
    assert len(steps) == LENGTH
    for drawing in (pipe, baseline):
        drawn = drawing.sample(CLASSES, SEED, codes=OTHER_BL, known=ALL)
        assert torch.equal(drawn.codes, OTHER_BL)
        assert torch.equal(drawn.coarse, drawing.clusters.labels_V[OTHER_BL])
    assert len(steps) == LENGTH


def test_one_upper_half_completed_in_many_ways(pipe: Pipeline, steps: list[int]) -> None:
    """Masks and codes for all images, in every shape and type that is as good as another."""
    drawn = pipe.sample(["red"] * 8, SEED, codes=OTHER_BL[0], known=UPPER)
    assert len(steps) == LENGTH // 2
    assert bool((drawn.codes[:, UPPER] == OTHER_BL[0, UPPER]).all())
    assert len(drawn.codes.unique(dim=0)) > 1
    for codes, known in (
        (OTHER_BL[:1], UPPER[None]),
        (OTHER_BL[0].byte(), UPPER.expand(8, -1)),
        (OTHER_BL[:1].to(torch.uint16).expand(8, -1), UPPER[None]),
    ):
        assert same(pipe.sample(["red"] * 8, SEED, codes=codes, known=known), drawn)
    other = pipe.sample(["red"] * 8, SEED + 100, codes=OTHER_BL[0], known=UPPER)
    assert torch.equal(other.codes[:, UPPER], drawn.codes[:, UPPER])
    assert not torch.equal(other.codes, drawn.codes)


def test_codes_stay_where_the_fine_model_chooses_among_all(pipe: Pipeline) -> None:
    assert pipe.fine is not None
    model = FineModel(pipe.fine.config, pipe.clusters, "full").eval().requires_grad_(False)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    free = dataclasses.replace(pipe, fine=model)
    drawn = free.sample(CLASSES, SEED, codes=OTHER_BL, known=UPPER)
    labels = pipe.clusters.labels_V[drawn.codes]
    assert torch.equal(drawn.codes[:, UPPER], OTHER_BL[:, UPPER])
    assert torch.equal(drawn.coarse[:, UPPER], labels[:, UPPER])
    assert not torch.equal(drawn.coarse, labels)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"codes": OTHER_BL}, "codes and known: got one of them, expected both or neither"),
        ({"known": UPPER}, "codes and known: got one of them"),
        ({"codes": OTHER_BL, "known": UPPER.long()}, "known: got torch.int64, expected torch.bool"),
        (
            {"codes": OTHER_BL.float(), "known": UPPER},
            "codes: got torch.float32, expected integers",
        ),
        ({"codes": UPPER, "known": UPPER}, "codes: got torch.bool, expected integers"),
        (
            {"codes": OTHER_BL[:2], "known": UPPER},
            "codes: got shape (2, 16), expected (4, 16), or (16,) for all images",
        ),
        ({"codes": OTHER_BL[:, :15], "known": UPPER}, "codes: got shape (4, 15)"),
        ({"codes": OTHER_BL.view(4, 4, 4), "known": UPPER}, "codes: got shape (4, 4, 4)"),
        (
            {"codes": OTHER_BL, "known": UPPER[None, :1]},
            "known: got shape (1, 1), expected (4, 16)",
        ),
        ({"codes": OTHER_BL + 1, "known": ALL}, "codes: got 1 to 64, expected 0 to 63"),
        ({"codes": OTHER_BL - 1, "known": ALL}, "codes: got -1 to 62, expected 0 to 63"),
    ],
)
def test_mistakes_in_what_is_kept(pipe: Pipeline, given: dict[str, Any], message: str) -> None:
    for draw in (pipe.sample, pipe.stream):
        with pytest.raises(UserError) as caught:
            draw(CLASSES, SEED, **given)
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


# --- details again --------------------------------------------------------------------------------


def test_refined_with_the_same_seed_is_the_same(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    given = {"guidance": 3.0, "fine_guidance": 2.0, "fine_top_p": 0.9}
    drawn = pipe.sample(CLASSES, SEED, resize=20, **given)
    steps.clear()
    assert same(pipe.refine(CLASSES, drawn.coarse, SEED, resize=20, **given), drawn)
    # The coarse stage is over: its settings change nothing.
    assert same(pipe.refine(CLASSES, drawn.coarse, SEED, resize=20, **{**given, "top_k": 1}), drawn)
    monkeypatch.setattr(generation, "BATCH_SIZE", 3)
    reported: list[tuple[int, int]] = []
    again = pipe.refine(
        CLASSES, drawn.coarse, SEED, resize=20, progress=lambda *n: reported.append(n), **given
    )
    assert same_but_rounding(again, drawn)
    assert reported == [(3, 4), (4, 4)]
    assert steps == []


def test_refined_with_another_seed_has_other_details(pipe: Pipeline, whole: Samples) -> None:
    other = pipe.refine(CLASSES, whole.coarse, SEED + 100)
    assert torch.equal(other.coarse, whole.coarse)
    assert torch.equal(pipe.clusters.labels_V[other.codes], whole.coarse)
    assert not torch.equal(other.codes, whole.codes)
    many = pipe.refine(["green"] * 5, whole.coarse[1].int(), SEED)
    assert torch.equal(many.coarse, whole.coarse[1].expand(5, -1))
    assert len(many.codes.unique(dim=0)) > 1
    greedy = pipe.refine(["green"] * 5, whole.coarse[1:2], SEED, fine_top_k=1)
    assert len(greedy.codes.unique(dim=0)) == 1


def test_the_baseline_has_no_details_to_draw(baseline: Pipeline) -> None:
    drawn = baseline.sample(CLASSES, SEED)
    assert same(baseline.refine(CLASSES, drawn.coarse, SEED + 100), drawn)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, LENGTH), "coarse: got torch.float32, expected integers"),
        (torch.zeros(3, LENGTH).long(), "coarse: got shape (3, 16), expected (4, 16)"),
        (torch.full((LENGTH,), 8), "coarse: got 8 to 8, expected 0 to 7"),
        (torch.full((LENGTH,), -1), "coarse: got -1 to -1, expected 0 to 7"),
    ],
)
def test_mistakes_in_labels(pipe: Pipeline, labels: Tensor, message: str) -> None:
    with pytest.raises(UserError) as caught:
        pipe.refine(CLASSES, labels)
    assert message in str(caught.value)


# --- pictures to codes ----------------------------------------------------------------------------


def test_pictures_are_encoded_as_those_of_the_training(
    pipe: Pipeline, splits: Splits, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (splits.train, splits.val)
    crops = [image for part in sets for image in part.read(np.arange(len(part)))]
    expected = pipe.encode([Image.fromarray(image) for image in crops])
    assert expected.shape == (24, LENGTH) and expected.dtype == torch.int64
    assert not expected.is_inference()
    as_tensor = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(expected, pipe.tokenizer.encode(as_tensor))
    # From the files: of every mode, not yet square, some to be turned, some transparent.
    files = sorted(path for path in image_folder.rglob("*") if path.is_file())
    opened = [Image.open(path) for path in files]
    assert {image.mode for image in opened} >= {"RGB", "RGBA", "CMYK"}
    from_files = pipe.encode(opened)
    rows = {tuple(row) for row in expected.tolist()}
    assert {tuple(row) for row in from_files.tolist()} == rows
    monkeypatch.setattr(generation, "BATCH_SIZE", 7)
    assert torch.equal(pipe.encode(opened), from_files)


def test_no_pictures(pipe: Pipeline) -> None:
    with pytest.raises(UserError, match="got 0 images to encode, expected 1 or more"):
        pipe.encode([])


# --- on the command line --------------------------------------------------------------------------


def test_guidance_of_some_steps_on_the_command_line(
    ctf: Command, run: Path, tmp_path: Path
) -> None:
    pipe = Pipeline.from_pretrained(run)
    given = ["--guidance-window", "0.25", "0.75", "--guidance-schedule", "linear"]
    out = tmp_path / "drawn"
    drawn = ctf("sample", run, "--count", 1, "--guidance", 4, *given, "--out", out)
    assert drawn.code == 0, drawn.err
    expected = pipe.sample(
        [0, 1, 2], guidance=4.0, guidance_window=(0.25, 0.75), guidance_schedule="linear"
    )
    with np.load(out / "codes.npz") as codes:
        assert (codes["codes"] == expected.codes.numpy()).all()
    stored = json.loads((out / "settings.json").read_text())["sampling"]
    assert stored["guidance_window"] == [0.25, 0.75]
    assert stored["guidance_schedule"] == "linear"
    again = pipe.sample([0, 1, 2], **stored)  # as they are in JSON
    assert same(again, expected)


def test_settings_draw_a_folder_again(ctf: Command, run: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    given = ["--classes", "red,0", "--count", "2", "--seed", "5", "--guidance", "3"]
    assert ctf("sample", run, *given, "--out", one).code == 0
    dry = ctf("sample", run, "--settings", one / "settings.json", "--out", other, "--dry-run")
    assert dry.code == 0 and "would sample " in dry.out and not other.exists()
    again = ctf("sample", run, "--settings", one / "settings.json", "--out", other)
    assert again.code == 0, again.err
    assert (one / "settings.json").read_bytes() == (other / "settings.json").read_bytes()
    with np.load(one / "codes.npz") as first, np.load(other / "codes.npz") as second:
        assert all((first[name] == second[name]).all() for name in first.files)
    sheet = tmp_path / "sheet.png"
    assert ctf("sample", run, "--settings", one / "settings.json", "--out", sheet).code == 0
    assert Image.open(sheet).width > 2 * 32


def test_mistakes_in_settings(ctf: Command, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    good = {"classes": [0], "count": 1, "seed": 0, "sampling": {}}

    def refused(words: str, *arguments: str | Path, **changed: Any) -> None:
        path.write_text(json.dumps({**good, **changed}))
        result = ctf("sample", *arguments, "--settings", path, "--out", tmp_path / "out.png")
        assert result.code == 2 and words in result.err, result
        assert len(result.err.splitlines()) <= 2 and "Traceback" not in result.err
        assert not (tmp_path / "out.png").exists()

    refused("names no model, expected e.g.")
    refused("sampled from another pipeline", run, weights="0" * 64)
    refused("remove --guidance", run, "--guidance", "2")
    refused("remove --seed", run, "--seed", "2")
    refused("unknown key 'sed'", run, sed=1)
    refused("no pipeline 'nowhere'", model="nowhere")
    refused("class 5 of 3", run, classes=[5])
    refused("count is 0", run, count=0)
    refused("got coarse and codes", run, coarse=[0] * LENGTH, codes=[0] * LENGTH)
    refused("expected both or neither", run, codes=[0] * LENGTH)
    refused("coarse: got shape (3,)", run, coarse=[0] * 3)
    refused("whole numbers of 64 bits", run, coarse=[2**64] * LENGTH)
    result = ctf("sample")
    assert result.code == 2 and "got no model" in result.err
