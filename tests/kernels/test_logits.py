"""Losses in slices and logits of members: against PyTorch's own, in value, gradients and memory."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctf import kernels
from ctf.kernels import logits
from ctf.kernels.logits import (
    BatchedFineModel,
    LeanFineModel,
    batched_members_logits,
    cross_entropy,
    members_logits,
)
from ctf.kernels.replace import replace
from ctf.models.clusters import Clusters
from ctf.models.fine import FineModel
from ctf.models.transformer import TransformerConfig

B, L, D, K = 3, 7, 16, 40


def problem() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden_BLD, weight_KD = torch.randn(B, L, D), torch.randn(K, D)
    return hidden_BLD.requires_grad_(), weight_KD.requires_grad_(), torch.randint(K, (B, L))


def plain(hidden_BLD: Tensor, weight_KD: Tensor, targets_BL: Tensor) -> Tensor:
    logits_BLK = hidden_BLD @ weight_KD.T
    return F.cross_entropy(logits_BLK.float().flatten(0, 1), targets_BL.flatten())


@pytest.mark.parametrize("slice_", [1, K, 4 * K + 1, 10 * K, 2**24])
@pytest.mark.parametrize("factor", [1.0, -0.25])
def test_it_is_pytorchs_in_any_slices(
    monkeypatch: pytest.MonkeyPatch, slice_: int, factor: float
) -> None:
    monkeypatch.setattr(logits, "SLICE", slice_)
    hidden_BLD, weight_KD, targets_BL = problem()
    found, expected = (f(hidden_BLD, weight_KD, targets_BL) for f in (cross_entropy, plain))
    assert found.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for x in (hidden_BLD, weight_KD):
        (a,), (b,) = (
            torch.autograd.grad(factor * y, x, retain_graph=True) for y in (found, expected)
        )
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    with torch.no_grad():  # as it is evaluated
        assert torch.equal(cross_entropy(hidden_BLD, weight_KD, targets_BL), found)


def test_one_gradient_without_the_other() -> None:
    hidden_BLD, weight_KD, targets_BL = problem()
    cross_entropy(hidden_BLD, weight_KD.detach(), targets_BL).backward()
    cross_entropy(hidden_BLD.detach(), weight_KD, targets_BL).backward()
    hidden, weight, targets = problem()
    plain(hidden, weight, targets).backward()
    for x, y in ((hidden_BLD, hidden), (weight_KD, weight)):
        torch.testing.assert_close(x.grad, y.grad)


def test_large_logits_and_impossible_targets() -> None:
    hidden_BLD, weight_KD, targets_BL = problem()
    with torch.no_grad():
        hidden_BLD *= 1000
    found = cross_entropy(hidden_BLD, weight_KD, targets_BL)
    torch.testing.assert_close(found, plain(hidden_BLD, weight_KD, targets_BL), rtol=1e-6, atol=0)
    found.backward()
    assert hidden_BLD.grad is not None and bool(hidden_BLD.grad.isfinite().all())


def test_under_autocast_as_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "SLICE", 4 * K)
    gradients = []
    for f in (cross_entropy, plain):
        hidden_BLD, weight_KD, targets_BL = problem()
        with torch.autocast("cpu", torch.bfloat16):
            loss = f(hidden_BLD, weight_KD, targets_BL)
        assert loss.dtype == torch.float32
        loss.backward()
        gradients.append((loss.detach(), hidden_BLD.grad, weight_KD.grad))
    for found, expected in zip(*gradients, strict=True):
        assert found is not None and expected is not None and found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.02, atol=2e-3)


def test_autograd_saves_nothing_of_the_size_of_all_logits() -> None:
    hidden_BLD, weight_KD, targets_BL = problem()
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy(hidden_BLD, weight_KD, targets_BL)
    assert sum(saved) == B * L * D + K * D < B * L * K + K * D


# --- logits of members ----------------------------------------------------------------------------

CONFIG = TransformerConfig(width=48, layers=2, heads=2, grid=4, classes=3, ffn_multiple=16)
# Sizes 6, 1, 4, 1, 2: the codes of a cluster lie apart in the codebook.
LABELS_V = torch.tensor([0, 2, 0, 4, 1, 0, 2, 2, 0, 3, 0, 4, 2, 0])
CLUSTERS = Clusters.from_labels(LABELS_V)


def make_model(clusters: Clusters = CLUSTERS, softmax: str = "members") -> FineModel:
    torch.manual_seed(0)
    model = FineModel(CONFIG, clusters, softmax).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def make_inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes_BL = torch.randint(len(LABELS_V), (batch, CONFIG.length), generator=generator)
    classes_B = torch.randint(CONFIG.classes, (batch,), generator=generator)
    return codes_BL, LABELS_V[codes_BL], classes_B


@pytest.mark.parametrize("softmax", ["members", "full"])
def test_a_lean_fine_model_is_the_plain_one(softmax: str) -> None:
    codes_BL, labels_BL, classes_B = make_inputs(3)
    plain, lean = make_model(softmax=softmax), make_model(softmax=softmax)
    kernels.for_evaluation(lean)
    for one, other in zip(
        (plain(labels_BL, classes_B), plain.loss(labels_BL, classes_B, codes_BL)),
        (lean(labels_BL, classes_B), lean.loss(labels_BL, classes_B, codes_BL)),
        strict=True,
    ):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    plain.loss(labels_BL, classes_B, codes_BL).backward()
    lean.loss(labels_BL, classes_B, codes_BL).backward()
    for one, other in zip(plain.parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


@st.composite
def problems(draw):
    """Sizes of clusters, and the clusters of some tokens (often not all are present)."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    tokens = draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=12))
    return sizes, torch.tensor(tokens), draw(st.integers(0, 1000))


