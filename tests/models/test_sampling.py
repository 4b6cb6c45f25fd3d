import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ctf.common.errors import UserError
from ctf.models import clusters as clustering
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.noise import gumbel_noise, noise_keys
from ctf.models.parallel import sample_coarse
from ctf.models.sampling import (
    Sampling,
    apply_guidance,
    filter_logits,
    format_settings,
    guidance_scales,
    nearest_to_mean,
    sample_fine,
    sample_logits,
    top_k_filter,
    top_p_filter,
)
from tests.models.sampling_cases import (
    CLASSES_B,
    CLUSTERS,
    CONFIG,
    LABELS_V,
    SEEDS,
    SETTINGS,
    L,
    make_coarse,
    make_fine,
    randomise,
    recorded,
)


@pytest.fixture(scope="module")
def coarse() -> CoarseModel:
    return make_coarse()


@pytest.fixture(scope="module")
def fine() -> FineModel:
    return make_fine()


@pytest.mark.parametrize("stage", ["", "fine_"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance", float("nan")),
        ("guidance", float("inf")),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(stage, name, value):
    with pytest.raises(UserError, match=f"{stage}{name}: got {value}"):
        Sampling(**{f"{stage}{name}": value})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"guidance_schedule": "cosin"}, "got 'cosin': did you mean 'cosine'"),
        ({"guidance_schedule": 2}, "got 2: "),
        *(
            ({"guidance_window": window}, r"got .*, expected 0 <= start < stop <= 1")
            for window in [(0.5, 0.5), (0.6, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.0, float("nan")),
                           (0.5,), (0.0, 0.5, 1.0), 0.5]
        ),
    ],
)  # fmt: skip
def test_unknown_schedules_and_windows_are_refused(setting: dict[str, Any], message: str) -> None:
    (name,) = setting
    with pytest.raises(UserError, match=f"{name}: {message}"):
        Sampling(**setting)


def test_settings_in_words():
    chosen = Sampling(guidance=1.5, top_k=3, guidance_schedule="linear", guidance_window=(0.25, 1))
    assert format_settings(dataclasses.asdict(chosen)) == (
        "guidance 1.5, fine_guidance 1, temperature 1, fine_temperature 1, top_k 3, fine_top_k 0, "
        "top_p 1, fine_top_p 1, guidance_schedule linear, guidance_window 0.25 to 1, "
        "fine_choice sample"
    )
    from_json = {"guidance_window": [0.5, 1.0]}
    assert format_settings(from_json) == "guidance_window 0.5 to 1"


# Guidance over the steps


def test_schedules_in_closed_form():
    def scales(name: Any) -> list[float]:
        return guidance_scales(Sampling(guidance=3.0, guidance_schedule=name), 5)

    assert scales("constant") == [3.0] * 5
    assert scales("linear") == [1.0, 1.5, 2.0, 2.5, 3.0]
    half = math.sqrt(0.5)
    assert scales("cosine") == pytest.approx([1.0, 2 - half, 2.0, 2 + half, 3.0], abs=1e-12)


@given(
    st.floats(-10, 10),
    st.sampled_from(["constant", "linear", "cosine"]),
    st.tuples(st.integers(0, 7), st.integers(1, 8)).filter(lambda w: w[0] < w[1]),
    st.sampled_from([1, 2, 5, 8, 16, 256]),
)
def test_a_window_leaves_the_schedule_as_it_is(g, schedule, eighths, length):
    whole = Sampling(guidance=g, guidance_schedule=schedule)
    start, stop = (e / 8 for e in eighths)
    window = dataclasses.replace(whole, guidance_window=(start, stop))
    every = guidance_scales(whole, length)
    for step, scale in enumerate(guidance_scales(window, length)):
        within = start * length <= step < stop * length
        assert scale == (every[step] if within else 1.0)
    # To the bit: anything else would compute what is not needed, or change what is sampled.
    if g == 1:
        assert every == [1.0] * length
    if schedule == "constant":
        assert every == [g] * length
    elif length > 1:
        assert (every[0], every[-1]) == (1.0, g)
        assert sorted(every, reverse=g < 1) == every


# Logits

