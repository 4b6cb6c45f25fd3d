"""How results are shown: tables in Markdown, medians with their spread, plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ctf.common import storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # columns and rows


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def spread(values: Sequence[float], to: str = "-") -> str:
    """Return the median, and the minimum and the maximum in brackets."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}{to}{max(values):.2f})"


def span(values: Sequence[float]) -> str:
    """Return the minimum and the maximum, in 10^9."""
    return f"{min(values) / 1e9:,.0f} to {max(values) / 1e9:,.0f}"


def listed(environment: Mapping[str, str]) -> str:
    """Return a machine and its software in one line."""
    return ", ".join(f"{name} {value}" for name, value in environment.items())


def write_text(path: Path, parts: Sequence[str]) -> None:
    """Write paragraphs and tables."""
    with storage.atomic(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_plot(path: Path, figure: Figure) -> None:
    """Write a plot as PNG."""
    with storage.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
