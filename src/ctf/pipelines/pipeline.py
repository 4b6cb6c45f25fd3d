"""The pipeline: a trained tokenizer, clusters, coarse and fine model, as one thing to draw with.

Shapes: B batch, L tokens of an image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile
from torch import Tensor

from ctf.common import claims, config, memory, storage
from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.common.progress import OpenProgress, Progress
from ctf.data.decode import to_rgb
from ctf.data.images import MAX_IMAGE_SIZE
from ctf.data.transforms import as_pil, as_tensor, crop
from ctf.kernels import sampling_cpu as engine
from ctf.kernels.sampling_cpu import Engine
from ctf.models import clusters, sampling
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.sampling import Sampling
from ctf.models.tokenizer import VQModel
from ctf.pipelines.folder import (
    CLUSTERS,
    PIPELINE_FILES,
    SETTINGS,
    PipelineSettings,
    find_pipeline,
    load_clusters,
    load_coarse,
    load_fine,
    load_settings,
    load_tokenizer,
    save_clusters,
)

LICENSE = "license"  # the entry of `origin` with the licence of the weights
BATCH = 64  # images drawn at a time, at most
DECODED = 2**23  # numbers in the largest layer of the decoder, of the images decoded at a time


@dataclasses.dataclass(frozen=True)
class Samples:
    """What `Pipeline.sample` and `refine` return, an entry per class that was asked for.

    images: PIL images, RGB.
    codes: (B, L), int64 in [0, V), row by row.
    coarse: (B, L), int64 in [0, K): their coarse labels.
    """

    images: list[Image.Image]
    codes: Tensor
    coarse: Tensor


@dataclasses.dataclass(frozen=True)
class Event:
    """What `Pipeline.stream` yields: one after each row of coarse labels, then one with `samples`.

    rows, total: rows of labels that are there, and that there will be.
    coarse: (B, rows * grid), int64 in [0, K): the labels so far, row by row.
    images: PIL images, RGB: previews, none where none are asked for; the last, those of `samples`.
    samples: None except in the last event.
    numbers: which of the images that were asked for these B are.
    """

    rows: int
    total: int
    coarse: Tensor
    images: list[Image.Image]
    samples: Samples | None = None
    numbers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Members:
    """What `Pipeline.members` returns: all codes that a token with its label could have.

    cluster: the label, in [0, K).
    codes: (S,), int64 in [0, V), the likeliest first.
    probabilities: (S,), float64.
    """

    cluster: int
    codes: Tensor
    probabilities: Tensor


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Images that are drawn at a time: which of all, and of what, where the models are."""

    images: slice
    classes_B: Tensor
    uniforms_B2L: Tensor
    kept_BL: Tensor | None  # codes, and -1 where one is to be drawn
    kept_labels_BL: Tensor | None  # of these codes, and -1

    def some(self, rows: list[int], labels_BT: Tensor) -> _Batch:
        """The rows that are still wanted; the labels that they have by now are kept."""
        kept_labels_BL = torch.full_like(self.uniforms_B2L[:, 0], -1, dtype=torch.int64)
        if self.kept_labels_BL is not None:
            kept_labels_BL = self.kept_labels_BL.clone()
        kept_labels_BL = kept_labels_BL.to(labels_BT.device)
        kept_labels_BL[:, : labels_BT.shape[1]] = labels_BT
        return dataclasses.replace(
            self,
            classes_B=self.classes_B[rows],
            uniforms_B2L=self.uniforms_B2L[rows],
            kept_BL=None if self.kept_BL is None else self.kept_BL[rows],
            kept_labels_BL=kept_labels_BL[rows],
        )


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
        engine: Engine = "eager",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Pipeline:
        """Loads the pipeline in a folder, a shipped one by its name, or one of the Hub.

        Args:
            name: a folder, a shipped name, or org/name[@revision] on the Hub, in this order.
            engine: what computes: "eager", PyTorch's operators as they are; "auto", the same
                results up to rounding, as fast as is known here; "int8", faster and nearly the
                same; "compile", steps that torch.compile made. See `engine.prepare`.
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
        folder = find_pipeline(
            name,
            revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return load(folder, torch.device(device), engine)

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
        from ctf.pipelines import card

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
        progress: OpenProgress | None = None,
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
            progress: opens a reporter of the samples that are drawn, e.g.
                `ctf.common.progress.show_progress`.

        Returns:
            The web address of the commit.

        Raises:
            UserError: no repository of that name can be made or written, or there is no network.
        """
        from ctf.pipelines import card as cards
        from ctf.pipelines import hub

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
            replaced=(*PIPELINE_FILES, cards.PICTURE),
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
        seed: int | Sequence[int] = 0,
        *,
        codes: Tensor | None = None,
        keep: Tensor | None = None,
        resize: int | None = None,
        apart: bool = False,
        report: Progress | None = None,
        **settings: Any,
    ) -> Samples:
        """Draws an image for each of the given classes.

        Image i is drawn from seed + i, and depends on nothing else but its class, what is kept of
        it, and the settings: it is the same in any batch, up to the rounding of the kernels.

        Args:
            classes: numbers or names.
            seed: of the first image, or a list with one for each.
            codes, keep: the parts of images that are given. Where `keep`, (B, L) of bool, is true,
                the code of `codes`, (B, L) of integers in [0, V), is in the result, and its label;
                elsewhere `codes` says nothing. The rest is drawn with the random numbers that it
                would have alone: coarse labels follow from those above and to the left of them,
                given or drawn, and codes from the labels of the whole image. (L,) and (1, L) are
                for all images.
            resize: pixels a side of the images, instead of the tokenizer's.
            apart: decode each image by itself: its pixels then follow from its codes to the last
                bit, whatever it was drawn beside. It takes longer.
            settings: any field of `Sampling`, by keyword; the rest as in `self.sampling`.
            report: called with the number of images done and to do.

        Raises:
            UserError: no class or an unknown one, an unknown setting, or one out of its range; a
                seed of more than 64 bits; `codes` without `keep`, or of another shape, type or
                range.
        """
        numbers, seeds, chosen = self._asked(classes, seed, resize, settings)
        kept_NL = self._kept(codes, keep, len(numbers))

        def coarse(batch: _Batch) -> Tensor:
            return sampling.sample_coarse(
                self.coarse,
                batch.classes_B,
                batch.uniforms_B2L[:, 0],
                chosen,
                batch.kept_labels_BL,
            )

        return self._samples(numbers, seeds, kept_NL, chosen, resize, apart, report, coarse)

    def refine(
        self,
        classes: Sequence[int | str],
        coarse: Tensor,
        seed: int | Sequence[int] = 0,
        *,
        resize: int | None = None,
        apart: bool = False,
        report: Progress | None = None,
        **settings: Any,
    ) -> Samples:
        """Draws the details again, for the same coarse labels: the fine stage alone.

        The images that `sample` draws of the same classes, seed and settings have, for their own
        `coarse`, the same codes here; another seed gives other details. The full-vocabulary
        baseline has no details left to draw, and gives the same codes for any seed.

        Args:
            coarse: (B, L) of integers in [0, K), or (L,) or (1, L) for all images.
            classes, seed, resize, apart, report, settings: see `sample`.

        Raises:
            UserError: see `sample`; labels of another shape, type or range.
        """
        numbers, seeds, chosen = self._asked(classes, seed, resize, settings)
        labels_NL = self._integers("coarse", coarse, len(numbers))
        _check_range("coarse", labels_NL, self.clusters.count)
        return self._samples(
            numbers,
            seeds,
            None,
            chosen,
            resize,
            apart,
            report,
            lambda batch: labels_NL[batch.images],
        )

    def stream(
        self,
        classes: Sequence[int | str],
        seed: int | Sequence[int] = 0,
        *,
        codes: Tensor | None = None,
        keep: Tensor | None = None,
        resize: int | None = None,
        apart: bool = False,
        preview: bool = True,
        wanted: Callable[[], Collection[int]] | None = None,
        **settings: Any,
    ) -> Generator[Event, None, None]:
        """Draws as `sample` does, and shows the images while they grow.

        An event comes after each row of coarse labels, and a last one has `samples`: what `sample`
        returns. Closed, or left by `break`, it takes no further step and frees its memory.

        A preview is decoded from the mean code vector of each label's cluster, the codes that are
        kept, and the mean of all clusters where no label is known yet. It costs a pass of the
        decoder for each row.

        Args:
            classes: one batch: at most `largest_batch`.
            preview: without, events have the labels only.
            wanted: asked before each step for the numbers of the images that are still wanted, as
                they stand in `classes`. The others leave the batch; with none, the stream ends.
            seed, codes, keep, resize, apart, settings: see `sample`.

        Raises:
            UserError: see `sample`; more images than one batch has. All at once, not at the first
                event.
        """
        numbers, seeds, chosen = self._asked(classes, seed, resize, settings)
        if len(numbers) > (most := self._at_a_time(chosen)):
            raise UserError(
                f"got {len(numbers)} images to stream, expected {most} or fewer: one batch; "
                "sample draws any number"
            )
        (batch,) = self._batches(numbers, seeds, self._kept(codes, keep, len(numbers)), most)
        return self._events(batch, chosen, resize, apart, preview, wanted)

    def _events(
        self,
        batch: _Batch,
        settings: Sampling,
        resize: int | None,
        apart: bool,
        preview: bool,
        wanted: Callable[[], Collection[int]] | None,
    ) -> Generator[Event, None, None]:
        grid, length = self.coarse.config.grid, self.coarse.config.length
        numbers = tuple(range(len(batch.classes_B)))
        steps = self._steps(batch, settings)
        labels_BT = batch.classes_B.new_empty(len(numbers), 0)
        done = 0
        while done < length:
            if wanted is not None:
                asked = set(wanted())
                rows = [i for i, number in enumerate(numbers) if number in asked]
                if not rows:
                    return
                if len(rows) < len(numbers):
                    # A new stream of those that are left: it takes what is there in one pass.
                    numbers, batch = tuple(numbers[i] for i in rows), batch.some(rows, labels_BT)
                    steps.close()
                    steps = self._steps(batch, settings)
            labels_BT = next(labels for labels in steps if labels.shape[1] > done)
            done += 1
            rows_done, more = divmod(done, grid)
            if more == 0:
                images = []
                if preview:
                    images = as_pil(self._preview(labels_BT, batch.kept_BL, resize))
                yield Event(rows_done, grid, labels_BT.clone().cpu(), images, None, numbers)
        samples = self._finish(batch, labels_BT, settings, resize, apart)
        yield Event(grid, grid, samples.coarse, samples.images, samples, numbers)

    def _steps(self, batch: _Batch, settings: Sampling) -> Generator[Tensor, None, None]:
        return sampling.stream_coarse(
            self.coarse,
            batch.classes_B,
            batch.uniforms_B2L[:, 0],
            settings,
            batch.kept_labels_BL,
        )

    def preview(
        self,
        coarse: Tensor,
        *,
        codes: Tensor | None = None,
        keep: Tensor | None = None,
        resize: int | None = None,
    ) -> list[Image.Image]:
        """Images of coarse labels alone: each token has the mean code vector of its cluster.

        Args:
            coarse: (B, T) of integers in [0, K): the first T labels of each image, 1 <= T <= L. The
                rest has the mean of all clusters.
            codes, keep, resize: see `sample`; a code that is kept is shown instead of its label.

        Raises:
            UserError: labels of another shape, type or range; see `sample`.
        """
        check_resize(resize)
        length = self.coarse.config.length
        if coarse.ndim != 2 or not len(coarse) or not 1 <= coarse.shape[1] <= length:
            raise UserError(
                f"coarse: got shape {tuple(coarse.shape)}, expected (B, T) with 1 to {length} "
                "labels of each image"
            )
        _check_integers("coarse", coarse)
        _check_range("coarse", coarse, self.clusters.count)
        kept_BL = self._kept(codes, keep, len(coarse))
        return as_pil(self._preview(coarse.to(self.device).long(), kept_BL, resize))

    @torch.inference_mode()
    def _preview(self, labels_BT: Tensor, kept_BL: Tensor | None, resize: int | None) -> Tensor:
        """Images in [-1, 1] of the first T labels and of all codes that are kept."""
        codebook_VC = self.tokenizer.codebook()
        means_KC = codebook_VC.new_zeros(self.clusters.count, codebook_VC.shape[1])
        means_KC.index_add_(0, self.clusters.labels_V, codebook_VC)
        means_KC /= self.clusters.sizes_K[:, None]
        # Not of length 1 again: it makes no difference to the images, as members are close, and
        # what is unknown spoils what is known the less the shorter its vectors are.
        batch, known = labels_BT.shape
        vectors_BLC = means_KC.mean(0).repeat(batch, self.coarse.config.length, 1)
        vectors_BLC[:, :known] = means_KC[labels_BT]
        if kept_BL is not None:
            kept_BL1 = (kept_BL >= 0)[..., None]
            vectors_BLC = torch.where(kept_BL1, codebook_VC[kept_BL], vectors_BLC)
        return self._decode_vectors(vectors_BLC, resize)

    @torch.inference_mode()
    def members(self, chosen: int | str, coarse: Tensor, position: int, **settings: Any) -> Members:
        """The codes among which the fine stage draws a token of an image, and how likely each is.

        The probabilities are those that it draws with: with guidance, temperature, top-k and top-p
        of the fine stage. A fine model that chooses among all codes may give the rest of the
        probability to codes that are no members.

        Args:
            chosen: the class of the image, a number or name.
            coarse: (L,) of integers in [0, K): the labels of the whole image.
            position: of the token, in [0, L).
            settings: see `sample`.

        Raises:
            UserError: see `sample`; labels or a position of another shape, type or range.
        """
        numbers, _, used = self._asked([chosen], 0, None, settings)
        labels_1L = self._integers("coarse", coarse, 1)
        _check_range("coarse", labels_1L, self.clusters.count)
        if not 0 <= position < labels_1L.shape[1]:
            raise UserError(f"position: got {position}, expected 0 to {labels_1L.shape[1] - 1}")
        label = int(labels_1L[0, position])
        members_S = self.clusters.members_KS[label, : int(self.clusters.sizes_K[label])]
        if self.fine is None:
            return Members(label, members_S.cpu(), torch.ones(1, dtype=torch.float64))
        classes_1 = torch.tensor(numbers, device=self.device)
        logits_K = self.fine(labels_1L, classes_1)[0, position]
        if used.fine_guidance != 1:
            no_class_1 = torch.full_like(classes_1, self.fine.no_class)
            uncond_K = self.fine(labels_1L, no_class_1)[0, position]
            logits_K = sampling.guide(logits_K, uncond_K, used.fine_guidance)
        logits_1K = sampling.keep_top_k(
            logits_K[None].double() / used.fine_temperature, used.fine_top_k
        )
        probabilities_K = sampling.keep_top_p(logits_1K, used.fine_top_p).softmax(-1)[0]
        probabilities_S = probabilities_K[self.fine.choices(members_S)]
        order_S = probabilities_S.argsort(descending=True, stable=True)
        return Members(label, members_S[order_S].cpu(), probabilities_S[order_S].cpu())

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size and mode, cropped as those of the training -> codes (B, L), int64.

        Raises:
            UserError: there are none.
        """
        if not images:
            raise UserError("got 0 images to encode, expected 1 or more")
        size = self.tokenizer.config.image_size
        # Copies are no files any more, whatever format they came from.
        pictures = [to_rgb(cast(ImageFile.ImageFile, i.copy()), (255, 255, 255)) for i in images]
        pixels_NHWC = np.stack([np.asarray(crop(picture, size)) for picture in pictures])
        parts = np.split(pixels_NHWC, range(BATCH, len(images), BATCH))
        codes = [self.tokenizer.encode(as_tensor(part, self.device)) for part in parts]
        return torch.cat(codes).cpu()

    @torch.inference_mode()
    def decode(self, codes_BL: Tensor, resize: int | None = None) -> Tensor:
        """Codes (B, L) -> images in [-1, 1], (B, 3, H, W), of `resize` pixels a side if given.

        Resized as LlamaGen does from 384 to 256 before it scores (sample_c2i_ddp.py): bicubic,
        not antialiased, before values are clipped.
        """
        return self._decode_vectors(self.tokenizer.codebook()[codes_BL], resize)

    def _decode_vectors(self, vectors_BLC: Tensor, resize: int | None) -> Tensor:
        shape = self.tokenizer.config
        at_a_time = max(1, DECODED // (shape.channels * shape.image_size**2))
        parts = [self.tokenizer.decode_vectors(part) for part in vectors_BLC.split(at_a_time)]
        images_BCHW = torch.cat(parts)
        if resize is not None:
            images_BCHW = F.interpolate(images_BCHW, size=(resize, resize), mode="bicubic")
        return images_BCHW.clamp(-1, 1)

    def largest_batch(self, **settings: Any) -> int:
        """How many images can be drawn at a time: `BATCH`, or fewer where memory is short."""
        return self._at_a_time(self._settings(settings))

    def _settings(self, settings: Mapping[str, Any]) -> Sampling:
        known = [field.name for field in dataclasses.fields(Sampling)]
        for name in settings:
            if name not in known:
                raise UserError(f"unknown setting {name!r}{did_you_mean(name, known)}")
        return dataclasses.replace(self.sampling, **settings)

    def _asked(
        self,
        classes: Sequence[int | str],
        seed: int | Sequence[int],
        resize: int | None,
        settings: Mapping[str, Any],
    ) -> tuple[list[int], Sequence[int], Sampling]:
        """The numbers of the classes, a seed for each, and the settings; raises UserError."""
        chosen = self._settings(settings)
        numbers = self.class_numbers(classes)
        if not numbers:
            raise UserError("got 0 images to sample, expected 1 or more")
        check_resize(resize)
        if isinstance(seed, int):
            check_seed(seed, len(numbers))
            return numbers, range(seed, seed + len(numbers)), chosen
        if len(seed) != len(numbers):
            raise UserError(f"got {len(seed)} seeds, expected {len(numbers)}: one for each image")
        for one in seed:
            check_seed(one, 1)
        return numbers, seed, chosen

    def _kept(self, codes: Tensor | None, keep: Tensor | None, count: int) -> Tensor | None:
        """The codes that are kept, and -1 elsewhere: int64 (count, L); None: none are given."""
        if codes is None and keep is None:
            return None
        if codes is None or keep is None:
            raise UserError("codes and keep: got one of them, expected both or neither")
        if keep.dtype != torch.bool:
            raise UserError(f"keep: got {keep.dtype}, expected torch.bool, true where a code stays")
        keep_NL = self._for_all("keep", keep, count)
        kept_NL = self._integers("codes", codes, count)
        _check_range("codes", kept_NL[keep_NL], self.clusters.codebook_size)
        return kept_NL.masked_fill(~keep_NL, -1)

    def _integers(self, name: str, given: Tensor, count: int) -> Tensor:
        _check_integers(name, given)
        return self._for_all(name, given, count).long()

    def _for_all(self, name: str, given: Tensor, count: int) -> Tensor:
        length = self.coarse.config.length
        if given.shape not in ((count, length), (1, length), (length,)):
            raise UserError(
                f"{name}: got shape {tuple(given.shape)}, expected {(count, length)}, or "
                f"{(length,)} for all images"
            )
        return given.to(self.device).expand(count, length)

    def _at_a_time(self, settings: Sampling) -> int:
        """How many images are drawn at a time: `BATCH`, or what half of the free memory holds."""
        halves = 1 if settings.guidance == 1 else 2
        return min(BATCH, max(1, memory.available(self.device) // 2 // (halves * self._cached())))

    def _cached(self) -> int:
        """Bytes of keys and values of one image without guidance."""
        shape, (_, dtype) = self.coarse.config, self.coarse.trunk.cached_as()
        return 2 * shape.layers * shape.length * shape.width * dtype.itemsize

    def _batches(
        self,
        numbers: Sequence[int],
        seeds: Sequence[int],
        kept_NL: Tensor | None,
        at_a_time: int,
    ) -> Iterator[_Batch]:
        for start in range(0, len(numbers), at_a_time):
            classes_B = torch.tensor(numbers[start : start + at_a_time], device=self.device)
            images = slice(start, start + len(classes_B))
            kept_BL = kept_labels_BL = None
            if kept_NL is not None:
                kept_BL = kept_NL[images]
                kept_labels_BL = torch.where(kept_BL < 0, -1, self.clusters.labels_V[kept_BL])
            yield _Batch(
                images,
                classes_B,
                sampling.uniforms(seeds[images], self.coarse.config.length),
                kept_BL,
                kept_labels_BL,
            )

    def _samples(
        self,
        numbers: Sequence[int],
        seeds: Sequence[int],
        kept_NL: Tensor | None,
        settings: Sampling,
        resize: int | None,
        apart: bool,
        report: Progress | None,
        coarse: Callable[[_Batch], Tensor],
    ) -> Samples:
        """All batches, of the labels that `coarse` gives for each."""
        done: list[Samples] = []
        for batch in self._batches(numbers, seeds, kept_NL, self._at_a_time(settings)):
            done.append(self._finish(batch, coarse(batch), settings, resize, apart))
            if report is not None:
                report(batch.images.stop, len(numbers))
        return Samples(
            [image for part in done for image in part.images],
            torch.cat([part.codes for part in done]),
            torch.cat([part.coarse for part in done]),
        )

    def _finish(
        self,
        batch: _Batch,
        labels_BL: Tensor,
        settings: Sampling,
        resize: int | None,
        apart: bool,
    ) -> Samples:
        """The fine stage and the decoder."""
        codes_BL = sampling.sample_fine(
            self.fine,
            self.clusters,
            labels_BL,
            batch.classes_B,
            batch.uniforms_B2L[:, 1],
            settings,
            batch.kept_BL,
        )
        parts = codes_BL.split(1 if apart else len(codes_BL))
        images = [image for part in parts for image in as_pil(self.decode(part, resize))]
        return Samples(images, codes_BL.cpu(), labels_BL.cpu())


def check_resize(resize: int | None) -> None:
    """Raises UserError where no image can have so many pixels a side."""
    if resize is not None and not 1 <= resize <= MAX_IMAGE_SIZE:
        raise UserError(f"resize: got {resize}, expected 1 to {MAX_IMAGE_SIZE} pixels a side")


def _check_integers(name: str, given: Tensor) -> None:
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise UserError(f"{name}: got {given.dtype}, expected integers, e.g. torch.int64")


def _check_range(name: str, given: Tensor, stop: int) -> None:
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < stop:
        raise UserError(
            f"{name}: got {int(given.min())} to {int(given.max())}, expected 0 to {stop - 1}"
        )


def check_seed(seed: int, count: int) -> None:
    """Raises UserError where seed to seed + count are not what a generator takes."""
    if not -(2**63) <= seed <= 2**63 - count:
        raise UserError(f"seed: got {seed}, expected a whole number of 64 bits")


def load(folder: Path, device: torch.device, how: Engine = "eager") -> Pipeline:
    settings = load_settings(folder)
    tokenizer = load_tokenizer(folder / "tokenizer", device)
    parts = load_clusters(folder / "clusters" / CLUSTERS).to(device)
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
    engine.prepare(coarse, fine, tokenizer, how)
    return Pipeline(tokenizer, parts, coarse, fine, **vars(settings))


def save(pipeline: Pipeline, folder: Path, dtype: torch.dtype | None) -> None:
    """Writes a pipeline's folder, its weights as `dtype`; None: as they are."""
    claims.is_ours(folder, SETTINGS, what="a pipeline")
    stored: dict[str, tuple[torch.nn.Module, dict[str, Any]]] = {
        "tokenizer": (pipeline.tokenizer, {}),
        "coarse": (pipeline.coarse, {"clusters": clusters.fingerprint(pipeline.clusters)}),
    }
    if pipeline.fine is not None:
        stored["fine"] = (
            pipeline.fine,
            {**stored["coarse"][1], "softmax": pipeline.fine.softmax},
        )
    if not all(engine.is_exact(model) for model, _ in stored.values()):
        raise UserError(
            "weights in int8 cannot be saved: they are not those of the model any more\n"
            "load it with the engine auto or eager to save it"
        )
    # First: it marks the folder as ours, if writing should be cut short.
    settings = PipelineSettings(pipeline.class_names, pipeline.sampling, pipeline.origin)
    storage.save_json(folder / SETTINGS, config.to_json(settings))
    for name, (model, more) in stored.items():
        shape: Any = model.config
        storage.save_json(folder / name / "config.json", {"model": config.to_json(shape), **more})
        weights = {k: v if dtype is None else v.to(dtype) for k, v in model.state_dict().items()}
        storage.save_tensors(folder / name / "model.safetensors", weights)
    save_clusters(pipeline.clusters, folder / "clusters" / CLUSTERS)
