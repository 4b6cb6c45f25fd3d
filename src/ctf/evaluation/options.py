"""The options of `ctf evaluate`; imports no torch, so that the command line parses fast."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ctf.common.options import Maybe

Balance = Literal["balanced", "uniform"]
Split = Literal["train", "val", "all"]
Weights = Annotated[
    Maybe[Path],
    arg(
        help="file of the Inception network's weights; by default it is searched for in the caches "
        "of torch.hub and the Hugging Face Hub"
    ),
]


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What to score against, and how.

    Attributes:
        reference: fashion-mnist, eurosat, image files (a folder, .tar or .parquet), or an .npz
            file of images or statistics; by default the included set that the pipeline was trained
            on
        samples: number of samples; by default 5000, or the next multiple of the number of classes
        out: folder for the report; by default one in evaluations/, named after the model and the
            options. With x.json, the folder is x, and x.json is a copy of the report.json in it
        against: report.json of another evaluation, to compare the scores with
        features: feature networks for FID and other scores: lite0, inception, fashion,
            eurosat or mymodule:factory; by default lite0, and fashion or eurosat for the classes of
            these sets
        seed: image i is sampled from seed + i
        search: search for the best guidance and temperatures first, with other seeds
        search_samples: samples for each setting that the search tries
        balance: balanced is an equal number of samples per class, uniform is random classes
        split: part of the reference set; by default val of an included set, all of other images
        resize: side in pixels to resize samples to before scoring, as LlamaGen does (384 to 256)
        classifier: folder of the classifier that measures the class accuracy; by default the
            included one, for the classes of Fashion-MNIST
        nearest: find the nearest training images of samples, by pixels and by the first features,
            show them side by side in nearest.png, and say whether samples are nearer to training
            images than held-out images are; --reference must be what the pipeline was trained on
        window: coarse labels of an image in a pass of the coarse model, or auto; the images are the
            same up to rounding, and large batches gain little from more than 1
    """

    reference: Maybe[str] = None
    samples: Maybe[int] = None
    out: Maybe[Path] = None
    against: Maybe[Path] = None
    features: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = ()
    seed: int = 0
    search: bool = False
    search_samples: int = 1000
    balance: Balance = "balanced"
    split: Maybe[Split] = None
    resize: Maybe[int] = None
    classifier: Maybe[Path] = None
    weights: Weights = None
    nearest: bool = False
    window: Annotated[str, arg(metavar="auto|INT")] = "1"
