"""Samples of an archive: which of its files are images, and what labels them.

As in webdataset, files of a sample share their name up to a dot: `0001.jpg`, its label `0001.cls`,
and `0001.mask.png`, another part of it. Names may have more dots: `img.3.cls`, if there is such a
file, labels `img.3.png`. StyleGAN's `dataset.json` is understood, too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ctf.common.errors import UserError
from ctf.data.decode import HEAD, is_image
from ctf.data.sources.base import HIDDEN, has_image_suffix, is_hidden, why_no_image
from ctf.data.sources.labels import (
    CLASS_COLUMNS,
    IMAGE_COLUMNS,
    class_of,
    class_of_text,
    drop_unknown,
    is_whole,
)
from ctf.data.sources.members import Span

MAX_LABEL_BYTES, MAX_LIST_BYTES = 1 << 16, 1 << 28
LABEL_LIST = "dataset.json"  # {"labels": [["00000/img00000000.png", 6], ...]}, or null for none
NO_CLASSES = "images"  # the only class if there are none
JSON_KEYS = tuple(dict.fromkeys(("label", "cls", *CLASS_COLUMNS)))
# Labels by where they were found, from the most to the least telling: ".cls" are files of that
# ending, "label" is a key of .json files. The last ones may be numbers or captions of the samples.
UNSURE = (".y", ".index", ".inx", ".txt", "y")
COLUMNS = tuple(
    dict.fromkeys((".cls", *(f".{name}" for name in CLASS_COLUMNS), LABEL_LIST, *JSON_KEYS))
)
COLUMNS = (*(name for name in COLUMNS if name not in UNSURE), *UNSURE)


class Samples(NamedTuple):
    """Images of an archive, and their labels.

    Attributes:
        spans: where each image is, by its path.
        samples: path of each image's sample: the start of its path that its other files have, too.
        columns: label of each image, "" if it has none, by where it was found (see COLUMNS).
        left_out: paths of files that are neither images nor their labels, by the reason.
    """

    spans: dict[str, Span]
    samples: list[str]
    columns: dict[str, list[str]]
    left_out: dict[str, list[str]]


def find_samples(
    files: Mapping[str, Span], read: Callable[[Span, int], bytes], class_column: str | None = None
) -> Samples:
    """Sort the files of an archive into images, labels and others.

    Args:
        files: where each file is, by its path.
        read: returns a file's first bytes, up to the given number.
        class_column: a column (see COLUMNS) to look for besides the usual ones.
    """
    spans: dict[str, Span] = {}
    labels: defaultdict[str, dict[str, str]] = defaultdict(dict)  # by column and sample
    others: list[tuple[str, str]] = []  # path, and the sample that it labels or ""
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    for path, span in files.items():
        if any(map(is_hidden, path.split("/"))):
            left_out[HIDDEN].append(path)
            continue
        sample, column, limit = _label_file(path, class_column)
        if has_image_suffix(path) or is_image((data := read(span, limit))[:HEAD]):
            spans[path] = span
            continue
        found = [*_labels(path, sample, column, data, class_column)] if span.size <= limit else []
        for name, labelled_sample, label in found:
            labels[name][labelled_sample] = label
        others.append((path, found[0][1] if found else ""))
    if NO_CLASSES in labels[LABEL_LIST].values():
        labels[LABEL_LIST] = dict.fromkeys(spans, NO_CLASSES)
    labelled = {sample for by_sample in labels.values() for sample in by_sample}
    stems = {path.rpartition(".")[0] for path in spans}
    samples = [_sample(path, labelled, stems) for path in spans]
    columns = {
        name: [by_sample.get(sample, "") for sample in samples]
        for name, by_sample in labels.items()
        if not by_sample.keys().isdisjoint(samples)
    }
    known = {*samples}
    for path, sample in others:
        if sample not in known and not (LABEL_LIST in columns and path.endswith(LABEL_LIST)):
            left_out[why_no_image(path)].append(path)
    return Samples(spans, samples, columns, dict(left_out))


def _label_file(path: str, class_column: str | None) -> tuple[str, str, int]:
    """Return a file's sample, its column if it may be a label (else ""), and how much to read."""
    folder, slash, name = path.rpartition("/")
    if name == LABEL_LIST:
        return path, LABEL_LIST, MAX_LIST_BYTES
    parts = name.split(".")
    for count in (2, 1):  # `.cls.txt`, `.cls`
        if len(parts) > count:
            column = f".{parts[-count].lower()}"
            if count == 2 and parts[-1].lower() not in ("txt", "json"):
                continue
            known = (*COLUMNS, f".{class_column}", class_column, ".json" if count == 1 else "")
            if column in known:
                return folder + slash + ".".join(parts[:-count]), column, MAX_LABEL_BYTES
    return folder + slash + parts[0], "", HEAD


def _labels(
    path: str, sample: str, column: str, data: bytes, class_column: str | None
) -> Iterator[tuple[str, str, str]]:
    """Yield column, sample and label of what a file labels."""
    try:
        if column == LABEL_LIST:
            yield from _listed_labels(path.removesuffix(LABEL_LIST), json.loads(data))
        elif column == ".json":
            content = json.loads(data)
            for key in dict.fromkeys((*JSON_KEYS, class_column)):
                if isinstance(content, dict) and key is not None and key in content:
                    yield key, sample, class_of(content[key])
        elif column:
            label = class_of_text(data.decode("utf-8-sig"))
            if column not in UNSURE or class_column in (column, column[1:]) or is_whole(label):
                yield column, sample, label
    except (ValueError, TypeError, KeyError, RecursionError):
        return


