"""examples/own_folder.py runs, on a folder of its own making."""

import runpy
from pathlib import Path

from PIL import Image

from ctf import Pipeline

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_folder.py"


def test_it_trains_samples_and_saves(tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    runpy.run_path(str(EXAMPLE))["main"](folder, out, steps=2)
    assert len(list(folder.glob("*/*.png"))) == 200
    assert (out / "run" / "fit.json").is_file()
    with Image.open(out / "samples.png") as grid:
        assert grid.width > 8 * 64
    assert Pipeline.from_pretrained(out / "pipeline").class_names == ("disc", "square")
