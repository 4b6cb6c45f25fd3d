"""Odd names of files and classes, through all commands: bytes, markup, commas, quotes, dashes."""

import json
import os
from pathlib import Path

import numpy as np

from ctf.pipelines.pipeline import Pipeline
from tests.conftest import SIDE, Command, disc_image, recipe_options

# The first is Latin-1, and so no UTF-8.
CLASSES = [b"caf\xe9", b"[red]", b"tench, Tinca tinca", b"-x", "\u72ac \U0001f600".encode(), b'"q"']
FILES = [b"a\xff.png", b"[b].png", b" a\nb.png", b"-y.png", b"it's.png"]


def test_odd_names_go_through_all_commands(ctf: Command, tmp_path: Path) -> None:
    images, run = tmp_path / "images", tmp_path / "r\udcff [b] $\\x$"
    for i, name in enumerate(CLASSES):
        folder = images / os.fsdecode(name)
        folder.mkdir(parents=True)
        for j, file in enumerate(FILES):
            disc_image(i / len(CLASSES), seed=j).save(os.fsencode(folder) + b"/" + file, "png")
        (folder / os.fsdecode(b"bad\xfe[x].png")).write_bytes(b"\x89PNG\r\n\x1a\n")
    options = ["--image-size", SIDE, "--preset", "tiny", "--steps", 1, *recipe_options()]
    refused = ctf("fit", images, "--out", run, *options)
    assert refused.code == 2 and r"caf\xe9/bad\xfe[x].png" in refused.err
    trained = ctf("fit", images, "--out", run, "--skip-bad", *options)
    assert trained.code == 0, trained.err
    assert all(name in trained.out for name in ("[red] (5)", r"caf\xe9 (5)", "tench, Tinca tinca"))

    pipe = Pipeline.from_pretrained(run)
    assert {*pipe.class_names} == {os.fsdecode(name) for name in CLASSES}
    for number, name in enumerate(pipe.class_names):
        result = ctf(
            "sample", run, f"--classes={name}", "--count", 1, "--out", tmp_path / "samples"
        )
        assert result.code == 0, result.err
        stored = json.loads((tmp_path / "samples" / "settings.json").read_text())
        assert stored["classes"] == [number] and stored["model"] == str(run)
    assert ctf("sample", run, "--count", 1, "--out", tmp_path / "s\udcff.png").code == 0
    again = ctf("sample", "--settings", tmp_path / "samples", "--out", tmp_path / "again")
    assert again.code == 0, again.err

    scored = ctf(
        "evaluate", run, "--reference", images, "--skip-bad", "--split", "all", "--samples", 12,
        "--out", tmp_path / "scores\udcff",
    )  # fmt: skip
    assert scored.code == 0, scored.err
    with np.load(tmp_path / "scores\udcff" / "samples.npz") as samples:
        assert len(samples["arr_0"]) == 12
    assert ctf("runs", "show", run, "--out", tmp_path / "curves.png").code == 0

    pipe.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert r"caf\xe9; " in card and "[red]" in card
    assert Pipeline.from_pretrained(tmp_path / "saved").class_names == pipe.class_names