def _listed_labels(folder: str, content: Any) -> Iterator[tuple[str, str, str]]:
    """Yield what StyleGAN's list labels; null means that its folders are no classes either."""
    if content["labels"] is None:
        yield LABEL_LIST, folder, NO_CLASSES
        return
    for name, label in content["labels"]:
        yield LABEL_LIST, folder + name, class_of(label)


def _sample(path: str, labelled: Collection[str], stems: Collection[str]) -> str:
    """Return the longest start of a path that has a label, else the shortest that is an image's."""
    folder, slash, name = path.rpartition("/")
    parts = name.split(".")
    heads = [folder + slash + ".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    longest = next((head for head in reversed(heads) if head in labelled), None)
    return longest or next((head for head in heads if head in stems), path)


# --- Choice of images and labels ------------------------------------------------------------------


def choose_images(
    source: Path,
    paths: Sequence[str],
    samples: Sequence[str],
    image_column: str | None,
    *,
    labelled: bool,
) -> tuple[list[int], dict[str, list[str]]]:
    """Choose one image of each sample: `0001.jpg`, not `0001.mask.png`, if they have labels.

    Args:
        source: where the archives are, for messages.
        paths: path of each image.
        samples: sample of each image.
        image_column: part of the names of the images to choose, such as "jpg" or "image".
        labelled: whether samples have labels; without any, all images are used.

    Returns:
        Numbers of the chosen images, and paths of those left out by the reason.

    Raises:
        UserError: no image has such a name, or no sample has one of the usual names.
    """
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    rows = list(range(len(paths)))
    if image_column is not None:
        part = image_column.strip(".").lower()
        rows = [row for row in rows if part in _file_name(paths[row]).lower().split(".")[1:]]
        if not rows:
            raise UserError(
                f"{source}: --image-column {image_column}: no image has such an ending; got "
                f"{_endings(paths)}"
            )
        left_out[f"not .{part}"] = [paths[row] for row in {*range(len(paths))} - {*rows}]
    if labelled:
        by_sample: defaultdict[str, list[int]] = defaultdict(list)
        for row in rows:
            by_sample[samples[row]].append(row)
        rows = []
        for sample, candidates in by_sample.items():
            endings = [paths[row].removeprefix(sample).lower() for row in candidates]
            chosen = _main_images(endings)
            rows += [candidates[i] for i in chosen]
            for i in {*range(len(endings))} - {*chosen}:
                left_out[f"another part of a sample ({endings[i]})"].append(paths[candidates[i]])
        if paths and not rows:
            raise UserError(
                f"{source}: samples have several images ({_endings(paths)}); choose one of them "
                "with --image-column"
            )
    return sorted(rows), {reason: names for reason, names in left_out.items() if names}


def _main_images(endings: Sequence[str]) -> list[int]:
    """Choose from the images of one sample: `.jpg`, else `.image.png`, else the only one."""
    if plain := [i for i, ending in enumerate(endings) if ending.count(".") <= 1]:
        return plain
    if len(endings) == 1:
        return [0]
    for name in IMAGE_COLUMNS:
        if usual := [i for i, ending in enumerate(endings) if ending.startswith(f".{name}.")]:
            return usual
    return []


def choose_labels(
    source: Path,
    columns: Mapping[str, Sequence[str]],
    paths: Sequence[str],
    class_column: str | None,
) -> tuple[list[str] | None, list[str]]:
    """Choose the labels that are the classes.

    Args:
        source: where the archives are, for messages.
        columns: see `Samples`.
        paths: path of each image.
        class_column: the column to choose; by default the most telling that labels the images.

    Returns:
        The label of each image, "" if it has none, or None if there are no labels; and what was
        chosen, a line each.

    Raises:
        UserError: there is no such column.
    """
    known = {name: drop_unknown(texts) for name, texts in columns.items()}
    counts = {name: len(texts) - texts.count("") for name, texts in known.items()}
    if class_column is not None:
        names = [name for name in (class_column, f".{class_column}") if counts.get(name)]
        if not names:
            got = _some(sorted(filter(counts.get, counts))) or "none"
            raise UserError(
                f"{source}: --class-column {class_column}: there are no such labels; got {got}"
            )
    else:
        names = [
            name
            for name in sorted(counts, key=COLUMNS.index)
            if 2 * counts[name] >= max(counts.values()) > 0
            and not (name in UNSURE and 2 * len({*known[name]}) > counts[name])
        ]
    if not names:
        unusable = [name for name in counts if not counts[name] and name not in UNSURE]
        lines = [f"not used: {_describe(name)}, which name no class each" for name in unusable]
        return None, lines
    chosen = names[0]
    labels = known[chosen]
    lines = [f"classes: {_describe(chosen)}"]
    if class_column is None and len(names) > 1:
        lines[0] += f"; not used: {', '.join(map(_describe, names[1:]))} (see --class-column)"
    for name, others in known.items():
        both = [row for row, label in enumerate(labels) if label and others[row]]
        different = [row for row in both if labels[row] != others[row]]
        if different and 2 * len(different) < len(both):  # the same classes, but for these
            row = different[0]
            lines.append(
                f"{_describe(name)} differ for {len(different)} images, "
                f"e.g. {paths[row]}: {others[row]}, not {labels[row]}"
            )
        if class_column is None and _kind(others) == _kind(labels):
            labels = [label or other for label, other in zip(labels, others, strict=True)]
    return labels, lines


def _kind(labels: Sequence[str]) -> bool:
    return all(map(is_whole, filter(None, labels)))


def _describe(column: str) -> str:
    if column == LABEL_LIST:
        return f"labels in {LABEL_LIST}"
    return f"{column} files" if column.startswith(".") else f"{column!r} in the .json files"


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _endings(paths: Sequence[str]) -> str:
    return _some(sorted({_file_name(path).partition(".")[2] for path in paths}))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
