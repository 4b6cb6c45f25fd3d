"""The coarse stage: windows of any size sample what sampling one by one does."""

import copy
import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from ctf.models.coarse import CoarseModel
from ctf.models.drafts import Drafts
from ctf.models.noise import gumbel_noise, noise_keys
from ctf.models.parallel import CoarseSampler, sample_coarse
from ctf.models.sampling import Sampling, apply_guidance, sample_logits
from ctf.models.transformer import KVCache
from tests.models.sampling_cases import (
    CLASSES_B,
    CLUSTERS,
    CONFIG,
    SEEDS,
    SETTINGS,
    WINDOWS,
    L,
    make_coarse,
    plain_coarse,
    randomise,
    recorded,
)


@pytest.fixture(scope="module")
def coarse() -> CoarseModel:
    return make_coarse()


# --- One by one ---


@pytest.mark.parametrize(
    "settings", [*SETTINGS, Sampling(top_k=1), Sampling(1.0, top_k=1), *WINDOWS]
)
def test_coarse_sampling_against_its_definition(coarse, settings):
    keys_BL = noise_keys(SEEDS, L)[:, 0]
    expected = plain_coarse(coarse, keys_BL, settings)
    assert torch.equal(sample_coarse(coarse, CLASSES_B, keys_BL, settings), expected)
    if settings.top_k != 1:
        whole = dataclasses.replace(
            settings, guidance_schedule="constant", guidance_window=(0.0, 1.0)
        )
        assert settings == whole or not torch.equal(
            sample_coarse(coarse, CLASSES_B, keys_BL, whole), expected
        )


@torch.inference_mode()
def cached_coarse(model: CoarseModel, keys_BL: Tensor, settings: Sampling) -> Tensor:
    """Full guidance with a cache and nothing else."""
    classes = torch.cat([CLASSES_B, torch.full_like(CLASSES_B, model.no_class)])
    cache = KVCache(CONFIG, len(classes), torch.device("cpu"), torch.float32)
    labels_BL = torch.zeros(keys_BL.shape, dtype=torch.int64)
    inputs = classes
    for position in range(L):
        cond, uncond = model.step(inputs[:, None], position, cache).chunk(2)
        logits = apply_guidance(cond, uncond, settings.guidance)
        labels_BL[:, position] = sample_logits(
            logits,
            gumbel_noise(keys_BL[:, position], CLUSTERS.count),
            settings.temperature,
            settings.top_k,
            settings.top_p,
        )
        inputs = labels_BL[:, position].repeat(2)
    return labels_BL


@pytest.mark.parametrize("guidance", [0.1, 1.1, 2.0])
def test_full_guidance_is_the_plain_loop_to_the_bit(coarse, guidance):
    keys_BL = noise_keys(SEEDS, L)[:, 0]
    settings = Sampling(guidance=guidance)
    with recorded(coarse) as (_, plain):
        expected = cached_coarse(coarse, keys_BL, settings)
    with recorded(coarse) as (_, logits):
        got = sample_coarse(coarse, CLASSES_B, keys_BL, settings)
    assert torch.equal(got, expected)
    assert len(plain) == len(logits) == L
    assert all(torch.equal(one, other[:, 0]) for one, other in zip(plain, logits, strict=True))


ONE, BOTH = (5, 1), (10, 1)  # a step of the batch, and of the batch with and without classes


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Sampling(), [BOTH] * L),
        (Sampling(guidance=1.0), [ONE] * L),
        (Sampling(guidance=1.0, guidance_schedule="linear"), [ONE] * L),
        (Sampling(guidance_window=(0.0, 0.5)), [BOTH] * 8 + [ONE] * 8),
        # What has no class catches up in one pass, over the class token and 8 labels.
        (Sampling(guidance_window=(0.5, 1.0)), [ONE] * 9 + [(5, 9)] + [BOTH] * 7),
        (Sampling(guidance_window=(0.25, 0.5)), [ONE] * 5 + [(5, 5)] + [BOTH] * 3 + [ONE] * 8),
        (Sampling(guidance_schedule="cosine"), [ONE] * 2 + [(5, 2)] + [BOTH] * 14),
    ],
)
def test_nothing_unconditional_is_computed_that_is_not_needed(coarse, settings, expected):
    with recorded(coarse) as (shapes, logits):
        sample_coarse(coarse, CLASSES_B, noise_keys(SEEDS, L)[:, 0], settings)
    assert shapes == expected
    assert [len(logits_BK) for logits_BK in logits] == [batch for batch, _ in expected]


