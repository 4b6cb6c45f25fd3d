"""A run for TensorBoard: its events are those of metrics.jsonl, whatever happened to the run."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctf.cli import main as cli
from ctf.models import points
from ctf.training import loop, metrics_log, state
from ctf.training import tensorboard as events
from tests.conftest import Command, fit_arguments, read_files


def read(folder: Path) -> EventAccumulator:
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    return read


def scalars(folder: Path) -> set[tuple[str, int, float]]:
    events = read(folder)
    found = [
        (tag, event.step, event.value) for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    ]  # fmt: skip
    assert len(found) == len(set(found))  # no step twice
    return set(found)


def expected(stage: Path) -> set[tuple[str, int, float]]:
    return {
        (f"{line['split']}/{name}", line["step"], float(np.float32(value)))
        for line in metrics_log.read_metrics(stage)
        for name, value in line.items()
        if name not in ("step", "split", "seconds")
    }


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_finished_run(copy: Path, ctf: Command) -> None:
    before = read_files(copy)
    for _ in range(2):  # again: written anew, nothing twice
        result = ctf("runs", "tensorboard", copy, "--once")
        assert result.code == 0 and f"--logdir {copy / 'tensorboard'}" in result.out
        for stage in ("tokenizer", "coarse", "fine"):
            assert scalars(copy / "tensorboard" / stage) == expected(copy / stage)
    (first, *_, last) = read(copy / "tensorboard" / "coarse").Scalars("train/loss")
    lines = [line for line in metrics_log.read_metrics(copy / "coarse") if line["split"] == "train"]
    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
    assert last.wall_time - first.wall_time == pytest.approx(seconds, abs=1e-3)
    images = read(copy / "tensorboard" / "pictures")
    assert set(images.Tags()["images"]) == {"clusters", "samples"}
    (swaps,) = images.Images("clusters")
    assert (swaps.width, swaps.height) == Image.open(copy / "clusters" / "swaps.png").size
    assert {n: c for n, c in read_files(copy).items() if not n.startswith("tensorboard/")} == before


def test_no_step_is_shown_twice(copy: Path) -> None:
    """Steps that a resumed training repeats, here with other values, are not shown twice."""
    stage = copy / "coarse"
    metrics = stage / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(lines[0] + lines[1][:20])  # it is just writing
    mirror = events.ScalarEvents(stage, copy)
    mirror.update()
    assert {step for _, step, _ in scalars(mirror.out)} == {20}
    metrics.write_text("".join(lines))
    mirror.update()
    mirror.update()
    assert scalars(mirror.out) == expected(stage)
    changed = {**json.loads(lines[1]), "loss": 7.0}
    metrics.write_text(lines[0])  # resumed after step 20
    live = read(mirror.out)  # a TensorBoard that is open all the time
    mirror.update()
    metrics.write_text(lines[0] + json.dumps(changed) + "\n" + lines[2])
    mirror.update()
    assert scalars(mirror.out) == expected(stage)
    live.Reload()
    assert [(e.step, e.value) for e in live.Scalars("train/loss")][1:] == [(40, 7.0)]


def test_images_are_written_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[str] = []
    monkeypatch.setattr(
        events.card, "sample_sheet", lambda pipe: sampled.append("x") or Image.new("L", (8, 8))
    )
    fine = copy / "fine" / "model.safetensors"
    content = fine.read_bytes()
    fine.unlink()
    images = events.ImageEvents(copy)
    images.update()
    assert not sampled  # no fine model yet
    fine.write_bytes(content)
    images.update()
    images.update()
    assert sampled == ["x"]


def test_samples_of_a_training_in_progress(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after 20 steps of a stage, with a state saved: sampled with its averaged weights."""

    def averaged(states: Path) -> dict[str, torch.Tensor]:
        return points.fold(state.without_prefix(state.load_state(states, 20), "ema."))

    def stop_in(stage: str) -> None:
        save = state.save_state

        def save_and_stop(folder: Path, *args: Any) -> None:
            save(folder, *args)
            if folder.parent.name == stage:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(loop, "SAVE_SECONDS", -1.0)
            patch.setattr(state, "save_state", save_and_stop)
            assert cli.main(fit_arguments(image_folder, tmp_path / "run")) == 130

    run = tmp_path / "run"
    samples = {stage: events.SampleEvents(run, stage, 20) for stage in ("coarse", "fine")}

    def sampled(stage: str) -> list[int]:
        samples[stage].update()
        folder = run / events.FOLDER / f"samples-{stage}"
        if not folder.is_dir():
            return []
        return [event.step for event in read(folder).Images("samples")]

    stop_in("tokenizer")
    assert sampled("coarse") == []
    stop_in("coarse")
    assert sampled("coarse") == [20] and sampled("coarse") == [20] and sampled("fine") == []
    pipe = events.load_unfinished(run)
    tensors = averaged(run / "coarse" / "state")
    assert torch.equal(pipe.coarse.head.weight, tensors["head.weight"])
    assert pipe.fine is not None and not pipe.fine.head.weight.any()
    stop_in("fine")
    assert sampled("coarse") == [20] and sampled("fine") == [20]
    pipe = events.load_unfinished(run)
    tensors = averaged(run / "fine" / "state")
    assert pipe.fine is not None
    assert torch.equal(pipe.fine.head.weight, tensors["head.weight"])
    # A mirror that is started again shows no step twice.
    samples["fine"] = events.SampleEvents(run, "fine", 20)
    assert sampled("fine") == [20]
    assert events.SampleEvents(run, "fine", 21).update() is None and sampled("fine") == [20]


def test_without_tensorboard(copy: Path, ctf: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = ctf("runs", "tensorboard", copy, "--once")
    assert result.code == 2 and "pip install 'ctf[tensorboard]'" in result.err


def test_it_can_be_started_first(tmp_path: Path, ctf: Command) -> None:
    result = ctf("runs", "tensorboard", tmp_path, "--dry-run")
    assert result.code == 0 and "nothing yet" in result.out and list(tmp_path.iterdir()) == []
    result = ctf("runs", "tensorboard", tmp_path, "--once", "--samples-every", -1)
    assert result.code == 2 and "samples-every: got -1, expected 0 or more" in result.err
    result = ctf("runs", "tensorboard", tmp_path / "none", "--once")
    assert result.code == 2 and "not found" in result.err
    assert ctf("runs", "tensorboard", tmp_path, "--once").code == 0
    assert list(tmp_path.iterdir()) == []  # so a run can still begin there
