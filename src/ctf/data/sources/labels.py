"""Labels of images as they are found in archives and tables, and which of them are the classes."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# The usual names of class labels, from the most to the least telling.
CLASS_COLUMNS = (
    "label", "labels", "class", "cls", "class_label", "class_name", "classname", "label_name",
    "category", "category_name", "class_id", "class_idx", "class_index", "label_id", "label_idx",
    "category_id", "target", "targets", "fine_label", "coarse_label", "y",
)  # fmt: skip
# The usual names of images where there are several.
IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "pixel_values", "picture")

MAX_LABEL_LENGTH = 1000  # characters; a longer text is not the name of a class
UNKNOWN = ("-1", "nan", "null", "None")  # -1 is how Hugging Face datasets writes it

_WHOLE = re.compile(r"(-?\d+)\.0*")
_PRINTED = re.compile(  # array(3), np.int64(3), tensor(3, device='cuda:0')
    r"(?:\w+\.)?(?:array|[Tt]ensor|u?int\d+|float\d+|str_)\((.*?)(?:, *\w+=.*)?\)", re.DOTALL
)
_PRINTED_NUMBERS = re.compile(r"\[[-\d.\s]+\]")  # [0. 0. 1.]
_QUOTED = ("[", "{", '"', "'", 'b"', "b'")


def class_of(value: Any) -> str:
    """Return the class that a value names, a text or a whole number; "" if it is not one class.

    A list names a class if it has one element or is one-hot, a dictionary if one of the usual keys
    does.
    """
    if isinstance(value, str):
        return class_of_text(value)
    if isinstance(value, bytes):
        return class_of_text(value.decode(errors="replace"))
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else ""
    if isinstance(value, list | tuple):
        if len(value) == 1:
            return class_of(value[0])
        hot = [i for i, number in enumerate(value) if number == 1]
        return str(hot[0]) if len(hot) == 1 and list(value).count(0) == len(value) - 1 else ""
    if isinstance(value, Mapping):
        classes = (class_of(value[key]) for key in CLASS_COLUMNS if key in value)
        return next(filter(None, classes), "")
    return ""


def class_of_text(text: str) -> str:
    """Return the class that a text names, however a program printed it: 3, 3.0, [3], "3"."""
    text = " ".join(text.removeprefix("\ufeff").replace("\0", " ").split())
    if len(text) > MAX_LABEL_LENGTH:
        return ""
    if match := _WHOLE.fullmatch(text):
        return match[1]
    if match := _PRINTED.fullmatch(text):
        return class_of_text(match[1])
    if not text.startswith(_QUOTED):
        return text
    if _PRINTED_NUMBERS.fullmatch(text):
        text = f"[{', '.join(number.rstrip('.') for number in text[1:-1].split())}]"
    for parse in (json.loads, ast.literal_eval):
        try:
            return class_of(parse(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text


def drop_unknown(labels: Sequence[str]) -> list[str]:
    """Replace what stands for no class among numbers: -1, unless -1 and 1 are all; nan and null."""
    known = {*labels} - {"", *UNKNOWN}
    if not all(map(is_whole, known)) or {*labels} - {""} == {"-1", "1"}:
        return [*labels]
    return ["" if label in UNKNOWN else label for label in labels]


def is_whole(label: str) -> bool:
    """Whether a label is a whole number."""
    return label.removeprefix("-").isdecimal()