def test_each_pass_makes_the_next_labels_certain(coarse):
    keys_BL = noise_keys(SEEDS, L)[:, 0]
    expected = sample_coarse(coarse, CLASSES_B, keys_BL, Sampling())
    with recorded(coarse) as (_, logits):
        sampler = CoarseSampler(coarse, CLASSES_B, keys_BL, Sampling())
        assert len(logits) == 0 and sampler.labels_BT.shape == (5, 0)
        for count in range(1, L + 1):
            assert not sampler.done and sampler.advance() == [1] * 5
            assert torch.equal(sampler.labels_BT, expected[:, :count])
            assert len(logits) == count and sampler.passes == [count] * 5
            assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert sampler.done


# --- Known labels ---


masks = st.integers(0, 2 ** (5 * L) - 1).map(
    lambda bits: torch.tensor([bits >> i & 1 for i in range(5 * L)], dtype=torch.bool).view(5, L)
)
FORCED_BL = torch.arange(5 * L).view(5, L) * 3 % CLUSTERS.count


@given(masks, st.sampled_from([SETTINGS[1], Sampling(1.0), WINDOWS[1], WINDOWS[2]]))
@examples(max_examples=25)
def test_sampling_around_known_labels_against_its_definition(coarse, known_BL, settings):
    keys_BL = noise_keys(SEEDS, L)[:, 0]
    kept_BL = FORCED_BL.masked_fill(~known_BL, -1)
    before = kept_BL.clone()
    got = sample_coarse(coarse, CLASSES_B, keys_BL, settings, kept_BL)
    assert torch.equal(got, plain_coarse(coarse, keys_BL, settings, kept_BL))
    assert torch.equal(kept_BL, before)


@given(st.integers(0, 2**L - 1), st.sampled_from([SETTINGS[1], Sampling(1.0), WINDOWS[2]]))
@examples(max_examples=40)
def test_positions_that_all_images_keep_take_no_step(coarse, bits, settings):
    known_L = torch.tensor([bits >> i & 1 for i in range(L)], dtype=torch.bool)
    keys_BL = noise_keys(SEEDS, L)[:, 0]
    kept_BL = FORCED_BL.masked_fill(~known_L, -1)
    with recorded(coarse) as (shapes, logits):
        got = sample_coarse(coarse, CLASSES_B, keys_BL, settings, kept_BL)
    assert torch.equal(got, plain_coarse(coarse, keys_BL, settings, kept_BL))
    assert 0 <= len(logits) - int((~known_L).sum()) <= 1  # one step may take two passes
    # No position is computed twice, and none after the last that is sampled.
    images = sum(batch * positions for batch, positions in shapes)
    sampled = (~known_L).nonzero()[:, 0].tolist()
    assert images <= 10 * (sampled[-1] + 1 if sampled else 0)


def test_a_known_half_takes_one_pass(coarse):
    keys_BL = noise_keys(SEEDS, L)[:, 0]
    for known_L, expected in (
        (torch.arange(L) < 8, [(10, 9)] + [BOTH] * 7),
        (torch.arange(L) >= 8, [BOTH] * 8),
        (torch.ones(L, dtype=torch.bool), []),
    ):
        with recorded(coarse) as (shapes, _):
            kept_BL = FORCED_BL.masked_fill(~known_L, -1)
            sample_coarse(coarse, CLASSES_B, keys_BL, Sampling(), kept_BL)
        assert shapes == expected


# --- Windows --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact() -> CoarseModel:
    """In float64: no rounding is near the difference of two sums of logit and noise."""
    return make_coarse().double()


@pytest.fixture(scope="module")
def drafted(exact: CoarseModel) -> CoarseModel:
    """The same with drafts of no meaning."""
    model, k = copy.deepcopy(exact), exact.vocab_size
    generator = torch.Generator().manual_seed(1)
    rows = {"left": k + 1, "above": k + 1, "position": L}
    tables = {name: torch.randn(count, k, generator=generator) for name, count in rows.items()}
    model.drafts = Drafts(tables)
    return model


KEYS_BL = noise_keys(SEEDS, L)[:, 0]
EVERY = [*SETTINGS, *WINDOWS, Sampling(1.0, top_k=1), Sampling(top_k=2, temperature=0.7)]


@given(
    st.sampled_from([1, 2, 3, 5, 7, L, L + 3]),
    st.sampled_from(EVERY),
    st.sets(st.integers(0, 4), min_size=1),
    st.none() | masks,
    st.booleans(),
)
@examples(max_examples=30)
def test_windows_sample_the_labels_of_one_by_one(
    exact, drafted, window, settings, images, known_BL, with_drafts
):
    """Of any size, with all settings, in any batch, around known labels, whatever the drafts."""
    kept_BL = None if known_BL is None else FORCED_BL.masked_fill(~known_BL, -1)
    expected_BL = plain_coarse(exact, KEYS_BL, settings, kept_BL)
    rows = sorted(images)
    got_BL = sample_coarse(
        drafted if with_drafts else exact, CLASSES_B[rows], KEYS_BL[rows], settings,
        None if kept_BL is None else kept_BL[rows], window,
    )  # fmt: skip
    assert torch.equal(got_BL, expected_BL[rows])


