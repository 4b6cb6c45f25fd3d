"""docs/troubleshooting.md quotes messages that ctf prints."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
NOT_OURS = ("Killed", "CUDA out of memory")


def quoted() -> list[str]:
    """The messages in the table of errors: what is in backticks in its first column."""
    table = PAGE.partition("| message | what to do |")[2].partition("\n\n")[0]
    cells = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    return [m for cell in cells for m in re.findall("`(.+?)`", cell) if m not in NOT_OURS]


def printed() -> list[str]:
    """All texts in the source, with "..." for what is inserted."""
    texts = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    str(part.value) if isinstance(part, ast.Constant) else "..."
                    for part in node.values
                ]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return printed()


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_printed(message: str, texts: list[str]) -> None:
    # For what is inserted, both have dots.
    words = [re.escape(part) for part in message.split("...")]
    pattern = re.compile(".*".join(words), re.DOTALL)
    assert any(pattern.search(text) for text in texts)


def test_most_errors_are_ours() -> None:
    assert len(quoted()) > 12
