"""How results are shown: medians with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # columns and rows


def spread(values: Sequence[float], to: str = "-") -> str:
    """Return the median, and the minimum and the maximum in brackets."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}{to}{max(values):.2f})"


def span(values: Sequence[float]) -> str:
    """Return the minimum and the maximum, in 10^9."""
    return f"{min(values) / 1e9:,.0f} to {max(values) / 1e9:,.0f}"


def listed(environment: Mapping[str, str]) -> str:
    """Return a machine and its software in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment.items())
