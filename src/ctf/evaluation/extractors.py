"""Feature networks behind one interface: uint8 images -> pooled features, logits.

Only the scores of `inception` are the published ones, so only they are called FID, sFID and IS. The
names of all others end in that of the network; they are comparable only to each other.

Networks compute in float32, on a GPU, too, and without TF32: reference features and published
scores are from a processor or from other libraries, and lower precision moves each feature in
the same direction, which a Fréchet distance sees. It would save little: to resize the images takes
longer than EfficientNet-Lite0 on them. Convolutions are channels-last, which only changes rounding.

Shapes: N images, B images of a batch, H height, W width, D features, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ctf.common import storage, threads
from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.common.precision import without_tf32
from ctf.data import fashion_mnist
from ctf.data.scan import THREADS
from ctf.data.transforms import as_tensor, crop
from ctf.evaluation import lite0
from ctf.evaluation.classifier import WEIGHTS, load_classifier, shipped_classifiers
from ctf.evaluation.inception import find_inception_weights, load_inception

NETWORKS = ("lite0", "inception")  # besides the included classifiers, see `classifier_name`
PREPROCESSING_VERSION = 1  # part of the digests; increase it if preprocessing changes

# Images per batch. On a CPU small batches are fastest, as their maps stay in the caches.
CPU_BATCH = {"lite0": 4, "inception": 4, "fashion": 64, "classifier": 64}
OTHER_CPU_BATCH = 16
GPU_BATCH = 128


@dataclass(frozen=True)
class Features:
    """What a network computes for N images.

    pooled_ND: features after global pooling.
    spatial_ND: features of sFID, which keep positions; Inception only.
    logits_NK: class logits for the Inception Score; None if the network has no classes.
    """

    pooled_ND: Tensor
    spatial_ND: Tensor | None = None
    logits_NK: Tensor | None = None


def concatenate(parts: Sequence[Features]) -> Features:
    """Join the features of consecutive batches, as float32 on the CPU."""

    def join(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat([value.float().cpu() for value in values])

    return Features(join("pooled_ND"), join("spatial_ND"), join("logits_NK"))


@dataclass(frozen=True)
class Extractor:
    """A feature network with its preprocessing.

    name: as given to `open_extractor`.
    suffix: what the names of its scores end in; "" for Inception only.
    digest: SHA-256 of weights, name and preprocessing version. Features of different digests must
        not be compared.
    batch_size: images that `network` takes at a time.
    network: uint8 (B, H, W, 3), contiguous -> features.
    device: where it computes.
    in_parts: whether a team of threads may call it at once; see common/threads.py.
    """

    name: str
    suffix: str
    digest: str
    batch_size: int
    network: Callable[[NDArray[np.uint8]], Features]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    in_parts: bool = False

    @torch.inference_mode()
    def __call__(self, images_NHWC: NDArray[np.uint8]) -> Features:
        """Compute the features of one or more images of any size, uint8 (N, H, W, 3).

        Raises:
            ValueError: another shape or type.
            UserError: the user's network fails or returns something other than features.
        """
        shape = images_NHWC.shape
        if images_NHWC.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]:
            raise ValueError(f"got {images_NHWC.dtype} {shape}, expected uint8 (N, H, W, 3)")

        def compute(images_NHWC: NDArray[np.uint8]) -> Features:
            starts = range(0, len(images_NHWC), self.batch_size)
            batches = (images_NHWC[start : start + self.batch_size] for start in starts)
            # Copied, since torch warns about read-only memory and supports no negative strides.
            return concatenate([self.network(np.array(batch, order="C")) for batch in batches])

        with without_tf32(self.device), threads.team(self.in_parts):
            return concatenate(threads.over_parts(compute, images_NHWC, smallest=self.batch_size))


def open_extractor(
    spec: str, *, weights: Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """Load a feature network by name.

    Args:
        spec: one of
            "lite0": EfficientNet-Lite0, trained on ImageNet; images are resized to 224 pixels by
                `crop`. 1280 features, 1000 classes.
            "inception": the network of ADM's evaluator; see inception.py. 2048 features, 2023
                spatial features, 1008 classes.
            "fashion": the included classifier of Fashion-MNIST, at 32 pixels. 128 features, 10
                classes. That of another included set has the set's name.
            "module:factory": the return value of `factory()` from a Python module, searched for in
                the current folder first. It takes float images (B, 3, H, W) in [-1, 1] at their own
                size and returns features (B, D), or (features, logits (B, K)), or `Features`. Its
                digest covers the module's file and, for an nn.Module, its state dict, but not what
                the file imports.
        weights: file of the Inception weights; by default it is searched for in the caches of
            torch.hub and of the Hugging Face Hub.
        device: where to compute.

    Raises:
        UserError: an unknown name, missing or invalid weights, or a module that does not work.
    """
    device = torch.device(device)
    if weights is not None and spec != "inception":
        raise UserError(f"--weights {weights}: only inception takes weights, got features {spec!r}")
    if ":" in spec:
        return _user_extractor(spec, device)
    classifiers = {classifier_name(images): path for images, path in shipped_classifiers().items()}
    match spec:
        case "lite0":
            path, suffix = lite0.lite0_weights(), "-Lite0"
            network = _oncrops_of(lite0.load_lite0().to(device), lite0.IMAGE_SIZE, device)
        case "inception":
            path, suffix = weights or find_inception_weights(), ""
            network = _on_pixels(load_inception(path, device), device)
        case _ if spec in classifiers:
            path, suffix = classifiers[spec] / WEIGHTS, f"-{spec}"
            classifier = load_classifier(classifiers[spec], device)
            network = _oncrops_of(classifier, classifier.image_size, device)
        case _:
            known = (*NETWORKS, *classifiers, "module:factory")
            raise UserError(f"unknown features {spec!r}{did_you_mean(spec, known)}")
    return _extractor(spec, suffix, [storage.hash_file(path)], network, device)


def classifier_extractor(folder: Path, device: torch.device | str = "cpu") -> Extractor:
    """Load the classifier in `folder` as a feature network.

    Its scores end in "-classifier", whatever it was trained on.

    Raises:
        UserError: see `load_classifier`.
    """
    device = torch.device(device)
    classifier = load_classifier(folder, device)
    network = _oncrops_of(classifier, classifier.image_size, device)
    return _extractor("classifier", "-classifier", [classifier.digest], network, device)


def classifier_name(images: str) -> str:
    """Return the name of the features of the included classifier of an image set."""
    return "fashion" if images == fashion_mnist.NAME else images


Network = Callable[[NDArray[np.uint8]], Features]


def _extractor(
    name: str, suffix: str, hashes: Sequence[str], network: Network, device: torch.device
) -> Extractor:
    digest = storage.hash_json([PREPROCESSING_VERSION, name, *hashes])
    on_cpu = device.type == "cpu"
    batch_size = CPU_BATCH.get(name, OTHER_CPU_BATCH) if on_cpu else GPU_BATCH
    in_parts = threads.pays(device) and ":" not in name  # a user's network may hold a state
    return Extractor(name, suffix, digest, batch_size, network, device, in_parts)


def _oncrops_of(
    classifier: Callable[[Tensor], tuple[Tensor, Tensor]], size: int, device: torch.device
) -> Network:
    """Crop images to `size` pixels for a network that returns logits and pooled features.

    For a GPU several threads crop: resizing an image takes longer than the network does there. On a
    processor they would take its time.
    """
    threads = 1 if device.type == "cpu" else THREADS

    def network(images_BHWC: NDArray[np.uint8]) -> Features:
        crops = crops_of(images_BHWC, size, threads)
        logits_BK, pooled_BD = classifier(as_tensor(crops, device))
        return Features(pooled_BD, logits_NK=logits_BK)

    return network


def crops_of(images_NHWC: NDArray[np.uint8], size: int, threads: int) -> NDArray[np.uint8]:
    """Crop images to `size` pixels, in some threads."""

    def cropped(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.asarray(crop(Image.fromarray(image_HWC), size))

    if threads == 1:
        return np.stack([cropped(image) for image in images_NHWC])
    with ThreadPoolExecutor(threads) as pool:
        return np.stack([*pool.map(cropped, images_NHWC)])


def _on_pixels(inception: nn.Module, device: torch.device) -> Network:
    """Pass the 8-bit values of images to Inception, which resizes them itself."""

    def network(images_BHWC: NDArray[np.uint8]) -> Features:
        return Features(*inception(torch.from_numpy(images_BHWC).to(device).permute(0, 3, 1, 2)))

    return network


# --- User-defined networks ------------------------------------------------------------------------


def _user_extractor(spec: str, device: torch.device) -> Extractor:
    user_network, module = _load_user_network(spec)
    hashes = [storage.hash_file(Path(module.__file__))] if module.__file__ else []
    if isinstance(user_network, nn.Module):
        user_network.to(device).eval()
        hashes.append(_hash_state(user_network))

    def network(images_BHWC: NDArray[np.uint8]) -> Features:
        with _user_errors(spec):
            # Contiguous, as most code expects: `view` fails on channels-last memory.
            output = user_network(as_tensor(images_BHWC, device).contiguous())
        return _check_features(spec, output, len(images_BHWC))

    return _extractor(spec, f"-{spec}", hashes, network, device)


def _load_user_network(spec: str) -> tuple[Callable[[Tensor], Any], ModuleType]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        with _user_errors(spec):
            network = pkgutil.resolve_name(spec)()
    finally:
        sys.path.remove(folder)
    if not callable(network):
        raise UserError(
            f"features {spec!r}: the factory returned {type(network).__name__}, expected an "
            "nn.Module or another function of images"
        )
    return network, sys.modules[spec.partition(":")[0]]


def _check_features(spec: str, output: Any, count: int) -> Features:
    if isinstance(output, Features):
        features = output
    elif isinstance(output, tuple) and len(output) == 2:
        features = Features(output[0], logits_NK=output[1])
    else:
        features = Features(output)
    for name, value in vars(features).items():
        if value is None and name != "pooled_ND":
            continue
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        if len(shape) != 2 or shape[0] != count or not shape[1] or not value.is_floating_point():
            kind = f"{value.dtype} {shape}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"features {spec!r}: got {kind} for {count} images as {name}, expected floats "
                f"({count}, {name[-1]}); return features, (features, logits), or ctf's Features"
            )
        if not value.isfinite().all():
            raise UserError(f"features {spec!r}: {name} has values that are not finite")
    return features


@contextlib.contextmanager
def _user_errors(spec: str) -> Iterator[None]:
    """Turn an exception in the user's code into a UserError that names the line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        not_theirs = (
            __file__, str(Path(torch.__file__).parent), importlib.__file__, pkgutil.__file__,
            "<frozen",
        )  # fmt: skip
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if not frame.filename.startswith(not_theirs)]
        where = f"{theirs[-1].filename}, line {theirs[-1].lineno}: " if theirs else ""
        reason = (str(error).strip() or "no message").splitlines()[0]
        hint = "" if theirs else "\nexpected MODULE:FACTORY, e.g. my_features:make"
        raise UserError(
            f"features {spec!r}: {where}{type(error).__name__}: {reason}{hint}"
        ) from error


def _hash_state(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
