"""Tables in Markdown."""

from ctf.bench.tables import markdown, span, spread


def test_a_table_in_markdown() -> None:
    assert markdown(("a", "b"), [("1", "2")]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_medians_with_their_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00-3.00)"
    assert spread([3.0, 1.0, 2.0], " to ") == "2.00 (1.00 to 3.00)"
    assert span([3e9, 1e12]) == "3 to 1,000"