def random_problem(sizes: list[int], tokens: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(len(tokens), 3, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    return hidden_TD.requires_grad_(), weight_VD.requires_grad_()


@given(problems())
def test_members_logits_equal_the_full_product_gathered(problem):
    sizes, labels_T, seed = problem
    hidden_TD, weight_VD = random_problem(*problem)
    logits_TS = members_logits(hidden_TD, weight_VD, labels_T, sizes)
    starts_K = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    rows_TS = starts_K[labels_T, None] + torch.arange(max(sizes))
    real_TS = torch.arange(max(sizes)) < torch.tensor(sizes)[labels_T, None]
    full_TS = (hidden_TD @ weight_VD.T).gather(1, rows_TS.clamp(max=sum(sizes) - 1))
    expected_TS = full_TS.masked_fill(~real_TS, -torch.inf)
    torch.testing.assert_close(logits_TS, expected_TS)

    slots_T = torch.tensor([seed % sizes[k] for k in labels_T])
    found = torch.autograd.grad(F.cross_entropy(logits_TS, slots_T), (hidden_TD, weight_VD))
    expected = torch.autograd.grad(F.cross_entropy(expected_TS, slots_T), (hidden_TD, weight_VD))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@given(problems(), st.integers(1, 5))
def test_one_batched_product_equals_one_for_each_cluster(problem, block):
    sizes, labels_T, seed = problem
    hidden_TD, weight_VD = random_problem(*problem)
    sizes_K, slots_S = torch.tensor(sizes), torch.arange(max(sizes))
    starts_K = sizes_K.cumsum(0) - sizes_K
    rows_KS = starts_K[:, None] + torch.minimum(slots_S, sizes_K[:, None] - 1)
    batched_TS = batched_members_logits(hidden_TD, weight_VD, labels_T, rows_KS, block)
    expected_TS = members_logits(hidden_TD, weight_VD, labels_T, sizes)
    real_TS = expected_TS.isfinite()
    torch.testing.assert_close(batched_TS[real_TS], expected_TS[real_TS])
    generator = torch.Generator().manual_seed(seed)
    grad_TS = torch.randn(real_TS.shape, generator=generator, dtype=torch.float64) * real_TS
    found = torch.autograd.grad(batched_TS, (hidden_TD, weight_VD), grad_TS)
    expected = torch.autograd.grad(expected_TS, (hidden_TD, weight_VD), grad_TS)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 20])  # of 16 tokens: fewer and more than a block
def test_the_fine_model_of_a_gpu_is_that_of_a_processor(batch: int, autocast: bool) -> None:
    codes_BL, labels_BL, classes_B = make_inputs(batch)
    lean, batched = make_model(), make_model()
    kernels.for_evaluation(lean)
    replace(batched, {FineModel: BatchedFineModel})
    assert type(lean) is LeanFineModel
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = (model(labels_BL, classes_B) for model in (batched, lean))
        losses = [model.loss(labels_BL, classes_B, codes_BL) for model in (batched, lean)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    tolerance = 1e-2 if autocast else 1e-4
    for one, other in zip(batched.parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=tolerance, atol=tolerance / 100)


def test_members_logits_gradcheck():
    sizes, labels_T = [3, 1, 4, 2], torch.tensor([2, 0, 2, 3, 0, 2, 2])
    hidden_TD, weight_VD = random_problem(sizes, labels_T, 0)

    def finite_part(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        logits_TS = members_logits(hidden_TD, weight_VD, labels_T, sizes)
        return logits_TS[logits_TS.isfinite()]

    assert torch.autograd.gradcheck(finite_part, (hidden_TD, weight_VD))


def test_autocast_leaves_the_logits_in_the_precision_of_the_weights():
    codes_BL, labels_BL, classes_B = make_inputs(2)
    model = make_model()
    kernels.for_evaluation(model)
    expected = model(labels_BL, classes_B)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BLS = model(labels_BL, classes_B)
        loss = F.cross_entropy(logits_BLS.mT, model.choices(codes_BL))
    loss.backward()
    assert logits_BLS.dtype == torch.float32
    real = expected.isfinite()
    assert torch.equal(logits_BLS.isfinite(), real)
    difference = (logits_BLS[real] - expected[real]).detach().abs()
    assert 0 < float(difference.mean()) < 0.05
    assert bool(model.head.weight.grad.any())


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that is computed."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_no_tensor_of_all_tokens_by_all_codes():
    codes, batch = 2048, 4
    labels_V = torch.randint(256, (codes,), generator=torch.Generator().manual_seed(0))
    labels_V[:256] = torch.arange(256)
    clusters = Clusters.from_labels(labels_V)
    config = dataclasses.replace(CONFIG, grid=8)
    codes_BL = torch.randint(codes, (batch, 64), generator=torch.Generator().manual_seed(1))
    largest = {}
    for softmax in ("members", "full"):
        model = FineModel(config, clusters, softmax)
        kernels.for_evaluation(model)
        with LargestTensor() as mode:
            logits = model(labels_V[codes_BL], torch.zeros(batch, dtype=torch.int64))
            F.cross_entropy(logits.flatten(0, 1), model.choices(codes_BL).flatten()).backward()
        largest[softmax] = mode.numel
    assert largest["full"] == batch * 64 * codes
    assert largest["members"] < largest["full"] / 4
