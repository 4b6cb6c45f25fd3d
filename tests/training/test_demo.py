"""`ctf demo`, in less time."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from ctf.pipelines.folder import shipped_pipelines
from ctf.training import demo, fit
from tests.conftest import disc_image


def test_it_compares_the_shipped_and_a_fitted_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SCORED", 20)
    monkeypatch.setattr(demo, "COLUMNS", 2)
    monkeypatch.setattr(fit, "MEASURED_IMAGES", 200)
    output = io.StringIO()
    demo.demo(tmp_path, 0.1, torch.device("cpu"), Console(file=output, width=100))
    text = output.getvalue()
    others = [f"{name}.png" for name in shipped_pipelines() if name != "fashion-mnist"]
    for name in ("shipped.png", *others, "fitted.png"):
        assert str(tmp_path / name) in text
        with Image.open(tmp_path / name) as sheet:
            # 10 classes of 2 images, each enlarged to 64 pixels.
            assert sheet.width > 2 * 64 and sheet.height > 10 * 64
    for row in ("codebook usage", "reconstruction error", "validation loss, fine",
                "class accuracy of 20 samples", "seconds, coarse"):  # fmt: skip
        line = next(line for line in text.splitlines() if row in line)
        assert len([cell for cell in line.split("│") if cell.strip()]) == 3, line


def test_of_other_images_only_the_fitted_one_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "COLUMNS", 1)
    for i in range(24):
        folder = tmp_path / "images" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        disc_image(0.1 * i, i).resize((64, 64)).save(folder / f"{i}.png")
    output = io.StringIO()
    console = Console(file=output, width=100)
    demo.demo(tmp_path / "out", 0.05, torch.device("cpu"), console, str(tmp_path / "images"))
    assert (tmp_path / "out" / "fitted.png").is_file()
    assert not (tmp_path / "out" / "shipped.png").exists()
    text = output.getvalue()
    assert "class accuracy" not in text and "shipped" not in text
    line = next(line for line in text.splitlines() if "reconstruction PSNR" in line)
    assert len([cell for cell in line.split("│") if cell.strip()]) == 2
