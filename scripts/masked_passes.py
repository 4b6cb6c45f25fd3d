"""The codes of a run's fine model in several masked passes, against all in one.

    python scripts/masked_passes.py RUN --images eurosat --classifier CLASSIFIER --weights FILE

The fine model is trained on with codes that it may read: a linear map of their vectors is added to
the embedding of the label, for a share of the tokens that follows MaskGIT's cosine (arXiv
2202.04200), and the loss is that of the others. Prints the held-out loss by the share of known
codes, then, as scripts/fine_stage.py does, what codes chosen in 1, 2, 4, 8 passes for the true
labels of held-out images are worth. A pass keeps as many codes as the cosine says: those of tokens
in random order, or the most likely. The weights are in FILE, which is not trained again.

Shapes: B batch, L tokens of an image, S members of the largest cluster, C code dimension, D width.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fine_stage
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from ctf.common import storage
from ctf.data.tokens import Tokens
from ctf.kernels.logits import members_logits
from ctf.models.clusters import Clusters
from ctf.models.fine import FineModel
from ctf.models.noise import gumbel_noise, noise_keys
from ctf.models.points import standardize
from ctf.models.sampling import nearest_to_mean
from ctf.pipelines.folder import CLUSTERS, load_clusters, load_fine, load_tokenizer

BATCH, SCORED = 16, 50
LEARNING_RATE, WARM_UP, DROPPED = 5e-4, 50, 0.1
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
PASSES = (1, 2, 4, 8)

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, noise, vectors -> slots


class MaskedFineModel(nn.Module):
    """A fine model that also reads the codes of some tokens."""

    def __init__(self, fine: FineModel, clusters: Clusters, codebook_VC: Tensor) -> None:
        super().__init__()
        self.fine, self.sizes = fine, [int(size) for size in clusters.sizes_K]
        self.labels_V, self.vectors_VC = clusters.labels_V, standardize(codebook_VC)
        self.known = nn.Linear(codebook_VC.shape[1], fine.config.width)
        nn.init.zeros_(self.known.weight)  # at first, it is the fine model
        nn.init.zeros_(self.known.bias)

    def forward(
        self, labels_BL: Tensor, classes_B: Tensor, codes_BL: Tensor, is_known_BL: Tensor
    ) -> Tensor:
        """Logits of the members of each token's cluster: (B, L, S)."""
        backbone = self.fine.backbone
        x_BTD = backbone.embed(torch.cat([classes_B[:, None], labels_BL], dim=1), 0)
        known_BLD = self.known(self.vectors_VC[codes_BL]) * is_known_BL[..., None]
        x_BTD = torch.cat([x_BTD[:, :1], x_BTD[:, 1:] + known_BLD], dim=1)
        rotation_TP2 = backbone.rotation(0, x_BTD.shape[1])
        attend = functools.partial(F.scaled_dot_product_attention, is_causal=False)
        for layer in backbone.layers:
            x_BTD = layer(x_BTD, rotation_TP2, attend)
        hidden_TD = backbone.norm(x_BTD)[:, 1:].flatten(0, 1).float()
        with torch.autocast("cpu", enabled=False):
            weight_VD = self.fine.head.weight
            logits_TS = members_logits(hidden_TD, weight_VD, labels_BL.flatten(), self.sizes)
        return logits_TS.view(*labels_BL.shape, -1)

    def loss(self, codes_BL: Tensor, classes_B: Tensor, is_known_BL: Tensor) -> Tensor:
        """Mean cross-entropy of the codes that are not known, in nats a token."""
        labels_BL = self.labels_V[codes_BL]
        logits_BLS = self(labels_BL, classes_B, codes_BL, is_known_BL)
        return F.cross_entropy(logits_BLS[~is_known_BL], self.fine.choices(codes_BL)[~is_known_BL])


def train(model: MaskedFineModel, tokens: Tokens, val: Tokens, steps: int) -> None:
    """Train on, and print the held-out loss by the share of known codes before and after."""
    evaluate(model, val, "before")
    generator = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(steps):
        decay = 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP) * decay
        rows, views = (generator.integers(n, size=BATCH) for n in (len(tokens), tokens.views))
        codes_BL, classes_B = tokens.codes(rows, views), _classes(tokens, rows)
        drop_B = torch.from_numpy(generator.random(BATCH) < DROPPED)
        classes_B = classes_B.masked_fill(drop_B, model.fine.no_class)
        hidden_B1 = torch.from_numpy(np.cos(generator.random((BATCH, 1)) * np.pi / 2))
        is_known_BL = torch.from_numpy(generator.random(tuple(codes_BL.shape))) >= hidden_B1
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(codes_BL, classes_B, is_known_BL)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"{step + 1}/{steps}, loss {loss.item():.4f}", flush=True)
    evaluate(model, val, f"after {steps} steps")


