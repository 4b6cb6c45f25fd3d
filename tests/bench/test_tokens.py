"""`ctf bench tokens`: what it compares is the same work, and it says what it found."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ctf.bench import tokens as tokens_bench
from ctf.common.precision import supports_bf16
from ctf.data.extraction import TokensConfig, extract
from ctf.data.image_set import Splits
from ctf.data.tokens import Tokens
from ctf.data.transforms import VIEWS
from ctf.models.sizes import TOKENIZERS
from ctf.models.tokenizer import VQModel
from tests.conftest import Command


@pytest.fixture
def tokenizer() -> VQModel:
    torch.manual_seed(0)
    small = dataclasses.replace(
        TOKENIZERS["VQ-16"], image_size=32, channels=16, latent_channels=16, groups=8,
        codebook_size=256,
    )  # fmt: skip
    return VQModel(small).eval()


def test_both_ways_make_the_same_codes(tokenizer: VQModel, tmp_path: Path) -> None:
    images = tokens_bench._Noise(20, 32)
    tokens_bench.plain_extract(tokenizer, images, tmp_path, VIEWS["flip"])
    splits = Splits(images, tokens_bench._Noise(1, 32))
    extract(tokenizer, "", splits, tmp_path / "tokens", TokensConfig(views="flip"))
    reader = Tokens(tmp_path / "tokens", "train")
    same = [
        np.array_equal(
            np.load(tmp_path / f"{i}.npy")[0, view], reader.codes(np.array([i]), view)[0]
        )
        for i in range(20)
        for view in range(2)
    ]
    assert np.mean(same) > 0.9  # but for codes that are equally near, up to rounding
    assert len({*reader.codes(np.arange(20)).flatten().tolist()}) > 5


def test_extraction_is_timed_in_turn(tokenizer: VQModel) -> None:
    plain, ours = tokens_bench.extraction(2, 3, torch.device("cpu"), tokenizer)
    assert len(plain) == len(ours) == 3 and min(*plain, *ours) > 0


def test_command(ctf: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                 tokenizer: VQModel) -> None:  # fmt: skip
    monkeypatch.setitem(tokens_bench.TOKENIZERS, "VQ-16", tokenizer.config)
    monkeypatch.setitem(
        tokens_bench.SIZES, "B",
        dataclasses.replace(tokens_bench.SIZES["B"], width=32, layers=1, heads=2),
    )  # fmt: skip
    small = ("--images", 5000, "--pictures", 1, "--rounds", 1, "--out", tmp_path / "found.json")
    result = ctf("bench", "tokens", *small)
    assert result.code == 0 and "opening 5,000 pictures" in result.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["reader"]["images"] == 5000 and found["extraction_ratio"]["fp32"] > 0
    low = supports_bf16(torch.device("cpu"))
    assert ("codes in bf16 that are fp32's" in result.out) == low
    assert not low or 0.9 < found["extraction"]["bf16"]["equal_codes"] < 1
    result = ctf("bench", "tokens", "--images", 0)
    assert result.code == 2 and "images: got 0, expected 1 or more" in result.err
