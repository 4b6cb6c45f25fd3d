"""Networks that see pictures as features, from which FID and other scores are made.

Only the scores of `inception` are the published ones, so only they are called FID, sFID and IS.
The others have the network's name behind theirs, and compare with themselves alone.

Shapes: N pictures, B of them at a time, H height, W width, D features, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ctf.common import storage
from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.common.weights import load_strict
from ctf.data.transforms import as_tensor, crop
from ctf.evaluation.classifier import SHIPPED, shipped_classifier
from ctf.evaluation.features import LITE0_SIZE, lite0_weights, load_lite0
from ctf.evaluation.inception import Inception, fold_batch_norms

NAMES = ("lite0", "inception", "fashion")
VERSION = 1  # of what is done to pictures before the networks; another one gives other digests

# Pictures at once on a CPU, where few are fastest; see `_keep_memory`.
CPU_BATCH = {"lite0": 4, "inception": 4, "fashion": 64}
OTHER_CPU_BATCH = 16
GPU_BATCH = 128

# As pytorch-fid and torch-fidelity name the same file in the cache of torch.hub. The digits are the
# first of its SHA-256.
INCEPTION_FILES = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
)
INCEPTION_SOURCE = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILES[0]}"
)


@dataclass(frozen=True)
class Features:
    """What a network sees in N pictures; float32, on the CPU."""

    pooled_ND: Tensor
    spatial_ND: Tensor | None = None  # those of sFID; Inception alone has them
    logits_NK: Tensor | None = None  # of classes, for the Inception Score; None without classes


@dataclass(frozen=True)
class Extractor:
    """A network with what has to be done to pictures before it.

    name: as `open_extractor` takes it.
    suffix: what is put behind the names of its scores: "" for inception alone.
    digest: SHA-256 of the weights, the name and the version of the preparation. Features of
        different digests must not be compared.
    look: uint8 (B, H, W, 3), B at most `batch_size` -> features.
    """

    name: str
    suffix: str
    digest: str
    batch_size: int
    look: Callable[[NDArray[np.uint8]], Features]

    @torch.inference_mode()
    def __call__(self, images_NHWC: NDArray[np.uint8]) -> Features:
        """Args: uint8 (N, H, W, 3), one picture or more, of any size.

        Raises:
            ValueError: another shape or type.
            UserError: the user's network fails, or gives something else than features.
        """
        shape = images_NHWC.shape
        if images_NHWC.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]:
            raise ValueError(f"got {images_NHWC.dtype} {shape}, expected uint8 (N, H, W, 3)")
        # Copies: torch warns of memory that is not writable, and takes no steps backwards in it.
        seen = [
            self.look(np.array(images_NHWC[start : start + self.batch_size], order="C"))
            for start in range(0, shape[0], self.batch_size)
        ]

        def joined(parts: list[Tensor | None]) -> Tensor | None:
            present = [part.float().cpu() for part in parts if part is not None]
            return torch.cat(present) if present else None

        return Features(
            torch.cat([one.pooled_ND.float().cpu() for one in seen]),
            joined([one.spatial_ND for one in seen]),
            joined([one.logits_NK for one in seen]),
        )


def open_extractor(
    spec: str, *, weights: Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """The network of that name.

    Args:
        spec: one of
            "lite0": EfficientNet-Lite0, trained on ImageNet; pictures are resized to 224 pixels by
                `crop`. 1280 features, 1000 classes.
            "inception": the network of ADM's evaluator; see inception.py. 2048 features, 2023
                spatial ones, 1008 classes.
            "fashion": the classifier of Fashion-MNIST that comes with the package, at 32 pixels.
                128 features, 10 classes.
            "module:factory": whatever `factory()` of a Python module returns, which is sought in
                the current folder first. It takes float images (B, 3, H, W) in [-1, 1] as they are,
                and returns features (B, D), or (features, logits (B, K)), or `Features`. Its
                digest is of that module's file and, where it is an nn.Module, its state dict; what
                the file imports is not covered.
        weights: file of Inception; without it, the caches of torch.hub and of the Hugging Face Hub
            are searched.

    Raises:
        UserError: an unknown name, weights that are missing or something else, or a module that
            cannot be used.
    """
    device = torch.device(device)
    if device.type == "cpu":
        _keep_memory()
    if weights is not None and spec != "inception":
        raise UserError(f"--weights {weights}: only inception takes weights, got features {spec!r}")
    if ":" in spec:
        return _user_extractor(spec, device)
    match spec:
        case "lite0":
            return _lite0(device)
        case "inception":
            return _inception(weights or _find_inception(), device)
        case "fashion":
            return _fashion(device)
    raise UserError(f"unknown features {spec!r}{did_you_mean(spec, (*NAMES, 'module:factory'))}")


def _keep_memory() -> None:
    """Makes glibc keep up to 64 MiB that are free; by default it gives the memory of every map back
    to the system, and has it anew, page by page, which takes a third of the time of lite0.

    The limit follows the largest block below 32 MiB that was ever freed (mallopt(3),
    M_MMAP_THRESHOLD and M_TRIM_THRESHOLD). Elsewhere this does nothing.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)


def _batch_size(name: str, device: torch.device) -> int:
    return CPU_BATCH.get(name, OTHER_CPU_BATCH) if device.type == "cpu" else GPU_BATCH


def _digest(name: str, *hashes: str) -> str:
    return storage.hash_json([VERSION, name, *hashes])


