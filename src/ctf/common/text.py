"""Text that may contain names of files, which are bytes: not all of them are UTF-8."""

from __future__ import annotations

import re

# Characters that act on a terminal instead of being shown, but line breaks and tabs.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


def encodable(text: str) -> str:
    r"""Return a text that can be encoded as UTF-8: a byte of a name that is not as `\xff`.

    Python decodes such a byte to a lone surrogate, which no encoder takes (PEP 383).
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
        except UnicodeEncodeError:  # another surrogate, e.g. from JSON
            return text.encode(errors="backslashreplace").decode()
    return text


def printable(text: str) -> str:
    r"""Return a text to print: encodable, and without effect on a terminal (`\x1b` for escape)."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", encodable(text))