@given(
    st.lists(st.integers(1, L), min_size=1, max_size=8),
    st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=4), max_size=3),
    st.sampled_from(EVERY),
    st.none() | masks,
    st.booleans(),
)
@examples(max_examples=20)
def test_windows_may_change_and_images_may_leave_at_any_pass(
    exact, drafted, windows, leaving, settings, known_BL, with_drafts
):
    kept_BL = None if known_BL is None else FORCED_BL.masked_fill(~known_BL, -1)
    expected_BL = plain_coarse(exact, KEYS_BL, settings, kept_BL)
    model = drafted if with_drafts else exact
    sampler = CoarseSampler(model, CLASSES_B, KEYS_BL, settings, kept_BL)
    images, taken = list(range(5)), 0
    while not sampler.done:
        stay = leaving[taken] if taken < len(leaving) else set(range(5))
        rows = [row for row, image in enumerate(images) if image in stay]
        if rows and len(rows) < len(images):
            images = [images[row] for row in rows]
            sampler.select(rows)
        before = list(sampler.certain)
        new = sampler.advance(windows[taken % len(windows)])
        assert sampler.certain == [b + n for b, n in zip(before, new, strict=True)]
        assert all(n >= 1 for n, b in zip(new, before, strict=True) if b < L)
        done = sampler.labels_BT.shape[1]
        assert done == min(sampler.certain)
        assert torch.equal(sampler.labels_BT, expected_BL[images, :done])
        taken += 1
    assert torch.equal(sampler.labels_BT, expected_BL[images])


@pytest.mark.parametrize(("window", "passes"), [(1, L), (3, 6), (4, 4), (L, 1)])
def test_right_guesses_need_no_pass_of_their_own(window, passes):
    constant = make_coarse()
    constant.head.weight.data.zero_()
    sampler = CoarseSampler(constant, CLASSES_B, KEYS_BL, Sampling(top_k=1))
    while not sampler.done:
        sampler.advance(window)
    assert sampler.passes == [passes] * 5 and not sampler.labels_BT.any()


@pytest.mark.parametrize("settings", [Sampling(), Sampling(temperature=0.5), Sampling(top_k=1)])
@pytest.mark.parametrize(("window", "passes"), [(3, 6), (4, 4), (L, 1)])
def test_drafts_with_the_scores_of_the_model_are_always_right(settings, window, passes):
    """They have the same noise."""
    constant, k = make_coarse(), CLUSTERS.count
    constant.head.weight.data.zero_()
    zeros = {"left": torch.zeros(k + 1, k), "above": torch.zeros(k + 1, k)}
    constant.drafts = Drafts({**zeros, "position": torch.zeros(L, k)})
    sampler = CoarseSampler(constant, CLASSES_B, KEYS_BL, settings)
    while not sampler.done:
        sampler.advance(window)
    assert sampler.passes == [passes] * 5
    assert settings.top_k == 1 or len(sampler.labels_BT.unique()) == k


@pytest.mark.parametrize("position", [0, 1, 4, 6])
def test_drafts_are_of_the_labels_left_and_above(position):
    """Greedily, tables decide: here the label is what a table has for the one next to it."""
    constant, k = make_coarse(), CLUSTERS.count
    constant.head.weight.data.zero_()
    left_KK, above_KK = torch.zeros(k + 1, k), torch.zeros(k + 1, k)
    left_KK[torch.arange(k + 1), torch.arange(1, k + 2) % k] = 1  # one more; none is k, so 1
    above_KK[torch.arange(k + 1), torch.arange(2, k + 3) % k] = 2  # two more; none is 2
    constant.drafts = Drafts({"left": left_KK, "above": above_KK, "position": torch.zeros(L, k)})
    known_BL = torch.full((5, L), -1)
    known_BL[:, :position] = FORCED_BL[:, :position]
    sampler = CoarseSampler(constant, CLASSES_B, KEYS_BL, Sampling(top_k=1), known_BL)
    sampler.advance(2)
    grid = CONFIG.grid
    for image in range(5):
        above = int(FORCED_BL[image, position - grid]) if position >= grid else k
        expected = (above + 2) % k
        # The pass computes label 0, so the draft was right where it says so as well.
        assert sampler.certain[image] == position + (2 if expected == 0 else 1)


