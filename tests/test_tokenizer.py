"""The tokenizer against LlamaGen's own, its shapes, and what cannot be built."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ctf import checkpoint
from ctf.errors import UserError
from ctf.tokenizer import TokenizerConfig, VQModel

LLAMAGEN = Path(__file__).parent / "fixtures" / "llamagen"

TINY = TokenizerConfig(
    image_size=16, codebook_size=32, code_dim=4, channels=8, multipliers=(1, 2, 3), blocks=1,
    latent_channels=12, groups=4,
)  # fmt: skip


def make(config: TokenizerConfig = TINY) -> VQModel:
    torch.manual_seed(0)
    return VQModel(config).eval()


def noise(count: int, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- parity ---------------------------------------------------------------------------------------

RENAMED = {
    "conv_in": "input", "conv_out": "output", "norm_out": "norm", "mid": "middle",
    "quant_conv": "to_code", "post_quant_conv": "from_code", "quantize.embedding": "embedding",
    "q": "query", "k": "key", "v": "value", "proj_out": "output",
}  # fmt: skip


def our_name(name: str, config: TokenizerConfig) -> str:
    """LlamaGen keeps the blocks of a level in lists of their own; here they are in sequence."""
    path, _, kind = name.rpartition(".")
    if found := re.match(r"(en|de)coder\.conv_blocks\.(\d+)\.(\w+)(?:\.(\d+))?", path):
        coder, level, part, number = found[1], int(found[2]), found[3], int(found[4] or 0)
        blocks = config.blocks + (coder == "de")
        deepest = len(config.multipliers) - 1 if coder == "en" else 0  # the level with attention
        lengths = [
            blocks * (2 if i == deepest else 1) + 1 for i in range(len(config.multipliers))
        ]  # the last is what halves or doubles the sides
        within = {
            "res": number * (2 if level == deepest else 1),
            "attn": 2 * number + 1,
            "downsample": lengths[level] - 1,
            "upsample": lengths[level] - 1,
        }[part]
        path = f"{coder}coder.levels.{sum(lengths[:level]) + within}{path[found.end() :]}"
    if path in RENAMED:
        return f"{RENAMED[path]}.{kind}"
    return ".".join([RENAMED.get(part, part) for part in path.split(".")] + [kind])


@pytest.fixture(scope="module")
def llamagen() -> tuple[VQModel, dict[str, np.ndarray]]:
    config = TokenizerConfig(
        image_size=8, codebook_size=256, channels=32, multipliers=(1, 1), latent_channels=64
    )
    stored = torch.load(LLAMAGEN / "vq.pt", weights_only=True)["model"]
    del stored["quantize.codebook_used"]  # statistics of its training
    model = VQModel(config).eval()
    weights = {our_name(name, config): value.float() for name, value in stored.items()}
    checkpoint.load_strict(model, weights, "vq.pt")
    return model, dict(np.load(LLAMAGEN / "vq_expected.npz"))


@torch.no_grad()
def test_codes_are_llamagens(llamagen: tuple[VQModel, dict[str, np.ndarray]]) -> None:
    model, expected = llamagen
    codes_BL = model.encode(torch.from_numpy(expected["images"]))
    assert codes_BL.numpy().tolist() == expected["codes"].tolist()


@torch.no_grad()
def test_images_are_llamagens(llamagen: tuple[VQModel, dict[str, np.ndarray]]) -> None:
    model, expected = llamagen
    gpt = np.load(LLAMAGEN / "gpt_expected.npz")
    for codes, decoded in (
        (expected["codes"], expected["decoded"]),
        (gpt["greedy_guidance_2"], expected["greedy_decoded"]),
    ):
        codes_BL = torch.from_numpy(codes).long()
        images_BCHW = model.decode_vectors(model.codebook()[codes_BL])
        assert np.abs(images_BCHW.numpy() - decoded).max() < 1e-4
        # What users get is the same, but for what cannot be a colour.
        assert np.abs(model.decode(codes_BL).numpy() - decoded.clip(-1, 1)).max() < 1e-4


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
        ({"image_size": 18}, r"image size 18 .* factor 4; take 16 or 20"),
        ({"image_size": 3}, r"image size 3 .* factor 4; take 4$"),
        ({"codebook_size": 0}, "codebook_size: got 0, expected 1 or more"),
        ({"blocks": 0}, "blocks: got 0"),
        ({"multipliers": ()}, r"multipliers: got \[\]"),
        ({"multipliers": (1, 0)}, r"multipliers: got \[1, 0\]"),
        ({"groups": 3}, "8 channels cannot be put into 3 groups"),
    ],
)
def test_what_cannot_be_built(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)  # type: ignore[arg-type]
