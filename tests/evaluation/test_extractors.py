"""Extractors: the same features in any batch, a digest for each network, clear errors."""

import hashlib
import importlib
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from ctf.common.errors import UserError
from ctf.data.images import open_images
from ctf.data.transforms import as_tensor, crop
from ctf.evaluation.classifier import SHIPPED, shipped_classifier
from ctf.evaluation.extractors import (
    Extractor,
    classifier_extractor,
    crops_of,
    open_extractor,
)
from ctf.evaluation.inception import Inception, fold_batch_norms
from ctf.evaluation.lite0 import load_lite0
from tests.evaluation.test_inception import random_weights

RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the format of pytorch-fid and torch-fidelity, named by its hash as theirs."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save(random_weights(0), folder / "any.pth")
    sha256 = hashlib.sha256((folder / "any.pth").read_bytes()).hexdigest()
    return (folder / "any.pth").rename(folder / f"pt_inception-{sha256[:8]}.pth")


@pytest.fixture(scope="module")
def lite0() -> Extractor:
    return open_extractor("lite0")


@pytest.fixture(scope="module")
def inception(weights: Path) -> Extractor:
    return open_extractor("inception", weights=weights)


@pytest.fixture(scope="module")
def fashion() -> Extractor:
    return open_extractor("fashion")


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a user module to the current folder and return its name."""
    monkeypatch.chdir(tmp_path)

    def write(code: str) -> str:
        name = f"user_{hashlib.sha256((str(tmp_path) + code).encode()).hexdigest()[:16]}"
        (tmp_path / f"{name}.py").write_text(f"import torch\nfrom torch import nn\n{code}")
        importlib.invalidate_caches()
        return name

    return write


def close(a: Tensor | None, b: Tensor | None) -> None:
    assert a is not None and b is not None
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_a_trained_classifier_is_a_network(fashion: Extractor) -> None:
    extractor = classifier_extractor(SHIPPED)
    assert (extractor.name, extractor.suffix) == ("classifier", "-classifier")
    assert extractor.digest != fashion.digest  # other scores' names
    one, other = extractor(NOISE), fashion(NOISE)
    close(one.pooled_ND, other.pooled_ND)
    close(one.logits_NK, other.logits_NK)


@pytest.mark.parametrize(
    ("name", "suffix", "shapes"),
    [
        ("lite0", "-Lite0", (1280, None, 1000)),
        ("inception", "", (2048, 2023, 1008)),
        ("fashion", "-fashion", (128, None, 10)),
    ],
)
def test_names_shapes_and_independence_of_the_batch(
    name: str, suffix: str, shapes: tuple[int | None, ...], request: pytest.FixtureRequest
) -> None:
    extractor: Extractor = request.getfixturevalue(name)
    assert (extractor.name, extractor.suffix) == (name, suffix)
    assert len(extractor.digest) == 64 and int(extractor.digest, 16) >= 0
    frozen = NOISE.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = extractor(frozen)
    found = (features.pooled_ND, features.spatial_ND, features.logits_NK)
    assert tuple(None if x is None else x.shape[1] for x in found) == shapes
    for x in found:
        assert x is None or (len(x) == 5 and x.dtype == torch.float32 and not x.is_cuda)
    for i in (0, 4):  # with negative strides, too
        close(extractor(frozen[::-1][4 - i : 5 - i]).pooled_ND[0], features.pooled_ND[i])


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("name", ["lite0", "fashion"])
def test_features_in_parts_are_those_of_the_whole(name: str) -> None:
    extractor = open_extractor(name)
    images = RANDOM.integers(0, 256, (4 * extractor.batch_size + 1, 20, 24, 3), dtype=np.uint8)
    parted = extractor(images)
    torch.set_num_threads(1)
    whole = extractor(images)
    close(parted.pooled_ND, whole.pooled_ND)
    close(parted.logits_NK, whole.logits_NK)


@pytest.mark.usefixtures("three_threads")
def test_a_users_network_is_called_by_one_thread(user_module: Callable[[str], str]) -> None:
    code = """
        import threading
        def make():
            return lambda x: torch.full((len(x), 1), float(threading.get_ident() % 2**20))
        """
    extractor = open_extractor(f"{user_module(textwrap.dedent(code))}:make")
    images = np.zeros((5 * extractor.batch_size, 8, 8, 3), np.uint8)
    assert extractor(images).pooled_ND.unique().tolist() == [threading.get_ident() % 2**20]


def test_digests_differ_for_other_networks_and_weights(
    lite0: Extractor, inception: Extractor, fashion: Extractor, tmp_path: Path
) -> None:
    torch.save(random_weights(1), tmp_path / "others.pth")
    others = open_extractor("inception", weights=tmp_path / "others.pth")
    assert len({e.digest for e in (lite0, inception, fashion, others)}) == 4
    assert open_extractor("lite0").digest == lite0.digest


def test_lite0_takes_crops_of_224_pixels(lite0: Extractor) -> None:
    photo = data.chelsea()
    cropped = np.array(crop(Image.fromarray(photo), 224))
    features = lite0(photo[None])
    logits_NK, pooled_ND = load_lite0()(as_tensor(cropped[None]))
    close(features.pooled_ND, pooled_ND)
    close(features.logits_NK, logits_NK)
    assert features.logits_NK is not None and features.logits_NK.argmax() in (281, 282, 285)  # cats


@pytest.mark.parametrize("threads", [1, 3])
def test_crops_are_in_the_order_of_the_images_in_any_number_of_threads(threads: int) -> None:
    images_NHWC = np.random.default_rng(0).integers(256, size=(9, 40, 48, 3), dtype=np.uint8)
    expected = [np.asarray(crop(Image.fromarray(image), 24)) for image in images_NHWC]
    assert np.array_equal(crops_of(images_NHWC, 24, threads), expected)


def test_inception_takes_pixels_of_any_size(weights: Path, inception: Extractor) -> None:
    network = Inception()
    network.load_state_dict(fold_batch_norms(torch.load(weights, weights_only=True)))
    pixels = torch.from_numpy(NOISE[:1]).permute(0, 3, 1, 2)
    with torch.no_grad():
        pooled_ND, spatial_ND, logits_NK = network(pixels)
    features = inception(NOISE[:1])
    close(features.pooled_ND, pooled_ND)
    close(features.spatial_ND, spatial_ND)
    close(features.logits_NK, logits_NK)


def test_fashion_is_the_included_classifier(fashion: Extractor) -> None:
    images = open_images("fashion-mnist").val.read(np.arange(200))
    with torch.inference_mode():
        logits_NK, pooled_ND = shipped_classifier()(as_tensor(images))
    features = fashion(images)
    close(features.pooled_ND, pooled_ND)
    close(features.logits_NK, logits_NK)
    larger = np.stack([np.asarray(Image.fromarray(p).resize((64, 64))) for p in images])
    same = fashion(larger).logits_NK
    assert same is not None
    assert (same.argmax(1) == logits_NK.argmax(1)).float().mean() > 0.95


@pytest.mark.parametrize(
    "images",
    [NOISE.astype(np.float32), NOISE[0], NOISE[..., :1], NOISE[:0]],
    ids=["float", "one", "grey", "none"],
)
def test_only_uint8_arrays_of_images_are_accepted(fashion: Extractor, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(N, H, W, 3\)"):
        fashion(images)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="unknown features 'lite': did you mean 'lite0'"):
        open_extractor("lite")
    with pytest.raises(UserError, match="only inception takes weights, got features 'lite0'"):
        open_extractor("lite0", weights=Path("w.pth"))


# --- User-defined networks ------------------------------------------------------------------------


NETWORK = """
class Network(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.dropout = nn.Dropout(0.9)

    def forward(self, x):
        assert x.dtype == torch.float32 and x.shape[1] == 3 and x.abs().max() <= 1
        return self.scale * self.dropout(x.view(len(x), -1)[:, :7])

def twice():
    return Network(2.0)
"""


def test_user_module(user_module: Callable[[str], str]) -> None:
    name = user_module(NETWORK)
    extractor = open_extractor(f"{name}:Network")
    assert (extractor.name, extractor.suffix) == (f"{name}:Network", f"-{name}:Network")
    images = np.concatenate([NOISE] * 7)  # more than one batch
    features = extractor(images)
    close(features.pooled_ND, as_tensor(images).flatten(1)[:, :7])  # no dropout
    assert features.spatial_ND is None and features.logits_NK is None
    twice = open_extractor(f"{name}:twice")
    close(twice(images).pooled_ND, 2 * features.pooled_ND)
    assert twice.digest != extractor.digest
    assert open_extractor(f"{name}:Network").digest == extractor.digest


def test_user_functions_may_return_tuples_or_features(user_module: Callable[[str], str]) -> None:
    name = user_module(
        "from ctf.evaluation.extractors import Features\n"
        "def pair(): return lambda x: (x.mean((2, 3)).half(), x[:, 0, 0, :4])\n"
        "def three(): return lambda x: Features(x.mean((2, 3)), x.flatten(1), x[:, 0, 0, :2])\n"
    )
    pair, three = (open_extractor(f"{name}:{factory}") for factory in ("pair", "three"))
    assert pair.digest != three.digest
    x = as_tensor(NOISE)
    features = pair(NOISE)
    assert features.pooled_ND.dtype == torch.float32
    torch.testing.assert_close(features.pooled_ND, x.mean((2, 3)), rtol=1e-3, atol=1e-3)
    close(features.logits_NK, x[:, 0, 0, :4])
    everything = three(NOISE)
    close(everything.spatial_ND, x.flatten(1))
    assert everything.logits_NK is not None and everything.logits_NK.shape == (5, 2)


def test_changed_user_code_has_another_digest(
    user_module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for number in (1, 2):
        name = user_module(f"def make(): return lambda x: {number} * x.mean((2, 3))\n")
        Path(f"{name}.py").rename("user_again.py")
        monkeypatch.delitem(sys.modules, "user_again", raising=False)
        importlib.invalidate_caches()
        digests.add(open_extractor("user_again:make").digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("attribute", "match"),
    [
        ("fetaures", "AttributeError: module .* has no attribute 'fetaures'"),
        ("number", "TypeError: 'int' object is not callable"),
        ("nothing", "the factory returned NoneType, expected an nn.Module"),
        ("raises", r"user_\w+\.py, line \d+: ZeroDivisionError: division by zero"),
        ("fails", r"user_\w+\.py, line \d+: RuntimeError: mat1 and mat2 shapes"),
        ("listed", r"got list for 5 images as pooled_ND, expected floats \(5, D\)"),
        ("maps", r"got torch.float32 \(5, 3, 20, 24\) for 5 images as pooled_ND"),
        ("summed", r"got torch.float32 \(3,\) for 5 images"),
        ("rounded", r"got torch.int64 \(5, 3\) for 5 images"),
        ("flat_logits", r"got torch.float32 \(5,\) for 5 images as logits_NK, expected .*\(5, K\)"),
        ("infinite", "pooled_ND has values that are not finite"),
    ],
)
def test_errors_in_user_code_are_user_errors(
    user_module: Callable[[str], str], attribute: str, match: str
) -> None:
    name = user_module(
        "number = 3\n"
        "def features(): return lambda x: x.mean((2, 3))\n"
        "def nothing(): pass\n"
        "def raises(): return 1 / 0\n"
        "def fails(): return lambda x: nn.Linear(2, 2)(x.mean((2, 3)))\n"
        "def listed(): return lambda x: [1.0] * 5\n"
        "def maps(): return lambda x: x\n"
        "def summed(): return lambda x: x.sum((0, 2, 3))\n"
        "def rounded(): return lambda x: x.mean((2, 3)).long()\n"
        "def flat_logits(): return lambda x: (x.mean((2, 3)), x.mean((1, 2, 3)))\n"
        "def infinite(): return lambda x: x.mean((2, 3)) / 0\n"
    )
    path = list(sys.path)
    with pytest.raises(UserError, match=match) as error:
        open_extractor(f"{name}:{attribute}")(NOISE)
    assert len(str(error.value).splitlines()) <= 2
    assert sys.path == path


@pytest.mark.parametrize("spec", [":make", "mine:", "a b:make", "mine:make:again", "mine.py:f()"])
def test_invalid_specs_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match=r"expected MODULE:FACTORY, e\.g\. my_features:make"):
        open_extractor(spec)


def test_import_errors_are_user_errors(user_module: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match=r"ModuleNotFoundError: No module named 'not_there'"):
        open_extractor("not_there:make")
    with pytest.raises(UserError, match=r"line 3: ModuleNotFoundError: No module named 'nor_here'"):
        open_extractor(f"{user_module('import nor_here')}:make")
    with pytest.raises(UserError, match=r"SyntaxError: .*line 3"):
        open_extractor(f"{user_module('def make(:')}:make")
