"""A pipeline on disk: its files, where to find them, and how to load and save each part."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ctf import kernels
from ctf.common import claims, config, storage
from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.common.weights import init_empty_weights, load_strict
from ctf.models.clusters import Clusters, fingerprint
from ctf.models.coarse import CoarseModel
from ctf.models.drafts import Drafts
from ctf.models.fine import FineModel
from ctf.models.sampling import Sampling
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.models.transformer import TransformerConfig

if TYPE_CHECKING:
    from ctf.pipelines.pipeline import Pipeline

SHIPPED = Path(__file__).parents[1] / "shipped"
SETTINGS = "pipeline.json"
CLUSTERS = "clusters.safetensors"
DRAFTS = "drafts.safetensors"
OPTIONAL_FILES = (f"coarse/{DRAFTS}",)  # on which no sample depends
PIPELINE_FILES = (  # all that is ever downloaded
    SETTINGS,
    f"clusters/{CLUSTERS}",
    *(
        f"{model}/{file}"
        for model in ("tokenizer", "coarse", "fine")
        for file in ("config.json", "model.safetensors")
    ),
    *OPTIONAL_FILES,
)

M = TypeVar("M", bound=nn.Module)
Transformer = TypeVar("Transformer", CoarseModel, FineModel)


@dataclasses.dataclass(frozen=True)
class PipelineSettings:
    """The content of pipeline.json: the fields of `Pipeline` that are not models."""

    class_names: tuple[str, ...]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)


# --- Finding --------------------------------------------------------------------------------------


def shipped_pipelines() -> list[str]:
    """Return the names of the pipelines that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{SETTINGS}"))


def find_pipeline(name: str | Path, revision: str | None = None, **download: Any) -> Path:
    """Return the folder of a pipeline, after downloading it if necessary.

    Args:
        name: A folder, the name of a shipped pipeline, or org/name[@revision] on the Hub, in this
            order.
        revision: On the Hub, if it is not in the name.
        download: See `hub.download`.

    Raises:
        UserError: There is no such pipeline.
    """
    is_folder = Path(name).is_dir()
    if is_folder or str(name) in shipped_pipelines():
        if revision is not None:
            raise UserError(f"{name}: a local pipeline has no revisions, got {revision!r}")
        return Path(name) if is_folder else SHIPPED / str(name)
    from ctf.pipelines import hub  # imports huggingface_hub, which is slow

    address = hub.parse(str(name), revision)
    if address is None:
        raise UserError(
            f"no pipeline {str(name)!r}: not a folder, a shipped pipeline or org/name on the Hub"
            f"{did_you_mean(str(name), shipped_pipelines())}"
        )
    folder = hub.download(address, PIPELINE_FILES, **download)
    _check_complete(folder, address)
    return folder


def lasting_name(name: str) -> str:
    """Return a pipeline's name, as `find_pipeline` takes it, that is valid in every folder."""
    return os.path.abspath(name) if Path(name).is_dir() else name


def _check_complete(folder: Path, address: object) -> None:
    """Raise a UserError if a file of the pipeline downloaded from `address` is missing."""
    needed = [file for file in PIPELINE_FILES if file not in OPTIONAL_FILES]
    missing = [file for file in needed if not (folder / file).is_file()]
    if SETTINGS in missing:
        raise UserError(f"{address} is not a pipeline: the repository has no {SETTINGS}")
    if {file.partition("/")[0] for file in missing} == {"fine"}:
        clusters = load_clusters(folder / "clusters" / CLUSTERS)
        missing = missing if clusters.largest > 1 else []  # the baseline has no fine model
    if missing:
        raise UserError(
            f"{address}: the repository has no {', '.join(missing)}\n"
            "expected all files of a pipeline, as uploaded by ctf push"
        )


def hash_pipeline(folder: Path) -> str:
    """Return a hash of the files of a pipeline that decide its samples, which identifies it."""
    files = {file: folder / file for file in PIPELINE_FILES if file not in OPTIONAL_FILES}
    return storage.hash_json(
        {file: storage.hash_file(path) for file, path in files.items() if path.is_file()}
    )


# --- Loading --------------------------------------------------------------------------------------


