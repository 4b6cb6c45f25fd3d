"""Training of the coarse and the fine model on made-up tokens: golden losses, EMA, resuming."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctf import kernels
from ctf.common import config, storage, threads
from ctf.common.distributed import ALONE
from ctf.common.errors import UserError
from ctf.common.precision import supports_bf16
from ctf.data.tokens import MANIFEST, Manifest, Shard, SplitManifest, Tokens
from ctf.data.transforms import VIEWS
from ctf.kernels.logits import BatchedFineModel, LeanFineModel
from ctf.kernels.replace import replace
from ctf.models import objectives, points
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.objectives import Objective
from ctf.models.transformer import TransformerConfig
from ctf.training import cost, loop, optim, transformers
from ctf.training.loop import DEFAULT_EXECUTION, Execution
from ctf.training.metrics_log import last_metrics
from ctf.training.state import collect, latest_state, restore, save_state
from ctf.training.transformers import Trainer, TrainingConfig
from tests.conftest import without_times
from tests.stalls import no_stalls
from tests.training.parted import assert_steps_agree

CODES, CLASSES, GRID = 40, 3, 4
LENGTH = GRID**2
SHAPE = TransformerConfig(
    width=32, layers=2, heads=2, grid=GRID, classes=CLASSES, dropout=0.1, ffn_multiple=16
)
TRAINING = TrainingConfig(
    steps=20, batch_size=8, learning_rate=5e-3, warm_up=4, ema=0.9, evaluate_every=20
)
# Code v is member v // 8 of cluster v % 8; cluster 7 has one member less and cluster 0 one more.
LABELS_V = torch.arange(CODES) % 8
LABELS_V[-1] = 0
CLUSTERS = Clusters.from_labels(LABELS_V)

Kind = Literal["coarse", "fine"]


def write_tokens(folder: Path, train: int = 50, val: int = 20) -> Path:
    """Codes that walk through the codebook by a stride of their class, and a step more at times."""
    folder.mkdir()
    parts = {}
    for seed, (split, count) in enumerate((("train", train), ("val", val))):
        views = VIEWS["flip" if split == "train" else "plain"]
        random = np.random.Generator(np.random.PCG64(seed))
        classes_N = np.arange(count, dtype=np.int64) % CLASSES
        steps_NVL = (
            classes_N[:, None, None] * 3 + 1 + (random.random((count, len(views), 16)) < 0.2)
        )
        codes_NVL = (steps_NVL.cumsum(-1) + random.integers(8, size=(count, 1, 1))) % CODES
        np.save(folder / f"{split}-classes.npy", classes_N)
        np.save(folder / f"{split}-00000.npy", codes_NVL.astype(np.uint16))
        shard = Shard(f"{split}-00000.npy", (count, len(views), LENGTH))
        parts[split] = SplitManifest("made up", "none", "none", count, views, (shard,))
    manifest = Manifest(
        "none", CODES, 4 * GRID, LENGTH, "uint16", ("a", "b", "c"), None, None, **parts
    )
    storage.save_json(folder / MANIFEST, config.to_json(manifest))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("run") / "tokens")


def make(
    folder: Path,
    kind: Kind,
    objective: Objective | None = None,
    dropout: float = 0.1,
    execution: Execution = DEFAULT_EXECUTION,
    **changes: Any,
) -> Trainer:
    t = dataclasses.replace(TRAINING, **changes)
    shape = dataclasses.replace(SHAPE, dropout=dropout)
    torch.manual_seed(t.seed)
    if kind == "coarse":
        model: transformers.Model = CoarseModel(shape, CLUSTERS.count)
        objective = objective or objectives.coarse_objective(CLUSTERS)
    else:
        model = FineModel(shape, CLUSTERS)
        objective = objective or objectives.fine_objective(CLUSTERS)
    return Trainer(
        model, objective, Tokens(folder, "train"), Tokens(folder, "val"), t, ALONE, execution
    )


KINDS: tuple[Kind, ...] = ("coarse", "fine")


multiplying_bf16 = pytest.mark.skipif(
    not supports_bf16(ALONE.device), reason="no bfloat16 products"
)


# --- losses ---------------------------------------------------------------------------------------

# What the losses of the first 20 steps have always been. A change in them is a change in what is
# trained: the models, their initialisation, the order of the data, the optimiser.
GOLDEN: dict[Kind, list[float]] = {
    "coarse": [
        2.07944, 2.07712, 2.06085, 2.03575, 1.99890, 1.97800, 1.95726, 1.89018, 1.88386, 1.87210,
        1.87126, 1.79139, 1.78700, 1.76257, 1.79072, 1.74169, 1.80521, 1.65980, 1.69598, 1.77771,
    ],
    "fine": [
        1.60893, 1.61486, 1.59104, 1.58441, 1.55945, 1.57666, 1.57488, 1.50616, 1.58307, 1.49224,
        1.62656, 1.55142, 1.47932, 1.50569, 1.59132, 1.52465, 1.49051, 1.62445, 1.44356, 1.42117,
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_golden_losses(folder: Path, kind: Kind) -> None:
    trainer = make(folder, kind, dropout=0.0)  # masks differ between versions of torch
    losses = [float(trainer.step(step)["loss"]) for step in range(20)]
    assert losses == pytest.approx(GOLDEN[kind], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_that_of_knowing_nothing(folder: Path, kind: Kind) -> None:
    calls: list[tuple[transformers.Model, Tensor, Tensor]] = []
    make(folder, kind, watching(calls)).step(0)
    loss = float(make(folder, kind).step(0)["loss"])
    codes_BL = calls[0][1]
    choices_BL = torch.full_like(codes_BL, CLUSTERS.count)
    if kind == "fine":
        choices_BL = CLUSTERS.sizes_K[CLUSTERS.labels_V[codes_BL]]
    assert loss == pytest.approx(float(choices_BL.double().log().mean()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_a_gpu(folder: Path, kind: Kind) -> None:
    trainer = make(folder, kind)
    trainer.checks = optim.Checks(deferred=True)
    replace(trainer.model, {LeanFineModel: BatchedFineModel})
    trainer.step(0)  # makes what is made once
    with no_stalls():
        losses = [trainer.step(step)["loss"] for step in (1, 2)]
    assert torch.stack([*map(torch.as_tensor, losses)]).isfinite().all()
    with pytest.raises(AssertionError, match="would wait"), no_stalls():
        trainer.check()


# --- the data of a step ---------------------------------------------------------------------------


def watching(calls: list[tuple[transformers.Model, Tensor, Tensor]]) -> Objective:
    """An objective that only records its arguments."""

    def losses(model: transformers.Model, codes_BL: Tensor, classes_B: Tensor) -> Tensor:
        calls.append((model, codes_BL, classes_B))
        return 0 * model.head.weight.sum()

    return losses


def test_batches_are_images_in_a_view_with_their_class_or_none(folder: Path) -> None:
    calls: list[tuple[transformers.Model, Tensor, Tensor]] = []
    trainer = make(folder, "coarse", watching(calls), batch_size=50, class_dropout=0.1)
    for step in range(40):
        trainer.step(step)
    train = trainer.train
    hidden = views = 0
    for step, (model, codes_BL, classes_B) in enumerate(calls):
        assert model is trainer.model
        indices_B = optim.batch_indices(50, 50, 0, step)
        expected_2BL = [train.codes(indices_B, view) for view in (0, 1)]
        view_2B = torch.stack([(codes_BL == e_BL).all(-1) for e_BL in expected_2BL])
        assert bool(view_2B.any(0).all())
        views += int(view_2B[1].sum())
        hidden_B = classes_B == CLASSES
        hidden += int(hidden_B.sum())
        true_B = torch.from_numpy(train.classes_N[indices_B])
        assert torch.equal(classes_B[~hidden_B], true_B[~hidden_B])
    # Of 2000, within 4 standard deviations.
    assert abs(hidden / 2000 - 0.1) < 0.027
    assert abs(views / 2000 - 0.5) < 0.045


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_classes_hidden_never_or_always(folder: Path, rate: float) -> None:
    calls: list[tuple[transformers.Model, Tensor, Tensor]] = []
    trainer = make(folder, "fine", watching(calls), class_dropout=rate)
    for step in range(5):
        trainer.step(step)
    assert all(bool((c == CLASSES).all()) == (rate == 1) for *_, c in calls)


def test_evaluation_sees_every_class_and_the_average(folder: Path) -> None:
    calls: list[tuple[transformers.Model, Tensor, Tensor]] = []
    trainer = make(folder, "coarse", watching(calls), class_dropout=1.0)
    trainer.evaluate()
    assert torch.cat([c for *_, c in calls]).tolist() == trainer.val.classes_N.tolist()
    assert all(model is trainer.averaged and not model.training for model, *_ in calls)
    assert torch.equal(torch.cat([c for _, c, _ in calls]), trainer.val.codes(np.arange(20)))
    calls.clear()
    make(folder, "coarse", watching(calls), evaluate_images=10).evaluate()
    assert sum(len(c) for *_, c in calls) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_loss_is_a_mean_over_images(folder: Path, kind: Kind) -> None:
    trainer = make(folder, kind)
    for step in range(5):
        trainer.step(step)
    val = trainer.val
    with torch.no_grad():
        loss = trainer.evaluated(val.codes(np.arange(20)), torch.from_numpy(val.classes_N))
    assert trainer.evaluate()["loss"] == pytest.approx(float(loss), rel=1e-5)


# --- the step -------------------------------------------------------------------------------------


def test_weights_follow_adamw_and_their_average_follows_them(folder: Path) -> None:
    """Against torch's own AdamW, clipping and arithmetic, over all of a short training."""
    trainer = make(folder, "coarse", dropout=0.0)
    model = copy.deepcopy(trainer.model)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    calls: list[tuple[transformers.Model, Tensor, Tensor]] = []
    data = make(folder, "coarse", watching(calls))
    for step in range(TRAINING.steps):
        logged = trainer.step(step)
        data.step(step)
        _, codes_BL, classes_B = calls[-1]
        labels_BL = LABELS_V[codes_BL]
        loss = F.cross_entropy(model(labels_BL, classes_B).mT, labels_BL)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = optim.learning_rate(step, 20, 5e-3, 4, "cosine", TRAINING.final_learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
        assert float(logged["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
        assert float(logged["gradient_norm"]) == pytest.approx(float(norm), rel=1e-3)
        assert logged["learning_rate"] == rate
    for name, parameter in trainer.averaged.named_parameters():
        torch.testing.assert_close(parameter, average[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_it_stops_before_what_is_not_finite(folder: Path, kind: Kind) -> None:
    trainer = make(folder, kind)
    trainer.step(0)
    with torch.no_grad():
        trainer.model.backbone.norm.weight[0] = torch.inf
    before = {k: v.clone() for k, v in collect(trainer.parts()).items()}
    with pytest.raises(UserError, match=r"step 1: loss is nan on .* stopped before the update"):
        trainer.step(1)
    for name, value in collect(trainer.parts()).items():
        assert torch.equal(value, before[name]), name


def test_the_last_good_state_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(loop, "LOG_EVERY", 5)

    def explode(done: int, *_: object) -> None:
        if done == 10:
            with torch.no_grad():
                trainer.model.backbone.norm.weight[0] = torch.nan

    trainer = make(folder, "coarse")
    with pytest.raises(UserError, match="step 10: loss is nan"):
        loop.run(trainer, tmp_path, 20, evaluate_every=5, progress=explode)
    assert latest_state(tmp_path / "state") == 10


# --- resuming -------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(loop, "LOG_EVERY", 4)
    whole, resumed = make(folder, kind), make(folder, kind)
    loop.run(whole, tmp_path / "whole", 20, evaluate_every=8)

    def kill(done: int, *_: object) -> None:
        if done in (8, 12):
            raise Killed

    for _ in range(2):  # the second time just after it has gone on from its state
        with pytest.raises(Killed):
            loop.run(make(folder, kind), tmp_path / "killed", 20, evaluate_every=8, progress=kill)
    loop.run(resumed, tmp_path / "killed", 20, evaluate_every=8)
    assert collect(whole.parts()).keys() == collect(resumed.parts()).keys()
    for name, value in collect(whole.parts()).items():
        assert torch.equal(collect(resumed.parts())[name], value), name
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "killed")


@pytest.mark.usefixtures("three_threads")
def test_resumed_in_parts_equals_uninterrupted(folder: Path, tmp_path: Path) -> None:
    whole, stopped, resumed = (make(folder, "coarse", dropout=0.0) for _ in range(3))
    loop.run(whole, tmp_path / "whole", 40, evaluate_every=20)

    def kill(done: int, *_: object) -> None:
        if done == 40:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SAVE_SECONDS", -1.0)
        with pytest.raises(Killed):
            loop.run(stopped, tmp_path / "killed", 40, evaluate_every=20, progress=kill)
    loop.run(resumed, tmp_path / "killed", 40, evaluate_every=20)
    for name, value in collect(whole.parts()).items():
        assert torch.equal(collect(resumed.parts())[name], value), name
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "killed")
    # With another number of threads, only rounding differs.
    torch.set_num_threads(1)
    alone = make(folder, "coarse", dropout=0.0)
    loop.run(alone, tmp_path / "alone", 40, evaluate_every=20)
    losses = [last_metrics(tmp_path / name, "val")["loss"] for name in ("whole", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- parts of a batch -----------------------------------------------------------------------------

IDENTITY = Clusters.from_labels(torch.arange(CODES))


def parted(folder: Path, case: str) -> Trainer:
    t = dataclasses.replace(TRAINING, batch_size=7)
    shape = dataclasses.replace(SHAPE, dropout=0.0)
    objective, other, execution = objectives.fine_objective(CLUSTERS), None, DEFAULT_EXECUTION
    torch.manual_seed(t.seed)
    match case:
        case "coarse" | "micro-batch" | "recomputed":
            model: transformers.Model = CoarseModel(shape, CLUSTERS.count)
            objective = objectives.coarse_objective(CLUSTERS)
            if case == "micro-batch":
                execution = Execution(micro_batch=4)
            elif case == "recomputed":
                execution = Execution(checkpoint_activations=True)
        case "full vocabulary" | "group loss":
            model = CoarseModel(shape, CODES)
            objective = objectives.coarse_objective(IDENTITY)
            if case == "group loss":
                other = objectives.grouped_objective(CLUSTERS, 0.5)
        case "full softmax":
            model = FineModel(shape, CLUSTERS, "full")
        case _:
            model = FineModel(shape, CLUSTERS)
    if case == "knowing the codebook":
        codebook_VC = torch.randn(CODES, 4)
        points.use_points(model, codebook_VC, CLUSTERS)
    return Trainer(
        model, objective, Tokens(folder, "train"), Tokens(folder, "val"), t, ALONE, execution, other
    )


CASES = (
    "coarse", "micro-batch", "recomputed", "full vocabulary", "group loss", "fine", "full softmax",
    "knowing the codebook",
)  # fmt: skip


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("case", CASES)
def test_a_step_in_parts_is_that_of_the_whole_batch(folder: Path, case: str) -> None:
    whole, in_parts = parted(folder, case), parted(folder, case)
    assert_steps_agree(whole, in_parts, range(3), parts=3)
    with threads.team():
        loss = in_parts.evaluate()["loss"]
    restore(whole.parts(), collect(in_parts.parts()))
    assert whole.evaluate()["loss"] == pytest.approx(loss, rel=1e-5)


def test_what_draws_random_numbers_or_is_compiled_is_not_divided(folder: Path) -> None:
    assert make(folder, "coarse", dropout=0.0).in_parts
    assert not make(folder, "coarse", dropout=0.1).in_parts
    assert not make(folder, "coarse", dropout=0.0, execution=Execution(compile=True)).in_parts


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_with_the_backbones_former_name_goes_on(
    folder: Path, tmp_path: Path, kind: Kind
) -> None:
    whole, resumed = make(folder, kind), make(folder, kind)
    loop.run(whole, tmp_path / "whole", 20, evaluate_every=20)
    first = make(folder, kind)
    for step in range(10):
        first.step(step)
    old = {name.replace(".backbone.", ".trunk."): x for name, x in collect(first.parts()).items()}
    assert {name.split(".")[1] for name in old if name[0] in "me"} == {"trunk", "head"}
    save_state(tmp_path / "old" / "state", 10, old)
    loop.run(resumed, tmp_path / "old", 20, evaluate_every=20)
    for name, value in collect(whole.parts()).items():
        assert torch.equal(collect(resumed.parts())[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected 1 or more"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan, expected more than 0"),
        ({"class_dropout": 1.5}, "class_dropout: got 1.5, expected 0 to 1"),
        ({"ema": -0.1}, "ema: got -0.1"),
        ({"betas": (0.9, 0.95, 0.99)}, "betas: got"),
    ],
)
def test_values_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TRAINING, **change)


# --- training objectives --------------------------------------------------------------------------


def test_training_and_evaluation_may_have_different_objectives(folder: Path) -> None:
    plain = make(folder, "fine")
    corrupted = objectives.corrupted_objective(CLUSTERS, 0.5)
    objective = objectives.fine_objective(CLUSTERS)
    inputs = (plain.model, objective, plain.train, plain.val, TRAINING, ALONE)
    other = Trainer(*inputs, training_objective=corrupted)
    assert other.evaluate()["loss"] == pytest.approx(plain.evaluate()["loss"])
    one, wrong = (float(trainer.step(0)["loss"]) for trainer in (plain, other))
    assert one != pytest.approx(wrong, rel=1e-6)


# --- how a step is computed -----------------------------------------------------------------------


def first_losses(folder: Path, kind: Kind, execution: Execution, dropout: float) -> list[float]:
    trainer = make(folder, kind, dropout=dropout, execution=execution)
    return [float(trainer.step(step)["loss"]) for step in range(6)] + [trainer.evaluate()["loss"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
def test_a_batch_in_parts_is_the_batch(folder: Path, kind: Kind, micro_batch: int) -> None:
    whole, parts = (
        first_losses(folder, kind, execution, 0.0)
        for execution in (DEFAULT_EXECUTION, Execution(micro_batch))
    )
    assert parts == pytest.approx(whole, abs=0 if micro_batch >= 8 else 1e-4)


def test_parts_are_of_that_size(folder: Path) -> None:
    calls: list[tuple[transformers.Model, Tensor, Tensor]] = []
    make(folder, "coarse", watching(calls), execution=Execution(3)).step(0)
    assert [len(codes_BL) for _, codes_BL, _ in calls] == [3, 3, 2]
    assert [classes_B.shape for *_, classes_B in calls] == [(3,), (3,), (2,)]
    calls.clear()
    make(folder, "coarse", watching(calls), execution=Execution(3)).evaluate()
    assert [len(codes_BL) for _, codes_BL, _ in calls] == [3] * 6 + [2]
    with pytest.raises(UserError, match="micro-batch: got 0, expected 1 or more"):
        Execution(0)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_that_are_computed_again_are_the_same(folder: Path, kind: Kind) -> None:
    """With the same dropout, and with less saved for the backward pass."""
    again = Execution(checkpoint_activations=True)
    assert first_losses(folder, kind, again, 0.1) == first_losses(
        folder, kind, DEFAULT_EXECUTION, 0.1
    )
    saved = {}
    for execution in (DEFAULT_EXECUTION, again):
        trainer = make(folder, kind, execution=execution)
        _, (codes_BL, classes_B) = trainer.batches(0)
        saved[execution] = cost.saved_bytes(
            trainer.model, lambda t=trainer, c=codes_BL, k=classes_B: t.trained(c, k)
        )
    assert saved[again] < 0.5 * saved[DEFAULT_EXECUTION]


def test_compiled_is_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels.available("compile", torch.device("cpu")):
        pytest.skip("no compiler")
    compile_, used = torch.compile, []

    def watched(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        compiled = compile_(forward)

        def run(*inputs: Any) -> Tensor:
            used.append(forward)
            return compiled(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", watched)
    compiled = Execution(compile=True, checkpoint_activations=True)
    found, expected = (
        first_losses(folder, "coarse", x, 0.0) for x in (compiled, DEFAULT_EXECUTION)
    )
    assert used and found == pytest.approx(expected, abs=1e-4)


# --- precision ------------------------------------------------------------------------------------


@multiplying_bf16
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_it_learns_the_same(folder: Path, kind: Kind) -> None:
    """Held-out losses within 1 %, and another way of computing; weights and moments stay fp32."""
    losses, lengths = {}, {"steps": 100, "warm_up": 10}
    for precision in ("fp32", "bf16"):
        trainer = make(folder, kind, execution=Execution(precision=precision), **lengths)
        for step in range(100):
            trainer.step(step)
        losses[precision] = trainer.evaluate()["loss"]
        assert {t.dtype for t in collect(trainer.parts()).values()} == {torch.float32}
    untrained = make(folder, kind).evaluate()["loss"]
    assert losses["fp32"] < 0.9 * untrained
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


@multiplying_bf16
def test_a_state_goes_on_in_another_precision(folder: Path, tmp_path: Path) -> None:
    whole = make(folder, "coarse")
    loop.run(whole, tmp_path / "whole", 20, evaluate_every=20)
    first, then = (
        make(folder, "coarse", execution=Execution(precision=precision))
        for precision in ("bf16", "fp32")
    )
    for step in range(10):
        first.step(step)
    save_state(tmp_path / "mixed" / "state", 10, collect(first.parts()))
    loop.run(then, tmp_path / "mixed", 20, evaluate_every=20)
    expected, found = (last_metrics(tmp_path / x, "val")["loss"] for x in ("whole", "mixed"))
    assert found == pytest.approx(expected, rel=0.01) and found != expected


def test_precision_that_the_processor_has_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctf.common.precision.supports_bf16", lambda _: False)
    with pytest.raises(UserError, match="precision bf16: this cpu has no bfloat16 products"):
        make(folder, "coarse", execution=Execution(precision="bf16"))
    assert not make(folder, "coarse", execution=Execution(precision="auto")).in_bf16
