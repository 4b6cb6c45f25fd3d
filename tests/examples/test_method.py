"""examples/method.py runs, from the parts of the method alone."""

import ast
import runpy
from pathlib import Path

from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "method.py"


def test_a_sheet_of_all_classes(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    runpy.run_path(str(EXAMPLE))["main"](out, steps=2, images=100)
    with Image.open(out) as sheet:
        assert sheet.width // 84 == 8 and sheet.height // (84 + 20) == 10


def test_it_needs_models_and_data_alone_and_fits_on_a_few_pages() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    modules = [n.module or "" for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
    rooms = {module.split(".")[1] for module in modules if module.startswith("ctf.")}
    assert rooms == {"models", "data"}
    assert len(text.splitlines()) <= 150
