"""The pipeline: a trained tokenizer, clusters, coarse and fine model, as one thing to draw with.

Shapes: B batch, L tokens of an image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ctf import checkpoint, clusters, config, sampling, tokenizer_training
from ctf.clusters import Clusters
from ctf.coarse import CoarseModel
from ctf.config import did_you_mean
from ctf.errors import UserError
from ctf.fine import FineModel
from ctf.images import LARGEST_SIZE, as_pictures
from ctf.sampling import Sampling
from ctf.tokenizer import VQModel
from ctf.transformer import TransformerConfig

SHIPPED = Path(__file__).parent / "shipped"
SETTINGS = "pipeline.json"
FILES = (  # that make a pipeline; all that is ever downloaded
    SETTINGS,
    f"clusters/{clusters.FILE}",
    *(
        f"{model}/{file}"
        for model in ("tokenizer", "coarse", "fine")
        for file in ("config.json", "model.safetensors")
    ),
)
LICENSE = "license"  # the entry of `origin` with the licence of the weights
BATCH = 64  # images drawn at a time

Report = Callable[[int, int], None]  # images drawn, images to draw
Progress = Callable[[str], contextlib.AbstractContextManager[Report]]


@dataclasses.dataclass(frozen=True)
class PipelineSettings:
    """What a pipeline says of itself besides its models: the file pipeline.json."""

    class_names: tuple[str, ...]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)  # pictures, recipe, metrics


@dataclasses.dataclass(frozen=True)
class Samples:
    """What `Pipeline.sample` returns, an entry per class that was asked for.

    images: PIL images, RGB.
    codes: (B, L), int64 in [0, V), row by row.
    coarse: (B, L), int64 in [0, K): their coarse labels.
    """

    images: list[Image.Image]
    codes: Tensor
    coarse: Tensor


@dataclasses.dataclass
class Pipeline:
    """Everything that is needed to draw. Without a fine model it is the full-vocabulary baseline.

    tokenizer: codes <-> images.
    clusters: labels_V, members_KS, count.
    coarse: (labels_BL, classes_B) -> teacher-forced logits (B, L, K).
    fine: (labels_BL, classes_B) -> logits over members (B, L, S), or None.
    class_names: one per class.
    sampling: the settings that `sample` takes where it is not told otherwise.
    origin: what it was made of, as plain JSON values; "license" is that of the weights.
    """

    tokenizer: VQModel
    clusters: Clusters
    coarse: CoarseModel
    fine: FineModel | None
    class_names: tuple[str, ...]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: torch.device | str = "cpu",
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Pipeline:
        """Loads the pipeline in a folder, a shipped one by its name, or one of the Hub.

        Args:
            name: a folder, a shipped name, or org/name[@revision] on the Hub, in this order.
            revision: branch, tag or commit on the Hub, if not in the name; by default "main". This
                and all below are of the Hub, and as everywhere in huggingface_hub.
            cache_dir: where downloads are kept.
            token: of the Hub; by default the one that was logged in with.
            local_files_only: use what is in the cache, and no network.
            force_download: download anew what is in the cache.

        Raises:
            UserError: there is none, or its parts are missing, damaged, or of different runs; see
                `hub.download`.
        """
        folder = find(
            name,
            revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return load(folder, torch.device(device))

    def save_pretrained(
        self, folder: str | Path, *, half: bool = False, license: str | None = None
    ) -> None:
        """Writes the pipeline into a folder that `from_pretrained` takes, with a model card.

        Equal pipelines are equal bytes. A README.md that was edited is kept.

        Args:
            half: store weights in half precision: half the size, and now and then another code.
            license: of the weights, as the Hub calls it, e.g. "apache-2.0"; it stays with the
                pipeline. By default what `origin` says.

        Raises:
            UserError: the folder exists and holds something else, or cannot be written.
        """
        from ctf import card

        licensed = self._licensed(license)
        save(licensed, Path(folder), torch.float16 if half else torch.float32)
        card.save(licensed, Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        half: bool = False,
        license: str | None = None,
        picture: bool = True,
        card: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Push a pipeline of ctf",
        progress: Progress | None = None,
    ) -> str:
        """Pushes what `save_pretrained` writes to the Hub, as one commit.

        Its card is made anew, whatever the repository has, unless `card` is given.

        Args:
            repo_id: org/name, or org/name@branch; made if there is none.
            half, license: see `save_pretrained`.
            picture: draw a sheet of samples for the card.
            card: the text of README.md, instead of the one that is made of `origin`.
            private: who can see a repository that is made; by default as the organisation has it.
            token: of the Hub; by default the one that was logged in with.
            progress: opens a reporter of the samples that are drawn, e.g. `ctf.progress.progress`.

        Returns:
            The web address of the commit.

        Raises:
            UserError: no repository of that name can be made or written, or there is no network.
        """
        from ctf import card as cards
        from ctf import hub

        address = hub.target(repo_id)
        if card is not None and license is not None:
            raise UserError(
                f"got a licence, {license!r}, and a {cards.FILE} of your own\n"
                "write the licence into its header instead"
            )
        licensed = self._licensed(license)
        hub.create(address, private=private, token=token)  # or fails before minutes of drawing
        sheet = None
        if picture:
            with progress("samples") if progress else contextlib.nullcontext() as report:
                sheet = cards.picture(self, report)
        if card is None:
            card = cards.text(licensed, str(address), with_picture=picture)

        def write(folder: Path) -> None:
            save(licensed, folder, torch.float16 if half else torch.float32)
            cards.write(folder, card, sheet)

        return hub.push(
            write,
            address,
            replaced=(*FILES, cards.PICTURE),
            message=commit_message,
            token=token,
        )

    def _licensed(self, license: str | None) -> Pipeline:
        if license is None:
            return self
        return dataclasses.replace(self, origin={**self.origin, LICENSE: license})

    @property
    def device(self) -> torch.device:
        return self.clusters.labels_V.device

    def class_numbers(self, classes: Sequence[int | str]) -> list[int]:
        """Numbers, checked, of classes given by number or by name.

        Raises:
            UserError: there is no such class.
        """
        return [self._class_number(c) for c in classes]

    def _class_number(self, given: int | str) -> int:
        names = self.class_names
        if isinstance(given, str) and given in names:
            return names.index(given)
        try:
            number = int(given) if isinstance(given, str) else operator.index(given)
        except ValueError:
            raise UserError(f"unknown class {given!r}{did_you_mean(str(given), names)}") from None
        if not 0 <= number < len(names):
            raise UserError(
                f"class {number} of {len(names)}: expected 0 to {len(names) - 1}, "
                "or a name: " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            )
        return number

    def sample(
        self,
        classes: Sequence[int | str],
        seed: int = 0,
        *,
        resize: int | None = None,
        report: Report | None = None,
        **settings: float,
    ) -> Samples:
        """Draws an image for each of the given classes.

        Image i is drawn from seed + i, and depends on nothing else but its class and the settings:
        it is the same in any batch, up to the rounding of the kernels.

        Args:
            classes: numbers or names.
            resize: pixels a side of the images, instead of the tokenizer's.
            settings: any field of `Sampling`, by keyword; the rest as in `self.sampling`.
            report: called with the number of images done and to do.

        Raises:
            UserError: no class or an unknown one, an unknown setting, or one out of its range; a
                seed of more than 64 bits.
        """
        known = [field.name for field in dataclasses.fields(Sampling)]
        for name in settings:
            if name not in known:
                raise UserError(f"unknown setting {name!r}{did_you_mean(name, known)}")
        chosen = dataclasses.replace(self.sampling, **settings)  # type: ignore[arg-type]
        numbers = self.class_numbers(classes)
        if not numbers:
            raise UserError("got 0 images to sample, expected 1 or more")
        if resize is not None and not 1 <= resize <= LARGEST_SIZE:
            raise UserError(f"resize: got {resize}, expected 1 to {LARGEST_SIZE} pixels a side")
        check_seed(seed, len(numbers))
        images: list[Image.Image] = []
        codes, coarse = [], []
        for start in range(0, len(numbers), BATCH):
            classes_B = torch.tensor(numbers[start : start + BATCH], device=self.device)
            seeds = range(seed + start, seed + start + len(classes_B))
            uniforms_B2L = sampling.uniforms(seeds, self.coarse.config.length)
            labels_BL = sampling.sample_coarse(self.coarse, classes_B, uniforms_B2L[:, 0], chosen)
            codes_BL = sampling.sample_fine(
                self.fine, self.clusters, labels_BL, classes_B, uniforms_B2L[:, 1], chosen
            )
            images += as_pictures(self.decode(codes_BL, resize))
            codes.append(codes_BL.cpu())
            coarse.append(labels_BL.cpu())
            if report is not None:
                report(len(images), len(numbers))
        return Samples(images, torch.cat(codes), torch.cat(coarse))

    @torch.inference_mode()
    def decode(self, codes_BL: Tensor, resize: int | None = None) -> Tensor:
        """Codes (B, L) -> images in [-1, 1], (B, 3, H, W), of `resize` pixels a side if given.

        Resized as LlamaGen does from 384 to 256 before it scores (sample_c2i_ddp.py): bicubic,
        not antialiased, before values are clipped.
        """
        if resize is None:
            return self.tokenizer.decode(codes_BL)
        images_BCHW = self.tokenizer.decode_vectors(self.tokenizer.codebook()[codes_BL])
        return F.interpolate(images_BCHW, size=(resize, resize), mode="bicubic").clamp(-1, 1)


def check_seed(seed: int, count: int) -> None:
    """Raises UserError where seed to seed + count are not what a generator takes."""
    if not -(2**63) <= seed <= 2**63 - count:
        raise UserError(f"seed: got {seed}, expected a whole number of 64 bits")


def shipped() -> list[str]:
    """Names of the pipelines that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{SETTINGS}"))


