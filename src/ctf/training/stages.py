"""The stages of a run before its models: tokenizer, tokens, clusters.

    RUN/tokenizer/  tokens/  clusters/

Each reads only the folders of the stages before it; a finished stage is loaded, a stopped one
resumes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from torch import Tensor

from ctf.common import claims, storage
from ctf.common.distributed import ALONE, World
from ctf.common.errors import UserError
from ctf.common.precision import Precision
from ctf.common.progress import Progress
from ctf.data import extraction
from ctf.data.image_set import Splits
from ctf.data.tokens import Tokens
from ctf.models.clusters import Clusters, ClustersConfig
from ctf.models.tokenizer import VQModel
from ctf.pipelines.folder import load_tokenizer, load_tokenizer_config
from ctf.training import clusters as clusters_stage
from ctf.training import tokenizer
from ctf.training.loop import DEFAULT_EXECUTION, Execution
from ctf.training.recipes import Recipe

FIT = "fit.json"  # marks the run of `ctf fit`
TOKENIZER = "tokenizer/config.json"  # marks any run
TOKENIZER_FILES = ("config.json", "model.safetensors")
STUDY_IMAGES = 256  # held-out images that the redundancy study of the clusters is based on


def tokenizer_hash(run: Path) -> str:
    """Return the SHA-256 of the tokenizer's weights, by which the later stages know it."""
    return storage.hash_file(run / "tokenizer" / "model.safetensors")


def tokenizer_hashes(run: Path) -> tuple[str, ...]:
    """Return the hash of the run's tokenizer, and that of the one that it was trained on from."""
    started = storage.load_object(run / TOKENIZER).get("warm_start")
    return tokenizer_hash(run), *([started] if isinstance(started, str) else [])


def train_tokenizer(
    run: Path,
    images: Splits,
    recipe: Recipe,
    world: World = ALONE,
    progress: Progress | None = None,
    execution: Execution = DEFAULT_EXECUTION,
    warm_start_from: Path | None = None,
) -> VQModel:
    """Train the tokenizer of a run, resume its training, or load it if it is finished.

    Args:
        run: Folder of the run.
        images: What to train on.
        recipe: Shape and training.
        world: All processes.
        progress: See `loop.run`.
        execution: Of which precision and compilation count.
        warm_start_from: Folder of a pipeline whose tokenizer is trained on; it sets the shape.

    Raises:
        UserError: `run` holds something else, or see `tokenizer.train`.
        Stopped: See `loop.run`.
    """
    world.on_main(lambda: claims.is_ours(run, FIT, TOKENIZER, what="a run of ctf"))
    training, folder, first = recipe.tokenizer_training, run / "tokenizer", None
    shape = recipe.tokenizer.config(images.train.image_size)
    if warm_start_from is not None:
        first = warm_start_from / "tokenizer"
        shape = load_tokenizer_config(first)
    return tokenizer.train(shape, training, images, folder, world, progress, execution, first)


def take_tokenizer(run: Path, source: Path) -> None:
    """Give a run the tokenizer of the pipeline or run in `source`, unless it has it already.

    Raises:
        UserError: `run` holds something else, or another tokenizer.
    """
    claims.is_ours(run, FIT, TOKENIZER, what="a run of ctf")
    for name in TOKENIZER_FILES:
        path = run / "tokenizer" / name
        if path.is_file() and storage.hash_file(path) != storage.hash_file(
            source / "tokenizer" / name
        ):
            raise UserError(f"{run} has another tokenizer than {source}; choose another folder")
    _copy_tokenizer(source, run)


def _copy_tokenizer(source: Path, run: Path) -> None:
    """Copy the tokenizer of `source` to a run that has none."""
    if (run / "tokenizer" / "model.safetensors").is_file():
        return
    for name in TOKENIZER_FILES:
        with storage.atomic(run / "tokenizer" / name) as temporary:
            shutil.copyfile(source / "tokenizer" / name, temporary)


def extract_tokens(
    run: Path,
    vq: VQModel,
    images: Splits,
    recipe: Recipe,
    *,
    limit: int | None = None,
    precision: Precision = "auto",
    world: World = ALONE,
    progress: Progress | None = None,
) -> None:
    """Encode the images with the run's tokenizer `vq`; see `extraction.extract`."""
    extraction.extract(
        vq, tokenizer_hash(run), images, tokens_folder(run), recipe.tokens,
        limit=limit, precision=precision, world=world, progress=progress,
    )  # fmt: skip


def open_tokens(run: Path) -> tuple[Tokens, Tokens]:
    """Return a run's tokens of training and of held-out images.

    Raises:
        UserError: They are missing, or were made by another tokenizer.
    """
    name = tokenizer_hash(run)
    folder = tokens_folder(run)
    return Tokens(folder, "train", name), Tokens(folder, "val", name)


def tokens_folder(run: Path) -> Path:
    """Return the folder of a run's tokens, which may be a link to that of another run.

    Both runs may have moved together after the link was made, which earlier versions made absolute.

    Raises:
        UserError: The link leads nowhere, and no folder of the other run's name is beside the run.
    """
    folder = run / "tokens"
    if not folder.is_symlink() or folder.exists():
        return folder
    target = Path(os.readlink(folder))
    beside = run.resolve().parent / target.parent.name / target.name
    if beside.is_dir():
        return beside
    raise UserError(
        f"{folder}: a link to {target}, which is not there any more\n"
        f"move that run to {beside.parent}, or remove the link and make a new one: "
        f"ln -s RUN/tokens {folder}"
    )


def fit_clusters(
    run: Path, vq: VQModel, clusters: ClustersConfig, taken_over: Clusters | None = None
) -> Clusters:
    """Cluster the codes of the run's tokenizer `vq`; see `training.clusters.fit_clusters`."""
    return clusters_stage.fit_clusters(
        run / "clusters", vq, study_codes(run), clusters, tokenizer_hash(run), taken_over
    )


def study_codes(run: Path) -> Tensor:
    """Return the codes of held-out images (B, L) that the redundancy study is based on."""
    _, val = open_tokens(run)
    return val.codes(np.arange(min(len(val), STUDY_IMAGES)))


def branch(run: Path, out: Path) -> None:
    """Make `out` a run with the tokenizer and the tokens of `run`, for other clusters or models.

    Raises:
        UserError: `run` has no tokenizer or tokens, or `out` holds something else.
    """
    open_tokens(run)
    with claims.hold(out, TOKENIZER, what=f"a run with the tokens of {run}"):
        _copy_tokenizer(run, out)
        link = out / "tokens"
        if link.is_symlink() and not link.exists():  # `run` was moved
            link.unlink(missing_ok=True)
        if not link.exists():
            # A link: tokens may be large, and only training needs them.
            target = _relative(tokens_folder(run), out)
            with storage.user_errors(link):
                link.symlink_to(target, target_is_directory=True)


def _relative(path: Path, folder: Path) -> Path:
    """Return a path as a link in `folder` leads to it: relative, so that both can move together.

    Absolute if they have nothing in common, as on two disks: each can then move by itself.
    """
    path, folder = path.resolve(), folder.resolve()
    common = os.path.commonpath([path, folder])
    return path if common == os.sep else Path(os.path.relpath(path, folder))


def make_baseline(run: Path, out: Path) -> Clusters:
    """Make `out` a run like `run`, but with identity clusters. Raises UserError as `branch`."""
    vq = load_tokenizer(run / "tokenizer")
    branch(run, out)
    return fit_clusters(out, vq, ClustersConfig(method="identity"))
