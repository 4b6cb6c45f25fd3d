"""examples/inpainting.py runs."""

import runpy
from pathlib import Path

from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "inpainting.py"


def test_each_image_has_a_row_with_its_completions(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    runpy.run_path(str(EXAMPLE))["main"](out, images=2, completions=3)
    with Image.open(out) as sheet:
        columns, rows = sheet.width // 64, sheet.height // (64 + 20)
    assert (columns, rows) == (2 + 3, 2)
