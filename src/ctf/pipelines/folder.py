"""A pipeline on disk: its files, where they are found, and the models in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ctf.common import config, storage
from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.models import clusters
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.sampling import Sampling
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.models.transformer import TransformerConfig

CLUSTERS = "clusters.safetensors"
SHIPPED = Path(__file__).parents[1] / "shipped"


SETTINGS = "pipeline.json"


PIPELINE_FILES = (  # that make a pipeline; all that is ever downloaded
    SETTINGS,
    f"clusters/{CLUSTERS}",
    *(
        f"{model}/{file}"
        for model in ("tokenizer", "coarse", "fine")
        for file in ("config.json", "model.safetensors")
    ),
)


@dataclasses.dataclass(frozen=True)
class PipelineSettings:
    """What a pipeline says of itself besides its models: the file pipeline.json."""

    class_names: tuple[str, ...]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)  # pictures, recipe, metrics


def shipped_pipelines() -> list[str]:
    """Names of the pipelines that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{SETTINGS}"))


def find_pipeline(name: str | Path, revision: str | None = None, **download: Any) -> Path:
    """The given folder, that of a shipped pipeline, or that of a downloaded one, in this order.

    Args:
        name: a folder, a shipped name, or org/name[@revision] on the Hub.
        revision: on the Hub, if not in the name.
        download: see `hub.download`.

    Raises:
        UserError: there is none of the three.
    """
    here = Path(name).is_dir()
    if here or str(name) in shipped_pipelines():
        if revision is not None:
            raise UserError(f"{name}: is here, not on the Hub, and has no revision {revision!r}")
        return Path(name) if here else SHIPPED / str(name)
    from ctf.pipelines import hub  # which takes its time, and is needed here alone

    address = hub.parse(str(name), revision)
    if address is None:
        raise UserError(
            f"no pipeline {str(name)!r}, neither a folder nor a shipped one nor org/name on the Hub"
            f"{did_you_mean(str(name), shipped_pipelines())}"
        )
    folder = hub.download(address, PIPELINE_FILES, **download)
    _check_complete(folder, address)
    return folder


def _check_complete(folder: Path, address: object) -> None:
    """Raises UserError where what was downloaded from `address` lacks a file of a pipeline."""
    missing = [file for file in PIPELINE_FILES if not (folder / file).is_file()]
    if {file.partition("/")[0] for file in missing} == {"fine"}:
        parts = load_clusters(folder / "clusters" / CLUSTERS)
        missing = missing if parts.largest > 1 else []  # a baseline has no fine model
    if SETTINGS in missing:
        raise UserError(f"{address} is no pipeline: the repository has no {SETTINGS}")
    if missing:
        raise UserError(
            f"{address}: the repository has no {', '.join(missing)}\n"
            "expected all files of a pipeline, as ctf push uploads them"
        )


def hash_pipeline(folder: Path) -> str:
    """What names the pipeline in a folder: a hash of the files that make it."""
    files = {file: folder / file for file in PIPELINE_FILES}
    return storage.hash_json(
        {file: storage.hash_file(path) for file, path in files.items() if path.is_file()}
    )


def load_settings(folder: Path) -> PipelineSettings:
    path = folder / SETTINGS
    return config.from_json(PipelineSettings, storage.load_json(path), str(path))


def load_coarse(
    folder: Path,
    parts: Clusters,
    device: torch.device,
    tensors: Mapping[str, Tensor] | None = None,
) -> CoarseModel:
    """The coarse model in `folder`, for these clusters, ready to draw.

    Args:
        tensors: the weights to take instead of the folder's.
    """
    shape, _ = _load_config(folder, parts)
    with storage.without_weights():  # the weights come from the file
        model = CoarseModel(shape, parts.count)
    return _ready(model, folder, device, tensors)


def load_fine(
    folder: Path,
    parts: Clusters,
    device: torch.device,
    tensors: Mapping[str, Tensor] | None = None,
) -> FineModel:
    """The fine model in `folder`, for these clusters, ready to draw; `tensors` as above."""
    shape, stored = _load_config(folder, parts)
    softmax = stored.get("softmax")
    if softmax not in ("members", "full"):
        raise UserError(f"{folder}: got softmax {softmax!r}, expected that of a fine model")
    with storage.without_weights():
        model = FineModel(shape, parts, softmax)
    return _ready(model, folder, device, tensors)


def _load_config(folder: Path, parts: Clusters) -> tuple[TransformerConfig, dict[str, Any]]:
    path = folder / "config.json"
    stored = storage.load_object(path)
    if stored.get("clusters") != clusters.fingerprint(parts):
        raise UserError(f"{folder}: trained for other clusters than those beside it")
    shape = config.from_json(TransformerConfig, stored.get("model"), f"{path}: model")
    return shape, stored


def _ready(
    model: Any, folder: Path, device: torch.device, tensors: Mapping[str, Tensor] | None
) -> Any:
    path = folder / "model.safetensors"
    if tensors is None:
        tensors, _ = storage.load_tensors(path)
    storage.load_strict(model, {k: v.float() for k, v in tensors.items()}, path)
    model.trunk.rope.to_empty(device="cpu")  # no weights of the file; it fills itself
    return model.to(device).eval().requires_grad_(False)


M = TypeVar("M", bound=nn.Module)


def load_tokenizer(folder: Path, device: torch.device | str = "cpu") -> VQModel:
    """The tokenizer in `folder` (config.json, model.safetensors), ready to encode and decode."""
    path = folder / "config.json"
    stored = storage.load_object(path)
    model_config = config.from_json(TokenizerConfig, stored.get("model"), f"{path}: model")
    tensors, _ = storage.load_tensors(folder / "model.safetensors")
    with storage.without_weights():  # the weights come from the file
        model = VQModel(model_config)
    storage.load_strict(
        model, {k: v.float() for k, v in tensors.items()}, folder / "model.safetensors"
    )
    return to_channels_last(model, torch.device(device)).eval().requires_grad_(False)


def to_channels_last(module: M, device: torch.device) -> M:
    return module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def save_clusters(clusters: Clusters, path: Path, metadata: dict[str, str] | None = None) -> None:
    tensors = {"labels_V": clusters.labels_V, "members_KS": clusters.members_KS}
    storage.save_tensors(path, tensors, metadata)


def load_clusters(path: Path) -> Clusters:
    """Raises UserError where the file is not there, is damaged, or its parts do not agree."""
    return read_clusters(path)[0]


def read_clusters(path: Path) -> tuple[Clusters, dict[str, str]]:
    tensors, metadata = storage.load_tensors(path)
    try:
        if set(tensors) != {"labels_V", "members_KS"}:
            raise ValueError(f"holds tensors {', '.join(sorted(tensors))}")
        clusters = Clusters.from_labels(tensors["labels_V"])
        if not torch.equal(clusters.members_KS, tensors["members_KS"]):
            raise ValueError("members do not agree with labels")
    except ValueError as error:
        raise UserError(
            f"{path}: not a file of clusters: {error}; delete it and run ctf clusters fit again"
        ) from None
    return clusters, metadata
