"""With few images, the weights of the best evaluation are kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.data.image_set import Splits
from ctf.models import points
from ctf.training import fit, loop, recipes, transformers
from ctf.training.best import BestWeights
from ctf.training.model_stage import ModelStage
from ctf.training.start import open_start
from ctf.training.transformers import Trainer, TrainingConfig, best_evaluations, keeps_best
from tests.conftest import Command, read_files, recipe_options

STEPS, BEST = 60, 40
KEEP = "coarse_training.keep=best"


# --- what is kept ---------------------------------------------------------------------------------


def test_the_lowest_loss_is_kept_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    weights = {"w": torch.zeros(2)}
    best = BestWeights(tmp_path, lambda: weights)
    for step, loss in ((20, 3.0), (40, 1.0 / 3), (60, 2.0), (80, 1.0 / 3)):
        weights["w"] = torch.full((2,), float(step))
        best(step, {"loss": loss})
    assert (best.step, best.loss) == (40, 1.0 / 3)
    assert torch.equal(best.load()["w"], torch.full((2,), 40.0))
    again = BestWeights(tmp_path, lambda: weights)  # as when a training is resumed
    assert (again.step, again.loss) == (40, 1.0 / 3)


def test_a_damaged_file_is_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "best.safetensors").write_bytes(b"no tensors")
    best = BestWeights(tmp_path, lambda: {"w": torch.ones(1)})
    assert (best.step, best.loss) == (0, float("inf"))
    assert "best.safetensors" in capsys.readouterr().out
    best(20, {"loss": 1.0})
    assert torch.equal(best.load()["w"], torch.ones(1))


@pytest.mark.parametrize(
    ("keep", "images", "held_out", "expected"),
    [
        ("auto", 300, 30, True),
        ("auto", 300, 9, False),  # too few to tell
        ("auto", 10_000, 1000, False),
        ("best", 60_000, 1000, True),
        ("last", 300, 30, False),
    ],
)
def test_it_is_on_by_default_for_few_images(
    keep: Any, images: int, held_out: int, expected: bool
) -> None:
    assert keeps_best(TrainingConfig(keep=keep), images, held_out) is expected


def test_evaluations_are_frequent_if_they_cost_little() -> None:
    training = TrainingConfig(steps=4000, batch_size=32, evaluate_every=500)
    assert best_evaluations(training, held_out=30) == 200  # 20 times
    assert best_evaluations(training, held_out=1000) == 4000 // 19
    short = TrainingConfig(steps=400, batch_size=32, evaluate_every=300)
    assert best_evaluations(short, held_out=1000) == 300  # 5 % of the time are a single one


# --- trainings ------------------------------------------------------------------------------------


Evaluated = dict[int, dict[str, torch.Tensor]]  # the averaged weights at each step


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Evaluated:
    """Held-out losses that turn after BEST steps."""
    weights: Evaluated = {}

    def evaluate(trainer: Trainer) -> dict[str, float]:
        states = trainer.optimizer.state.values()
        step = max((int(state["step"]) for state in states if "step" in state), default=0)
        weights[step] = {k: v.clone() for k, v in trainer.averaged.state_dict().items()}
        return {"loss": 1 + abs(step - BEST)}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    return weights


def stage(run: Path) -> ModelStage:
    recipe = recipes.adjust(recipes.preset("tiny"), STEPS, [*recipe_options()[1:], KEEP])
    return ModelStage.open(run, "coarse", recipe)


def branch(run: Path, out: Path) -> Path:
    for part in ("tokenizer", "tokens", "clusters"):
        shutil.copytree(run / part, out / part)
    return out


def check_kept(run: Path, evaluated: Evaluated) -> None:
    kept, _ = storage.load_tensors(run / "coarse" / "model.safetensors")
    expected = points.fold(evaluated[BEST])
    assert kept.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.items())


def test_the_weights_of_the_best_evaluation_are_kept_and_recorded(
    run: Path,
    tmp_path: Path,
    evaluated: Evaluated,
    ctf: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = branch(run, tmp_path / "out")
    stage(out).train()
    assert (
        f"coarse: the held-out loss was lowest after {BEST} of {STEPS}" in capsys.readouterr().out
    )
    assert [*evaluated] == [20, 40, 60]
    check_kept(out, evaluated)
    assert json.loads((out / "coarse" / "config.json").read_text())["keep"] == "best"
    assert sorted(read_files(out / "coarse")) == [
        "config.json", "drafts.safetensors", "metrics.jsonl", "model.safetensors",
    ]  # fmt: skip
    last = ctf("train", "coarse", out, "--preset", "tiny", "--steps", STEPS,
               *recipe_options("coarse_training.keep=last"))  # fmt: skip
    assert last.code == 2 and "training.keep was" in last.err


def test_killed_after_the_best_evaluation_it_is_still_kept(
    run: Path, tmp_path: Path, evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def stop(done: int, *_: object) -> None:
        if done == STEPS:
            raise Killed

    out = branch(run, tmp_path / "out")
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    with pytest.raises(Killed):
        stage(out).train(stop)
    assert (out / "coarse" / "state" / "best.safetensors").is_file()
    stage(out).train()
    check_kept(out, evaluated)


def test_trainings_of_earlier_versions_keep_the_last(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "ENOUGH_HELD_OUT", 1)
    recipe = recipes.adjust(recipes.preset("tiny"), 20, recipe_options()[1:])
    out = branch(run, tmp_path / "out")
    assert ModelStage.open(out, "coarse", recipe).keeps_best
    # `run` was trained without: its config.json has no such key.
    assert not ModelStage.open(run, "coarse", recipe).keeps_best


@pytest.mark.usefixtures("evaluated")
def test_metrics_are_those_of_what_was_kept(run: Path, splits: Splits, tmp_path: Path) -> None:
    start, out = open_start(run), tmp_path / "out"
    recipe = start.resolve(splits, steps=STEPS, overrides=[KEEP]).with_steps(20, ["fine"])
    pipe = fit.fit(splits, out, recipe, device=torch.device("cpu"), start=start)
    assert pipe.origin["metrics"]["coarse"] == {"loss": 1, "step": BEST}
    assert pipe.origin["metrics"]["fine"] == {"loss": 1 + BEST - 20}


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(UserError, match="unknown value 'first'"):
        recipes.adjust(recipes.preset("tiny"), None, ["coarse_training.keep=first"])
