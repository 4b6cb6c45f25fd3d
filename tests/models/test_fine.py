import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctf.models import clusters as clustering
from ctf.models.clusters import Clusters
from ctf.models.fine import FineModel, members_logits
from ctf.models.transformer import TransformerConfig

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


@torch.no_grad()
def test_every_label_changes_the_logits_everywhere():
    model = make_model(softmax="full")  # so that the places' logits can be compared
    _, labels_BL, classes_B = make_inputs(2)
    before = model(labels_BL, classes_B)
    for j in range(CONFIG.length):
        changed_BL = labels_BL.clone()
        changed_BL[:, j] = (labels_BL[:, j] + 1) % CLUSTERS.count
        difference_BL = (model(changed_BL, classes_B) - before).abs().amax(-1)
        assert bool((difference_BL > 1e-5).all())


@torch.no_grad()
def test_logits_stand_at_the_place_of_their_label():
    model = make_model(softmax="full")
    for layer in model.trunk.layers:
        layer.attention.out.weight.zero_()  # so that no place hears of another
    _, labels_BL, classes_B = make_inputs(2)
    before = model(labels_BL, classes_B)
    for j in range(CONFIG.length):
        changed_BL = labels_BL.clone()
        changed_BL[:, j] = (labels_BL[:, j] + 1) % CLUSTERS.count
        difference_BL = (model(changed_BL, classes_B) - before).abs().amax(-1)
        assert (difference_BL > 1e-5).nonzero().tolist() == [[0, j], [1, j]]


@torch.no_grad()
def test_class_changes_all_logits():
    model = make_model(softmax="full")
    _, labels_BL, classes_B = make_inputs(2)
    without = model(labels_BL, torch.full_like(classes_B, model.no_class))
    assert bool(((model(labels_BL, classes_B) - without).abs().amax(-1) > 1e-5).all())


@torch.no_grad()
def test_each_token_has_the_logits_of_its_members_and_then_minus_infinity():
    _, labels_BL, classes_B = make_inputs(3)
    logits_BLS = make_model()(labels_BL, classes_B)
    full_BLV = make_model(softmax="full")(labels_BL, classes_B)
    assert logits_BLS.shape == (3, CONFIG.length, 6)
    assert full_BLV.shape == (3, CONFIG.length, len(LABELS_V))
    members_BLS = CLUSTERS.members_KS[labels_BL]
    expected_BLS = full_BLV.gather(-1, members_BLS.clamp(min=0))
    expected_BLS = expected_BLS.masked_fill(members_BLS < 0, -torch.inf)
    torch.testing.assert_close(logits_BLS, expected_BLS, rtol=1e-5, atol=1e-6)


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
    got = torch.autograd.grad(F.cross_entropy(logits_TS, slots_T), (hidden_TD, weight_VD))
    wanted = torch.autograd.grad(F.cross_entropy(expected_TS, slots_T), (hidden_TD, weight_VD))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_members_logits_gradcheck():
    sizes, labels_T = [3, 1, 4, 2], torch.tensor([2, 0, 2, 3, 0, 2, 2])
    hidden_TD, weight_VD = random_problem(sizes, labels_T, 0)

    def finite_part(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        logits_TS = members_logits(hidden_TD, weight_VD, labels_T, sizes)
        return logits_TS[logits_TS.isfinite()]

    assert torch.autograd.gradcheck(finite_part, (hidden_TD, weight_VD))


def test_first_loss_is_that_of_uniform_members():
    codes_BL, labels_BL, classes_B = make_inputs(2)
    model = FineModel(CONFIG, CLUSTERS)
    loss = F.cross_entropy(model(labels_BL, classes_B).mT, model.choices(codes_BL))
    expected = CLUSTERS.sizes_K[labels_BL].double().log().mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_training_reaches_every_weight_of_what_is_present():
    codes_BL, labels_BL, classes_B = make_inputs(2)
    model = make_model()
    F.cross_entropy(model(labels_BL, classes_B).mT, model.choices(codes_BL)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("softmax", ["members", "full"])
def test_choices_and_codes_are_inverse(softmax):
    codes_V = torch.arange(len(LABELS_V))
    model = FineModel(CONFIG, CLUSTERS, softmax)
    assert torch.equal(model.codes(LABELS_V, model.choices(codes_V)), codes_V)
    limit_V = len(LABELS_V) if softmax == "full" else CLUSTERS.sizes_K[LABELS_V]
    assert bool((model.choices(codes_V) < limit_V).all())


def test_clusters_come_from_the_argument_not_from_the_weights():
    model = make_model()
    assert all(key.startswith(("trunk.", "head.")) for key in model.state_dict())
    other = FineModel(CONFIG, CLUSTERS).eval()
    other.load_state_dict(model.state_dict())
    _, labels_BL, classes_B = make_inputs(1)
    assert torch.equal(other(labels_BL, classes_B), model(labels_BL, classes_B))


def test_autocast_leaves_the_logits_in_the_precision_of_the_weights():
    codes_BL, labels_BL, classes_B = make_inputs(2)
    model = make_model()
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
        with LargestTensor() as mode:
            logits = model(labels_V[codes_BL], torch.zeros(batch, dtype=torch.int64))
            F.cross_entropy(logits.flatten(0, 1), model.choices(codes_BL).flatten()).backward()
        largest[softmax] = mode.numel
    assert largest["full"] == batch * 64 * codes
    assert largest["members"] < largest["full"] / 4


def test_one_member_each_leaves_nothing_to_choose():
    clusters = clustering.identity(5)
    model = make_model(clusters)
    labels_BL = torch.arange(CONFIG.length)[None] % 5
    logits_BLS = model(labels_BL, torch.tensor([0]))
    assert logits_BLS.shape == (1, CONFIG.length, 1)
    loss = F.cross_entropy(logits_BLS.mT, model.choices(labels_BL))
    assert math.isclose(float(loss.detach()), 0)
