"""Several commands at once: one process at a time in a folder, whatever the command."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from ctf.common import locks
from tests.cli.helpers import LLAMAGEN
from tests.conftest import Command, fit_arguments, read_files, recipe_options
from tests.held import end, held_by_another

SIZE = ["--image-size", 32]
TINY = ["--preset", "tiny", "--steps", "2", *recipe_options()]


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("new", fit_arguments(Path("IMAGES"), Path("NEW"))),
        ("new/tokenizer", ["tokenizer", "train", "IMAGES", "--out", "NEW", *TINY]),
        ("run/tokens", ["tokens", "extract", "IMAGES", "--run", "RUN", "--preset", "tiny"]),
        ("run/clusters", ["clusters", "fit", "RUN", "--count", 8]),
        ("run/coarse", ["train", "coarse", "RUN", *TINY]),
        ("new", ["train", "baseline", "RUN", "--out", "NEW", *TINY]),
        ("new", ["classifier", "train", "IMAGES", "--out", "NEW", "--steps", 2, *SIZE]),
        ("new", ["sample", "RUN", "--count", 1, "--out", "NEW"]),
        ("new", ["evaluate", "RUN", "--reference", "IMAGES", "--samples", 30, "--out", "NEW"]),
        ("new", ["bench", "sample", "--sizes", "B", "--batches", 1, "--out", "NEW"]),
        (
            "new",
            ["convert", "llamagen", "--vq", LLAMAGEN / "vq.pt", "--gpt", LLAMAGEN / "gpt.pt",
             "--image-size", 8, "--out", "NEW"],
        ),
    ],
)  # fmt: skip
def test_a_folder_in_use_is_refused(
    ctf: Command, run: Path, image_folder: Path, tmp_path: Path, folder: str, command: list[Any]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    if folder == "run/coarse":
        (tmp_path / folder / "model.safetensors").unlink()
    paths = {"RUN": tmp_path / "run", "IMAGES": image_folder, "NEW": tmp_path / "new"}
    arguments = [paths.get(str(word), word) for word in command]
    with held_by_another(tmp_path / folder) as pid:
        before = read_files(tmp_path)
        result = ctf(*arguments)
        assert result.code == 2, result
        assert f"{tmp_path / folder}: in use by process {pid} on " in result.err
        assert "choose another folder" in result.err and "Traceback" not in result.err
        assert read_files(tmp_path) == before


def test_a_killed_command_does_not_lock_its_folder(
    ctf: Command, image_folder: Path, tmp_path: Path
) -> None:
    command = fit_arguments(image_folder, tmp_path / "run", steps=2)
    with held_by_another(tmp_path / "run") as pid:
        assert ctf(*command).code == 2
        end(pid, signal.SIGKILL)
        assert (tmp_path / "run" / locks.NAME).exists()
        assert ctf(*command).code == 0
    assert not list((tmp_path / "run").rglob(locks.NAME))
