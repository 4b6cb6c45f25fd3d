"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], divider: Sequence[str] | None = None
) -> str:
    """Format a table; bars in cells are escaped.

    Args:
        columns: Names of the columns.
        rows: Cells of each row.
        divider: Cells of the line below the names, which align the columns; by default "---".
    """
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        for row in (columns, *rows)
    ]
    lines.insert(1, f"|{'|'.join(divider or ['---'] * len(columns))}|")
    return "\n".join(lines)
