"""How redundant a codebook is: what happens to images when codes are swapped within clusters.

Fig. 1b of the paper (arXiv 2503.16194).

Shapes: B batch, L codes of an image, K clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctf.data.image_grid import image_grid
from ctf.data.transforms import as_pil
from ctf.evaluation.metrics import psnr
from ctf.models.clusters import Clusters, inertia, swap
from ctf.models.tokenizer import VQModel

SHEET_COLUMNS = 10
BATCH = 64


def redundancy_study(
    tokenizer: VQModel, clusters: Clusters, control: Clusters, codes_BL: Tensor, *, seed: int = 0
) -> dict[str, Any]:
    """Compare swapping codes within clusters to swapping them within random clusters.

    Args:
        tokenizer: decodes the codes.
        clusters: the clusters under study.
        control: random clusters of the same sizes.
        codes_BL: codes of held-out images, (B, L) int64 in [0, V).
        seed: of the swaps.

    Returns:
        The content of clusters/report.json. "swap_psnr" is the PSNR in dB between the image decoded
        from swapped codes and the one decoded from the true codes: the mean over the images that
        changed, None if none did.
    """
    generator = torch.Generator().manual_seed(seed)
    psnr_of: dict[str, list[Tensor]] = {"clusters": [], "random": []}
    for start in range(0, len(codes_BL), BATCH):
        codes = codes_BL[start : start + BATCH]
        original_BCHW = _decode(tokenizer, codes)
        for name, partition in (("clusters", clusters), ("random", control)):
            swapped_BCHW = _decode(tokenizer, swap(codes, partition, generator))
            psnr_B = psnr(swapped_BCHW, original_BCHW)
            psnr_of[name].append(psnr_B[psnr_B.isfinite()])
    changed = {name: torch.cat(values) for name, values in psnr_of.items()}
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
        "swap_psnr": {name: float(p.mean()) if len(p) else None for name, p in changed.items()},
        "pictures": len(codes_BL),
    }


def swap_sheet(
    tokenizer: VQModel, clusters: Clusters, control: Clusters, codes_BL: Tensor, *, seed: int = 0
) -> Image.Image:
    """Draw Fig. 1b: one column per row of `codes_BL`, the original above its two swapped versions.

    The arguments are those of `redundancy_study`.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = {
        "original codes": codes_BL,
        f"codes swapped within {clusters.count} clusters": swap(codes_BL, clusters, generator),
        "codes swapped within random clusters of the same sizes": swap(
            codes_BL, control, generator
        ),
    }
    return image_grid([(name, as_pil(_decode(tokenizer, codes))) for name, codes in rows.items()])


@torch.inference_mode()
def _decode(tokenizer: VQModel, codes_BL: Tensor) -> Tensor:
    """Decode codes (B, L) on the CPU to images (B, 3, H, W) in [-1, 1] on the CPU."""
    device = next(tokenizer.parameters()).device
    return tokenizer.decode(codes_BL.to(device)).float().cpu()