def load_parts(folder: Path, device: torch.device) -> dict[str, Any]:
    """Load the fields of the `Pipeline` in a folder.

    Raises:
        UserError: A part is missing, damaged, or from a different run.
    """
    settings = load_settings(folder)
    tokenizer = load_tokenizer(folder / "tokenizer", device)
    clusters = load_clusters(folder / "clusters" / CLUSTERS).to(device)
    if clusters.codebook_size != tokenizer.config.codebook_size:
        raise UserError(
            f"{folder}: clusters of {clusters.codebook_size} codes, but the tokenizer has "
            f"{tokenizer.config.codebook_size}: parts of different runs"
        )
    models: dict[str, Any] = {
        "coarse": load_coarse(folder / "coarse", clusters, device),
        "fine": load_fine(folder / "fine", clusters, device) if clusters.largest > 1 else None,
    }
    for name, model in models.items():
        expected = (tokenizer.grid, len(settings.class_names))
        if model is not None and (model.config.grid, model.config.classes) != expected:
            raise UserError(
                f"{folder / name}: made for a grid of {model.config.grid} and "
                f"{model.config.classes} classes, expected {expected[0]} and {expected[1]}: "
                "parts of different runs"
            )
    return {"tokenizer": tokenizer, "clusters": clusters, **models, **vars(settings)}


def load_settings(folder: Path) -> PipelineSettings:
    """Load pipeline.json."""
    path = folder / SETTINGS
    return config.from_json(PipelineSettings, storage.load_json(path), str(path))


def load_coarse(
    folder: Path,
    clusters: Clusters,
    device: torch.device,
    tensors: Mapping[str, Tensor] | None = None,
) -> CoarseModel:
    """Load the coarse model in `folder` for sampling, with other weights if there are `tensors`.

    Raises:
        UserError: The model is missing, damaged, or was trained with other clusters.
    """
    model_config, _ = load_model_config(folder, clusters)
    with init_empty_weights():
        model = CoarseModel(model_config, clusters.count)
    model = _load_transformer(model, folder, device, tensors)
    if (path := folder / DRAFTS).is_file():
        model.drafts = load_drafts(path, (model_config.length, clusters.count)).to(device)
    return model


def load_drafts(path: Path, shape: tuple[int, int]) -> Drafts:
    """Load drafts for L labels of K clusters; `shape` is (L, K).

    Raises:
        UserError: The file is damaged, or its drafts are of another shape.
    """
    tensors, _ = storage.load_tensors(path)
    remedy = "delete it: it only saves passes of the coarse model"
    try:
        drafts = Drafts(tensors)
    except ValueError as error:
        raise UserError(f"{path}: not a file of drafts: {error}; {remedy}") from None
    if drafts.shape != shape:
        raise UserError(
            f"{path}: drafts of {drafts.shape[0]} labels of {drafts.shape[1]} clusters, expected "
            f"{shape[0]} of {shape[1]}; {remedy}"
        )
    return drafts


def load_fine(
    folder: Path,
    clusters: Clusters,
    device: torch.device,
    tensors: Mapping[str, Tensor] | None = None,
) -> FineModel:
    """Load the fine model in `folder` for sampling; see `load_coarse`."""
    model_config, stored = load_model_config(folder, clusters)
    softmax = stored.get("softmax")
    if softmax not in ("members", "full"):
        raise UserError(f"{folder}: got softmax {softmax!r}, expected that of a fine model")
    with init_empty_weights():
        model = FineModel(model_config, clusters, softmax)
    return _load_transformer(model, folder, device, tensors)


def load_model_config(folder: Path, clusters: Clusters) -> tuple[TransformerConfig, dict[str, Any]]:
    """Load the shape of the coarse or fine model in `folder`, and all of its config.json.

    Raises:
        UserError: The file is missing or damaged, or the model was trained with other clusters.
    """
    path = folder / "config.json"
    stored = storage.load_object(path)
    if stored.get("clusters") != fingerprint(clusters):
        raise UserError(f"{folder}: trained with other clusters than those of the pipeline")
    model_config = config.from_json(TransformerConfig, stored.get("model"), f"{path}: model")
    return model_config, stored


def _load_transformer(
    model: Transformer, folder: Path, device: torch.device, tensors: Mapping[str, Tensor] | None
) -> Transformer:
    _load_weights(model, folder, tensors)
    model.to(device).eval().requires_grad_(False)
    kernels.for_evaluation(model)
    return model


def _load_weights(
    model: nn.Module, folder: Path, tensors: Mapping[str, Tensor] | None = None
) -> None:
    path = folder / "model.safetensors"
    if tensors is None:
        tensors, _ = storage.load_tensors(path)
    load_strict(model, {name: t.float() for name, t in tensors.items()}, path)


