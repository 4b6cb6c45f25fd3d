"""The model card: the README.md of a pipeline, of what the pipeline says of itself.

Nothing is in it that the pipeline does not say. Equal pipelines have equal cards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from PIL import Image
from torch import nn

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.models.sampling import in_words
from ctf.pipelines.export import class_sheet
from ctf.pipelines.pipeline import LICENSE, Pipeline

FILE = "README.md"
IMAGE = "samples.png"
HERE = "path/to/this/folder"  # what a pipeline is called that is nowhere but in a folder
CLASSES, COLUMNS = 5, 4  # of the picture
MOST_NAMES = 20  # of classes

HUB_DATASETS = {"fashion-mnist": "zalando-datasets/fashion_mnist"}
PAPER = "https://arxiv.org/abs/2503.16194"
LLAMAGEN = "https://arxiv.org/abs/2406.06525"


def save(pipe: Pipeline, folder: Path) -> None:
    """Writes the card of a pipeline that was saved in `folder`; one that was edited is kept."""
    if edited(folder) is None:
        write(folder, text(pipe))


def write(folder: Path, card: str, sheet: Image.Image | None = None) -> None:
    with storage.atomic(folder / FILE) as temporary:
        temporary.write_text(card, encoding="utf-8")
    if sheet is not None:
        with storage.atomic(folder / IMAGE) as temporary:
            sheet.save(temporary, format="PNG")


def edited(folder: Path) -> str | None:
    """The card in `folder`, where it is not as `text` made it."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        there = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text in UTF-8; mend it, or delete it") from None
    return None if there == _sealed(there.rpartition("\n<!--")[0]) else there


def _sealed(card: str) -> str:
    """With a last line that tells whether it was edited since."""
    digest = hashlib.sha256(card.encode()).hexdigest()
    return f"{card}\n<!-- Made by ctf, and kept once it is edited: {digest} -->\n"


def sample_sheet(pipe: Pipeline, progress: Progress | None = None) -> Image.Image:
    """A sheet of samples: seeds from 0, a few classes spread evenly over all."""
    count = len(pipe.class_names)
    rows = min(CLASSES, count)
    numbers = [i * count // rows for i in range(rows)]
    return class_sheet(pipe, numbers, COLUMNS, progress)


def text(pipe: Pipeline, name: str = HERE, *, with_image: bool = False) -> str:
    """The card of a pipeline that `from_pretrained` takes by this name, in Markdown."""
    origin = pipe.origin
    dataset = HUB_DATASETS.get(str(origin.get("images")))
    header = ModelCardData(
        license=origin.get(LICENSE),
        library_name="ctf",
        pipeline_tag="unconditional-image-generation",
        tags=["arxiv:2503.16194", "arxiv:2406.06525", "autoregressive", "class-conditional"],
        datasets=None if dataset is None else [dataset],
    )
    title = "A pipeline of ctf" if name == HERE else name.rpartition("/")[2]
    parts = [f"---\n{header.to_yaml()}\n---", f"# {title}"]
    if with_image:
        parts.append(f"![Pictures drawn by this pipeline, a row for each class]({IMAGE})")
    parts += [_what(pipe), _use(pipe, name), _parts(pipe), _metrics(pipe), _classes(pipe)]
    parts += [_license(pipe), _making(pipe)]
    return _sealed("\n\n".join(part for part in parts if part) + "\n")


def _what(pipe: Pipeline) -> str:
    size = pipe.tokenizer.config.image_size
    drawn = f"Draws pictures of {size} x {size} pixels of {len(pipe.class_names)} classes"
    if pipe.fine is None:
        return (
            f"{drawn}, code by code: an autoregressive model over the full codebook "
            f"([LlamaGen]({LLAMAGEN})), which is the baseline of "
            f"[coarse-to-fine token prediction]({PAPER})."
        )
    return (
        f"{drawn} by [coarse-to-fine token prediction]({PAPER}): a coarse model draws the cluster "
        "of each code one after another, a fine model then all codes at once. Tokenizer and "
        f"transformers are built as those of [LlamaGen]({LLAMAGEN})."
    )


def _use(pipe: Pipeline, name: str) -> str:
    quoted = json.dumps(pipe.class_names[0], ensure_ascii=False)
    return f"""## Use

```python
from ctf import Pipeline
pipe = Pipeline.from_pretrained("{name}")
pipe.sample(classes=[{quoted}], seed=0).images[0].save("picture.png")
```

```sh
ctf sample {name} --out sheet.png
```"""


def _parts(pipe: Pipeline) -> str:
    shape = pipe.tokenizer.config
    codes = f"{pipe.tokenizer.grid} x {pipe.tokenizer.grid} of {shape.codebook_size}"
    largest = pipe.clusters.largest
    rows = {
        "codes of a picture": codes,
        "tokenizer": _millions(pipe.tokenizer),
        "clusters": f"{pipe.clusters.count} of up to {largest} codes" if largest > 1 else "none",
        "coarse model": _transformer(pipe.coarse),
        "fine model": "none" if pipe.fine is None else _transformer(pipe.fine),
        "sampling": in_words(dataclasses.asdict(pipe.sampling)),
    }
    return "## Parts\n\n" + _table(("part", ""), rows.items())


def _transformer(model: Any) -> str:
    shape = model.config
    return f"{_millions(model)}: {shape.layers} layers, {shape.heads} heads, width {shape.width}"


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"


def _classes(pipe: Pipeline) -> str:
    names = pipe.class_names
    more = f"; and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"## Classes\n\n{'; '.join(names[:MOST_NAMES])}{more}"


def _making(pipe: Pipeline) -> str:
    """All that `origin` says, as JSON; its metrics and its licence have sections of their own."""
    told = {k: v for k, v in pipe.origin.items() if k not in ("metrics", LICENSE)}
    if not told:
        return ""
    return f"## How it was made\n\n```json\n{json.dumps(told, indent=2, ensure_ascii=False)}\n```"


def _metrics(pipe: Pipeline) -> str:
    rows = dict(_flat(pipe.origin.get("metrics", {})))
    if not rows:
        return ""
    said = "Of held-out pictures; losses are in nats a token." if "recipe" in pipe.origin else ""
    return f"## Metrics\n\n{said}\n\n" + _table(("metric", "value"), rows.items())


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name} {key}".strip())
    else:
        yield name, f"{value:.6g}" if isinstance(value, float) else str(value)


def _license(pipe: Pipeline) -> str:
    stated = pipe.origin.get(LICENSE)
    said = "Nobody has stated one for these weights." if stated is None else f"`{stated}`"
    return f"## Licence\n\n{said}"


def _table(head: tuple[str, str], rows: Any) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {key} | {value} |" for key, value in lines)
