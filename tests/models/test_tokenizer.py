"""The tokenizer: its shapes, its look-up, and what cannot be built. Parity: test_llamagen.py."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ctf import kernels
from ctf.common.errors import UserError
from ctf.models.tokenizer import TokenizerConfig, VQModel

TINY = TokenizerConfig(
    image_size=16, codebook_size=32, code_dim=4, channels=8, multipliers=(1, 2, 3), blocks=1,
    latent_channels=12, groups=4,
)  # fmt: skip


def make(config: TokenizerConfig = TINY) -> VQModel:
    torch.manual_seed(0)
    return VQModel(config).eval()


def noise(count: int, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- shapes ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 3), (2, 1, 1, 3)])
def test_shapes(multipliers: tuple[int, ...]) -> None:
    config = dataclasses.replace(TINY, multipliers=multipliers)
    model = make(config)
    factor = 2 ** (len(multipliers) - 1)
    assert (config.factor, config.grid, model.grid) == (factor, 16 // factor, 16 // factor)
    length = config.grid**2
    images_BCHW = noise(2)
    codes_BL = model.encode(images_BCHW)
    assert codes_BL.shape == (2, length) and codes_BL.dtype == torch.int64
    assert int(codes_BL.min()) >= 0 and int(codes_BL.max()) < config.codebook_size
    vectors_BLC = model.encode_vectors(images_BCHW)
    assert vectors_BLC.shape == (2, length, config.code_dim)
    torch.testing.assert_close(vectors_BLC.norm(dim=-1), torch.ones(2, length))
    decoded_BCHW = model.decode(codes_BL)
    assert decoded_BCHW.shape == images_BCHW.shape
    assert float(decoded_BCHW.abs().max()) <= 1


@torch.no_grad()
def test_nearest_is_the_code_at_the_smallest_distance() -> None:
    model = make()
    vectors_NC = torch.nn.functional.normalize(torch.randn(5000, TINY.code_dim), dim=-1)
    distances_NV = torch.cdist(vectors_NC.double(), model.codebook().double())
    assert torch.equal(model.nearest(vectors_NC), distances_NV.argmin(-1))
    torch.testing.assert_close(model.codebook().norm(dim=-1), torch.ones(TINY.codebook_size))
    assert torch.equal(model.nearest(model.codebook()), torch.arange(TINY.codebook_size))


@torch.no_grad()
def test_without_l2_norm_the_nearest_code_is_at_the_smallest_distance() -> None:
    model = make(dataclasses.replace(TINY, l2_norm=False))
    model.embedding.weight *= torch.linspace(0.1, 3, TINY.codebook_size)[:, None]
    vectors_NC = torch.randn(5000, TINY.code_dim)
    distances_NV = torch.cdist(vectors_NC.double(), model.embedding.weight.double())
    expected_N = distances_NV.argmin(-1)
    assert torch.equal(model.nearest(vectors_NC), expected_N)
    kernels.for_evaluation(model)
    assert torch.equal(model.nearest(vectors_NC), expected_N)
    assert torch.equal(model.codebook(), model.embedding.weight)
    lengths = model.encode_vectors(noise(2)).norm(dim=-1)
    assert float((lengths - 1).abs().min()) > 1e-3


@torch.no_grad()
def test_length_of_code_vectors_does_not_matter() -> None:
    model = make()
    images_BCHW = noise(2)
    codes_BL = model.encode(images_BCHW)
    decoded_BCHW = model.decode(codes_BL)
    model.embedding.weight *= torch.linspace(0.1, 10, TINY.codebook_size)[:, None]
    assert torch.equal(model.encode(images_BCHW), codes_BL)
    torch.testing.assert_close(model.decode(codes_BL), decoded_BCHW, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_image_has_its_codes_in_any_batch() -> None:
    model = make()
    images_BCHW = noise(5)
    together_BL = model.encode(images_BCHW)
    assert torch.equal(together_BL, torch.cat([model.encode(i[None]) for i in images_BCHW]))
    alone = torch.cat([model.decode(codes[None]) for codes in together_BL])
    torch.testing.assert_close(model.decode(together_BL), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("multipliers", "factor", "expected"), [((1, 1, 2, 2, 4), 16, 72), ((1, 2, 2, 4), 8, 70)]
)
def test_sizes_of_the_released_tokenizers(
    multipliers: tuple[int, ...], factor: int, expected: int
) -> None:
    config = TokenizerConfig(multipliers=multipliers)
    with torch.device("meta"):
        model = VQModel(config)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(millions) == expected  # LlamaGen's table 1
    assert config.factor == factor


# --- what cannot be built -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 18}, r"image size 18 .* factor 4; use 16 or 20"),
        ({"image_size": 3}, r"image size 3 .* factor 4; use 4$"),
        ({"codebook_size": 0}, "codebook_size: got 0, expected 1 or more"),
        ({"blocks": 0}, "blocks: got 0"),
        ({"multipliers": ()}, r"multipliers: got \[\]"),
        ({"multipliers": (1, 0)}, r"multipliers: got \[1, 0\]"),
        ({"groups": 3}, "channels: got 8, expected a multiple of groups 3"),
        ({"image_size": 0}, r"image size 0 .* factor 4; use 4$"),
        ({"decoder_multipliers": (1, 2)}, r"decoder_multipliers: got \[1, 2\], expected 3 of 1"),
        ({"decoder_blocks": 0}, "decoder_blocks: got 0, expected 1 or more"),
        ({"attention": (0, 3)}, r"attention: got levels \[0, 3\], expected some of \[0, 1, 2\]"),
    ],
)
def test_what_cannot_be_built(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)  # type: ignore[arg-type]