def load_tokenizer(folder: Path, device: torch.device | str = "cpu") -> VQModel:
    """Load the tokenizer in `folder` for encoding and decoding."""
    model_config = load_tokenizer_config(folder)
    with init_empty_weights():
        model = VQModel(model_config)
    _load_weights(model, folder)
    to_channels_last(model, torch.device(device)).eval().requires_grad_(False)
    kernels.for_evaluation(model)
    return model


def load_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Load the shape of the tokenizer in `folder`."""
    path = folder / "config.json"
    stored = storage.load_object(path)
    return config.from_json(TokenizerConfig, stored.get("model"), f"{path}: model")


def to_channels_last(module: M, device: torch.device) -> M:
    """Move a module to a device, its convolutions in the memory format that is fastest there."""
    module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def load_clusters(path: Path) -> Clusters:
    """Load clusters.

    Raises:
        UserError: The file is missing, damaged or inconsistent.
    """
    return read_clusters(path)[0]


def read_clusters(path: Path) -> tuple[Clusters, dict[str, str]]:
    """Load clusters and the metadata of the file; see `load_clusters`."""
    tensors, metadata = storage.load_tensors(path)
    try:
        if set(tensors) != {"labels_V", "members_KS"}:
            raise ValueError(f"its tensors are {', '.join(sorted(tensors))}")
        clusters = Clusters.from_labels(tensors["labels_V"])
        if not torch.equal(clusters.members_KS, tensors["members_KS"]):
            raise ValueError("members do not match labels")
    except ValueError as error:
        raise UserError(
            f"{path}: not a file of clusters: {error}; delete it and run ctf clusters fit again"
        ) from None
    return clusters, metadata


# --- Saving ---------------------------------------------------------------------------------------


def save(pipe: Pipeline, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a pipeline into a folder, with its weights in `dtype`; None to keep theirs.

    Raises:
        UserError: The folder holds something else; weights were quantised to int8; the tokenizer
            is not a `VQModel`.
    """
    if not isinstance(pipe.tokenizer, VQModel):
        kind = type(pipe.tokenizer).__name__
        raise UserError(f"a pipeline with a {kind} cannot be saved, only one with a VQModel")
    with claims.hold(folder, SETTINGS, what="a pipeline"):
        _save(pipe, folder, dtype)


def _save(pipe: Pipeline, folder: Path, dtype: torch.dtype | None) -> None:
    assert isinstance(pipe.tokenizer, VQModel)
    coarse_config = {"clusters": fingerprint(pipe.clusters)}
    models: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "tokenizer": (pipe.tokenizer, {}),
        "coarse": (pipe.coarse, coarse_config),
    }
    if pipe.fine is not None:
        models["fine"] = (pipe.fine, {**coarse_config, "softmax": pipe.fine.softmax})
    if not all(kernels.is_exact(model) for model, _ in models.values()):
        raise UserError(
            "a pipeline loaded with the engine int8 or bf16 cannot be saved: its weights are "
            "rounded\n"
            "load it with the engine auto or eager instead"
        )
    # First, so that the folder is recognised as a pipeline's if writing is interrupted.
    settings = PipelineSettings(pipe.class_names, pipe.sampling, pipe.origin)
    storage.save_json(folder / SETTINGS, config.to_json(settings))
    for name, (model, extra) in models.items():
        save_model(model, folder / name, extra, dtype)
    save_clusters(pipe.clusters, folder / "clusters" / CLUSTERS)
    if (drafts := pipe.coarse.drafts) is None:
        (folder / "coarse" / DRAFTS).unlink(missing_ok=True)
    else:
        storage.save_tensors(folder / "coarse" / DRAFTS, drafts.tables())


def save_model(
    model: nn.Module,
    folder: Path,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json, with `extra` entries, and model.safetensors, with weights in `dtype`."""
    content = {"model": config.to_json(model.config), **(extra or {})}
    storage.save_json(folder / "config.json", content)
    weights = model.state_dict()
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    storage.save_tensors(folder / "model.safetensors", weights)


def save_clusters(clusters: Clusters, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write clusters into a file."""
    tensors = {"labels_V": clusters.labels_V, "members_KS": clusters.members_KS}
    storage.save_tensors(path, tensors, metadata)
