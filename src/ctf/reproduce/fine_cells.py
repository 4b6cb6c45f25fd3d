"""Cells of the fine stage alone: codes of held-out images, chosen for their true labels.

Shapes: B batch, N images, L tokens of an image, K clusters, S members of the largest cluster,
T tokens, G groups of images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ctf import kernels
from ctf.common import config
from ctf.data.transforms import as_pil, as_tensor
from ctf.evaluation import metrics, scores
from ctf.evaluation.distances import (
    FeatureStatistics,
    Gaussian,
    frechet_distance,
    frechet_distance_estimate,
)
from ctf.evaluation.intervals import estimate, leave_one_out
from ctf.evaluation.reconstruction import BATCH
from ctf.models.clusters import Clusters, central_members, swap
from ctf.models.fine import FineModel
from ctf.models.noise import gumbel_noise, noise_keys
from ctf.models.sampling import Sampling, sample_fine
from ctf.pipelines.folder import load_fine, load_tokenizer
from ctf.reproduce.cells import Cell, Outcome, Workspace, stored_as
from ctf.reproduce.training_cells import (
    ClassifierCell,
    ClustersCell,
    FineCell,
    link_clusters,
    open_extractors,
)
from ctf.training import stages

Codes = Literal["true", "random", "nearest", "model"]


@dataclasses.dataclass(frozen=True)
class FineStageCell(Cell):
    """Scores held-out images whose codes are chosen for their true labels.

    Attributes:
        clusters: Those of the labels.
        fine: The fine model; None where none is used.
        codes: The true codes, random members of their clusters, the members nearest to the
            clusters' centres, or samples of the fine model.
        settings: Fields of `Sampling` that differ from the defaults, for the fine model.
        images: Number of held-out images, evenly spread.
        classifier: Of the plan, if it has one.
    """

    clusters: ClustersCell
    fine: FineCell | None
    codes: Codes
    settings: dict[str, Any]
    images: int
    classifier: ClassifierCell | None = dataclasses.field(
        default=None, metadata=config.OMIT_DEFAULT
    )

    @torch.inference_mode()
    def compute(self, space: Workspace) -> Outcome:
        """Return PSNR, the FID by each feature network, and the loss of a uniform choice.

        Each FID comes with those without one of the random groups of images. The groups are the
        same in all cells, so that ratios of distances have intervals, too.
        """
        clusters = link_clusters(self.clusters, run := space.run(self), space)
        tokenizer = load_tokenizer(run / "tokenizer", space.device)
        fine = None
        if self.fine is not None:
            fine = load_fine(space.run(self.fine) / "fine", clusters, space.device)
        kernels.for_sampling(None, fine, tokenizer)
        _, val = stages.open_tokens(run)
        count = min(self.images, len(val))
        rows_N = np.arange(count) * len(val) // count
        codebook_VC = tokenizer.codebook()
        central_K = central_members(codebook_VC.cpu(), clusters)
        batches, psnr, uniform = [], [], []
        with space.open_progress(f"{self.codes} codes") as progress:
            for start in range(0, count, BATCH):
                rows_B = rows_N[start : start + BATCH]
                true_BL, classes_B = val.codes(rows_B), torch.from_numpy(val.classes_N[rows_B])
                codes_BL = self._choose(
                    fine, clusters, codebook_VC, central_K, true_BL, classes_B, rows_B
                )
                decoded_BCHW = tokenizer.decode(codes_BL.to(space.device))
                images_BCHW = as_tensor(space.images.val.read(rows_B), space.device)
                psnr.append(metrics.psnr(decoded_BCHW, images_BCHW).cpu())
                uniform.append(clusters.sizes_K[clusters.labels_V[true_BL]].double().log())
                batches.append(_pixels(decoded_BCHW))
                progress(start + len(rows_B), count)
        outcome: Outcome = {
            "psnr": float(torch.cat(psnr).mean()),
            "uniform_loss": float(torch.cat(uniform).mean()),
        }
        for suffix, groups, reference in _summaries(space, batches, self.classifier, self.codes):

            def distance(
                parts: Sequence[FeatureStatistics], reference: Gaussian = reference
            ) -> float:
                return frechet_distance(FeatureStatistics.merge(parts).gaussian, reference)

            without_G = leave_one_out(groups, distance)
            score = estimate(distance(groups), without_G, count, lower_bound=0.0)
            outcome[f"FID{suffix}"] = {**config.to_json(score), "without_group": [*without_G]}
        return outcome

    def _choose(
        self,
        fine: FineModel | None,
        clusters: Clusters,
        codebook_VC: Tensor,
        central_K: Tensor,
        codes_BL: Tensor,
        classes_B: Tensor,
        rows_B: np.ndarray,
    ) -> Tensor:
        labels_BL = clusters.labels_V[codes_BL]
        keys_BL = noise_keys(rows_B.tolist(), codes_BL.shape[1])[:, 1]
        match self.codes:
            case "true":
                return codes_BL
            case "random":
                members_BLS = clusters.members_KS[labels_BL]
                noise_BLS = gumbel_noise(keys_BL, members_BLS.shape[-1])
                chosen_BL1 = noise_BLS.masked_fill(members_BLS < 0, -torch.inf).argmax(-1, True)
                return members_BLS.gather(-1, chosen_BL1)[..., 0]
            case "nearest":
                return central_K[labels_BL]
            case "model":
                assert fine is not None
                device = fine.head.weight.device
                return sample_fine(
                    fine,
                    clusters,
                    labels_BL.to(device),
                    classes_B.to(device),
                    keys_BL,
                    Sampling(**self.settings),
                    codebook_VC=codebook_VC,
                )


@dataclasses.dataclass(frozen=True)
class DetailsCell(Cell):
    """Scores the fine stage alone: held-out images with codes resampled from their true labels.

    Attributes:
        codes: The true codes, random members of their clusters, or samples of the fine model.
        temperature: Of the fine model; 0 takes the most likely member.
        classifier: Of the plan, if it has one.
    """

    fine: FineCell
    codes: Literal["true", "random", "model"]
    temperature: float
    images: int = stored_as("pictures")
    classifier: ClassifierCell | None = dataclasses.field(
        default=None, metadata=config.OMIT_DEFAULT
    )

    @torch.inference_mode()
    def compute(self, space: Workspace) -> Outcome:
        """Return the FID by each feature network."""
        run = space.run(self)
        clusters = link_clusters(self.fine.clusters, run, space)
        tokenizer = load_tokenizer(run / "tokenizer", space.device)
        fine = load_fine(space.run(self.fine) / "fine", clusters, space.device)
        _, val = stages.open_tokens(run)
        generator = torch.Generator().manual_seed(0)
        rows_N = np.arange(min(self.images, len(val)))
        batches = []  # sampled once for all networks
        for rows_B in np.split(rows_N, range(BATCH, len(rows_N), BATCH)):
            codes_BL, classes_B = val.codes(rows_B), torch.from_numpy(val.classes_N[rows_B])
            codes_BL = self._resample(fine, clusters, codes_BL, classes_B, generator)
            batches.append(_pixels(tokenizer.decode(codes_BL.to(space.device))))
        outcome = {}
        for suffix, groups, reference in _summaries(space, batches, self.classifier, self.codes):
            outcome[f"FID{suffix}"] = config.to_json(frechet_distance_estimate(groups, reference))
        return outcome

    def _resample(
        self,
        fine: FineModel,
        clusters: Clusters,
        codes_BL: Tensor,
        classes_B: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        if self.codes == "true":
            return codes_BL
        if self.codes == "random":
            return swap(codes_BL, clusters, generator)
        labels_BL, device = clusters.labels_V[codes_BL], fine.head.weight.device
        logits_BLS = fine(labels_BL.to(device), classes_B.to(device)).float().cpu()
        if self.temperature == 0:
            return clusters.members_KS[labels_BL, logits_BLS.argmax(-1)]
        probabilities_TS = (logits_BLS / self.temperature).softmax(-1).flatten(0, 1)
        members_T1 = torch.multinomial(probabilities_TS, 1, generator=generator)
        return clusters.members_KS[labels_BL, members_T1.view_as(labels_BL)]


def _pixels(images_BCHW: Tensor) -> np.ndarray:
    """Decoded images as uint8 (B, H, W, 3)."""
    return np.stack([np.asarray(image) for image in as_pil(images_BCHW)])


def _summaries(
    space: Workspace, batches: list[np.ndarray], classifier: ClassifierCell | None, codes: str
) -> Iterator[tuple[str, list[FeatureStatistics], Gaussian]]:
    """Yield, for each feature network, its suffix, groups of the images, and the reference."""
    held_out = space.held_out()
    subject = dataclasses.replace(
        held_out,
        batches=batches.__iter__,
        count=sum(map(len, batches)),
        classes_N=None,
        class_names=None,
    )
    for extractor in open_extractors(space, classifier):
        reference = scores.load_reference(held_out, extractor)
        with space.open_progress(f"{extractor.name}: {codes} codes") as progress:
            summary = scores.summarize(extractor, subject, progress)
        yield extractor.suffix, summary.groups, reference.pooled
