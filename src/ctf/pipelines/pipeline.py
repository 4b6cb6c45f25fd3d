"""`Pipeline`: a trained tokenizer, clusters, coarse and fine model, to sample images with.

Shapes: B images, L tokens of an image.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctf import kernels
from ctf.common.defaults import with_torch_defaults
from ctf.common.deprecation import renamed_keywords
from ctf.common.errors import UserError
from ctf.common.progress import OpenProgress, Progress
from ctf.kernels import Engine
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.sampling import Sampling
from ctf.models.tokenizer import Tokenizer
from ctf.pipelines import arguments, editing, generation
from ctf.pipelines.arguments import Window
from ctf.pipelines.folder import PIPELINE_FILES, find_pipeline, load_parts, save
from ctf.pipelines.generation import Samples
from ctf.pipelines.windows import AutoWindow

LICENSE = "license"  # the key of `origin` for the licence of the weights


@dataclasses.dataclass
class Pipeline:
    """Everything that is needed to sample images.

    Attributes:
        tokenizer: Images <-> codes.
        clusters: The coarse label of each code, and the codes of each label.
        coarse: (labels_BL, classes_B) -> teacher-forced logits (B, L, K).
        fine: (labels_BL, classes_B) -> logits over the members of each cluster (B, L, S); None in
            the full-vocabulary baseline, whose clusters have one code each.
        class_names: One per class.
        sampling: The default settings of `sample`.
        origin: What the pipeline was made from, as JSON values.
        window: How many labels of an image a pass of the coarse model computes, unless `sample` is
            told; not stored with the pipeline. See `sample`.
        auto_window: What `window="auto"` has measured.
    """

    tokenizer: Tokenizer
    clusters: Clusters
    coarse: CoarseModel
    fine: FineModel | None
    class_names: tuple[str, ...]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    window: Window = "auto"
    auto_window: AutoWindow | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )

    @classmethod
    @with_torch_defaults
    def from_pretrained(
        cls,
        name: str | Path,
        device: torch.device | str = "cpu",
        *,
        engine: Engine = "eager",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Pipeline:
        """Load a pipeline.

        Args:
            name: A folder, the name of a shipped pipeline, or org/name[@revision] on the Hugging
                Face Hub, in this order.
            device: Where to compute.
            engine: "eager" is plain PyTorch; "auto" is the fastest implementation with the same
                results up to rounding; "int8" on a processor and "bf16" on a GPU are faster and
                nearly the same; "compile" compiles the steps with torch.compile.
            revision: Branch, tag or commit on the Hub, if it is not in the name; "main" by default.
                This and all arguments below are those of huggingface_hub.
            cache_dir: Where downloads are stored.
            token: For private repositories; by default the one of `hf auth login`.
            local_files_only: Use what is in the cache, without network access.
            force_download: Download files again that are in the cache.

        Raises:
            UserError: There is no such pipeline; its parts are missing, damaged or from different
                runs; the download failed.
        """
        path = find_pipeline(
            name,
            revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        parts = load_parts(path, torch.device(device))
        kernels.for_sampling(parts["coarse"], parts["fine"], parts["tokenizer"], engine)
        return cls(**parts)

    @with_torch_defaults
    def save_pretrained(
        self, folder: str | Path, *, half: bool = False, license: str | None = None
    ) -> None:
        """Write the pipeline and a model card into a folder that `from_pretrained` can load.

        Equal pipelines give equal bytes. An edited README.md is kept.

        Args:
            folder: A new folder, or one with a pipeline, which is overwritten.
            half: Store weights in half precision: half the size, and occasionally another code.
            license: Of the weights, as the Hub calls it, e.g. "apache-2.0"; it is stored in
                `origin`. By default the one stored there.

        Raises:
            UserError: The folder holds something else, or cannot be written.
        """
        from ctf.pipelines import card  # imports huggingface_hub

        pipe = self._with_license(license)
        save(pipe, Path(folder), torch.float16 if half else torch.float32)
        card.save(pipe, Path(folder))

    @renamed_keywords(picture="image")
    @with_torch_defaults
    def push_to_hub(
        self,
        repo_id: str,
        *,
        half: bool = False,
        license: str | None = None,
        image: bool = True,
        card: str | None = None,
        evaluation: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Push a pipeline of ctf",
        progress: OpenProgress | None = None,
    ) -> str:
        """Push what `save_pretrained` writes to the Hugging Face Hub, as one commit.

        Args:
            repo_id: org/name or org/name@branch; created if it does not exist.
            half: See `save_pretrained`.
            license: See `save_pretrained`.
            image: Sample a contact sheet for the model card.
            card: The text of README.md; by default a new model card made from `origin`, even if
                the repository has one.
            evaluation: A section of the new model card, in Markdown; see
                `ctf.evaluation.report.card_section`.
            private: Visibility of a repository that is created; by default the organisation's.
            token: By default the one of `hf auth login`.
            commit_message: Of the commit.
            progress: Opens a display of the sampling's progress, e.g.
                `ctf.common.progress.show_progress`.

        Returns:
            The URL of the commit.

        Raises:
            UserError: The repository cannot be created or written, or there is no network.
        """
        from ctf.pipelines import card as cards
        from ctf.pipelines import hub

        address = hub.target(repo_id)
        if card is not None and license is not None:
            raise UserError(
                f"got license {license!r} and the text of a model card\n"
                "write the licence into its header instead"
            )
        pipe = self._with_license(license)
        hub.create(address, private=private, token=token)  # fails before minutes of sampling
        sheet = None
        if image:
            with progress("samples") if progress else contextlib.nullcontext() as shown:
                sheet = cards.sample_sheet(pipe, shown)
        text = card
        if text is None:
            text = cards.text(pipe, str(address), with_image=image, evaluation=evaluation)

        def write(folder: Path) -> None:
            save(pipe, folder, torch.float16 if half else torch.float32)
            cards.write(folder, text, sheet)

        replaced = (*PIPELINE_FILES, cards.IMAGE)
        return hub.push(write, address, replaced=replaced, message=commit_message, token=token)

    def _with_license(self, license: str | None) -> Pipeline:
        if license is None:
            return self
        return dataclasses.replace(self, origin={**self.origin, LICENSE: license})

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.clusters.labels_V.device

    def class_numbers(self, classes: Sequence[int | str]) -> list[int]:
        """Return the numbers of classes; see `sample` for how they are chosen.

        Raises:
            UserError: There is no such class.
        """
        return arguments.class_numbers(self.class_names, classes)

    def largest_batch(self, **settings: Any) -> int:
        """Return how many images are sampled at a time: 64, or fewer if memory is short."""
        used = arguments.update_sampling(self.sampling, settings)
        return generation.max_batch(self, used)

    @renamed_keywords(keep="known", apart="decode_separately", report="progress")
    @with_torch_defaults
    def sample(
        self,
        classes: Sequence[int | str],
        seed: int | Sequence[int] = 0,
        *,
        codes: Tensor | None = None,
        known: Tensor | None = None,
        resize: int | None = None,
        decode_separately: bool = False,
        progress: Progress | None = None,
        window: Window | None = None,
        **settings: Any,
    ) -> Samples:
        """Sample an image for each class.

        Image i is sampled from seed + i. It depends on nothing but its class, its known codes and
        the settings: it is the same in any batch, up to the rounding of the kernels.

        With `codes` and `known`, parts of the images are given (inpainting). The rest is sampled
        from the same random numbers as without them: each coarse label conditional on those before
        it, row by row, known or sampled; the codes conditional on all labels of the image.

        Args:
            classes: Names, or numbers: positions in `class_names`, from 0. Text that is no name,
                e.g. "3", is a number. A warning tells if a number is another class's name.
            seed: Of the first image, or a sequence with one for each image: integers of Python,
                NumPy or PyTorch.
            codes: (B, L), integers in [0, V) where `known` is true; ignored elsewhere. (L,) and
                (1, L) are for all images.
            known: (B, L), bool, in the same shapes: which of `codes` are in the result.
            resize: Pixels per side; by default the tokenizer's.
            decode_separately: Decode image by image, which is slower: pixels then depend on the
                image's codes alone, to the last bit.
            progress: Called with the numbers of images sampled and to sample.
            window: How many coarse labels of an image a pass of the coarse model computes. The next
                labels are guessed, and those that were guessed right need no pass of their own: the
                image is the same whatever the window, up to rounding. "auto" chooses what is
                fastest, from measured times of passes. By default `self.window`.
            settings: Fields of `Sampling`; by default those of `self.sampling`.

        Raises:
            UserError: No class or an unknown one; an unknown setting or one out of its range; a
                seed of more than 64 bits; one of `codes` and `known` alone, or of another shape,
                type or range.
        """
        request = arguments.check_request(
            self, classes, seed, settings,
            codes=codes, known=known, resize=resize, decode_separately=decode_separately,
            window=window,
        )  # fmt: skip
        return generation.generate(self, request, progress)

    stream = editing.stream
    """Sample, and yield previews after each row of coarse labels; see `editing.stream`."""

    refine = editing.refine
    """Sample the fine stage alone, for given coarse labels; see `editing.refine`."""

    preview = editing.preview
    """Decode coarse labels alone; see `editing.preview`."""

    members = editing.members
    """Return the codes that a token can have, and their probabilities; see `editing.members`."""

    encode = editing.encode
    """Encode images (paths, bytes, PIL images, arrays) into codes; see `editing.encode`."""

    @with_torch_defaults
    @torch.inference_mode()
    def decode(self, codes_BL: Tensor, resize: int | None = None) -> Tensor:
        """Decode codes (B, L) into images in [-1, 1]: (B, 3, H, W).

        With `resize`, to as many pixels per side, as LlamaGen does it from 384 to 256 before
        evaluation (sample_c2i_ddp.py): bicubic without antialiasing, before values are clipped.
        """
        return generation.decode_vectors(self, self.tokenizer.codebook()[codes_BL], resize)
