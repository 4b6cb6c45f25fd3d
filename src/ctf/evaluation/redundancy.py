"""How redundant the codes of a codebook are: what swapping codes within clusters does to images.

Fig. 1b of the paper (arXiv 2503.16194).

Shapes: B batch, L codes of an image, K clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctf.data.images import as_pictures
from ctf.data.sheet import sheet
from ctf.evaluation.metrics import psnr
from ctf.models.clusters import Clusters, inertia, swap
from ctf.models.tokenizer import VQModel

SHEET_COLUMNS = 10


def report(
    tokenizer: VQModel,
    clusters: Clusters,
    control: Clusters,
    codes_BL: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """The redundancy study of Fig. 1b: what swapping codes within clusters does to pictures.

    `control` are random clusters of the same sizes. The PSNR, in dB, is that of the picture
    decoded from swapped codes against the one from the true codes, the mean over the pictures that
    changed; None where none did.
    """
    generator = torch.Generator().manual_seed(seed)
    decibels: dict[str, list[Tensor]] = {"clusters": [], "random": []}
    for codes in codes_BL.split(batch_size):
        true_BCHW = _decode(tokenizer, codes)
        for name, partition in (("clusters", clusters), ("random", control)):
            swapped_BCHW = _decode(tokenizer, swap(codes, partition, generator))
            psnr_B = psnr(swapped_BCHW, true_BCHW)
            decibels[name].append(psnr_B[psnr_B.isfinite()])
    changed = {name: torch.cat(values) for name, values in decibels.items()}
    share_K = clusters.sizes_K.double() / clusters.codebook_size
    return {
        "codes": clusters.codebook_size,
        "clusters": clusters.count,
        "sizes": {
            "min": int(clusters.sizes_K.min()),
            "median": float(np.median(clusters.sizes_K.numpy())),
            "max": clusters.largest,
            "entropy_bits": float(-(share_K * share_K.log2()).sum()),
        },
        "inertia": {
            "clusters": inertia(tokenizer.codebook(), clusters),
            "random": inertia(tokenizer.codebook(), control),
        },
        "swap_psnr": {n: float(d.mean()) if len(d) else None for n, d in changed.items()},
        "pictures": len(codes_BL),
    }


def swap_sheet(
    tokenizer: VQModel,
    clusters: Clusters,
    control: Clusters,
    codes_BL: Tensor,
    *,
    seed: int = 0,
) -> Image.Image:
    """Fig. 1b as a picture: a column for each row of `codes_BL`; below the true codes the swaps."""
    generator = torch.Generator().manual_seed(seed)
    rows = {
        "codes as they are": codes_BL,
        f"each swapped within its cluster, {clusters.count} clusters": swap(
            codes_BL, clusters, generator
        ),
        "each swapped within random clusters of the same sizes": swap(codes_BL, control, generator),
    }
    return sheet([(name, as_pictures(_decode(tokenizer, codes))) for name, codes in rows.items()])


@torch.inference_mode()
def _decode(tokenizer: VQModel, codes_BL: Tensor) -> Tensor:
    """Codes (B, L) on the CPU -> images in [-1, 1], (B, 3, H, W), on the CPU."""
    device = next(tokenizer.parameters()).device
    return tokenizer.decode(codes_BL.to(device)).float().cpu()
