"""`ctf bench tokens`: both ways are timed in turn, and the table has all results."""

import functools
import json
from pathlib import Path

import pytest
import torch

from ctf.bench import tokens
from ctf.bench.shapes import Shapes
from ctf.common.precision import supports_bf16
from ctf.models.tokenizer import VQModel
from tests.conftest import Command


def test_extraction_is_timed_in_turn(tokenizer: VQModel) -> None:
    plain, ours = tokens.time_extraction(2, 3, torch.device("cpu"), tokenizer)
    assert len(plain) == len(ours) == 3 and min(*plain, *ours) > 0


def test_command(
    ctf: Command, tmp_path: Path, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "measure", functools.partial(tokens.measure, shapes=shapes))
    out = tmp_path / "found.json"
    small = ("--images", 5000, "--encoded", 1, "--rounds", 1, "--out", out)
    result = ctf("bench", "tokens", *small)
    assert result.code == 0 and "opening 5,000 images" in result.out
    found = json.loads(out.read_text())
    assert found["reader"]["images"] == 5000 and found["extraction_ratio"]["fp32"] > 0
    low = supports_bf16(torch.device("cpu"))
    assert ("codes in bf16 that are equal in fp32" in result.out) == low
    assert not low or 0.9 < found["extraction"]["bf16"]["equal_codes"] < 1


def test_a_number_below_1_is_an_error(ctf: Command) -> None:
    result = ctf("bench", "tokens", "--images", 0)
    assert result.code == 2 and "images: got 0, expected 1 or more" in result.err