def _resized(images_BHWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.stack([np.asarray(crop(Image.fromarray(image), size)) for image in images_BHWC])


def _lite0(device: torch.device) -> Extractor:
    network = load_lite0().to(device)

    def look(images_BHWC: NDArray[np.uint8]) -> Features:
        logits_BK, pooled_BD = network(as_tensor(_resized(images_BHWC, LITE0_SIZE), device))
        return Features(pooled_BD, logits_NK=logits_BK)

    digest = _digest("lite0", storage.hash_file(lite0_weights()))
    return Extractor("lite0", "-Lite0", digest, _batch_size("lite0", device), look)


def _fashion(device: torch.device) -> Extractor:
    classifier = shipped_classifier(device)

    def look(images_BHWC: NDArray[np.uint8]) -> Features:
        images = _resized(images_BHWC, classifier.image_size)
        logits_BK, pooled_BD = classifier(as_tensor(images, device))
        return Features(pooled_BD, logits_NK=logits_BK)

    digest = _digest("fashion", storage.hash_file(SHIPPED / "model.safetensors"))
    return Extractor("fashion", "-fashion", digest, _batch_size("fashion", device), look)


# --- Inception ------------------------------------------------------------------------------------


def _inception(path: Path, device: torch.device) -> Extractor:
    network, sha256 = _load_inception(path)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def look(images_BHWC: NDArray[np.uint8]) -> Features:
        pixels = torch.from_numpy(images_BHWC).to(device)
        return Features(*network(pixels.permute(0, 3, 1, 2)))

    batch_size = _batch_size("inception", device)
    return Extractor("inception", "", _digest("inception", sha256), batch_size, look)


def _find_inception() -> Path:
    for name in INCEPTION_FILES:
        in_hub = Path(constants.HF_HUB_CACHE).glob(f"models--*/snapshots/*/{name}")
        for path in (Path(torch.hub.get_dir()) / "checkpoints" / name, *sorted(in_hub)):
            if path.is_file():
                return path
    raise UserError(
        "the weights of Inception are not here, and nothing is downloaded: get the file from\n"
        f"{INCEPTION_SOURCE} and say --weights FILE"
    )


def _load_inception(path: Path) -> tuple[Inception, str]:
    """The network and the SHA-256 of its file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {INCEPTION_FILES[0]}")
    sha256 = storage.hash_file(path)
    named = re.search(r"-([0-9a-f]{8,})\.", path.name)  # as torch.hub names files
    if named and not sha256.startswith(named[1]):
        raise UserError(
            f"{path}: damaged: its SHA-256 begins with {sha256[:8]}, but by its name with "
            f"{named[1]}\nget it again from {INCEPTION_SOURCE}"
        )
    other = UserError(
        f"{path}: not the weights of Inception as pytorch-fid and torch-fidelity have them\n"
        f"get them from {INCEPTION_SOURCE}"
    )
    try:
        stored = storage.load_pt(path)
    except UserError:
        raise other from None
    if not isinstance(stored, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in stored.items()
    ):
        raise other
    network = Inception()
    try:
        load_strict(network, fold_batch_norms(stored), path)
    except (KeyError, RuntimeError):
        raise other from None
    return network.requires_grad_(False), sha256


# --- The user's own -------------------------------------------------------------------------------


def _user_extractor(spec: str, device: torch.device) -> Extractor:
    network, module = _make(spec)
    hashes = [storage.hash_file(Path(module.__file__))] if module.__file__ else []
    if isinstance(network, nn.Module):
        network.to(device).eval()
        hashes.append(_hash_state(network))

    def look(images_BHWC: NDArray[np.uint8]) -> Features:
        with _blaming(spec):
            # As most code expects them: a view of them needs their memory in order.
            given = network(as_tensor(images_BHWC, device).contiguous())
        return _as_features(spec, given, len(images_BHWC))

    return Extractor(spec, f"-{spec}", _digest(spec, *hashes), _batch_size(spec, device), look)


def _make(spec: str) -> tuple[Callable[[Tensor], Any], ModuleType]:
    name, _, attribute = spec.partition(":")
    if not all(part.isidentifier() for part in (*name.split("."), attribute)):
        raise UserError(f"features {spec!r}: expected MODULE:FACTORY, e.g. my_features:make")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        with _blaming(spec):
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                raise UserError(
                    f"features {spec!r}: no module {name!r} in {here}, and none is installed"
                )
            module = importlib.import_module(name)
            if not hasattr(module, attribute):
                known = [key for key, value in vars(module).items() if callable(value)]
                raise UserError(
                    f"features {spec!r}: {name} has no {attribute!r}"
                    f"{did_you_mean(attribute, known) if known else ''}"
                )
            factory = getattr(module, attribute)
            if not callable(factory):
                raise UserError(
                    f"features {spec!r}: got {type(factory).__name__}, expected a function"
                )
            network = factory()
    finally:
        sys.path.remove(here)
    if not callable(network):
        raise UserError(
            f"features {spec!r}: its factory returned {type(network).__name__}, expected an "
            "nn.Module or another function of images"
        )
    return network, module


def _as_features(spec: str, given: Any, count: int) -> Features:
    if isinstance(given, tuple) and len(given) == 2:
        given = Features(given[0], logits_NK=given[1])
    elif not isinstance(given, Features):
        given = Features(given)
    for name, value in vars(given).items():
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
    return given


@contextlib.contextmanager
def _blaming(spec: str) -> Iterator[None]:
    """Tells in a UserError what the user's code raised, and in which of its lines."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        not_theirs = (__file__, str(Path(torch.__file__).parent), importlib.__file__, "<frozen")
        theirs = [f for f in frames if not f.filename.startswith(not_theirs)]
        where = f"{theirs[-1].filename}, line {theirs[-1].lineno}: " if theirs else ""
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(f"features {spec!r}: {where}{type(error).__name__}: {reason}") from error


def _hash_state(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
