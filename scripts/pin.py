"""Pins what ctf computes, so that a change of the code can be shown to change no result.

    python scripts/pin.py record --out before       # with the code as it is
    python scripts/pin.py record --out after        # with the code as it has become
    python scripts/pin.py compare before after      # line by line; exits with 1 on differences
    python scripts/pin.py old before                # new code, with the files of the old code

It knows nothing of the inside of the package: it uses the command line, the names that `ctf`
itself exports, and files on disk. Which code runs is which package is importable:

    PYTHONPATH=OTHER/src python scripts/pin.py record --out before

Everything is computed in single precision on one thread of the CPU, and compared to the last bit;
so compare what one machine has recorded. Times and speeds are left out. `--part` records some parts
alone; each takes from a second to four minutes of a free processor.

`--ignore-wording` lets texts differ, but not the numbers in them; `--ignore-new` lets there be more
than there was; `--allow PATTERN` excuses what it matches. A part that fails keeps what it had.

A recording is a folder:

    machine.json   what computed it
    pins/          for each part a .json, and an .npz of arrays
    files/         what the commands made: runs, stopped runs, samples, settings, reports
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import fnmatch
import hashlib
import importlib.metadata
import inspect
import io
import json
import os
import platform
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "400"  # so that nothing that is printed is wrapped
os.environ["TERM"] = "dumb"

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "pillow", "fastapi", "pydantic")
SHOWN = 8  # differences inside of a pin that are told
AGAIN = "again"  # folder for what is made of the files of others, and is not kept
NEW = "is new"
WORDING = ("*/says", "*/says/*", "*/description", "*/summary", "*/takes")  # names of pins
RENAMED = ("trunk", "backbone")  # parts of the names of tensors that mean the same


# --- Pins -----------------------------------------------------------------------------------------


class Pins:
    """Named values of a part: plain JSON, or arrays."""

    def __init__(self) -> None:
        self.plain: dict[str, Any] = {}
        self.arrays: dict[str, NDArray[Any]] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self.plain or name in self.arrays:
            raise KeyError(f"two pins are called {name}")
        if isinstance(value, torch.Tensor):
            value = value.numpy()
        if isinstance(value, np.ndarray):
            self.arrays[name] = value
        else:
            self.plain[name] = json.loads(json.dumps(value))

    def values(self) -> dict[str, Any]:
        return {**self.plain, **self.arrays}

    def save(self, folder: Path, part: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.plain, indent=1, ensure_ascii=False)
        (folder / f"{part}.json").write_text(text + "\n", encoding="utf-8")
        np.savez_compressed(folder / f"{part}.npz", **self.arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: Path, part: str) -> Pins:
        pins = cls()
        pins.plain = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
        with np.load(folder / f"{part}.npz", allow_pickle=False) as stored:
            pins.arrays = dict(stored)
        return pins


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def picture(image: Image.Image) -> str:
    """An image as a pin: its mode and size, and the hash of it as a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"{image.mode} {image.width}x{image.height} {sha(file.getvalue())}"


