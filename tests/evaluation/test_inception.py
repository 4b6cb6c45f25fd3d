"""Inception: parity with a plain reference with batch normalisation, and each of its quirks."""

import hashlib
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ctf.common.errors import UserError
from ctf.common.weights import load_strict
from ctf.evaluation import inception
from ctf.evaluation.inception import (
    Inception,
    InceptionE,
    average_pool,
    find_inception_weights,
    fold_batch_norms,
    load_inception,
    resize_bilinear,
)

Stored = dict[str, Tensor]


def random_weights(seed: int) -> Stored:
    """In the file's own format: 94 convolutions with a batch normalisation each, and fc."""
    g = torch.Generator().manual_seed(seed)
    stored = {}
    for name, module in Inception().named_modules():
        if isinstance(module, nn.Conv2d):
            out, fan_in = len(module.weight), module.weight[0].numel()
            stored[f"{name}.conv.weight"] = torch.randn(module.weight.shape, generator=g)
            stored[f"{name}.conv.weight"] *= math.sqrt(2 / fan_in)
            stored[f"{name}.bn.weight"] = torch.rand(out, generator=g) + 0.5
            stored[f"{name}.bn.bias"] = 0.1 * torch.randn(out, generator=g)
            stored[f"{name}.bn.running_mean"] = 0.1 * torch.randn(out, generator=g)
            stored[f"{name}.bn.running_var"] = torch.rand(out, generator=g) + 0.5
    stored["fc.weight"] = 0.02 * torch.randn(1008, 2048, generator=g)
    stored["fc.bias"] = torch.randn(1008, generator=g)
    return stored


@pytest.fixture(scope="module")
def stored() -> Stored:
    return random_weights(0)


