"""Monitoring: the table has what the files have, and the image shows every run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from ctf.common.errors import UserError
from ctf.training import monitoring
from tests.conftest import STEPS, Command, read_files


def has(image: Path, color: str) -> bool:
    pixels = np.asarray(Image.open(image).convert("RGB")).reshape(-1, 3)
    expected = np.round(255 * np.array(to_rgb(color)))
    return bool((np.abs(pixels - expected).max(1) <= 2).any())


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run(run: Path, tmp_path: Path, ctf: Command) -> None:
    before = read_files(run)
    result = ctf("runs", "show", run, "--out", tmp_path / "curves.png")
    assert result.code == 0, result.err
    head, *rows, written = result.out.splitlines()
    assert head.split("  ")[0] == "run" and written == str(tmp_path / "curves.png")
    assert [row.split()[1] for row in rows] == ["tokenizer", "coarse", "fine"]
    for row, key, held_out in zip(
        rows, ("reconstruction", "loss", "loss"), ("mse", "loss", "loss"), strict=True
    ):
        name, stage, steps, train, val, speed, unit, seconds = row.split()
        *_, last, evaluated = lines(run / stage)
        assert (name, steps, "finished" in row) == ("run", f"{STEPS}/{STEPS}", False)
        assert train == f"{last[key]:.4f}" and val == f"{evaluated[held_out]:.4f}"
        counted = "images_per_second" if stage == "tokenizer" else "tokens_per_second"
        assert float(speed.replace(",", "")) == pytest.approx(last[counted], abs=0.51)
        assert unit == counted.replace("_per_second", "/s")
        assert float(seconds) == pytest.approx(last["seconds"], abs=0.51)
    assert has(tmp_path / "curves.png", "C0") and not has(tmp_path / "curves.png", "C1")
    assert read_files(run) == before


def test_several_runs_and_one_in_training(run: Path, tmp_path: Path, ctf: Command) -> None:
    other, out = tmp_path / "other", tmp_path / "curves.png"
    shutil.copytree(run / "coarse", other / "coarse")
    (other / "coarse" / "model.safetensors").unlink()
    with open(other / "coarse" / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "spl')  # being written just now
    result = ctf("runs", "show", run, other, "--out", out)
    assert result.code == 0, result.err
    rows = result.out.splitlines()[1:-1]
    assert [row.endswith("not finished") for row in rows] == [False, False, False, True]
    assert has(out, "C0") and has(out, "C1")
    width, height = Image.open(out).size
    ctf("runs", "show", other, "--out", out)  # one stage instead of three
    assert Image.open(out).size[0] < width / 2 and Image.open(out).size[1] == height


def test_a_folder_that_is_a_stage_itself(run: Path) -> None:
    (training,) = monitoring.load_trainings(run / "fine")
    assert (training.run, training.stage) == ("fine", "fine")
    assert (training.steps, training.finished) == (STEPS, True)


def test_many_lines_are_smoothed() -> None:
    assert monitoring.smooth([1.0, 5.0, 3.0]) == [1.0, 5.0, 3.0]
    straight = [float(i) for i in range(800)]
    assert monitoring.smooth(straight) == pytest.approx(straight)  # it doesn't lag behind
    noise = np.random.default_rng(0).normal(size=800)
    assert np.std(monitoring.smooth(list(noise))) < 0.5


def test_mistakes(run: Path, tmp_path: Path, ctf: Command) -> None:
    for arguments, message in (
        ((tmp_path,), "no training has logged anything there"),
        ((run, "--out", tmp_path / "curves.pdf"), "expected a name that ends in .png"),
        ((), "got no run"),
    ):
        result = ctf("runs", "show", *arguments)
        assert result.code == 2 and message in result.err
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not the configuration of a training"):
        monitoring.load_trainings(tmp_path)
    before = list(tmp_path.iterdir())
    result = ctf("runs", "show", run, "--out", tmp_path / "curves.png", "--dry-run")
    assert result.code == 0 and "coarse" in result.out
    assert list(tmp_path.iterdir()) == before
