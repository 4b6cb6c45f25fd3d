"""Names of the 1000 classes of ImageNet-1k."""

from __future__ import annotations

from pathlib import Path

CLASS_FILE = Path(__file__).parent / "included" / "imagenet" / "classes.txt"


def imagenet_classes() -> dict[str, str]:
    """Return the name of each class by its WordNet id ("n01440764"), in ImageNet's order."""
    lines = CLASS_FILE.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", maxsplit=1) for line in lines)


def readable_class_names(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Replace WordNet ids by the names of the classes if all of them are ids of ImageNet-1k."""
    if not all(name.startswith("n") for name in class_names):
        return class_names
    names = imagenet_classes()
    if not names.keys() >= {*class_names}:
        return class_names
    return tuple(names[class_id] for class_id in class_names)
