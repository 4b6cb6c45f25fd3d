"""The main job as `make demo` does it, in less time."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from ctf.training import demo


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SCORED", 20)
    said = io.StringIO()
    demo.demo(tmp_path, 0.1, torch.device("cpu"), Console(file=said, width=100))
    text = said.getvalue()
    for name in ("shipped.png", "fitted.png"):
        assert str(tmp_path / name) in text
        with Image.open(tmp_path / name) as sheet:
            # 10 classes of 8 pictures, each enlarged to 64 pixels.
            assert sheet.width > 8 * 64 and sheet.height > 10 * 64
    for row in ("codebook usage", "reconstruction error", "validation loss, fine",
                "class accuracy of 20 samples", "seconds, coarse"):  # fmt: skip
        line = next(line for line in text.splitlines() if row in line)
        assert len([cell for cell in line.split("│") if cell.strip()]) == 3, line
