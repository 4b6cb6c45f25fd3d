import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ctf import clusters as clustering
from ctf.clusters import Clusters
from ctf.coarse import CoarseModel
from ctf.errors import UserError
from ctf.fine import FineModel
from ctf.sampling import (
    Sampling,
    choose,
    draw,
    guide,
    keep_top_k,
    keep_top_p,
    sample_coarse,
    sample_fine,
    uniforms,
)
from ctf.transformer import TransformerConfig

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


# Random numbers


def test_numbers_of_an_image_depend_on_its_seed_alone():
    together = uniforms(SEEDS, L)
    assert together.shape == (5, 2, L)
    assert together.dtype == torch.float64
    for i, seed in enumerate(SEEDS):
        assert torch.equal(uniforms([seed], L)[0], together[i])
    assert len(together.unique()) == together.numel()


def test_numbers_of_neighbouring_seeds_are_uniform_and_unrelated():
    numbers = uniforms(range(4000), 2)[:, :, 0].numpy()
    for stage in range(2):
        assert scipy.stats.kstest(numbers[:, stage], "uniform").pvalue > 0.01
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.05
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.05


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


def kept(filtered_1K: Tensor) -> set[int]:
    return set(filtered_1K[0].isfinite().nonzero()[:, 0].tolist())


@given(rows, st.integers(0, 10))
def test_top_k_against_brute_force(row, k):
    expected = by_rank(row)[: k or len(row)]
    filtered = keep_top_k(row_tensor(row), k)
    assert kept(filtered) == {i for i in expected if np.isfinite(row[i])}
    assert all(float(filtered[0, i]) == row[i] for i in kept(filtered))


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
    filtered = keep_top_p(row_tensor(row), p)
    assert kept(filtered) == expected
    assert all(float(filtered[0, i]) == row[i] for i in expected)


def test_of_many_equal_choices_the_first_are_kept():
    row = torch.zeros(1, 4096, dtype=torch.float64)
    assert kept(keep_top_k(row, 1024)) == set(range(1024))
    assert kept(keep_top_p(row, 0.25)) == set(range(1024))


def test_guidance_in_closed_form():
    cond = torch.tensor([[1.0, 2.0, -torch.inf]])
    uncond = torch.tensor([[0.0, 4.0, -torch.inf]])
    for scale, expected in ((0, [0, 4]), (1, [1, 2]), (2, [2, 0]), (-1, [-1, 6])):
        assert guide(cond, uncond, scale).tolist() == [[*expected, -torch.inf]]
    assert guide(cond.bfloat16(), uncond.bfloat16(), 1.7).dtype == torch.float32


# Draws


@given(rows, st.one_of(st.sampled_from([0.0, 5e-324, 1 - 2**-53, 1.0]), st.floats(0, 1)))
def test_nothing_masked_is_ever_drawn(row, uniform):
    choice = int(draw(row_tensor(row), torch.tensor([uniform], dtype=torch.float64)))
    assert np.isfinite(row[choice])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_even_grid_of_numbers_gives_the_probabilities(dtype):
    logits_K = torch.tensor([0.5, -torch.inf, 2.0, -1.0, 0.25, -torch.inf], dtype=dtype)
    count = 10_000
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(logits_K.expand(count, -1), numbers).bincount(minlength=6)
    expected = count * logits_K.double().softmax(-1)
    assert float((drawn - expected).abs().max()) <= 1


def test_frequencies_over_seeds_follow_the_probabilities():
    logits_K = torch.tensor([1.0, 0.0, -torch.inf, -1.0, 2.0])
    numbers = uniforms(range(40), 250).flatten()
    drawn = draw(logits_K.expand(len(numbers), -1), numbers).bincount(minlength=5)
    expected = len(numbers) * logits_K.double().softmax(-1)
    real = expected > 0
    assert int(drawn[~real].sum()) == 0
    assert scipy.stats.chisquare(drawn[real].numpy(), expected[real].numpy()).pvalue > 0.01


def test_temperature_then_top_k_then_top_p():
    logits_K = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0], dtype=torch.float64)
    count = 10_000
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = choose(logits_K.expand(count, -1), numbers, 2.0, 4, 0.8).bincount(minlength=5)
    four = np.exp([1.0, 0.5, 0.0, -0.5])
    # 0.455 and 0.276 of the four make 0.73, so that a third is needed for 0.8.
    expected = np.array([*(four[:3] / four[:3].sum()), 0, 0]) * count
    assert np.abs(drawn.numpy() - expected).max() <= 1