def find(name: str | Path, revision: str | None = None, **download: Any) -> Path:
    """The given folder, that of a shipped pipeline, or that of a downloaded one, in this order.

    Args:
        name: a folder, a shipped name, or org/name[@revision] on the Hub.
        revision: on the Hub, if not in the name.
        download: see `hub.download`.

    Raises:
        UserError: there is none of the three.
    """
    here = Path(name).is_dir()
    if here or str(name) in shipped():
        if revision is not None:
            raise UserError(f"{name}: is here, not on the Hub, and has no revision {revision!r}")
        return Path(name) if here else SHIPPED / str(name)
    from ctf import hub  # which takes its time, and is needed here alone

    address = hub.parse(str(name), revision)
    if address is None:
        raise UserError(
            f"no pipeline {str(name)!r}, neither a folder nor a shipped one nor org/name on the Hub"
            f"{did_you_mean(str(name), shipped())}"
        )
    folder = hub.download(address, FILES, **download)
    _check_complete(folder, address)
    return folder


def _check_complete(folder: Path, address: object) -> None:
    """Raises UserError where what was downloaded from `address` lacks a file of a pipeline."""
    missing = [file for file in FILES if not (folder / file).is_file()]
    if {file.partition("/")[0] for file in missing} == {"fine"}:
        parts = clusters.load(folder / "clusters" / clusters.FILE)
        missing = missing if parts.largest > 1 else []  # a baseline has no fine model
    if SETTINGS in missing:
        raise UserError(f"{address} is no pipeline: the repository has no {SETTINGS}")
    if missing:
        raise UserError(
            f"{address}: the repository has no {', '.join(missing)}\n"
            "expected all files of a pipeline, as ctf push uploads them"
        )


