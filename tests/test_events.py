"""A run for TensorBoard: the events are those of metrics.jsonl, whatever happened to the run."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, files
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctf import events, loop


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
        for line in loop.read_metrics(stage)
        for name, value in line.items()
        if name not in ("step", "split", "seconds")
    }


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_finished_run(copy: Path, ctf: Command) -> None:
    before = files(copy)
    for _ in range(2):  # again: written anew, nothing twice
        result = ctf("runs", "tensorboard", copy, "--once")
        assert result.code == 0 and f"--logdir {copy / 'tensorboard'}" in result.out
        for stage in ("tokenizer", "coarse", "fine"):
            assert scalars(copy / "tensorboard" / stage) == expected(copy / stage)
    (first, *_, last) = read(copy / "tensorboard" / "coarse").Scalars("train/loss")
    lines = [line for line in loop.read_metrics(copy / "coarse") if line["split"] == "train"]
    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
    assert last.wall_time - first.wall_time == pytest.approx(seconds, abs=1e-3)
    pictures = read(copy / "tensorboard" / "pictures")
    assert set(pictures.Tags()["images"]) == {"clusters", "samples"}
    (swaps,) = pictures.Images("clusters")
    assert (swaps.width, swaps.height) == Image.open(copy / "clusters" / "swaps.png").size
    assert {n: c for n, c in files(copy).items() if not n.startswith("tensorboard/")} == before


def test_a_training_that_goes_on_and_one_that_is_resumed(copy: Path) -> None:
    """What a resumed training dropped is made again, with other values here; nothing is doubled."""
    stage = copy / "coarse"
    metrics = stage / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(lines[0] + lines[1][:20])  # it is just writing
    mirror = events._Stage(stage, copy)
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


def test_pictures_are_drawn_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        events.card, "picture", lambda pipe: drawn.append("x") or Image.new("L", (8, 8))
    )
    fine = copy / "fine" / "model.safetensors"
    content = fine.read_bytes()
    fine.unlink()
    pictures = events._Pictures(copy)
    pictures.update()
    assert not drawn  # no fine model yet
    fine.write_bytes(content)
    pictures.update()
    pictures.update()
    assert drawn == ["x"]


def test_without_tensorboard(copy: Path, ctf: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = ctf("runs", "tensorboard", copy, "--once")
    assert result.code == 2 and "pip install 'ctf[tensorboard]'" in result.err


def test_it_can_be_started_first(tmp_path: Path, ctf: Command) -> None:
    result = ctf("runs", "tensorboard", tmp_path, "--dry-run")
    assert result.code == 0 and "nothing yet" in result.out and list(tmp_path.iterdir()) == []
    result = ctf("runs", "tensorboard", tmp_path / "none", "--once")
    assert result.code == 2 and "not found" in result.err
    assert ctf("runs", "tensorboard", tmp_path, "--once").code == 0
    assert list(tmp_path.iterdir()) == []  # so a run can still be made there
