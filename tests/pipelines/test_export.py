"""Samples as files, and settings files that reproduce them; through `ctf sample`."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ctf.cli import main as cli
from ctf.common.errors import Stopped
from ctf.pipelines import export
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import Command, read_files
from tests.pipelines.helpers import LENGTH, same


@pytest.fixture
def written(ctf: Command, run: Path, tmp_path: Path) -> Path:
    """A folder with two samples of each of two classes."""
    out = tmp_path / "written"
    options = ["--classes", "red,0", "--count", 2, "--seed", 5, "--guidance", 3]
    assert ctf("sample", run, *options, "--out", out).code == 0
    return out


def test_settings_are_stored_as_keywords_of_sample(ctf: Command, run: Path, tmp_path: Path) -> None:
    options = ["--guidance", 4, "--guidance-window", 0.25, 0.75, "--guidance-schedule", "linear"]
    result = ctf("sample", run, "--count", 1, *options, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    stored = json.loads((tmp_path / "out" / "settings.json").read_text())["sampling"]
    assert stored["guidance_window"] == [0.25, 0.75] and stored["guidance_schedule"] == "linear"
    pipe = Pipeline.from_pretrained(run)
    expected = pipe.sample(
        [0, 1, 2], guidance=4.0, guidance_window=(0.25, 0.75), guidance_schedule="linear"
    )
    assert same(pipe.sample([0, 1, 2], **stored), expected)
    with np.load(tmp_path / "out" / "codes.npz") as codes:
        assert (codes["codes"] == expected.codes.numpy()).all()


def test_settings_sample_a_folder_again(
    ctf: Command, run: Path, written: Path, tmp_path: Path
) -> None:
    command = ("sample", run, "--settings", written / "settings.json", "--out", tmp_path / "again")
    planned = ctf(*command, "--dry-run")
    assert planned.code == 0 and "would sample " in planned.out
    assert not (tmp_path / "again").exists()
    result = ctf(*command)
    assert result.code == 0, result.err
    first, second = (folder / "settings.json" for folder in (written, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
    with np.load(written / "codes.npz") as a, np.load(tmp_path / "again" / "codes.npz") as b:
        assert all((a[name] == b[name]).all() for name in a.files)


def test_settings_beside_samples_name_their_pipeline(
    ctf: Command, run: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    assert ctf("sample", run.name, "--count", 3, "--out", tmp_path / "a").code == 0
    monkeypatch.chdir(tmp_path)
    for settings in ("a/settings.json", "a"):
        result = ctf("sample", "--settings", settings, "--out", "b")
        assert result.code == 0, result.err
        assert read_files(tmp_path / "a") == read_files(tmp_path / "b")


def test_settings_whose_pipeline_has_moved_take_another_name(
    ctf: Command, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert ctf("sample", tmp_path / "run", "--count", 1, "--out", tmp_path / "a").code == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    command = ("--settings", tmp_path / "a", "--out", tmp_path / "b")
    result = ctf("sample", *command)
    assert result.code == 2 and "say where it is now: ctf sample MODEL --settings" in result.err
    assert len(result.err.splitlines()) == 2
    assert ctf("sample", tmp_path / "moved", *command).code == 0
    first, second = read_files(tmp_path / "a"), read_files(tmp_path / "b")
    assert json.loads(second.pop("settings.json"))["model"] == str(tmp_path / "moved")
    del first["settings.json"]
    assert first == second


def test_settings_for_another_pipeline_are_told(
    ctf: Command, run: Path, written: Path, tmp_path: Path
) -> None:
    path = tmp_path / "settings.json"
    path.write_text(
        json.dumps({**json.loads((written / "settings.json").read_text()), "weights": "0" * 64})
    )
    result = ctf("sample", run, "--settings", path, "--out", tmp_path / "out")
    assert result.code == 0 and "sampled from another pipeline" in result.out
    result = ctf("sample", "--settings", path, "--out", tmp_path / "out")
    assert result.code == 2 and "sampled from another pipeline" in result.err


def test_settings_beside_an_evaluation_sample_its_images(
    ctf: Command, run: Path, image_folder: Path, tmp_path: Path
) -> None:
    options = ["--reference", image_folder, "--samples", 12, "--balance", "uniform", "--seed", 4]
    result = ctf("evaluate", run, *options, "--guidance", 3, "--out", tmp_path / "scores")
    assert result.code == 0, result.err
    command = ("sample", "--settings", tmp_path / "scores", "--engine", "eager")
    result = ctf(*command, "--out", tmp_path / "again")
    assert result.code == 0, result.err
    with np.load(tmp_path / "scores" / "samples.npz") as samples:
        for i, pixels in enumerate(samples["arr_0"]):
            with Image.open(tmp_path / "again" / f"{i:06d}.png") as image:
                assert (np.asarray(image) == pixels).all()


def test_samples_of_another_versions_random_numbers_are_not_continued(
    ctf: Command, run: Path, written: Path, tmp_path: Path
) -> None:
    """Folders from before there was a version of them, too."""
    settings = json.loads((written / "settings.json").read_text())
    assert settings.pop("noise_version") == 2
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    result = ctf("sample", "--settings", path, "--out", tmp_path / "out")
    assert result.code == 0 and "the random numbers of another version of ctf" in result.out
    assert (tmp_path / "out" / "settings.json").read_bytes() == (
        written / "settings.json"
    ).read_bytes()
    begun = tmp_path / "begun" / export.BEGUN
    begun.mkdir(parents=True)
    request = {"settings": settings, "weights": settings["weights"], "exact": True}
    (begun / export.REQUEST).write_text(json.dumps(request))
    (begun.parent / "settings.json").write_text(json.dumps(settings))
    result = ctf("sample", "--settings", written, "--out", begun.parent)
    assert result.code == 2 and "settings.noise_version was null, now 2" in result.err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "windows"])
def test_settings_edited_elsewhere_are_read(
    ctf: Command, run: Path, written: Path, tmp_path: Path, encoding: str
) -> None:
    text, path = (written / "settings.json").read_text(), tmp_path / "settings.json"
    path.write_bytes(
        text.encode("utf-8-sig") if encoding == "utf-8-sig" else text.replace("\n", "\r\n").encode()
    )
    assert ctf("sample", "--settings", path, "--out", tmp_path / "out").code == 0


@pytest.mark.parametrize(("count", "width"), [(2, 2 * 68 + 4), (1, 32)])
def test_settings_sample_a_sheet_or_a_single_image(
    ctf: Command, run: Path, written: Path, tmp_path: Path, count: int, width: int
) -> None:
    settings = json.loads((written / "settings.json").read_text())
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({**settings, "count": count, "classes": [2]}))
    assert ctf("sample", run, "--settings", path, "--out", tmp_path / "out.png").code == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.width == width


def test_known_codes_and_labels_are_part_of_the_settings(sharp: Pipeline) -> None:
    known = tuple(i < LENGTH // 2 for i in range(LENGTH))
    settings = export.Settings((1,), 2, 7, sharp.sampling, codes=tuple(range(LENGTH)), keep=known)
    completed = export.sample(sharp, settings)
    assert completed.codes[:, : LENGTH // 2].tolist() == [list(range(LENGTH // 2))] * 2
    labels = tuple(completed.coarse[0].tolist())
    refined = export.sample(sharp, export.Settings((1,), 2, 7, sharp.sampling, coarse=labels))
    assert refined.coarse.tolist() == [list(labels)] * 2


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model": None}, [], "names no model, expected e.g."),
        ({"weights": "0" * 64}, [], "sampled from another pipeline"),
        ({}, ["--guidance", 2], "remove --guidance"),
        ({}, ["--seed", 2], "remove --seed"),
        ({"sed": 1}, [], "unknown key 'sed'"),
        ({"model": "nowhere"}, [], "no pipeline 'nowhere'"),
        ({"classes": [5]}, [], "class 5 of 3"),
        ({"count": 0}, [], "count is 0"),
        ({"coarse": [0] * LENGTH, "codes": [0] * LENGTH}, [], "got coarse and codes"),
        ({"codes": [0] * LENGTH}, [], "expected both or neither"),
        ({"coarse": [0] * 3}, [], "coarse: got shape (3,)"),
        ({"coarse": [2**64] * LENGTH}, [], "whole numbers of 64 bits"),
    ],
)
def test_errors_in_settings(
    ctf: Command,
    run: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    options: list[str],
    message: str,
) -> None:
    path, out = tmp_path / "settings.json", tmp_path / "out.png"
    settings = {"classes": [0], "count": 1, "seed": 0, "sampling": {}, "model": str(run)}
    path.write_text(json.dumps({**settings, **changes}))
    result = ctf("sample", *options, "--settings", path, "--out", out)
    assert result.code == 2 and message in result.err, result
    assert len(result.err.splitlines()) <= 2 and "Traceback" not in result.err
    assert not out.exists()


def test_a_model_or_settings_are_required(ctf: Command) -> None:
    result = ctf("sample")
    assert result.code == 2 and "got no model" in result.err


# --- interrupted ----------------------------------------------------------------------------------


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "BATCH_SIZE", 4)


def interrupt_after(batches: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make the batch after so many fail, as Ctrl-C or a full disk do."""
    sample, calls = Pipeline.sample, []

    def interrupted(self: Pipeline, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > batches:
            raise error
        return sample(self, *args, **options)

    monkeypatch.setattr(Pipeline, "sample", interrupted)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "what is finished is kept, run the same command again"),
        (Stopped("stopped; run it again to resume"), 0, "run it again to resume"),
    ],
)
def test_an_interrupted_command_continues_and_ends_with_the_same_files(
    ctf: Command,
    run: Path,
    tmp_path: Path,
    small_batches: None,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    options = ["--count", 6, "--seed", 3]
    assert ctf("sample", run, *options, "--out", tmp_path / "at-once").code == 0
    out = tmp_path / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(3, patch, error)
        result = ctf("sample", run, *options, "--out", out)
    assert result.code == code and message in result.out + result.err
    kept = read_files(out)
    assert [name for name in kept if name.endswith(".png")] == [f"{i:06d}.png" for i in range(12)]
    assert "codes.npz" not in kept and export.is_unfinished(out)
    times = {i: (out / f"{i:06d}.png").stat().st_mtime_ns for i in range(12)}

    refused = ctf("sample", run, "--count", 5, "--seed", 3, "--out", out)
    assert refused.code == 2 and "12 images of other settings" in refused.err
    assert "settings.count was 6, now 5" in refused.err and read_files(out) == kept
    refused = ctf("evaluate", out, "--reference", "fashion-mnist")
    assert refused.code == 2 and "not finished" in refused.err

    assert ctf("sample", run, *options, "--out", out).code == 0
    assert read_files(out) == read_files(tmp_path / "at-once")
    assert times == {i: (out / f"{i:06d}.png").stat().st_mtime_ns for i in range(12)}
    assert ctf("sample", run, "--count", 1, "--out", out).code == 0  # finished ones are replaced


def kill_after(files: int) -> None:
    """Make this process kill itself after it wrote so many files."""
    replace, written = os.replace, itertools.count(1)

    def counted(*args: Any) -> None:
        replace(*args)
        if next(written) == files:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted  # type: ignore[assignment]


def test_killed_at_any_write_samples_end_the_same(
    ctf: Command, run: Path, tmp_path: Path, small_batches: None
) -> None:
    command = [str(word) for word in ("sample", run, "--count", 2, "--seed", 3, "--out")]
    assert ctf(*command, tmp_path / "at-once").code == 0
    out, attempt, status = tmp_path / "killed", 0, 1
    while status:
        attempt += 1
        if (pid := os.fork()) == 0:
            kill_after(attempt)
            os._exit(cli.main([*command, str(out)]))
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL)
    assert attempt > 2
    assert read_files(out) == read_files(tmp_path / "at-once")


def test_an_interrupted_sheet_continues(
    ctf: Command, run: Path, tmp_path: Path, small_batches: None
) -> None:
    command = ["sample", run, "--count", 3, "--out"]
    assert ctf(*command, tmp_path / "at-once.png").code == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(2, patch, KeyboardInterrupt())
        assert ctf(*command, tmp_path / "sheet.png").code == 130
    assert not (tmp_path / "sheet.png").exists()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(1, patch, AssertionError("sampled again"))
        assert ctf(*command, tmp_path / "sheet.png").code == 0
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "at-once.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at-once.png", "sheet.png"]


def test_a_deleted_image_is_sampled_again(
    ctf: Command, run: Path, tmp_path: Path, small_batches: None
) -> None:
    options = ["--count", 3, "--out"]
    assert ctf("sample", run, *options, tmp_path / "at-once").code == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(2, patch, KeyboardInterrupt())
        ctf("sample", run, *options, tmp_path / "out")
    (tmp_path / "out" / "000001.png").unlink()
    assert ctf("sample", run, *options, tmp_path / "out").code == 0
    assert read_files(tmp_path / "out") == read_files(tmp_path / "at-once")