def timeless(value: Any) -> Any:
    """JSON without the times and speeds in it."""
    if isinstance(value, dict):
        return {
            key: timeless(inner)
            for key, inner in value.items()
            if key != "seconds" and not key.endswith("_per_second")
        }
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def short(value: Any) -> Any:
    """JSON with hashes for long texts, as pictures in base64 are."""
    if isinstance(value, dict):
        return {key: short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [short(inner) for inner in value]
    if isinstance(value, str) and len(value) > 500:
        return f"{len(value)} characters, {sha(value.encode())}"
    return value


def tensors(path: Path) -> dict[str, str]:
    """Type, shape and hash of each tensor of a safetensors file, and its metadata."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    found = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = f"{entry['dtype']} {entry['shape']} {sha(data[start:stop])}"
    return {**found, "metadata": json.dumps(metadata, sort_keys=True)}


def pin_text(pins: Pins, name: str, text: str) -> None:
    """A text for people: its numbers, and its words, which may be put in another way."""
    pins[f"{name}/numbers"] = re.findall(
        r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)", text
    )
    pins[f"{name}/says"] = text.splitlines()


def pin_said(pins: Pins, name: str, said: Said) -> None:
    """What a command said, where it may fail."""
    pins[f"{name}/code"] = said.code
    pin_text(pins, name, said.out or said.err)


def pin_folder(pins: Pins, name: str, folder: Path) -> None:
    """All files of a folder, each by what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    pins[f"{name}/files"] = [str(path.relative_to(folder)) for path in files]
    others: dict[str, Any] = {}
    for path in files:
        file = str(path.relative_to(folder))
        match path.suffix:
            case ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                pins[f"{name}/json/{file}"] = timeless(content)
            case ".jsonl":
                lines = path.read_text(encoding="utf-8").splitlines()
                pins[f"{name}/lines/{file}"] = [timeless(json.loads(line)) for line in lines]
            case ".safetensors":
                pins[f"{name}/weights/{file}"] = tensors(path)
            case ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    others[file] = {
                        key: f"{a.dtype} {list(a.shape)} {sha(a.tobytes())}"
                        for key, a in sorted(arrays.items())
                    }
            case ".md":
                pin_text(pins, f"{name}/text/{file}", path.read_text(encoding="utf-8"))
            case _:
                others[file] = sha(path.read_bytes())
    pins[f"{name}/others"] = others


def pin_samples(pins: Pins, name: str, samples: Any) -> None:
    """What `Pipeline.sample` and `refine` return."""
    pins[f"{name}/codes"] = samples.codes
    pins[f"{name}/coarse"] = samples.coarse
    pins[f"{name}/images"] = [picture(image) for image in samples.images]


# --- Commands -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Said:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


class Failed(Exception):
    """Something that has to succeed did not."""


class Commands:
    """Runs `ctf` in a folder, with a cache of its own: nothing is taken from earlier runs."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in paths if path),
            "PYTHONUNBUFFERED": "1",
            "PYTHONUTF8": "1",
            "PYTHONWARNINGS": "ignore",
            "CTF_CACHE": str(cache.resolve()),
        }
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, arguments: Sequence[str], **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "ctf", *arguments],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            **more,
        )

    def tell(self, *arguments: str) -> Said:
        """Runs a command to its end, however that is."""
        process = self.start(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate()
        return Said(process.returncode, out, err)

    def tell_here(self, *arguments: str) -> Said:
        """The same within this process, without waiting for imports each time."""
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        before, path = dict(os.environ), sys.argv
        os.environ["CTF_CACHE"] = self.environment["CTF_CACHE"]
        sys.argv = ["ctf", *arguments]
        code: Any = 0
        try:
            with (
                contextlib.chdir(self.folder),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                runpy.run_module("ctf", run_name="__main__", alter_sys=False)
        except SystemExit as leaving:
            code = leaving.code or 0
        finally:
            sys.argv = path
            os.environ.clear()
            os.environ.update(before)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
        return Said(int(code), *texts)

    def run(self, *arguments: str) -> str:
        """Runs a command that has to succeed; what it printed."""
        said = self.tell(*arguments)
        if said.code:
            raise Failed(f"ctf {' '.join(arguments)}: exit code {said.code}\n{said.err}")
        return said.out


# --- What is computed from ------------------------------------------------------------------------


def pattern(kind: int, number: int, side: int = 40) -> Image.Image:
    """A picture of a disc, a bar or waves, the same for the same numbers."""
    random = np.random.default_rng([kind, number])
    y, x = np.mgrid[:side, :side] / side - 0.5
    size, angle = random.uniform(0.1, 0.4), random.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    inside = (np.hypot(x, y) < size, abs(along) < size / 2, np.sin(120 * size * along) > 0)[kind]
    front, back = random.integers(0, 256, (2, 3))
    return Image.fromarray(np.where(inside[..., None], front, back).astype(np.uint8))


def write_pictures(folder: Path) -> None:
    """A folder of 60 pictures of each of three classes."""
    if folder.is_dir():
        return
    for kind, name in enumerate(("discs", "bars", "waves")):
        (folder / name).mkdir(parents=True)
        for number in range(60):
            pattern(kind, number).save(folder / name / f"{number:03d}.png")


def pictures_of_all_modes() -> list[Image.Image]:
    """Pictures of several sizes, shapes and modes."""
    colour = pattern(0, 0, 96)
    transparent = pattern(2, 1, 64).convert("RGBA")
    transparent.putalpha(pattern(0, 2, 64).convert("L"))
    deep = np.linspace(0, 65535, 50 * 70).reshape(50, 70).astype(np.uint16)
    return [
        colour,
        colour.resize((150, 60)),
        pattern(1, 3, 33).convert("L"),
        transparent,
        pattern(2, 4, 48).convert("P"),
        pattern(1, 5, 40).convert("1"),
        pattern(0, 6, 40).convert("CMYK"),
        Image.fromarray(deep),
    ]


# --- Part: commands -------------------------------------------------------------------------------


def sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """The boxes of a help: title and lines."""
    title, lines = "", list[str]()
    for line in text.splitlines():
        if opened := re.match(r"╭─ (.+?) ─*╮$", line):
            title, lines = opened[1], []
        elif line.startswith("│"):
            lines.append(line[2:].rstrip(" │"))
        elif line.startswith("╰"):
            yield title, lines


def parse_help(text: str) -> tuple[dict[str, Any], list[str]]:
    """Arguments of a command by each of their names, {"takes", "default"}; and its subcommands."""
    arguments: dict[str, Any] = {}
    inner: list[str] = []
    for title, lines in sections(text):
        if title == "subcommands":
            inner += [found[1] for line in lines if (found := re.match(r"\s*• (\S+)", line))]
            continue
        entries: list[list[str]] = []
        for line in lines:
            if line and not line.startswith(" "):
                entries.append([])
            if entries:
                entries[-1].append(line)
        for first, *others in entries:
            head, _, said = first.partition("  ")
            said = " ".join([said.strip(), *(line.strip() for line in others)]).strip()
            found = re.search(r"\((default: .*|required)\)$", said)
            names = re.findall(r"(?:^|, )(--?[\w-]+)", head)
            if title.startswith("positional"):
                names = [f"positional {len(arguments)}"]
            # What takes None, and what is None by default, was written out at one time.
            takes = re.sub(r"(?:^|, )--?[\w-]+", "", head).replace("{None}|", "").strip()
            by_default = (found[1] if found else "").removeprefix("default:").strip() or "None"
            for name in names:
                arguments[name] = {"takes": takes.replace("{None,", "{"), "default": by_default}
    return arguments, inner


def record_help(pins: Pins, files: Path, ctf: Commands) -> None:
    """Every command, its subcommands and their options, from what --help says."""
    waiting: list[tuple[str, ...]] = [()]
    names = []
    while waiting:
        command = waiting.pop(0)
        said = ctf.tell_here(*command, "--help")
        if said.code:
            raise Failed(f"ctf {' '.join(command)} --help: {said.err}")
        arguments, inner = parse_help(said.out)
        name = " ".join(("ctf", *command))
        names.append(name)
        pins[name] = {"arguments": arguments, "subcommands": sorted(inner)}
        waiting += [(*command, one) for one in inner]
    pins["commands"] = sorted(names)


MISTAKES = (
    ("nothing",),
    ("sample",),
    ("sample", "fashion"),
    ("sample", "fashion-mnist", "--classes", "sneakers"),
    ("sample", "fashion-mnist", "--classes", "10"),
    ("sample", "fashion-mnist", "--count", "0"),
    ("sample", "fashion-mnist", "--top-p", "0"),
    ("sample", "fashion-mnist", "--engine", "fast"),
    ("sample", "fashion-mnist", "--out", "a.jpg"),
    ("sample", "--settings", "nowhere.json"),
    ("fit", "nowhere", "--out", "run"),
    ("fit", "fashion-mnist", "--out", "pictures"),
    ("fit", "fashion-mnist", "--out", "run", "--preset", "large"),
    ("fit", "fashion-mnist", "--out", "run", "--minutes", "1", "--steps", "1"),
    ("fit", "fashion-mnist", "--out", "run", "--set", "coarse.widht=3"),
    ("fit", "pictures", "--out", "run", "--image-size", "64"),
    ("train", "coarse", "nowhere"),
    ("tokens", "check", "nowhere"),
    ("evaluate", "nowhere"),
)
WITHOUT_WORK = (
    ("fit", "pictures", "--out", "run", "--preset", "tiny", "--steps", "20", "--dry-run"),
    ("fit", "fashion-mnist", "--out", "run", "--minutes", "2", "--dry-run"),
    ("tokenizer", "train", "pictures", "--out", "run", "--preset", "tiny", "--dry-run"),
    ("sample", "fashion-mnist", "--classes", "3,bag", "--guidance", "3", "--dry-run"),
    ("push", "fashion-mnist", "--to", "me/clothes", "--license", "mit", "--dry-run"),
    ("evaluate", "fashion-mnist", "--samples", "500", "--features", "fashion", "--dry-run"),
    ("classifier", "train", "pictures", "--out", "run", "--image-size", "32", "--dry-run"),
    ("reproduce", "status", "--results", "results", "--out", "out"),
    ("reproduce", "all", "--budget", "small", "--results", "results", "--out", "out", "--dry-run"),
    *(("cost", preset) for preset in ("tiny", "small", "base", "imagenet256-B", "imagenet256-XL")),
    ("cost", "base", "--size", "L", "--devices", "4", "--micro-batch", "8", "--steps", "1000"),
)


def record_words(pins: Pins, files: Path, ctf: Commands) -> None:
    """What commands that compute little print, and how mistakes are told."""
    write_pictures(files / "pictures")
    for arguments in WITHOUT_WORK:
        said = ctf.tell_here(*arguments)
        pin_said(pins, "ctf " + " ".join(arguments), said)
    for arguments in MISTAKES:
        said = ctf.tell_here(*arguments)
        pins[f"mistake/ctf {' '.join(arguments)}/code"] = said.code
        pins[f"mistake/ctf {' '.join(arguments)}/says"] = [said.out, said.err]


# --- Part: sample ---------------------------------------------------------------------------------


SETTINGS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance": 1.0},
    "window": {"guidance": 3.0, "guidance_window": (0.2, 0.8)},
    "linear": {"guidance": 3.0, "guidance_schedule": "linear"},
    "cosine": {"guidance": 3.0, "guidance_schedule": "cosine", "guidance_window": (0.3, 1.0)},
    "top-k": {"top_k": 5, "fine_top_k": 3},
    "top-p": {"top_p": 0.8, "fine_top_p": 0.7},
    "top-k and top-p": {"top_k": 20, "top_p": 0.9, "fine_top_k": 9, "fine_top_p": 0.9},
    "temperatures": {"temperature": 0.7, "fine_temperature": 1.4},
    "fine guidance": {"fine_guidance": 1.5},
    "greedy": {"top_k": 1, "fine_top_k": 1},
}


def record_sample(pins: Pins, files: Path, ctf: Commands) -> None:
    """What the shipped pipeline draws: each engine, each setting, each way."""
    from ctf import Pipeline

    classes = [number % 10 for number in range(40)]
    for engine in ("eager", "auto", "int8", "compile"):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            pipe: Any = Pipeline.from_pretrained("fashion-mnist", engine=engine)
        pins[f"{engine}/warnings"] = [str(one.message) for one in warned]
        plain = pipe.sample(classes, seed=0)
        pin_samples(pins, f"{engine}/plain", plain)
        if engine == "compile":
            continue  # each shape is compiled anew
        for name, settings in SETTINGS.items():
            drawn = pipe.sample(classes[:20], seed=100, **settings)
            pin_samples(pins, f"{engine}/{name}", drawn)
        length = plain.codes.shape[1]
        upper_L = torch.arange(length) < length // 2
        some_BL = torch.rand(10, length, generator=torch.Generator().manual_seed(0)) < 0.5
        drawn = pipe.sample(["bag"] * 6, 7, codes=plain.codes[8], keep=upper_L)
        pin_samples(pins, f"{engine}/kept upper half", drawn)
        drawn = pipe.sample(classes[:10], 7, codes=plain.codes[:10], keep=some_BL, guidance=1.5)
        pin_samples(pins, f"{engine}/kept here and there", drawn)
        drawn = pipe.refine(classes, plain.coarse, seed=500)
        pin_samples(pins, f"{engine}/refine", drawn)
        pin_stream(pins, f"{engine}/stream", pipe.stream(classes[:6], seed=0, guidance=2.5))


def pin_stream(pins: Pins, name: str, events: Any) -> None:
    told = []
    for event in events:
        told.append(
            {
                "rows": event.rows,
                "total": event.total,
                "numbers": list(event.numbers),
                "coarse": event.coarse.tolist(),
                "images": [picture(image) for image in event.images],
                "last": event.samples is not None,
            }
        )
        if event.samples is not None:
            pin_samples(pins, name, event.samples)
    pins[f"{name}/events"] = told


# --- Part: pipeline -------------------------------------------------------------------------------


def default(value: Any) -> str:
    return "none" if value in (dataclasses.MISSING, inspect.Parameter.empty) else repr(value)


def signature(method: Any) -> dict[str, str]:
    """The kind of each parameter of a method and its default, without types and self."""
    return {
        name: f"{parameter.kind.description}, default {default(parameter.default)}"
        for i, (name, parameter) in enumerate(inspect.signature(method).parameters.items())
        if i > 0 or inspect.ismethod(method)
    }


def record_pipeline(pins: Pins, files: Path, ctf: Commands) -> None:
    """The rest of what a `Pipeline` does: encode, members, previews, logits, saving, mistakes."""
    import ctf as package
    from ctf import Pipeline, Samples, Sampling, UserError

    pins["names"] = sorted(package.__all__)
    pins["version"] = package.__version__
    pins["fields"] = {
        one.__name__: {field.name: default(field.default) for field in dataclasses.fields(one)}
        for one in (Sampling, Samples)
    }
    public = [name for name in dir(Pipeline) if not name.startswith("_")]
    pins["methods"] = {
        name: signature(getattr(Pipeline, name))
        for name in public
        if callable(getattr(Pipeline, name))
    }

    pipe: Any = Pipeline.from_pretrained("fashion-mnist")
    classes = [number % 10 for number in range(40)]
    drawn = pipe.sample(classes, seed=0)
    pins["class names"] = list(pipe.class_names)
    pins["sampling"] = dataclasses.asdict(pipe.sampling)
    pins["origin"] = pipe.origin
    pins["class numbers"] = pipe.class_numbers(["bag", "3", 9, "ankle-boot"])

    steps: list[tuple[int, int]] = []
    many = pipe.sample([3] * 70, seed=0, report=lambda done, all_: steps.append((done, all_)))
    pin_samples(pins, "more than a batch", many)
    pins["more than a batch/report"] = steps
    pin_samples(
        pins, "names, a seed for each", pipe.sample(["bag", "coat", 3], seed=[5, -1, 2**40])
    )
    pin_samples(pins, "resized", pipe.sample(classes[:10], seed=0, resize=48))
    pin_samples(pins, "apart", pipe.sample(classes[:10], seed=0, apart=True))
    pin_samples(pins, "refine/one for all", pipe.refine([8] * 5, drawn.coarse[8], seed=3))
    settings: dict[str, Any] = {"fine_guidance": 2.0, "fine_top_k": 4, "resize": 40, "apart": True}
    refined = pipe.refine(classes[:5], drawn.coarse[:5], seed=3, **settings)
    pin_samples(pins, "refine/settings", refined)

    upper_L = torch.arange(drawn.codes.shape[1]) < 20
    pin_stream(
        pins, "stream/kept", pipe.stream([8, 8], 3, codes=drawn.codes[8], keep=upper_L, resize=20)
    )
    pin_stream(pins, "stream/without previews", pipe.stream([1, 2, 3], 3, preview=False))
    asked = iter(range(1000))
    pin_stream(
        pins,
        "stream/some leave",
        pipe.stream([1, 2, 3], 3, wanted=lambda: (0, 1, 2) if next(asked) < 20 else (0, 2)),
    )
    asked = iter(range(1000))
    pin_stream(
        pins,
        "stream/all leave",
        pipe.stream([1, 2, 3], 3, wanted=lambda: (0,) if next(asked) < 20 else ()),
    )
    for count in (1, 13, 64):
        shown = pipe.preview(drawn.coarse[:4, :count])
        pins[f"preview/{count} labels"] = [picture(image) for image in shown]
    shown = pipe.preview(drawn.coarse[:4, :30], codes=drawn.codes[:4], keep=upper_L, resize=50)
    pins["preview/kept"] = [picture(image) for image in shown]

    codes_BL = pipe.encode(pictures_of_all_modes())
    pins["encode"] = codes_BL
    pins["encode/drawn"] = pipe.encode(drawn.images)
    pins["decode"] = pipe.decode(codes_BL)
    pins["decode/resized"] = pipe.decode(codes_BL, 40)
    unusual = {"fine_guidance": 1.5, "fine_top_k": 5, "fine_temperature": 0.8}
    for position in (0, 10, 63):
        for name, chosen in (("plain", {}), ("settings", unusual)):
            found = pipe.members("bag", drawn.coarse[8], position, **chosen)
            pins[f"members/{name}/{position}/cluster"] = found.cluster
            pins[f"members/{name}/{position}/codes"] = found.codes
            pins[f"members/{name}/{position}/probabilities"] = found.probabilities

    classes_B = torch.tensor(classes[:2])
    labels_BL = pipe.clusters.labels_V[drawn.codes[:2]]
    with torch.no_grad():
        pins["parts/coarse"] = pipe.coarse(labels_BL, classes_B)
        pins["parts/fine"] = pipe.fine(labels_BL, classes_B)
        pins["parts/tokenizer"] = pipe.tokenizer.decode(drawn.codes[:2])
    pins["parts/labels"] = pipe.clusters.labels_V
    pins["parts/members"] = pipe.clusters.members_KS
    pins["parts/count"] = pipe.clusters.count

    made = {
        "from_pretrained": Pipeline.from_pretrained(
            name="fashion-mnist",
            device="cpu",
            engine="eager",
            revision=None,
            cache_dir=None,
            token=None,
            local_files_only=False,
            force_download=False,
        ).class_names,
        "class_numbers": pipe.class_numbers(classes=["bag"]),
        "largest_batch": pipe.largest_batch(guidance=1.0) > 0,
        "encode": pipe.encode(images=drawn.images[:2]).tolist(),
        "decode": list(pipe.decode(codes_BL=drawn.codes[:2], resize=None).shape),
        "members": pipe.members(chosen="bag", coarse=drawn.coarse[8], position=1).codes.tolist(),
        "preview": len(
            pipe.preview(coarse=drawn.coarse[:1], codes=drawn.codes[0], keep=upper_L, resize=None)
        ),
    }
    more: dict[str, Any] = {"classes": [1], "seed": 2, "resize": None, "apart": False}
    kept = {"codes": drawn.codes[0], "keep": upper_L}
    made["sample"] = pipe.sample(**more, **kept, report=None, top_k=9).codes.tolist()
    made["refine"] = pipe.refine(**more, coarse=drawn.coarse[0], report=None).codes.tolist()
    *_, last = pipe.stream(**more, **kept, preview=False, wanted=None, top_k=9)
    made["stream"] = last.coarse.tolist()
    for name, value in made.items():
        pins[f"by keyword/{name}"] = value

    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "whole": ("eager", {}),
        "half": ("eager", {"half": True, "license": "mit"}),
        "packed": ("auto", {}),
    }
    for name, (engine, options) in ways.items():
        folder = files / "pipeline" / name
        saved: Any = Pipeline.from_pretrained("fashion-mnist", engine=engine)
        saved.save_pretrained(folder, **options)
        pin_folder(pins, f"saved/{name}", folder)
        again = Pipeline.from_pretrained(folder)
        pin_samples(pins, f"saved/{name}/samples", again.sample(classes[:10], seed=0))

    int8 = Pipeline.from_pretrained("fashion-mnist", engine="int8")
    zeros_L = torch.zeros(64, dtype=torch.int64)
    mistakes: dict[str, Callable[[], Any]] = {
        "no pipeline": lambda: Pipeline.from_pretrained("fashion-mnst"),
        "unknown class": lambda: pipe.sample(["sneakers"]),
        "class out of range": lambda: pipe.sample([10]),
        "no class": lambda: pipe.sample([]),
        "unknown setting": lambda: pipe.sample([1], guidence=2.0),
        "guidance": lambda: pipe.sample([1], guidance=float("nan")),
        "window": lambda: pipe.sample([1], guidance_window=(0.5, 0.2)),
        "schedule": lambda: pipe.sample([1], guidance_schedule="cosinus"),
        "top-p": lambda: pipe.sample([1], top_p=0.0),
        "seeds": lambda: pipe.sample([1, 2], seed=[1]),
        "seed": lambda: pipe.sample([1], seed=2**64),
        "codes without keep": lambda: pipe.sample([1], codes=zeros_L),
        "keep of integers": lambda: pipe.sample([1], codes=zeros_L, keep=zeros_L),
        "labels out of range": lambda: pipe.refine([1], zeros_L + 256),
        "labels of another length": lambda: pipe.refine([1], zeros_L[:9]),
        "position": lambda: pipe.members(1, zeros_L, 64),
        "too many to stream": lambda: pipe.stream([1] * 65),
        "nothing to encode": lambda: pipe.encode([]),
        "int8 saved": lambda: int8.save_pretrained(files / "pipeline" / "int8"),
        "resize": lambda: pipe.sample([1], resize=0),
    }
    for name, attempt in mistakes.items():
        try:
            attempt()
        except UserError as error:
            pins[f"mistake/{name}/says"] = str(error)
            pins[f"mistake/{name}/told"] = True
        else:
            pins[f"mistake/{name}/told"] = False


# --- Part: studio ---------------------------------------------------------------------------------


class Studio:
    """A studio that runs: requests to it, and answers."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(
        self, path: str, body: Any = None, kind: str = "application/json", accept: str = "*/*"
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer. A body that is no bytes is sent as JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Accept": accept, **({} if data is None else {"Content-Type": kind})}
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def json(self, path: str, body: Any = None, **more: Any) -> Any:
        status, _, said = self.ask(path, body, **more)
        if status != 200:
            raise Failed(f"{path}: status {status}: {said.decode()}")
        return json.loads(said)


@contextlib.contextmanager
def running_studio(ctf: Commands) -> Iterator[Studio]:
    process = ctf.start(["studio", "fashion-mnist", "--port", "0"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        address = re.search(r"http://\S+", first)
        if address is None:
            raise Failed(f"ctf studio said {first!r}, not where it is")
        studio = Studio(address[0])
        for _ in range(600):
            with contextlib.suppress(OSError):
                studio.ask("/health")
                break
            time.sleep(0.1)
        yield studio
    finally:
        process.terminate()
        process.communicate()


def keys(value: Any) -> Any:
    """The keys of an answer, with the types of what they lead to."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    return type(value).__name__


def record_studio(pins: Pins, files: Path, ctf: Commands) -> None:
    """The studio's description of its API, and what each address answers."""
    folder = files / "studio"
    folder.mkdir(parents=True)

    def keep(name: str, drawn: Mapping[str, Any]) -> None:
        """A picture of an answer: its file, and the settings that draw it again."""
        (folder / f"{name}.png").write_bytes(base64.b64decode(drawn["image"]))
        (folder / f"{name}.json").write_text(json.dumps(drawn["settings"]), encoding="utf-8")

    with running_studio(ctf) as studio:
        described = studio.json("/openapi.json")
        for path, ways in described["paths"].items():
            pins[f"openapi/paths{path}"] = ways
        for name, schema in described["components"]["schemas"].items():
            pins[f"openapi/schemas/{name}"] = schema
        pins["openapi/rest"] = {
            k: v for k, v in described.items() if k not in ("paths", "components")
        }

        def pin(name: str, answer: Any) -> Any:
            pins[f"{name}/keys"] = keys(answer)
            pins[f"{name}/answer"] = short(answer)
            return answer

        pin("health", studio.json("/health"))
        pin("models", studio.json("/v1/models"))
        asked: dict[str, Any] = {"classes": ["bag", 7], "count": 2, "seed": 0}
        drawn = pin(
            "generate", studio.json("/v1/generate", {**asked, "settings": {"guidance": 2.5}})
        )["pictures"]
        keep("generated", drawn[0])
        codes = drawn[0]["codes"]
        half = [position < len(codes) // 2 for position in range(len(codes))]
        more = {"classes": ["bag"], "seed": 9, "codes": [codes], "keep": [half]}
        drawn = pin("generate, kept", studio.json("/v1/generate", more))["pictures"]
        keep("redrawn", drawn[0])
        settings = {"fine_temperature": 1.3, "fine_top_p": 0.9}
        more = {"classes": ["bag"], "coarse": [drawn[0]["coarse"]], "seed": 4, "settings": settings}
        keep("refined", pin("refine", studio.json("/v1/refine", more))["pictures"][0])
        more = {"class": "bag", "codes": codes, "position": 20}
        pin("members", studio.json("/v1/members", more))
        file = io.BytesIO()
        pattern(0, 1, 80).save(file, "PNG")
        answer = studio.json("/v1/encode?class=bag", file.getvalue(), kind="image/png")
        keep("encoded", pin("encode", answer)["picture"])

        status, headers, said = studio.ask("/v1/generate", asked, accept="text/event-stream")
        events = [part.split("\n", 1) for part in said.decode().strip().split("\n\n")]
        told = [(name, short(json.loads(data.removeprefix("data: ")))) for name, data in events]
        told[0] = (told[0][0], keys(told[0][1]))  # how many wait: the last answer may still be sent
        pins["stream"] = {"status": status, "type": headers["content-type"], "events": told}
        for path in ("/", "/docs"):
            status, headers, _ = studio.ask(path)
            changing = ("date", "etag", "content-length")
            kept = {k.lower(): v for k, v in headers.items() if k.lower() not in changing}
            pins[f"page{path}"] = {"status": status, "headers": kept}
        for name, (path, body, kind) in {
            "class": ("/v1/generate", {"classes": ["bags"]}, "application/json"),
            "count": ("/v1/generate", {"classes": [1], "count": 65}, "application/json"),
            "field": ("/v1/generate", {"classes": [1], "sede": 1}, "application/json"),
            "range": (
                "/v1/generate",
                {"classes": [1], "settings": {"top_p": 2}},
                "application/json",
            ),
            "no JSON": ("/v1/generate", b"{", "application/json"),
            "model": ("/v1/generate", {"classes": [1], "model": "other"}, "application/json"),
            "labels": ("/v1/refine", {"classes": [1], "coarse": [[1, 2]]}, "application/json"),
            "type": ("/v1/encode", b"text", "text/plain"),
            "no picture": ("/v1/encode", b"text", "image/png"),
            "address": ("/v1/other", None, ""),
        }.items():
            status, _, said = studio.ask(path, body, kind=kind)
            answer = json.loads(said)
            pins[f"mistake/{name}"] = {"status": status, "says": answer.pop("reason"), **answer}
    pin_settings(pins, files, ctf)


def pin_settings(pins: Pins, files: Path, ctf: Commands) -> None:
    """Draws again what the studio saved: the same bytes."""
    (files / AGAIN).mkdir(exist_ok=True)
    for path in sorted((files / "studio").glob("*.json")):
        out = f"{AGAIN}/{path.stem}.png"
        ctf.run("sample", "--settings", f"studio/{path.name}", "--out", out)
        drawn, original = (files / out).read_bytes(), path.with_suffix(".png").read_bytes()
        pins[f"settings/{path.stem}"] = {"picture": sha(drawn), "as saved": drawn == original}


# --- Parts: fit, fashion, stages ------------------------------------------------------------------

FIT = ("fit", "pictures", "--preset", "tiny", "--image-size", "32", "--steps", "20")
VARIANT = (  # what the presets leave out, as far as a CPU can do it
    *("--micro-batch", "16", "--checkpoint-activations", "--precision", "fp32"),
    *("--views", "ten-crop", "--set"),
    "tokenizer_training.perceptual_weight=0.2",
    "tokenizer_training.adversarial_weight=0.5",
    "tokenizer.largest_grid=4",
    "clusters.method=balanced",
    "clusters.count=64",
    "coarse.dropout=0.1",
    "coarse_training.schedule=constant",
    "fine.dropout=0.1",
    "fine_softmax=full",
    "fine_corruption=0.1",
)


def record_fit(pins: Pins, files: Path, ctf: Commands) -> None:
    """20 steps of every stage on a small folder, as preset tiny has it and with other choices."""
    write_pictures(files / "pictures")
    for name, more in (("tiny", ()), ("variant", VARIANT)):
        out = f"fit/{name}"
        ctf.run(*FIT, "--out", out, *more)
        pin_folder(pins, name, files / out)
    ctf.run("sample", "fit/tiny", "--classes", "discs,2", "--count", "3", "--out", "fit/drawn")
    pin_folder(pins, "drawn", files / "fit" / "drawn")
    ctf.run("sample", "fit/tiny", "--count", "3", "--out", "fit/sheet.png")
    pins["sheet"] = sha((files / "fit" / "sheet.png").read_bytes())
    for arguments in (
        ("tokens", "check", "fit/tiny"),
        ("clusters", "show", "fit/tiny"),
        ("tokenizer", "evaluate", "fit/tiny", "--images", "pictures"),
    ):
        pin_said(pins, "ctf " + " ".join(arguments), ctf.tell(*arguments))
    pin_text(
        pins, "ctf runs show", curves(ctf, "fit/tiny", "fit/variant", "--out", "fit/curves.png")
    )


def curves(ctf: Commands, *arguments: str) -> str:
    """What `ctf runs show` prints, without speeds and seconds."""
    said = re.sub(r" +[\d,.]+ \w+/s.*", "", ctf.run("runs", "show", *arguments))
    return re.sub(" +", " ", said)  # how wide its columns are follows from the speeds


def record_fashion(pins: Pins, files: Path, ctf: Commands) -> None:
    """20 steps of every stage on the included pictures, and of the classifier."""
    out = "fashion/run"
    ctf.run("fit", "fashion-mnist", "--preset", "tiny", "--steps", "20", "--out", out)
    pin_folder(pins, "run", files / out)
    trained = ("classifier", "train", "fashion-mnist", "--steps", "20", "--out")
    pin_text(pins, "classifier", ctf.run(*trained, "fashion/classifier"))
    pin_folder(pins, "classifier", files / "fashion" / "classifier")


def record_stages(pins: Pins, files: Path, ctf: Commands) -> None:
    """The stages one by one, the baseline, and a coarse model that starts from it."""
    write_pictures(files / "pictures")
    short_ = ("--preset", "tiny", "--steps", "20")
    run, baseline, branch = "stages/run", "stages/baseline", "stages/branch"
    ctf.run("tokenizer", "train", "pictures", "--out", run, "--image-size", "32", *short_)
    ctf.run("tokens", "extract", "pictures", "--run", run, "--preset", "tiny", "--limit", "90")
    ctf.run("clusters", "fit", run, "--count", "128", "--method", "average")
    ctf.run("train", "coarse", run, *short_)
    ctf.run("train", "fine", run, *short_)
    pin_folder(pins, "run", files / run)
    # Its folder of tokens is a link to the run's.
    ctf.run("train", "baseline", run, "--out", baseline, *short_, "--set", "group_loss.weight=0.5")
    pin_folder(pins, "baseline/coarse", files / baseline / "coarse")
    pin_folder(pins, "baseline/clusters", files / baseline / "clusters")
    ctf.run("clusters", "fit", run, "--count", "32", "--seed", "1", "--out", branch)
    ctf.run("train", "coarse", branch, "--warm-start", baseline, *short_)
    pin_folder(pins, "branch/coarse", files / branch / "coarse")
    pin_folder(pins, "branch/clusters", files / branch / "clusters")
    ctf.run("sample", baseline, "--count", "2", "--out", "stages/drawn")
    pin_folder(pins, "baseline/drawn", files / "stages" / "drawn")
    for name in (baseline, branch):
        (files / name / "tokens").unlink()
        shutil.copytree(files / run / "tokens", files / name / "tokens")


# --- Part: evaluate -------------------------------------------------------------------------------


def record_evaluate(pins: Pins, files: Path, ctf: Commands) -> None:
    """All numbers of an evaluation, and those of a small search."""
    scored = ("evaluate", "fashion-mnist", "--samples", "500", "--out", "evaluate/scores")
    pin_text(pins, "scores", ctf.run(*scored))
    pin_folder(pins, "scores", files / "evaluate" / "scores")
    searched = ("evaluate", "fashion-mnist", "--samples", "100", "--features", "fashion")
    more = ("--search", "--search-samples", "100", "--out", "evaluate/search")
    pin_text(pins, "search", ctf.run(*searched, *more))
    pin_folder(pins, "search", files / "evaluate" / "search")
    pin_against(pins, files, ctf)


def pin_against(pins: Pins, files: Path, ctf: Commands) -> None:
    """Another evaluation, compared with the report that is there."""
    other = ("evaluate", "fashion-mnist", "--samples", "100", "--features", "fashion")
    more = ("--guidance", "1.5", "--balance", "uniform", "--resize", "28")
    report = ("--against", "evaluate/search/report.json")
    fitting = ("--guidance", "1.5", "--seed", "1000")
    pin_said(pins, "against/refused", ctf.tell(*other, *more, *report))
    pin_said(
        pins, "against/scores", ctf.tell(*other, *fitting, *report, "--out", f"{AGAIN}/scores")
    )
    pin_folder(pins, "against/scores", files / AGAIN / "scores")


# --- Part: stopped, and what is done with old files -----------------------------------------------

STAGES = ("tokenizer", "coarse", "fine")
LONGER = ("fit", "pictures", "--preset", "tiny", "--image-size", "32", "--steps", "50")


def stop_in(ctf: Commands, folder: Path, stage: str) -> None:
    """Goes on with a run, and stops it by SIGTERM soon after step 20 of a stage."""
    out = str(folder.relative_to(ctf.folder))
    process = ctf.start([*LONGER, "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = folder / stage / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    unfinished = not (folder / stage / "model.safetensors").exists()
    if process.returncode or not (unfinished and (folder / stage / "state").is_dir()):
        raise Failed(f"could not be stopped within its stage {stage}:\n{said}")


def record_stopped(pins: Pins, files: Path, ctf: Commands) -> None:
    """A run that is stopped in each stage, kept as it was then, and the end that it comes to."""
    write_pictures(files / "pictures")
    folder = files / "stopped"
    for before, stage in zip((None, "tokenizer", "coarse"), STAGES, strict=True):
        if before is not None:  # what was stopped there goes on into this stage
            shutil.copytree(folder / before, folder / stage)
        stop_in(ctf, folder / stage, stage)
    pin_resumed(pins, files, ctf)


def pin_resumed(pins: Pins, files: Path, ctf: Commands) -> None:
    """Goes on with copies of the stopped runs, by the command that they were made with."""
    for stage in STAGES:
        name = f"{AGAIN}/{stage}"
        shutil.copytree(files / "stopped" / stage, files / name)
        ctf.run(*LONGER, "--out", name)
        pin_folder(pins, f"stopped in {stage}", files / name)


def pin_loaded(pins: Pins, files: Path, ctf: Commands) -> None:
    """Loads, draws from, and goes on with what was made before."""
    from ctf import Pipeline

    folders = {
        name: files / name
        for name in ("fit/tiny", "fit/variant", "stages/run", "stages/baseline", "pipeline/half")
        if (files / name).is_dir()
    }
    for name, folder in folders.items():
        for engine in ("eager", "auto"):
            pipe: Any = Pipeline.from_pretrained(folder, engine=engine)
            drawn = pipe.sample([0, 1, 2] * 3, seed=5)
            pin_samples(pins, f"{name}/{engine}", drawn)
            pin_samples(pins, f"{name}/{engine}/refined", pipe.refine([0], drawn.coarse[0], 9))
        found = pipe.members(1, drawn.coarse[1], 3)
        pins[f"{name}/members"] = [
            found.cluster,
            found.codes.tolist(),
            found.probabilities.tolist(),
        ]
    if "fit/tiny" in folders:
        ctf.run(*FIT, "--out", "fit/tiny")  # it is done, and stays as it is
        pin_folder(pins, "fit/tiny/fitted again", folders["fit/tiny"])
        ctf.run("sample", "fit/tiny", "--count", "2", "--seed", "3", "--out", f"{AGAIN}/drawn")
        pin_folder(pins, "fit/tiny/drawn", files / AGAIN / "drawn")
        settings = ("--settings", "fit/drawn/settings.json", "--out", f"{AGAIN}/again")
        ctf.run("sample", "fit/tiny", *settings)
        pin_folder(pins, "fit/tiny/drawn again", files / AGAIN / "again")
        for arguments in (
            ("tokens", "check", "fit/tiny"),
            ("clusters", "show", "fit/tiny"),
            ("tokenizer", "evaluate", "fit/tiny", "--images", "pictures"),
            ("train", "coarse", "fit/tiny", "--preset", "tiny", "--steps", "30"),  # refused
        ):
            said = ctf.tell(*arguments)
            pin_said(pins, "ctf " + " ".join(arguments), said)
        pin_text(pins, "ctf runs show", curves(ctf, "fit/tiny", "--dry-run"))
        short_ = ("--preset", "tiny", "--steps", "20")
        ctf.run("train", "baseline", "fit/tiny", "--out", f"{AGAIN}/baseline", *short_)
        pin_folder(pins, "baseline of fit/tiny", files / AGAIN / "baseline" / "coarse")


# --- The parts ------------------------------------------------------------------------------------

Part = Callable[[Pins, Path, Commands], None]
PARTS: dict[str, Part] = {  # in the order in which they are recorded
    "help": record_help,
    "words": record_words,
    "sample": record_sample,
    "pipeline": record_pipeline,
    "studio": record_studio,
    "fit": record_fit,
    "stages": record_stages,
    "stopped": record_stopped,
    "loaded": pin_loaded,
    "fashion": record_fashion,
    "evaluate": record_evaluate,
}
NEEDED = {"loaded": ("pipeline", "fit", "stages")}  # whose files a part looks at
# What `old` does again with the files of a recording: the beginning of the names of its pins, and
# the files that it takes.
OLD: dict[str, tuple[Part, str, tuple[str, ...]]] = {
    "loaded": (pin_loaded, "", ("pictures", "pipeline", "fit", "stages")),
    "stopped": (pin_resumed, "", ("pictures", "stopped")),
    "studio": (pin_settings, "settings/", ("studio",)),
    "evaluate": (pin_against, "against/", ("evaluate",)),
}


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def say_package() -> None:
    import ctf

    print(f"ctf {ctf.__version__}, {Path(ctf.__file__).parent}", flush=True)


def done(part: Part, pins: Pins, files: Path, ctf: Commands) -> bool:
    """Whether a part came to its end. What it had until then is kept, the rest will be missed."""
    try:
        part(pins, files, ctf)
    except Exception:
        traceback.print_exc()
        return False
    return True


def record(out: Path, parts: Sequence[str]) -> int:
    """Records the parts that are asked for, and those whose files they need and are not there."""
    say_package()
    needed = {n for part in parts for n in NEEDED.get(part, ()) if not (out / "files" / n).is_dir()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")
    whole = True
    with tempfile.TemporaryDirectory() as cache:
        ctf = Commands(out / "files", Path(cache))
        for name, part in PARTS.items():
            if name not in parts and name not in needed:
                continue
            shutil.rmtree(out / "files" / name, ignore_errors=True)
            began = time.monotonic()
            pins = Pins()
            whole = done(part, pins, out / "files", ctf) and whole
            shutil.rmtree(out / "files" / AGAIN, ignore_errors=True)
            pins.save(out / "pins", name)
            seconds = time.monotonic() - began
            print(f"{name}: {len(pins.values())} pins, {seconds:.0f} s", flush=True)
    return 0 if whole else 1


def old(recording: Path, parts: Sequence[str], comparison: Comparison) -> int:
    """Does with the files of a recording, by the code of now, what was done when it was made."""
    say_package()
    for name, (part, begin, folders) in OLD.items():
        if name not in parts or not (recording / "pins" / f"{name}.json").is_file():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            files = Path(scratch) / "files"
            ctf = Commands(files, Path(scratch) / "cache")
            for folder in folders:
                shutil.copytree(recording / "files" / folder, files / folder)
            began = time.monotonic()
            pins = Pins()
            done(part, pins, files, ctf)
        before = Pins.load(recording / "pins", name).values()
        comparison.compare(
            name, {k: v for k, v in before.items() if k.startswith(begin)}, pins.values()
        )
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return comparison.end()


# --- Comparing ------------------------------------------------------------------------------------


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Where two values differ, and how."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        if said := array_difference(np.asarray(a), np.asarray(b)):
            yield path, said
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{path}/{key}"
            if key not in b:
                yield inner, f"is gone, was {brief(a[key])}"
            elif key not in a:
                yield inner, f"{NEW}: {brief(b[key])}"
            else:
                yield from differences(a[key], b[key], inner)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{path}/{i}")
    elif isinstance(a, list) and isinstance(b, list):
        gone = [brief(one) for one in a if one not in b]
        new = [brief(one) for one in b if one not in a]
        if all(isinstance(one, str) for one in b) and not gone and len(b) == len(a) + len(new):
            yield path, f"{NEW}: {', '.join(new)}"
        else:
            yield path, f"{len(a)} -> {len(b)} entries; gone: {gone[:5]}; new: {new[:5]}"
    elif type(a) is not type(b) or a != b:
        how = ""
        if isinstance(a, int | float) and isinstance(b, int | float) and a:
            how = f" (by {(b - a) / abs(a):+.2g} of it)"
        yield path, f"{brief(a)} -> {brief(b)}{how}"


def array_difference(a: NDArray[Any], b: NDArray[Any]) -> str | None:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{a.dtype} {a.shape} -> {b.dtype} {b.shape}"
    if a.tobytes() == b.tobytes():
        return None
    unequal = (a != b) & ~((a != a) & (b != b))
    if not unequal.any():
        return "the same numbers in other bits (zeros with another sign, or NaN)"
    first = tuple(int(axis[0]) for axis in np.nonzero(unequal))
    said = f"{unequal.sum()} of {a.size} differ, first at {first}: {a[first]} -> {b[first]}"
    if np.issubdtype(a.dtype, np.floating):
        both = np.isfinite(a) & np.isfinite(b)
        most = np.abs(np.where(both, a, 0) - np.where(both, b, 0)).max()
        said += f"; by {most:.2g} at most"
    elif a.ndim > 1:
        said += f"; in {unequal.reshape(len(a), -1).any(1).sum()} of {len(a)} rows"
    return said


def brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def same_names(weights: Mapping[str, str]) -> dict[str, str]:
    """Tensors by names in which the parts that mean the same are called the same."""
    return {
        ".".join(RENAMED[0] if part in RENAMED else part for part in name.split(".")): value
        for name, value in weights.items()
    }


class Comparison:
    """Tells pin by pin what is equal, and counts what is not.

    allowed: patterns of names, e.g. "*/weights/*", of what may differ.
    may_grow: what is new beside what was there is no difference.
    """

    def __init__(self, allowed: Sequence[str], may_grow: bool) -> None:
        self.allowed, self.may_grow = allowed, may_grow
        self.equal = self.excused = self.different = 0

    def compare(self, part: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
        for name in [*a, *(name for name in b if name not in a)]:
            whole = f"{part}/{name}"
            if name not in b or name not in a:
                self.tell(whole, [("", "is gone" if name not in b else NEW)])
                continue
            before, now, note = a[name], b[name], ""
            if "/weights/" in name and set(before) != set(now):
                before, now = same_names(before), same_names(now)
                note = f", with {RENAMED[0]} and {RENAMED[1]} taken as the same name"
            self.tell(whole, list(differences(before, now)), note)

    def tell(self, name: str, found: Sequence[tuple[str, str]], note: str = "") -> None:
        counted = [(inner, how) for inner, how in found if not self.may(name + inner, how)]
        if not found:
            self.equal += 1
            print(f"equal    {name}{note}")
            return
        self.different += bool(counted)
        self.excused += not counted
        print(f"{'DIFFERS' if counted else 'allowed'}  {name}{note}")
        for inner, how in (counted or found)[:SHOWN]:
            print(f"         {inner or name.rpartition('/')[2]}: {how}")
        if len(counted or found) > SHOWN:
            print(f"         and {len(counted or found) - SHOWN} more")

    def may(self, name: str, how: str) -> bool:
        if self.may_grow and how.startswith(NEW):
            return True
        return any(fnmatch.fnmatchcase(name, one) for one in self.allowed)

    def end(self) -> int:
        """The exit code."""
        allowed = f", {self.excused} differ as allowed" * bool(self.excused)
        print(f"{self.equal} equal, {self.different} different{allowed}")
        if not self.equal + self.excused + self.different:
            print("nothing to compare")
            return 1
        return 1 if self.different else 0


def compare(a: Path, b: Path, parts: Sequence[str], comparison: Comparison) -> int:
    """Compares two recordings, of the parts that are asked for and that one of them has."""
    machines = [json.loads((folder / "machine.json").read_text()) for folder in (a, b)]
    for inner, how in differences(*machines):
        print(f"note: recorded with another {inner.strip('/')}: {how}")
    for part in parts:
        there = [(folder / "pins" / f"{part}.json").is_file() for folder in (a, b)]
        if all(there):
            before, now = (Pins.load(folder / "pins", part).values() for folder in (a, b))
            comparison.compare(part, before, now)
        elif any(there):
            comparison.tell(part, [("", f"is in {a if there[0] else b} alone")])
    return comparison.end()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\nA recording")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record", help="store what the importable package computes")
    one.add_argument("--out", type=Path, required=True, help="folder of the recording")
    two = commands.add_parser("compare", help="tell what two recordings differ in")
    two.add_argument("a", type=Path, metavar="A", help="a recording")
    two.add_argument("b", type=Path, metavar="B", help="another")
    three = commands.add_parser("old", help="load and go on with the files of a recording")
    three.add_argument("recording", type=Path, metavar="DIR", help="a recording of older code")
    for command, known in ((one, PARTS), (two, PARTS), (three, OLD)):
        command.add_argument(
            "--part",
            nargs="+",
            choices=list(known),
            default=list(known),
            metavar="PART",
            help=f"by default all: {', '.join(known)}",
        )
    for command in (two, three):
        command.add_argument(
            "--allow",
            nargs="+",
            default=[],
            metavar="PATTERN",
            help="names of pins, or of places in them, that may differ, e.g. '*/versions/ctf'",
        )
        command.add_argument(
            "--ignore-wording",
            action="store_true",
            help="texts may differ, but not numbers in them",
        )
        command.add_argument(
            "--ignore-new", action="store_true", help="what is new beside the old is no difference"
        )
    given = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # older names are what is looked for
    if given.command == "record":
        return record(given.out.resolve(), given.part)
    wording = WORDING if given.ignore_wording else ()
    comparison = Comparison([*given.allow, *wording], given.ignore_new)
    if given.command == "compare":
        return compare(given.a, given.b, given.part, comparison)
    return old(given.recording.resolve(), given.part, comparison)


if __name__ == "__main__":
    sys.exit(main())
