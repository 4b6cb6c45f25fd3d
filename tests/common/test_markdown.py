"""Tables in Markdown."""

from ctf.common.markdown import markdown_table


def test_a_table_in_markdown() -> None:
    assert markdown_table(("a", "b"), [("1", "2")]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_the_divider_aligns_columns_and_bars_are_escaped() -> None:
    expected = "| a | b |\n|---|---:|\n| 1\\|2 | 3 |"
    assert markdown_table(("a", "b"), [("1|2", "3")], ("---", "---:")) == expected