@pytest.fixture(scope="module")
def weights(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the format of pytorch-fid and torch-fidelity, named by its hash as theirs."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save(stored, folder / "any.pth")
    sha256 = hashlib.sha256((folder / "any.pth").read_bytes()).hexdigest()
    return (folder / "any.pth").rename(folder / f"pt_inception-{sha256[:8]}.pth")


@pytest.fixture(scope="module")
def network(stored: Stored) -> Inception:
    network = Inception()
    load_strict(network, fold_batch_norms(stored), "random")
    return network.requires_grad_(False)


def test_number_of_parameters(stored: Stored, network: Inception) -> None:
    """That of torchvision's (27,161,264) without the auxiliary classifier, with 1008 classes."""
    statistics = sum(v.numel() for k, v in stored.items() if ".running_" in k)
    assert sum(v.numel() for v in stored.values()) - statistics == 23_850_960
    assert sum(k.endswith(".conv.weight") for k in stored) == 94
    assert stored["Mixed_6d.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)
    assert stored["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert {k for k in network.state_dict() if not k.startswith(("Mixed", "Conv"))} == {"fc.weight"}


# --- A reference: the layers of the paper's figures, one by one, from the stored tensors ----------


def layer(stored: Stored, name: str, x: Tensor, stride: int = 1, valid: bool = False) -> Tensor:
    weight = stored[f"{name}.conv.weight"]
    padding = [0, 0] if valid else [(side - 1) // 2 for side in weight.shape[2:]]
    norm = nn.BatchNorm2d(len(weight), eps=1e-3)
    names = ("weight", "bias", "running_mean", "running_var")
    norm.load_state_dict({k: stored[f"{name}.bn.{k}"] for k in names}, strict=False)
    return F.relu(norm.eval()(F.conv2d(x, weight, None, stride, padding)))


def chain(stored: Stored, block: str, x: Tensor, *names: str) -> Tensor:
    for name in names:
        x = layer(stored, f"{block}.{name}", x)
    return x


def average(x: Tensor) -> Tensor:
    """Mean of the existing neighbours."""
    padded = F.pad(torch.stack([x, torch.ones_like(x)]), (1, 1, 1, 1))
    windows = padded.unfold(-2, 3, 1).unfold(-2, 3, 1).sum(dim=(-2, -1))
    return windows[0] / windows[1]


def maximum(x: Tensor) -> Tensor:
    padded = F.pad(x, (1, 1, 1, 1), value=-math.inf)
    return padded.unfold(-2, 3, 1).unfold(-2, 3, 1).amax(dim=(-2, -1))


def halved(x: Tensor) -> Tensor:
    return x.unfold(-2, 3, 2).unfold(-2, 3, 2).amax(dim=(-2, -1))


def reference(stored: Stored, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From prepared images (B, 3, 299, 299)."""
    x = layer(stored, "Conv2d_1a_3x3", x, 2, valid=True)
    x = layer(stored, "Conv2d_2a_3x3", x, valid=True)
    x = halved(layer(stored, "Conv2d_2b_3x3", x))
    x = layer(stored, "Conv2d_4a_3x3", layer(stored, "Conv2d_3b_1x1", x), valid=True)
    x = halved(x)
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        threes = chain(stored, b, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        five = chain(stored, b, x, "branch5x5_1", "branch5x5_2")
        one = chain(stored, b, x, "branch1x1")
        x = torch.cat([one, five, threes, chain(stored, b, average(x), "branch_pool")], dim=1)
    three = layer(stored, "Mixed_6a.branch3x3", x, 2, valid=True)
    threes = chain(stored, "Mixed_6a", x, "branch3x3dbl_1", "branch3x3dbl_2")
    threes = layer(stored, "Mixed_6a.branch3x3dbl_3", threes, 2, valid=True)
    x = torch.cat([three, threes, halved(x)], dim=1)
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        one = chain(stored, b, x, "branch1x1")
        if b == "Mixed_6d":  # the graph's mixed_6/conv, after mixed to mixed_5
            spatial = one.permute(0, 2, 3, 1)[..., :7].reshape(len(x), -1)
        seven = chain(stored, b, x, *(f"branch7x7_{i}" for i in (1, 2, 3)))
        sevens = chain(stored, b, x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
        x = torch.cat([one, seven, sevens, chain(stored, b, average(x), "branch_pool")], dim=1)
    three = chain(stored, "Mixed_7a", x, "branch3x3_1")
    three = layer(stored, "Mixed_7a.branch3x3_2", three, 2, valid=True)
    seven = chain(stored, "Mixed_7a", x, "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
    seven = layer(stored, "Mixed_7a.branch7x7x3_4", seven, 2, valid=True)
    x = torch.cat([three, seven, halved(x)], dim=1)
    for b, pool in (("Mixed_7b", average), ("Mixed_7c", maximum)):
        three = chain(stored, b, x, "branch3x3_1")
        threes = chain(stored, b, x, "branch3x3dbl_1", "branch3x3dbl_2")
        x = torch.cat(
            [
                chain(stored, b, x, "branch1x1"),
                chain(stored, b, three, "branch3x3_2a"),
                chain(stored, b, three, "branch3x3_2b"),
                chain(stored, b, threes, "branch3x3dbl_3a"),
                chain(stored, b, threes, "branch3x3dbl_3b"),
                chain(stored, b, pool(x), "branch_pool"),
            ],
            dim=1,
        )
    pooled = x.flatten(2).mean(dim=2)
    return pooled, spatial, pooled @ stored["fc.weight"].T


@torch.inference_mode()
def test_network_equals_a_reference_with_batch_normalisation(
    stored: Stored, network: Inception
) -> None:
    pixels = torch.randint(0, 256, (2, 3, 299, 299), generator=torch.Generator().manual_seed(1))
    expected = reference(stored, (pixels.float() - 128) / 128)
    got = network(pixels.byte().contiguous(memory_format=torch.channels_last))
    assert [x.shape for x in got] == [(2, 2048), (2, 2023), (2, 1008)]
    for ours, theirs in zip(got, expected, strict=True):
        assert theirs.std() > 0.05
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@torch.inference_mode()
def test_small_images_are_resized_first(network: Inception) -> None:
    pixels = torch.randint(0, 256, (1, 3, 24, 40), generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(
        network(pixels.byte()), network(resize_bilinear(pixels, 299)), strict=True
    ):
        assert torch.equal(ours, theirs)


# --- TensorFlow 1's resize ------------------------------------------------------------------------


def scalar_resize(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's, pixel by pixel: image (H, W)."""
    f = np.float32
    out = np.empty((size, size), f)
    scales = [f(length) / f(size) for length in image.shape]
    for y in range(size):
        for x in range(size):
            at_y, at_x = f(y) * scales[0], f(x) * scales[1]
            top, left = math.floor(at_y), math.floor(at_x)
            bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
            dy, dx = at_y - f(top), at_x - f(left)
            above = image[top, left] + (image[top, right] - image[top, left]) * dx
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
            out[y, x] = above + (below - above) * dy
    return out


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 24), st.integers(0, 9999))
def test_resize_equals_that_of_tensorflow_1(height: int, width: int, size: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.float32)
    got = resize_bilinear(torch.from_numpy(image)[None, None], size)[0, 0]
    np.testing.assert_array_equal(got.numpy(), scalar_resize(image, size))


def test_resize_has_no_half_pixel_offset() -> None:
    """Doubled, every other pixel is an old one, and the last is repeated."""
    doubled = resize_bilinear(torch.tensor([[[[0.0, 8.0], [4.0, 4.0]]]]), 4)[0, 0]
    assert doubled.tolist() == [[0, 4, 8, 8], [2, 4, 6, 6], [4, 4, 4, 4], [4, 4, 4, 4]]
    same = torch.rand(1, 3, 5, 5)
    assert torch.equal(resize_bilinear(same, 5), same)


# --- Pooling --------------------------------------------------------------------------------------


def test_average_leaves_the_border_out() -> None:
    x = torch.arange(9.0).view(1, 1, 3, 3)
    averages = average_pool(x)[0, 0]
    assert averages[0, 0] == (0 + 1 + 3 + 4) / 4
    assert averages[0, 1] == (0 + 1 + 2 + 3 + 4 + 5) / 6
    assert averages[1, 1] == 4
    assert torch.equal(average_pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_only_the_last_block_uses_max_pooling(network: Inception) -> None:
    assert [network.Mixed_7b.max_pool, network.Mixed_7c.max_pool] == [False, True]
    one_of_each = torch.zeros(1, 2048, 5, 5)
    one_of_each[:, :, 2, 2] = 1.0
    for block, expected in (
        (InceptionE(2048, True), 9),
        (InceptionE(2048, False), 1),
    ):
        nn.init.zeros_(block.branch_pool.weight)
        nn.init.zeros_(block.branch_pool.bias)
        block.branch_pool.weight.data[:, 0] = 1.0
        assert block(one_of_each)[0, -1].sum().item() == pytest.approx(expected)


# --- The weights file -----------------------------------------------------------------------------


def test_num_batches_tracked_is_ignored(stored: Stored) -> None:
    counted = {**stored, "Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(7)}
    assert fold_batch_norms(counted).keys() == fold_batch_norms(stored).keys()


def test_a_missing_batch_normalisation_is_an_error(stored: Stored) -> None:
    with pytest.raises(KeyError, match=r"Conv2d_1a_3x3\.bn\.bias"):
        fold_batch_norms({k: v for k, v in stored.items() if k != "Conv2d_1a_3x3.bn.bias"})


# --- Finding and loading the weights file ---------------------------------------------------------


@pytest.fixture
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_weights_are_found_in_the_caches(
    empty_caches: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"nothing is downloaded.*\nhttps.*--weights FILE") as error:
        find_inception_weights()
    assert len(str(error.value).splitlines()) == 2
    monkeypatch.setattr(inception, "WEIGHTS_FILES", ("other.pth", weights.name))
    for folder in ("torch/hub/checkpoints", "hub/models--somebody--fid/snapshots/0123"):
        link = empty_caches / folder / weights.name
        link.parent.mkdir(parents=True)
        link.symlink_to(weights)
        assert find_inception_weights() == link
        link.unlink()


class Harmful:
    """Creates a folder if it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harm-done",)


def test_invalid_weights_files_are_refused(
    empty_caches: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(empty_caches)
    path = empty_caches / "file.pth"

    def refused(match: str, name: str = "file.pth") -> None:
        with pytest.raises(UserError, match=match) as error:
            load_inception(path.rename(empty_caches / name))
        assert len(str(error.value).splitlines()) <= 2
        (empty_caches / name).rename(path)

    with pytest.raises(UserError, match="no such file"):
        load_inception(path)
    path.write_bytes(weights.read_bytes()[:1000])
    refused("damaged: its SHA-256 begins with", inception.WEIGHTS_FILES[0])
    refused("not the Inception weights")
    path.write_bytes(pickle.dumps(Harmful(), protocol=2))
    refused("not the Inception weights")
    assert not (empty_caches / "harm-done").exists()
    for content in ([1, 2], {"epoch": 3}, {3: torch.zeros(1)}):
        torch.save(content, path)
        refused("not the Inception weights")
    stored = torch.load(weights, weights_only=True)
    first = "Conv2d_1a_3x3"
    for changed, match in (
        ({**stored, "AuxLogits.fc.weight": torch.zeros(1)}, "unknown tensor 'AuxLogits.fc.weight'"),
        (
            {**stored, "fc.weight": torch.zeros(1000, 2048)},
            r"\(1000, 2048\), expected \(1008, 2048",
        ),
        ({k: v for k, v in stored.items() if k != "fc.weight"}, "'fc.weight' is missing"),
        ({k: v for k, v in stored.items() if not k.startswith(first)}, f"{first}.* is missing"),
        ({k: v for k, v in stored.items() if k != f"{first}.bn.bias"}, "not the Inception weights"),
        ({**stored, f"{first}.bn.bias": torch.zeros(3)}, "not the Inception weights"),
    ):
        torch.save(changed, path)
        refused(match)