@given(rows, st.floats(0, 1))
def test_greedy_is_the_first_largest(row, uniform):
    number = torch.tensor([uniform], dtype=torch.float64)
    assert int(choose(row_tensor(row), number, 1.0, 1, 1.0)) == row.index(max(row))


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
    numbers = uniforms(seeds, L)
    labels_BL = sample_coarse(coarse, classes, numbers[:, 0], settings)
    return labels_BL, sample_fine(fine, CLUSTERS, labels_BL, classes, numbers[:, 1], settings)


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
def plain_coarse(model: CoarseModel, numbers_BL: Tensor, settings: Sampling) -> Tensor:
    """The definition: no cache, two passes, the guided logits of one place after another."""
    labels_BL = torch.zeros(numbers_BL.shape, dtype=torch.int64)
    for position in range(L):
        cond = model(labels_BL, CLASSES_B)[:, position]
        uncond = model(labels_BL, torch.full_like(CLASSES_B, model.no_class))[:, position]
        logits = uncond + settings.guidance * (cond - uncond)
        labels_BL[:, position] = choose(
            logits, numbers_BL[:, position], settings.temperature, settings.top_k, settings.top_p
        )
    return labels_BL


@pytest.mark.parametrize("settings", [*SETTINGS, Sampling(top_k=1), Sampling(1.0, top_k=1)])
def test_coarse_sampling_against_its_definition(coarse, settings):
    numbers_BL = uniforms(SEEDS, L)[:, 0]
    expected = plain_coarse(coarse, numbers_BL, settings)
    assert torch.equal(sample_coarse(coarse, CLASSES_B, numbers_BL, settings), expected)


@torch.no_grad()
@pytest.mark.parametrize("softmax", ["members", "full"])
@pytest.mark.parametrize("settings", [*SETTINGS, Sampling(fine_top_k=1)])
def test_fine_sampling_against_its_definition(settings, softmax):
    model = FineModel(CONFIG, CLUSTERS, softmax).eval()
    randomise(model)
    labels_BL = LABELS_V[torch.arange(5 * L).view(5, L) % len(LABELS_V)]
    numbers_BL = uniforms(SEEDS, L)[:, 1]
    cond = model(labels_BL, CLASSES_B)
    uncond = model(labels_BL, torch.full_like(CLASSES_B, model.no_class))
    got = sample_fine(model, CLUSTERS, labels_BL, CLASSES_B, numbers_BL, settings)
    for b in range(5):
        for i in range(L):
            members = CLUSTERS.members_KS[labels_BL[b, i]]
            codes = members[members >= 0] if softmax == "members" else torch.arange(40)
            c, u = cond[b, i, : len(codes)], uncond[b, i, : len(codes)]
            logits = u + settings.fine_guidance * (c - u)
            choice = choose(
                logits[None],
                numbers_BL[b, i : i + 1],
                settings.fine_temperature,
                settings.fine_top_k,
                settings.fine_top_p,
            )
            assert got[b, i] == codes[choice]


def test_no_guidance_costs_nothing(coarse, fine):
    batches = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        batches.append(len(inputs[0]))

    hooks = [m.trunk.norm.register_forward_pre_hook(record) for m in (coarse, fine)]
    for scale, factor in ((1.0, 1), (1.5, 2)):
        batches.clear()
        settings = Sampling(guidance=scale, fine_guidance=scale)
        sample(coarse, fine, CLASSES_B, SEEDS, settings)
        assert batches == [factor * len(SEEDS)] * (L + 1)
    for hook in hooks:
        hook.remove()


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
    numbers = uniforms(SEEDS, L)
    labels_BL = sample_coarse(coarse, CLASSES_B, numbers[:, 0], settings)
    clusters = clustering.identity(CLUSTERS.count)
    codes_BL = sample_fine(None, clusters, labels_BL, CLASSES_B, numbers[:, 1], settings)
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
    settings = Sampling(fine_guidance=2.0, top_p=0.9, fine_top_k=3)
    labels_BL, codes_BL = sample(coarse, fine, CLASSES_B, SEEDS, settings)
    assert torch.equal(LABELS_V[codes_BL], labels_BL)
