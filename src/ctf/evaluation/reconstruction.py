"""How a tokenizer reconstructs images.

Shapes: B images, C channels, H height, W width, L codes of an image, V codes of the codebook.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ctf.common import threads
from ctf.common.progress import Progress
from ctf.data.image_set import ImageSet
from ctf.data.transforms import as_tensor
from ctf.evaluation import metrics
from ctf.models.tokenizer import VQModel

BATCH = 64  # images


@torch.inference_mode()
def reconstruction_metrics(
    model: VQModel,
    images: ImageSet,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Measure how a tokenizer reconstructs (the first `limit`) images and uses its codebook.

    Returns:
        "mse" (on [-1, 1]), "psnr" (dB), "ssim", "usage" (fraction of the codes that occur),
        "perplexity" (codes), and "images" (how many were measured).
    """
    count = min(len(images), limit or len(images))
    computed: list[tuple[Tensor, ...]] = []

    def compute(pixels_BHWC: np.ndarray) -> tuple[Tensor, ...]:
        images_BCHW = as_tensor(pixels_BHWC, device)
        codes_BL = model.encode(images_BCHW)
        decoded_BCHW = model.decode(codes_BL)
        mse_B = (decoded_BCHW - images_BCHW).square().mean((1, 2, 3))
        psnr_B = metrics.psnr(decoded_BCHW, images_BCHW)
        ssim_B = metrics.ssim(decoded_BCHW, images_BCHW)
        return mse_B.cpu(), psnr_B.cpu(), ssim_B.cpu(), codes_BL.cpu()

    with threads.team(threads.pays(torch.device(device))):
        for start in range(0, count, BATCH):
            pixels_BHWC = images.read(np.arange(start, min(start + BATCH, count)))
            computed += threads.over_parts(compute, pixels_BHWC)
            if progress is not None:
                progress(start + len(pixels_BHWC), count)
    mse, psnr, ssim, codes = (torch.cat(values) for values in zip(*computed, strict=True))
    counts_V = torch.bincount(codes.flatten(), minlength=model.config.codebook_size)
    return {
        "mse": float(mse.mean()),
        "psnr": float(psnr.mean()),
        "ssim": float(ssim.mean()),
        "usage": metrics.codebook_usage(counts_V),
        "perplexity": metrics.perplexity(counts_V),
        "images": count,
    }