def hash_of(folder: Path) -> str:
    """What names the pipeline in a folder: a hash of the files that make it."""
    files = {file: folder / file for file in FILES}
    return checkpoint.hash_json(
        {file: checkpoint.hash_file(path) for file, path in files.items() if path.is_file()}
    )


def load(folder: Path, device: torch.device) -> Pipeline:
    settings = load_settings(folder)
    tokenizer = tokenizer_training.load(folder / "tokenizer", device)
    parts = clusters.load(folder / "clusters" / clusters.FILE).to(device)
    if parts.codebook_size != tokenizer.config.codebook_size:
        raise UserError(
            f"{folder}: clusters of {parts.codebook_size} codes, but the tokenizer has "
            f"{tokenizer.config.codebook_size}: parts of different runs"
        )
    coarse = load_coarse(folder / "coarse", parts, device)
    fine = None
    if parts.largest > 1:
        fine = load_fine(folder / "fine", parts, device)
    for name, model in (("coarse", coarse), ("fine", fine)):
        if model is None:
            continue
        got = (model.config.grid, model.config.classes)
        if got != (tokenizer.grid, len(settings.class_names)):
            raise UserError(
                f"{folder / name}: made for a grid of {got[0]} and {got[1]} classes, expected "
                f"{tokenizer.grid} and {len(settings.class_names)}: parts of different runs"
            )
    return Pipeline(tokenizer, parts, coarse, fine, **vars(settings))