def test_passes_are_counted_for_each_image(exact):
    sampler = CoarseSampler(exact, CLASSES_B, KEYS_BL, Sampling())
    alone = []
    for row in range(5):
        one = CoarseSampler(exact, CLASSES_B[row : row + 1], KEYS_BL[row : row + 1], Sampling())
        while not one.done:
            one.advance(4)
        alone += one.passes
    while not sampler.done:
        sampler.advance(4)
    assert sampler.passes == alone and len(set(alone)) > 1
    assert all(L / 4 <= passes < L for passes in alone)


def test_a_window_takes_a_pass_over_as_many_positions(exact):
    with recorded(exact) as (shapes, logits):
        sampler = CoarseSampler(exact, CLASSES_B, KEYS_BL, Sampling())
        while not sampler.done:
            sampler.advance(4)
    # Once some images are done, there are fewer.
    batches = [batch for batch, positions in shapes if positions == 4]
    assert len(batches) == len(shapes) == max(sampler.passes) and batches[0] == 10
    assert batches == sorted(batches, reverse=True) and {*batches} <= {10, 8, 6, 4, 2}
    assert [tuple(each.shape) for each in logits] == [(b, 4, CLUSTERS.count) for b in batches]


def test_images_that_are_done_are_computed_no_more(exact):
    known_BL = torch.full((5, L), -1)
    known_BL[:3, 2:] = FORCED_BL[:3, 2:]  # three images have two labels to sample
    with recorded(exact) as (shapes, _):
        got_BL = sample_coarse(exact, CLASSES_B, KEYS_BL, Sampling(), known_BL)
    assert shapes == [BOTH] * 2 + [(4, 1)] * (L - 2)
    assert torch.equal(got_BL, plain_coarse(exact, KEYS_BL, Sampling(), known_BL))
    fixed = copy.deepcopy(exact)
    fixed.backbone.fixed_batch = True  # as where each size of a batch is compiled
    with recorded(fixed) as (shapes, _):
        assert torch.equal(sample_coarse(fixed, CLASSES_B, KEYS_BL, Sampling(), known_BL), got_BL)
    assert shapes == [BOTH] * L


def test_rows_of_a_pass_are_images_and_halves_of_guidance(exact):
    sampler = CoarseSampler(exact, CLASSES_B, KEYS_BL, Sampling(guidance_window=(0.5, 1.0)))
    rows = []
    while not sampler.done:
        rows.append(sampler.rows)
        sampler.advance()
    assert rows == [5] * 8 + [10] * 8


def test_windows_compute_nothing_unconditional_that_is_not_needed(exact):
    settings = Sampling(guidance_window=(0.0, 0.25))
    with recorded(exact) as (shapes, _):
        sampler = CoarseSampler(exact, CLASSES_B[:1], KEYS_BL[:1], settings)
        while sampler.certain[0] < 4:
            sampler.advance(2)
        guided = len(shapes)
        while not sampler.done:
            sampler.advance(2)
    assert set(shapes[:guided]) == {(2, 2)} and set(shapes[guided:]) == {(1, 2)}


@pytest.mark.parametrize("window", [1, 3, 4])
def test_frequencies_follow_the_joint_distribution(window):
    """Of all 81 images of a small model, each with the product of its conditional probabilities."""
    config = dataclasses.replace(CONFIG, grid=2, layers=1)
    model = CoarseModel(config, 3).eval().double()
    randomise(model)
    model.head.weight.data.mul_(0.1)  # so that no image is rare
    settings, count = Sampling(guidance=1.5, temperature=0.8), 4000
    images_NL = torch.cartesian_prod(*[torch.arange(3)] * 4)
    one = torch.ones(81, dtype=torch.int64)
    with torch.no_grad():
        cond, uncond = model(images_NL, one), model(images_NL, model.no_class * one)
    logp_NLK = (apply_guidance(cond, uncond, 1.5) / 0.8).log_softmax(-1)
    probabilities_N = logp_NLK.gather(-1, images_NL[..., None]).sum((1, 2)).exp().numpy()
    assert probabilities_N.sum() == pytest.approx(1) and probabilities_N.min() * count > 5
    keys_BL = noise_keys(range(count), 4)[:, 0]
    labels_BL = sample_coarse(model, one[:1].expand(count), keys_BL, settings, None, window)
    numbers_B = (labels_BL * torch.tensor([27, 9, 3, 1])).sum(1)
    frequencies = np.bincount(numbers_B.numpy(), minlength=81)
    assert scipy.stats.chisquare(frequencies, count * probabilities_N).pvalue > 0.01
