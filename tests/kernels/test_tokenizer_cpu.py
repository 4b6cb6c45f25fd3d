"""The prepared tokenizer: equal in float32, near in bfloat16, and the same nearest codes."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctf import kernels
from ctf.data import images, transforms
from ctf.kernels import tokenizer_cpu
from ctf.kernels.products import Packed, has_layer
from ctf.models.tokenizer import TokenizerConfig, Upsample, VQModel
from ctf.pipelines.pipeline import Pipeline

CPU = torch.device("cpu")
needs_packed = pytest.mark.skipif(not has_layer(Packed), reason="no packed layers here")

VQ = TokenizerConfig(
    image_size=32,
    codebook_size=50,
    channels=16,
    multipliers=(1, 2, 2),
    latent_channels=16,
    groups=4,
)


def make_tokenizer() -> VQModel:
    torch.manual_seed(0)
    return VQModel(VQ).eval().requires_grad_(False)


@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99)
)
def test_doubling_by_a_transposed_convolution(
    batch: int, height: int, width: int, channels: int, seed: int
) -> None:
    torch.manual_seed(seed)
    up = Upsample(channels).requires_grad_(False)
    x = torch.randn(batch, channels, height, width)
    expected = up(x)
    tokenizer_cpu.prepare(up, torch.float32)
    torch.testing.assert_close(up(x), expected, rtol=0, atol=1e-5)


def test_training_takes_the_same_gradients() -> None:
    """In double precision, so that rounding is no excuse."""
    torch.manual_seed(0)
    plain, fast = VQModel(VQ).double(), VQModel(VQ).double()
    fast.load_state_dict(plain.state_dict())
    kernels.for_training(fast)
    assert any(isinstance(part, tokenizer_cpu.TransposedUpsample) for part in fast.modules())
    images_BCHW = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    for model in (plain, fast):
        decoded_BCHW = model.decode_vectors(model.encode_vectors(images_BCHW))
        (decoded_BCHW - images_BCHW).square().mean().backward()
    for (name, own), (_, other) in zip(
        plain.named_parameters(), fast.named_parameters(), strict=True
    ):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)


@needs_packed
def test_a_prepared_decoder_is_the_same() -> None:
    plain_model, prepared = make_tokenizer(), make_tokenizer()
    kernels.for_sampling(None, None, prepared, "auto")
    codes_BL = torch.arange(3 * 64).view(3, 64) % 50
    images = plain_model.decode(codes_BL)
    torch.testing.assert_close(prepared.decode(codes_BL), images, rtol=0, atol=1e-5)
    assert torch.equal(prepared.encode(images), plain_model.encode(images))
    own, stored = plain_model.state_dict(), prepared.state_dict()
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[name], stored[name]) for name in own)
    assert any(isinstance(part, tokenizer_cpu.FastUpsample) for part in prepared.modules())


def test_a_prepared_encoder_is_the_same() -> None:
    tokenizer = Pipeline.from_pretrained("fashion-mnist", engine="eager").tokenizer
    images_BCHW = transforms.as_tensor(held_out(tokenizer), CPU)
    vectors_BLC, codes_BL = tokenizer.encode_vectors(images_BCHW), tokenizer.encode(images_BCHW)
    for dtype, atol, equal in ((torch.float32, 1e-5, 1.0), (torch.bfloat16, 0.02, 0.9)):
        prepared = copy.deepcopy(tokenizer)
        kernels.for_encoding(prepared, dtype)
        near_BLC = prepared.encode_vectors(images_BCHW)
        torch.testing.assert_close(near_BLC, vectors_BLC, rtol=0, atol=atol)
        share = float((prepared.encode(images_BCHW) == codes_BL).float().mean())
        assert share >= equal
        assert dtype == torch.float32 or not torch.equal(near_BLC, vectors_BLC)


def held_out(tokenizer: VQModel) -> Any:
    return images.open_images("fashion-mnist", tokenizer.config.image_size).val.read(range(50))


def test_low_precision_changes_pixels_by_less_than_a_grey_level() -> None:
    pipe = Pipeline.from_pretrained("fashion-mnist")
    low = copy.deepcopy(pipe.tokenizer)
    tokenizer_cpu.prepare(low.decoder, torch.bfloat16)
    codes_BL = pipe.sample(list(range(10)), seed=5).codes
    change = (low.decode(codes_BL) - pipe.tokenizer.decode(codes_BL)).abs() * 127.5
    assert 0 < float(change.mean()) < 1


@given(st.integers(1, 70), st.sampled_from([1, 50, 256, 300, 512]), st.integers(0, 99))
def test_the_nearest_code_is_the_first_of_the_largest_products(
    vectors: int, codes: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = VQModel(TokenizerConfig(8, codes, 2, 4, (1, 1), 1, 4, 4)).requires_grad_(False)
    model.embedding.weight[: codes // 2] = model.embedding.weight[-1]  # ties
    vectors_NC = torch.nn.functional.normalize(torch.randn(vectors, 2), dim=-1)
    plain_N = model.nearest(vectors_NC)
    kernels.for_evaluation(model)
    assert type(model) is tokenizer_cpu.CpuVQModel
    assert torch.equal(model.nearest(vectors_NC), plain_N)


@pytest.mark.parametrize("codes", [1, 7, 96, 256, 1000, 1024])
def test_the_first_of_equal_products_is_taken(codes: int) -> None:
    products_NV = torch.randint(0, 4, (50, codes)).float()
    products_NV[0] = 1.0
    products_NV[1, codes // 2] = torch.nan  # as argmax has it, it is the largest
    first_N = [row.index(max(row)) for row in products_NV[2:].tolist()]
    found_N = tokenizer_cpu.first_argmax(products_NV).tolist()
    assert found_N == [0, codes // 2, *first_N]
    assert found_N == products_NV.argmax(-1).tolist()