# Few values, so that there are ties; -inf as the fine model's padding, but never everywhere.
rows = st.lists(
    st.sampled_from([-float("inf"), -2.0, -1.0, 0.0, 0.5, 1.5, 3.0]), min_size=1, max_size=8
).filter(lambda row: max(row) > -float("inf"))


def row_tensor(row: list[float]) -> Tensor:
    return torch.tensor([row], dtype=torch.float64)


def by_rank(row: list[float]) -> list[int]:
    """Places of a row, the largest first, equal ones in order."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def remaining(filtered_1K: Tensor) -> set[int]:
    return set(filtered_1K[0].isfinite().nonzero()[:, 0].tolist())


@given(rows, st.integers(0, 10))
def test_top_k_against_brute_force(row, k):
    expected = by_rank(row)[: k or len(row)]
    filtered = top_k_filter(row_tensor(row), k)
    assert remaining(filtered) == {i for i in expected if np.isfinite(row[i])}
    assert all(float(filtered[0, i]) == row[i] for i in remaining(filtered))


@given(rows, st.floats(0.01, 1.0))
def test_top_p_against_brute_force(row, p):
    weights = np.exp(np.array(row) - max(row))
    probabilities = weights / weights.sum()
    expected, total = set(), 0.0
    for i in by_rank(row):
        if abs(total - p) < 1e-9:
            return  # rounding decides
        if total < p and probabilities[i] > 0:
            expected.add(i)
        total += probabilities[i]
    filtered = top_p_filter(row_tensor(row), p)
    assert remaining(filtered) == expected
    assert all(float(filtered[0, i]) == row[i] for i in expected)


def test_filters_keep_the_first_of_many_equal_choices():
    row = torch.zeros(1, 4096, dtype=torch.float64)
    assert remaining(top_k_filter(row, 1024)) == set(range(1024))
    assert remaining(top_p_filter(row, 0.25)) == set(range(1024))


def test_guidance_in_closed_form():
    cond = torch.tensor([[1.0, 2.0, -torch.inf]])
    uncond = torch.tensor([[0.0, 4.0, -torch.inf]])
    for scale, expected in ((0, [0, 4]), (1, [1, 2]), (2, [2, 0]), (-1, [-1, 6])):
        assert apply_guidance(cond, uncond, scale).tolist() == [[*expected, -torch.inf]]
    assert apply_guidance(cond.bfloat16(), uncond.bfloat16(), 1.7).dtype == torch.float32


# Choices


def noise(count: int, choices: int) -> Tensor:
    """Noise of the first position of `count` images."""
    return gumbel_noise(noise_keys(range(count), 1)[:, 0, 0], choices)


@given(rows, st.integers(-(2**63), 2**63 - 1))
def test_nothing_masked_is_ever_sampled(row, key):
    noise_1K = gumbel_noise(torch.tensor([key]), len(row))
    assert np.isfinite(row[int(sample_logits(row_tensor(row), noise_1K, 1.0, 0, 1.0))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_over_seeds_follow_the_probabilities(dtype):
    logits_K = torch.tensor([1.0, 0.0, -torch.inf, -1.0, 2.0], dtype=dtype)
    count = 10_000
    sampled = sample_logits(logits_K.expand(count, -1), noise(count, 5), 1.0, 0, 1.0)
    expected = count * logits_K.double().softmax(-1)
    frequencies, real = sampled.bincount(minlength=5), expected > 0
    assert int(frequencies[~real].sum()) == 0
    assert scipy.stats.chisquare(frequencies[real].numpy(), expected[real].numpy()).pvalue > 0.01


def test_temperature_then_top_k_then_top_p():
    logits_K = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0], dtype=torch.float64)
    count = 10_000
    sampled = sample_logits(logits_K.expand(count, -1), noise(count, 5), 2.0, 4, 0.8)
    frequencies = sampled.bincount(minlength=5)
    # 0.455 and 0.276 of the first four make 0.73, so that a third is needed for 0.8.
    assert frequencies[3:].tolist() == [0, 0]
    three = np.exp([1.0, 0.5, 0.0])
    expected = count * three / three.sum()
    assert scipy.stats.chisquare(frequencies[:3].numpy(), expected).pvalue > 0.01


@given(rows, st.integers(-(2**63), 2**63 - 1), st.sampled_from([(1.0, 1), (5e-324, 0)]))
def test_greedy_is_the_first_largest(row, key, limits):
    temperature, top_k = limits
    noise_1K = gumbel_noise(torch.tensor([key]), len(row))
    choice = int(sample_logits(row_tensor(row), noise_1K, temperature, top_k, 1.0))
    if top_k == 1:
        assert choice == row.index(max(row))
    assert row[choice] == max(row)


# Images


def sample(
    coarse: CoarseModel, fine: FineModel, classes: Tensor, seeds: list[int], settings: Sampling
) -> tuple[Tensor, Tensor]:
    keys_B2L = noise_keys(seeds, L)
    labels_BL = sample_coarse(coarse, classes, keys_B2L[:, 0], settings)
    return labels_BL, sample_fine(fine, CLUSTERS, labels_BL, classes, keys_B2L[:, 1], settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_image_is_the_same_in_any_batch(coarse, fine, settings):
    labels_BL, codes_BL = sample(coarse, fine, CLASSES_B, SEEDS, settings)
    assert len(labels_BL.unique(dim=0)) == len(SEEDS)
    for i, seed in enumerate(SEEDS):
        alone = sample(coarse, fine, CLASSES_B[i : i + 1], [seed], settings)
        assert torch.equal(alone[0][0], labels_BL[i])
        assert torch.equal(alone[1][0], codes_BL[i])


@pytest.mark.parametrize("settings", SETTINGS)
def test_codes_are_members_of_their_labels(coarse, fine, settings):
    labels_BL, codes_BL = sample(coarse, fine, CLASSES_B, SEEDS, settings)
    assert torch.equal(LABELS_V[codes_BL], labels_BL)


# Known codes


@pytest.mark.parametrize("softmax", ["members", "full"])
def test_known_codes_stay(softmax):
    model = FineModel(CONFIG, CLUSTERS, softmax).eval()
    randomise(model)
    codes_BL = torch.arange(5 * L).view(5, L) % len(LABELS_V)
    known_BL = torch.arange(5 * L).view(5, L) % 3 == 0
    inputs = (CLUSTERS, LABELS_V[codes_BL], CLASSES_B, noise_keys(SEEDS, L)[:, 1], Sampling())
    free_BL = sample_fine(model, *inputs)
    got_BL = sample_fine(model, *inputs, codes_BL.masked_fill(~known_BL, -1))
    assert torch.equal(got_BL, torch.where(known_BL, codes_BL, free_BL))
    assert not torch.equal(got_BL, free_BL)


@torch.no_grad()
@pytest.mark.parametrize("softmax", ["members", "full"])
@pytest.mark.parametrize("settings", [*SETTINGS, Sampling(fine_top_k=1)])
def test_fine_sampling_against_its_definition(settings, softmax):
    model = FineModel(CONFIG, CLUSTERS, softmax).eval()
    randomise(model)
    labels_BL = LABELS_V[torch.arange(5 * L).view(5, L) % len(LABELS_V)]
    keys_BL = noise_keys(SEEDS, L)[:, 1]
    cond = model(labels_BL, CLASSES_B)
    uncond = model(labels_BL, torch.full_like(CLASSES_B, model.no_class))
    got = sample_fine(model, CLUSTERS, labels_BL, CLASSES_B, keys_BL, settings)
    for b in range(5):
        for i in range(L):
            members = CLUSTERS.members_KS[labels_BL[b, i]]
            codes = members[members >= 0] if softmax == "members" else torch.arange(40)
            c, u = cond[b, i, : len(codes)], uncond[b, i, : len(codes)]
            logits = u + settings.fine_guidance * (c - u)
            choice = sample_logits(
                logits[None],
                gumbel_noise(keys_BL[b, i : i + 1], len(codes)),
                settings.fine_temperature,
                settings.fine_top_k,
                settings.fine_top_p,
            )
            assert got[b, i] == codes[choice]


@torch.no_grad()
@pytest.mark.parametrize("softmax", ["members", "full"])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_the_mean_choice_has_the_least_expected_distance(temperature, softmax):
    model = FineModel(CONFIG, CLUSTERS, softmax).eval()
    randomise(model)
    codebook_VC = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    labels_BL = LABELS_V[torch.arange(5 * L).view(5, L) % len(LABELS_V)]
    keys_BL = noise_keys(SEEDS, L)[:, 1]
    settings = Sampling(fine_choice="mean", fine_temperature=temperature, fine_top_k=6)
    inputs = (CLUSTERS, labels_BL, CLASSES_B, keys_BL, settings)
    got_BL = sample_fine(model, *inputs, codebook_VC=codebook_VC)
    logits_BLS = model(labels_BL, CLASSES_B)
    for b in range(5):
        for i in range(L):
            probabilities_S = filter_logits(logits_BLS[b, i : i + 1], temperature, 6, 1.0)
            probabilities_S = probabilities_S.softmax(-1)[0]
            possible = probabilities_S.nonzero()[:, 0]
            codes = possible
            if softmax == "members":
                codes = CLUSTERS.members_KS[labels_BL[b, i]][possible]
            vectors = codebook_VC[codes].double()
            distances = torch.cdist(vectors, vectors).square() @ probabilities_S[possible]
            assert distances[codes == got_BL[b, i]] <= distances.min() + 1e-9


def test_the_mean_choice_ignores_codes_that_are_impossible():
    logits_1K = torch.tensor([[0.0, -torch.inf, 0.0, 1.0]], dtype=torch.float64)
    vectors_1KC = torch.tensor([[[-1.0], [0.1], [0.5], [3.0]]])
    assert nearest_to_mean(logits_1K, vectors_1KC).item() == 2
    assert nearest_to_mean(logits_1K * 9, vectors_1KC).item() == 3


def test_no_guidance_costs_nothing(coarse, fine):
    for scale, factor in ((1.0, 1), (1.5, 2)):
        settings = Sampling(guidance=scale, fine_guidance=scale)
        with recorded(coarse, fine) as (shapes, _):
            sample(coarse, fine, CLASSES_B, SEEDS, settings)
        assert [batch for batch, _ in shapes] == [factor * len(SEEDS)] * (L + 1)


def test_each_stage_has_settings_of_its_own(coarse, fine):
    plain = Sampling()
    labels_BL, codes_BL = sample(coarse, fine, CLASSES_B, SEEDS, plain)
    for change in ({"guidance": 4.0}, {"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.5}):
        changed = sample(coarse, fine, CLASSES_B, SEEDS, dataclasses.replace(plain, **change))
        assert not torch.equal(changed[0], labels_BL)
        change = {f"fine_{name}": value for name, value in change.items()}
        changed = sample(coarse, fine, CLASSES_B, SEEDS, dataclasses.replace(plain, **change))
        assert torch.equal(changed[0], labels_BL)
        assert not torch.equal(changed[1], codes_BL)


def test_baseline_has_codes_for_labels(coarse):
    settings = Sampling()
    keys_B2L = noise_keys(SEEDS, L)
    labels_BL = sample_coarse(coarse, CLASSES_B, keys_B2L[:, 0], settings)
    clusters = clustering.identity(CLUSTERS.count)
    codes_BL = sample_fine(None, clusters, labels_BL, CLASSES_B, keys_B2L[:, 1], settings)
    assert torch.equal(codes_BL, labels_BL)


def test_samples_can_be_trained_on(coarse, fine):
    labels_BL, codes_BL = sample(coarse, fine, CLASSES_B, SEEDS, Sampling())
    loss = coarse(labels_BL, CLASSES_B).sum() + fine(LABELS_V[codes_BL], CLASSES_B)[..., 0].sum()
    loss.backward()
    coarse.zero_grad()
    fine.zero_grad()


def test_half_precision_samples_too():
    coarse = CoarseModel(CONFIG, CLUSTERS.count).eval()
    fine = FineModel(CONFIG, CLUSTERS).eval()
    for model in (coarse, fine):
        randomise(model)
        model.bfloat16()
    settings = Sampling(fine_guidance=2.0, top_p=0.9, fine_top_k=3, guidance_window=(0.5, 1.0))
    labels_BL, codes_BL = sample(coarse, fine, CLASSES_B, SEEDS, settings)
    assert torch.equal(LABELS_V[codes_BL], labels_BL)
