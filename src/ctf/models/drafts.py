"""Drafts: guesses of labels that no pass has computed yet, from tables of the labels around them.

A draft has the noise of the position, as the label itself: the largest sum of a score and the noise
(see `ctf.models.parallel`). So it is the label wherever scores and logits agree well enough. How
good drafts are changes how many passes an image takes, and nothing else.

The score of label k at a position is

    0.9 log p(k | left) + 0.9 log p(k | above) + 0.7 log p(k | position) - 1.5 log p(k)

with the frequencies in the training tokens: a product of experts, whose weights were fitted to the
labels that the pipeline of Fashion-MNIST samples at guidance 2. Classes added little to that.

Shapes: N images, B batch, L labels of an image, K clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

WEIGHTS = {"left": 0.9, "above": 0.9, "position": 0.7}
PRIOR_WEIGHT = -1.5  # of log p(k)
PSEUDO_COUNT = 10.0  # labels after p(k), which each row of a table is counted beside
MAX_LABELS = 2048  # K at most: tables have K ** 2 numbers


class Drafts(nn.Module):
    """Tables of scores, whose sum is the score of each label.

    Args:
        tables: "left" and "above", (K + 1, K), by the label there, the last row where there is
            none; "position", (L, K).

    Raises:
        ValueError: A table is missing or has another shape or type.
    """

    left: Tensor
    above: Tensor
    position: Tensor

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        if set(tables) != set(WEIGHTS):
            raise ValueError(f"its tensors are {', '.join(sorted(tables))}")
        length, labels = (*tables["position"].shape, 0, 0)[:2]
        for name, table in tables.items():
            rows = length if name == "position" else labels + 1
            if table.shape != (rows, labels) or not table.is_floating_point():
                raise ValueError(f"{name} is {tuple(table.shape)}, {table.dtype}")
            if not bool(table.isfinite().all()):
                raise ValueError(f"{name} has numbers that are not finite")
            # Not part of the state: a model's weights are the same with and without drafts.
            self.register_buffer(name, table.float(), persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """L and K."""
        return self.position.shape[0], self.position.shape[1]

    def forward(self, left_B: Tensor, above_B: Tensor, positions_B: Tensor) -> Tensor:
        """Scores (B, K) at positions of the labels left and above, K where there is none."""
        return self.left[left_B] + self.above[above_B] + self.position[positions_B]

    def tables(self) -> dict[str, Tensor]:
        """The tables as they are stored, in half precision."""
        return {name: getattr(self, name).half() for name in WEIGHTS}


def fit(labels: Iterable[Tensor], grid: int, vocab_size: int) -> Drafts | None:
    """Count labels; None if there are too many clusters for tables.

    Args:
        labels: Batches of int64 (N, L), in [0, K).
        grid: Side of the grid.
        vocab_size: K.
    """
    if vocab_size > MAX_LABELS:
        return None
    length = grid**2
    rows = {"left": vocab_size + 1, "above": vocab_size + 1, "position": length}
    counts = {name: torch.zeros(n * vocab_size, dtype=torch.int64) for name, n in rows.items()}
    positions_L = torch.arange(length)
    for labels_NL in labels:
        none = labels_NL.new_full((len(labels_NL), grid, 1), vocab_size)
        labels_NHW = labels_NL.unflatten(1, (grid, grid))
        given = {
            "left": torch.cat([none, labels_NHW[:, :, :-1]], dim=2).flatten(1),
            "above": torch.cat([none.mT, labels_NHW[:, :-1]], dim=1).flatten(1),
            "position": positions_L.expand_as(labels_NL),
        }
        for name, given_NL in given.items():
            pairs = (given_NL * vocab_size + labels_NL).flatten()
            counts[name] += pairs.bincount(minlength=len(counts[name]))
    prior_K = counts["position"].view(length, vocab_size).sum(0).double() + 1
    prior_K /= prior_K.sum()
    tables = {}
    for name, count in counts.items():
        count_RK = count.view(-1, vocab_size).double() + PSEUDO_COUNT * prior_K
        tables[name] = WEIGHTS[name] * (count_RK / count_RK.sum(1, keepdim=True)).log()
    tables["position"] += PRIOR_WEIGHT * prior_K.log()
    return Drafts(tables)
