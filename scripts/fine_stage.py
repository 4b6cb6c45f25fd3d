"""What the fine stage of a run is worth: codes chosen for the true labels of held-out images.

    python scripts/fine_stage.py RUN --images eurosat --classifier CLASSIFIER

RUN is a run of `ctf` with a fine model, IMAGES are what it was trained on, CLASSIFIER is a folder
of `ctf classifier train` on images of this size. A line of Markdown for each way of choosing: the
FID by EfficientNet-Lite0 and by the classifier, against the held-out images themselves, and how
much of the difference between random members and true codes it recovers; class accuracy; PSNR.
`ctf reproduce fine` computes the same with intervals, for the models of its plan.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctf.data.images import open_images
from ctf.data.transforms import as_tensor
from ctf.evaluation import metrics
from ctf.evaluation.classifier import load_classifier
from ctf.evaluation.distances import FeatureStatistics, Gaussian, frechet_distance
from ctf.evaluation.extractors import open_extractor
from ctf.models.clusters import Clusters, central_members
from ctf.models.fine import FineModel
from ctf.models.noise import gumbel_noise, noise_keys
from ctf.models.sampling import Sampling, sample_fine
from ctf.models.tokenizer import VQModel
from ctf.pipelines.folder import CLUSTERS, load_clusters, load_fine, load_tokenizer

BATCH = 64
WAYS = {
    "temperature 1": Sampling(),
    "temperature 0.7": Sampling(fine_temperature=0.7),
    "temperature 0.5": Sampling(fine_temperature=0.5),
    "guidance 2": Sampling(fine_guidance=2.0),
    "top-k 8": Sampling(fine_top_k=8),
    "most likely": Sampling(fine_top_k=1),
    "mean": Sampling(fine_choice="mean"),
    "mean, temperature 0.5": Sampling(fine_choice="mean", fine_temperature=0.5),
    "mean, temperature 0.3": Sampling(fine_choice="mean", fine_temperature=0.3),
    "mean, temperature 0.15": Sampling(fine_choice="mean", fine_temperature=0.15),
    "mean, temperature 0.5, guidance 2": Sampling(
        fine_choice="mean", fine_temperature=0.5, fine_guidance=2.0
    ),
}


class Scores:
    """Compares images of chosen codes with the held-out images that the true codes are of.

    Args:
        tokenizer: That codes are of.
        images: Included set, folder or archive.
        classifier: Folder of a classifier; None for none.
        count: Held-out images.
    """

    def __init__(
        self, tokenizer: VQModel, images: str, classifier: Path | None, count: int
    ) -> None:
        val = open_images(images, tokenizer.image_size).val
        rows_N = np.arange(min(count, len(val))) * len(val) // min(count, len(val))  # spread evenly
        self.tokenizer = tokenizer
        self.lite0 = open_extractor("lite0")
        self.classifier = None if classifier is None else load_classifier(classifier)
        self.originals_NHWC = val.read(rows_N)
        self.classes_N = torch.from_numpy(val.classes_N[rows_N]).long()
        with torch.inference_mode():
            parts = as_tensor(self.originals_NHWC).split(BATCH)
            self.codes_NL = torch.cat([tokenizer.encode(part) for part in parts])
        self.fids: dict[str, list[float]] = {}
        self.reference, accuracy = self.features(self.originals_NHWC)
        print(f"originals: class accuracy {accuracy:.1%}", flush=True)

    @torch.inference_mode()
    def features(self, images_NHWC: np.ndarray) -> tuple[list[Gaussian], float]:
        """Gaussians of the features of each network, and the class accuracy."""
        statistics: list[FeatureStatistics] = []
        hits = 0
        for start in range(0, len(images_NHWC), BATCH):
            pixels = images_NHWC[start : start + BATCH]
            features = [self.lite0(pixels).pooled_ND]
            if self.classifier is not None:
                logits_BK, features_BD = self.classifier(as_tensor(pixels))
                hits += int((logits_BK.argmax(1) == self.classes_N[start : start + BATCH]).sum())
                features.append(features_BD)
            statistics = statistics or [FeatureStatistics(x.shape[1]) for x in features]
            for each, x in zip(statistics, features, strict=True):
                each.add(x)
        return [each.gaussian for each in statistics], hits / len(images_NHWC)

    def print(self, name: str, codes_NL: Tensor) -> None:
        """Print a line about the images of codes. True codes come first, then random members."""
        images_NHWC = decode(self.tokenizer, codes_NL)
        gaussians, accuracy = self.features(images_NHWC)
        pairs = zip(gaussians, self.reference, strict=True)
        self.fids[name] = [frechet_distance(*pair) for pair in pairs]
        psnr = float(metrics.psnr(as_tensor(images_NHWC), as_tensor(self.originals_NHWC)).mean())
        cells = [name]
        for i, fid in enumerate(self.fids[name]):
            cells.append(f"{fid:.2f}")
            if len(self.fids) > 1:
                true, random = self.fids["true codes"][i], self.fids["random members"][i]
                cells[-1] += f" ({(random - fid) / (random - true):.0%})"
        print("|", " | ".join([*cells, f"{accuracy:.1%}", f"{psnr:.2f} dB"]), "|", flush=True)


def decode(tokenizer: VQModel, codes_NL: Tensor) -> np.ndarray:
    """Codes to images, uint8 (N, H, W, 3)."""
    parts = []
    for codes_BL in codes_NL.split(BATCH):
        with torch.inference_mode():
            images_BCHW = tokenizer.decode(codes_BL)
        pixels = ((images_BCHW + 1) * 127.5).round().clamp(0, 255).byte()
        parts.append(pixels.permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def random_members(clusters: Clusters, codes_NL: Tensor) -> Tensor:
    """Any member of the cluster of each code, from fixed noise: int64 (N, L)."""
    rows = []
    keys_NL = noise_keys(range(len(codes_NL)), codes_NL.shape[1])[:, 1]
    for labels_L, keys_L in zip(clusters.labels_V[codes_NL], keys_NL, strict=True):
        members_LS = clusters.members_KS[labels_L]
        noise_LS = gumbel_noise(keys_L, members_LS.shape[1])
        slots_L1 = noise_LS.masked_fill(members_LS < 0, -torch.inf).argmax(1, True)
        rows.append(members_LS.gather(1, slots_L1)[:, 0])
    return torch.stack(rows)


def choices(
    fine: FineModel, clusters: Clusters, codebook_VC: Tensor, codes_NL: Tensor, classes_N: Tensor
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each way of choosing codes, the controls first."""
    labels_NL = clusters.labels_V[codes_NL]
    keys_NL = noise_keys(range(len(codes_NL)), codes_NL.shape[1])[:, 1]

    def sampled(settings: Sampling) -> Tensor:
        return sample_fine(
            fine, clusters, labels_NL, classes_N, keys_NL, settings, codebook_VC=codebook_VC
        )

    yield "true codes", lambda: codes_NL
    yield "random members", lambda: random_members(clusters, codes_NL)
    yield "nearest to the centres", lambda: central_members(codebook_VC, clusters)[labels_NL]
    for name, settings in WAYS.items():
        yield f"fine model, {name}", functools.partial(sampled, settings)


def main() -> None:
    """Score every way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", required=True)
    parser.add_argument("--classifier", type=Path)
    parser.add_argument("--fine", type=Path, help="folder of the fine model, by default RUN/fine")
    parser.add_argument("--count", type=int, default=2000, help="held-out images")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    clusters = load_clusters(args.run / "clusters" / CLUSTERS)
    tokenizer = load_tokenizer(args.run / "tokenizer")
    fine = load_fine(args.fine or args.run / "fine", clusters, torch.device("cpu"))
    scores = Scores(tokenizer, args.images, args.classifier, args.count)
    codebook_VC = tokenizer.codebook().detach()
    ways = choices(fine, clusters, codebook_VC, scores.codes_NL, scores.classes_N)
    for name, choose in ways:
        scores.print(name, choose())


if __name__ == "__main__":
    main()
