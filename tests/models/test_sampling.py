import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

from ctf.common.errors import UserError
from ctf.models import clusters as clustering
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.noise import gumbel_noise, noise_keys
from ctf.models.sampling import (
    Sampling,
    apply_guidance,
    format_settings,
    guidance_scales,
    sample_coarse,
    sample_fine,
    sample_logits,
    stream_coarse,
    top_k_filter,
    top_p_filter,
)
from ctf.models.transformer import KVCache, TransformerConfig

CONFIG = TransformerConfig(width=48, layers=2, heads=2, grid=4, classes=3, ffn_multiple=16)
L = CONFIG.length
LABELS_V = torch.randint(8, (40,), generator=torch.Generator().manual_seed(3))
CLUSTERS = Clusters.from_labels(LABELS_V)
CLASSES_B = torch.tensor([0, 2, 1, 2, 0])
SEEDS = [5, 6, 7, 8, 9]


def randomise(model: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)


@pytest.fixture(scope="module")
def coarse() -> CoarseModel:
    model = CoarseModel(CONFIG, CLUSTERS.count).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def fine() -> FineModel:
    model = FineModel(CONFIG, CLUSTERS).eval()
    randomise(model)
    return model


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
        "top_p 1, fine_top_p 1, guidance_schedule linear, guidance_window 0.25 to 1"
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

SETTINGS = [
    Sampling(guidance=1.0),
    Sampling(guidance=2.5, fine_guidance=1.5, temperature=1.2, fine_temperature=0.8),
    Sampling(guidance=0.0, fine_guidance=0.0, top_k=3, fine_top_p=0.7),
    Sampling(top_p=0.8, fine_top_k=2),
]


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


@torch.no_grad()
def plain_coarse(
    model: CoarseModel, keys_BL: Tensor, settings: Sampling, kept_BL: Tensor | None = None
) -> Tensor:
    """The definition: no cache, two passes, the guided logits of one position after another."""
    labels_BL = torch.zeros(keys_BL.shape, dtype=torch.int64)
    first, last = settings.guidance_window
    for position in range(L):
        cond = model(labels_BL, CLASSES_B)[:, position]
        uncond = model(labels_BL, torch.full_like(CLASSES_B, model.no_class))[:, position]
        r = position / (L - 1)
        rise = {"constant": 1, "linear": r, "cosine": 0.5 - 0.5 * math.cos(math.pi * r)}
        scale = 1 + (settings.guidance - 1) * rise[settings.guidance_schedule]
        if not first <= position / L < last:
            scale = 1
        logits = uncond + scale * (cond - uncond)
        labels_BL[:, position] = sample_logits(
            logits,
            gumbel_noise(keys_BL[:, position], CLUSTERS.count),
            settings.temperature,
            settings.top_k,
            settings.top_p,
        )
        if kept_BL is not None:
            for b in range(len(kept_BL)):
                if kept_BL[b, position] >= 0:
                    labels_BL[b, position] = kept_BL[b, position]
    return labels_BL


WINDOWS = [
    Sampling(guidance=3.0, guidance_window=(0.0, 0.5)),
    Sampling(guidance=3.0, guidance_window=(0.5, 1.0), top_k=1),
    Sampling(guidance=3.0, guidance_window=(0.3, 0.7), guidance_schedule="cosine"),
    Sampling(guidance=-1.0, guidance_schedule="linear"),
    Sampling(guidance=2.5, guidance_schedule="cosine", temperature=0.8, top_p=0.9),
]


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


@contextmanager
def recorded(*models: nn.Module) -> Iterator[tuple[list[tuple[int, ...]], list[Tensor]]]:
    """What goes through the first block of each, as (batch, positions); and all logits."""
    shapes: list[tuple[int, ...]] = []
    logits: list[Tensor] = []
    hooks = [
        *(m.backbone.layers[0].register_forward_pre_hook(
            lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2]))
        ) for m in models),
        *(m.head.register_forward_hook(
            lambda _, inputs, result: logits.append(result.clone())
        ) for m in models),
    ]  # fmt: skip
    try:
        yield shapes, logits
    finally:
        for hook in hooks:
            hook.remove()


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
    assert all(torch.equal(one, other) for one, other in zip(plain, logits, strict=True))


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


def test_a_stream_takes_a_step_only_for_the_next_labels(coarse):
    keys_BL = noise_keys(SEEDS, L)[:, 0]
    expected = sample_coarse(coarse, CLASSES_B, keys_BL, Sampling())
    with recorded(coarse) as (_, logits):
        steps = stream_coarse(coarse, CLASSES_B, keys_BL, Sampling())
        assert len(logits) == 0
        for count in range(1, L + 1):
            assert torch.equal(next(steps), expected[:, :count])
            assert len(logits) == count
            assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert list(steps) == []
        steps = stream_coarse(coarse, CLASSES_B, keys_BL, Sampling())
        next(steps)
        steps.close()
        assert len(logits) == L + 1 and list(steps) == []


# Known labels and codes

masks = st.integers(0, 2 ** (5 * L) - 1).map(
    lambda bits: torch.tensor([bits >> i & 1 for i in range(5 * L)], dtype=torch.bool).view(5, L)
)
FORCED_BL = torch.arange(5 * L).view(5, L) * 3 % CLUSTERS.count


@given(masks, st.sampled_from([SETTINGS[1], Sampling(1.0), WINDOWS[1], WINDOWS[2]]))
@examples(max_examples=25, deadline=None)
def test_sampling_around_known_labels_against_its_definition(coarse, known_BL, settings):
    keys_BL = noise_keys(SEEDS, L)[:, 0]
    kept_BL = FORCED_BL.masked_fill(~known_BL, -1)
    before = kept_BL.clone()
    got = sample_coarse(coarse, CLASSES_B, keys_BL, settings, kept_BL)
    assert torch.equal(got, plain_coarse(coarse, keys_BL, settings, kept_BL))
    assert torch.equal(kept_BL, before)


@given(st.integers(0, 2**L - 1), st.sampled_from([SETTINGS[1], Sampling(1.0), WINDOWS[2]]))
@examples(max_examples=40, deadline=None)
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
