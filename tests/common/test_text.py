"""Names of files in texts."""

import os

from hypothesis import given
from hypothesis import strategies as st

from ctf.common.text import encodable, printable


def test_a_byte_that_is_not_utf8_is_shown_in_hexadecimal() -> None:
    assert encodable(os.fsdecode(b"caf\xe9 \xff.png")) == r"caf\xe9 \xff.png"
    assert encodable("\ud800") == r"\ud800"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_other_texts_are_unchanged(text: str) -> None:
    assert encodable(text) == text


@given(st.binary())
def test_every_name_of_a_file_can_be_printed(name: bytes) -> None:
    text = printable(os.fsdecode(name))
    assert text.encode().decode() == text
    assert all(character in "\n\t" or not 0 <= ord(character) < 32 for character in text)
