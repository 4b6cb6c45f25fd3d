"""examples/custom_tokenizer.py runs; all that a pipeline does works with such a tokenizer."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ctf import Pipeline, UserError

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_tokenizer.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_a_sheet_of_all_classes(example: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    example["main"](out, steps=2, images=100)
    with Image.open(out) as sheet:
        assert sheet.width // 64 == 8 and sheet.height // (64 + 20) == 10


def test_patches_are_decoded_where_they_were(example: dict[str, Any]) -> None:
    squares = (torch.arange(9 * 16) * 7 % 5 % 2).view(9, 1, 4, 4) * 2.0 - 1
    images_BCHW = squares.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    tokenizer = example["PatchTokenizer"](images_BCHW, codebook_size=2)
    codes_BL = tokenizer.encode(images_BCHW)
    assert codes_BL.shape == (9, 16) and codes_BL.unique().tolist() == [0, 1]
    decoded_BCHW = tokenizer.decode_vectors(tokenizer.codebook()[codes_BL])
    torch.testing.assert_close(decoded_BCHW, images_BCHW)


def test_known_codes_previews_and_streams(example: dict[str, Any], tmp_path: Path) -> None:
    pipe: Pipeline = example["main"](tmp_path / "sheet.png", steps=1, images=50)
    codes_BL = pipe.encode([Image.new("RGB", (40, 40), "grey")])
    known_L = torch.arange(codes_BL.shape[1]) < 40
    out = pipe.sample(["bag", "coat"], codes=codes_BL, known=known_L)
    assert torch.equal(out.codes[:, :40], codes_BL[:, :40].expand(2, -1))
    assert len(pipe.preview(out.coarse)) == 2
    *_, last = pipe.stream(["bag", "coat"], codes=codes_BL, known=known_L)
    assert last.samples is not None and torch.equal(last.samples.codes, out.codes)
    with pytest.raises(UserError, match="with a PatchTokenizer cannot be saved"):
        pipe.save_pretrained(tmp_path / "saved")
