"""How numbers are shown: tables in Markdown, medians with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def spread(values: Sequence[float], to: str = "-") -> str:
    """Return the median, and the minimum and the maximum in brackets."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}{to}{max(values):.2f})"