@torch.inference_mode()
def evaluate(model: MaskedFineModel, val: Tokens, when: str) -> None:
    """Print the held-out loss of codes that are not known, by the share of those that are."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    rows = np.arange(200) * len(val) // 200
    cells = []
    for share in SHARES:
        losses = []
        for part in np.split(rows, 4):
            codes_BL = val.codes(part)
            is_known_BL = torch.rand(codes_BL.shape, generator=generator) < share
            losses.append(model.loss(codes_BL, _classes(val, part), is_known_BL).item())
        cells.append(f"{np.mean(losses):.4f}")
    print("|", " | ".join([when, *cells]), "|", flush=True)


def _classes(tokens: Tokens, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(tokens.classes_N)[rows]).long()


@torch.inference_mode()
def sample(
    model: MaskedFineModel,
    codebook_VC: Tensor,
    labels_NL: Tensor,
    classes_N: Tensor,
    passes: int,
    choose: Choose,
    confident: bool,
) -> Tensor:
    """Choose the codes of labels in several passes: int64 (N, L)."""
    parts, length = [], labels_NL.shape[1]
    keys_NL = noise_keys(range(len(labels_NL)), length)[:, 1]
    generator = torch.Generator().manual_seed(0)
    for labels_BL, classes_B, keys_BL in zip(
        *(x.split(SCORED) for x in (labels_NL, classes_N, keys_NL)), strict=True
    ):
        codes_BL = torch.zeros_like(labels_BL)
        is_known_BL = torch.zeros_like(labels_BL, dtype=torch.bool)
        order_BL = torch.rand(labels_BL.shape, generator=generator).double()
        members_BLS = model.fine.members_KS[labels_BL].clamp(min=0)
        noise_BLS = gumbel_noise(keys_BL, members_BLS.shape[-1])
        for number in range(1, passes + 1):
            logits_BLS = model(labels_BL, classes_B, codes_BL, is_known_BL).double()
            images = zip(logits_BLS, noise_BLS, codebook_VC[members_BLS], strict=True)
            slots_BL = torch.stack([choose(*image) for image in images])
            new_BL = members_BLS.gather(-1, slots_BL[..., None])[..., 0]
            codes_BL = torch.where(is_known_BL, codes_BL, new_BL)
            if confident:
                order_BL = logits_BLS.softmax(-1).gather(-1, slots_BL[..., None])[..., 0]
            kept = length - int(math.cos(number / passes * math.pi / 2) * length + 1e-6)
            first_BL = order_BL.masked_fill(is_known_BL, torch.inf).argsort(1, descending=True)
            is_known_BL = torch.zeros_like(is_known_BL).scatter(1, first_BL[:, :kept], True)
        parts.append(codes_BL)
    return torch.cat(parts)


def ways() -> Iterator[tuple[str, Choose]]:
    """How each pass chooses among the members of a cluster."""

    def sampled(temperature: float, logits_LS: Tensor, noise_LS: Tensor, _: Tensor) -> Tensor:
        return (logits_LS / temperature + noise_LS).argmax(-1)

    def mean(temperature: float, logits_LS: Tensor, _: Tensor, vectors_LSC: Tensor) -> Tensor:
        return nearest_to_mean(logits_LS / temperature, vectors_LSC)

    for temperature in (1.0, 0.5):
        yield f"temperature {temperature:g}", functools.partial(sampled, temperature)
    for temperature in (0.5, 0.2):
        yield f"mean, temperature {temperature:g}", functools.partial(mean, temperature)


def main() -> None:
    """Train, unless there are weights, and score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", required=True)
    parser.add_argument("--classifier", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--count", type=int, default=800, help="held-out images")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    clusters = load_clusters(args.run / "clusters" / CLUSTERS)
    tokenizer = load_tokenizer(args.run / "tokenizer")
    codebook_VC = tokenizer.codebook().detach()
    fine = load_fine(args.run / "fine", clusters, torch.device("cpu")).requires_grad_(True)
    model = MaskedFineModel(fine, clusters, codebook_VC)
    name = storage.hash_file(args.run / "tokenizer" / "model.safetensors")
    train_tokens, val = (Tokens(args.run / "tokens", part, name) for part in ("train", "val"))
    if args.weights.exists():
        load_model(model, args.weights)
    else:
        train(model, train_tokens, val, args.steps)
        save_model(model, str(args.weights))
    model.eval()
    scores = fine_stage.Scores(tokenizer, args.images, args.classifier, args.count)
    labels_NL = clusters.labels_V[scores.codes_NL]
    scores.print("true codes", scores.codes_NL)
    scores.print("random members", fine_stage.random_members(clusters, scores.codes_NL))
    for way, choose in ways():
        for passes in PASSES:
            for confident in (False, True)[:passes]:
                codes_NL = sample(
                    model, codebook_VC, labels_NL, scores.classes_N, passes, choose, confident
                )
                order = ", most likely first" if confident else ""
                scores.print(f"{way}, passes: {passes}{order}", codes_NL)


if __name__ == "__main__":
    main()
