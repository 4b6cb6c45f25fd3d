"""Tables of labels given those left and above."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ctf.models import drafts
from ctf.models.drafts import Drafts

GRID, K = 3, 4
LABELS_NL = torch.randint(K, (20, GRID**2), generator=torch.Generator().manual_seed(0))


def fitted(labels: Sequence[Tensor] = (LABELS_NL,)) -> Drafts:
    fit = drafts.fit(labels, GRID, K)
    assert fit is not None
    return fit


def share(label: int, at: Sequence[tuple[int, int]], total: Sequence[float]) -> float:
    """Frequency of a label among (image, position), smoothed by the frequencies of all."""
    count = sum(int(LABELS_NL[n, i]) == label for n, i in at) + drafts.PSEUDO_COUNT * total[label]
    return count / (len(at) + drafts.PSEUDO_COUNT)


@pytest.mark.parametrize("position", [0, 1, 3, 4, 8])
def test_scores_are_the_weighted_logarithms_of_frequencies(position: int) -> None:
    every = [(n, i) for n in range(len(LABELS_NL)) for i in range(GRID**2)]
    counts = [sum(int(LABELS_NL[n, i]) == k for n, i in every) + 1 for k in range(K)]
    total = [count / sum(counts) for count in counts]

    def left(n: int, i: int) -> int:
        return int(LABELS_NL[n, i - 1]) if i % GRID else K

    def above(n: int, i: int) -> int:
        return int(LABELS_NL[n, i - GRID]) if i >= GRID else K

    n = 7
    scores_1K = fitted()(
        torch.tensor([left(n, position)]),
        torch.tensor([above(n, position)]),
        torch.tensor([position]),
    )
    for k in range(K):
        same_left = [at for at in every if left(*at) == left(n, position)]
        same_above = [at for at in every if above(*at) == above(n, position)]
        same_position = [at for at in every if at[1] == position]
        expected = (
            0.9 * math.log(share(k, same_left, total))
            + 0.9 * math.log(share(k, same_above, total))
            + 0.7 * math.log(share(k, same_position, total))
            - 1.5 * math.log(total[k])
        )
        assert float(scores_1K[0, k]) == pytest.approx(expected, rel=1e-5)


def test_the_batches_of_labels_do_not_matter() -> None:
    one, other = fitted().tables(), fitted(LABELS_NL.split(7)).tables()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_is_impossible_that_was_not_seen() -> None:
    tables = fitted([torch.zeros(2, GRID**2, dtype=torch.int64)]).tables()
    assert all(bool(table.isfinite().all()) for table in tables.values())


def test_stored_tables_are_in_half_precision_and_no_weights() -> None:
    tables = fitted().tables()
    assert {name: tuple(table.shape) for name, table in tables.items()} == {
        "left": (K + 1, K),
        "above": (K + 1, K),
        "position": (GRID**2, K),
    }
    assert all(table.dtype == torch.float16 for table in tables.values())
    loaded = Drafts(tables)
    assert loaded.shape == (GRID**2, K) and not loaded.state_dict() and not [*loaded.parameters()]
    again = loaded.tables()
    assert all(torch.equal(tables[name], again[name]) for name in tables)


def test_there_are_no_tables_for_many_clusters() -> None:
    assert drafts.fit([LABELS_NL], GRID, drafts.MAX_LABELS + 1) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": None}, "its tensors are above, position"),
        ({"more": torch.zeros(1)}, "its tensors are above, left, more, position"),
        ({"above": torch.zeros(K, K)}, r"above is \(4, 4\)"),
        ({"left": torch.zeros(K + 1, K).long()}, r"left is \(5, 4\), torch.int64"),
        ({"position": torch.zeros(0, 0)}, r"left is \(5, 4\)"),
        ({"position": torch.zeros(())}, r"left is \(5, 4\)"),
        ({"left": torch.full((K + 1, K), torch.nan)}, "left has numbers that are not finite"),
    ],
)
def test_tables_that_are_none_are_refused(changes: dict[str, Tensor | None], message: str) -> None:
    tables = {**fitted().tables(), **changes}
    with pytest.raises(ValueError, match=message):
        Drafts({name: table for name, table in tables.items() if table is not None})