def save(pipeline: Pipeline, folder: Path, dtype: torch.dtype | None) -> None:
    """Writes a pipeline's folder, its weights as `dtype`; None: as they are."""
    if not (checkpoint.is_vacant(folder) or (folder / SETTINGS).is_file()):
        raise UserError(f"{folder} exists and is not a pipeline; choose another folder")
    # First: it marks the folder as ours, if writing should be cut short.
    settings = PipelineSettings(pipeline.class_names, pipeline.sampling, pipeline.origin)
    checkpoint.save_json(folder / SETTINGS, config.to_json(settings))
    stored: dict[str, tuple[torch.nn.Module, dict[str, Any]]] = {
        "tokenizer": (pipeline.tokenizer, {}),
        "coarse": (pipeline.coarse, {"clusters": clusters.fingerprint(pipeline.clusters)}),
    }
    if pipeline.fine is not None:
        stored["fine"] = (
            pipeline.fine,
            {**stored["coarse"][1], "softmax": pipeline.fine.softmax},
        )
    for name, (model, more) in stored.items():
        shape: Any = model.config
        checkpoint.save_json(
            folder / name / "config.json", {"model": config.to_json(shape), **more}
        )
        weights = {k: v if dtype is None else v.to(dtype) for k, v in model.state_dict().items()}
        checkpoint.save_tensors(folder / name / "model.safetensors", weights)
    clusters.save(pipeline.clusters, folder / "clusters" / clusters.FILE)


def load_settings(folder: Path) -> PipelineSettings:
    path = folder / SETTINGS
    return config.from_json(PipelineSettings, checkpoint.load_json(path), str(path))


def load_coarse(folder: Path, parts: Clusters, device: torch.device) -> CoarseModel:
    """The coarse model in `folder`, for these clusters, ready to draw."""
    shape, _ = _load_config(folder, parts)
    model = CoarseModel(shape, parts.count)
    return _ready(model, folder, device)


def load_fine(folder: Path, parts: Clusters, device: torch.device) -> FineModel:
    """The fine model in `folder`, for these clusters, ready to draw."""
    shape, stored = _load_config(folder, parts)
    softmax = stored.get("softmax")
    if softmax not in ("members", "full"):
        raise UserError(f"{folder}: got softmax {softmax!r}, expected that of a fine model")
    model = FineModel(shape, parts, softmax)
    return _ready(model, folder, device)


def _load_config(folder: Path, parts: Clusters) -> tuple[TransformerConfig, dict[str, Any]]:
    path = folder / "config.json"
    stored = checkpoint.load_object(path)
    if stored.get("clusters") != clusters.fingerprint(parts):
        raise UserError(f"{folder}: trained for other clusters than those beside it")
    shape = config.from_json(TransformerConfig, stored.get("model"), f"{path}: model")
    return shape, stored


def _ready(model: Any, folder: Path, device: torch.device) -> Any:
    path = folder / "model.safetensors"
    tensors, _ = checkpoint.load_tensors(path)
    checkpoint.load_strict(model, {k: v.float() for k, v in tensors.items()}, path)
    return model.to(device).eval().requires_grad_(False)
