"""The model card: a pipeline's README.md, made from nothing but the pipeline.

Equal pipelines have equal cards.
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

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.common.markdown import markdown_table
from ctf.common.progress import Progress
from ctf.common.text import encodable
from ctf.common.weights import describe_parameters
from ctf.models.sampling import format_settings
from ctf.pipelines.export import class_sheet
from ctf.pipelines.pipeline import LICENSE, Pipeline

FILE = "README.md"
IMAGE = "samples.png"
FOLDER = "path/to/this/folder"  # the name of a pipeline that is not on the Hub
SHEET_CLASSES, SHEET_COLUMNS = 5, 4
MAX_CLASS_NAMES = 20

DIVIDER = (" --- ", " --- ")  # of tables
HUB_DATASETS = {
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "eurosat": "timm/eurosat-rgb",
}
PAPER = "https://arxiv.org/abs/2503.16194"
LLAMAGEN = "https://arxiv.org/abs/2406.06525"


def save(pipe: Pipeline, folder: Path) -> None:
    """Write the card of a pipeline into its folder, unless there is an edited one."""
    if load_edited(folder) is None:
        write(folder, text(pipe))


def write(folder: Path, card: str, sheet: Image.Image | None = None) -> None:
    """Write the text of a card, and its contact sheet."""
    storage.save_text(folder / FILE, card)
    if sheet is not None:
        storage.save_png(folder / IMAGE, sheet)


def load_edited(folder: Path) -> str | None:
    """Return the card in `folder` if it was edited since `text` made it, otherwise None.

    Raises:
        UserError: It is not text in UTF-8.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        card = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text in UTF-8; convert or delete it") from None
    return None if card == _with_hash(card.rpartition("\n<!--")[0]) else card


def _with_hash(card: str) -> str:
    """Append a line that tells whether the card was edited since."""
    digest = hashlib.sha256(card.encode()).hexdigest()
    return f"{card}\n<!-- Made by ctf, and kept once it is edited: {digest} -->\n"


def sample_sheet(pipe: Pipeline, progress: Progress | None = None) -> Image.Image:
    """Sample a contact sheet of a few classes, spread evenly over all."""
    count = len(pipe.class_names)
    rows = min(SHEET_CLASSES, count)
    return class_sheet(pipe, [i * count // rows for i in range(rows)], SHEET_COLUMNS, progress)


def text(
    pipe: Pipeline, name: str = FOLDER, *, with_image: bool = False, evaluation: str | None = None
) -> str:
    """Return the card of a pipeline in Markdown.

    Args:
        pipe: The pipeline.
        name: With which `from_pretrained` loads it.
        with_image: Whether the contact sheet is part of the card.
        evaluation: The section of an evaluation, in Markdown; see `report.card_section`.
    """
    origin = pipe.origin
    dataset = HUB_DATASETS.get(str(origin.get("images")))
    header = ModelCardData(
        license=origin.get(LICENSE),
        library_name="ctf",
        pipeline_tag="unconditional-image-generation",
        tags=["arxiv:2503.16194", "arxiv:2406.06525", "autoregressive", "class-conditional"],
        datasets=None if dataset is None else [dataset],
        base_model=_base_model(origin),
    )
    parts = [f"---\n{header.to_yaml()}\n---"]
    parts.append("# A pipeline of ctf" if name == FOLDER else f"# {name.rpartition('/')[2]}")
    if with_image:
        parts.append(f"![Images sampled from this pipeline, a row for each class]({IMAGE})")
    parts.append(_summary(pipe))
    sections = {
        "Use": _use(pipe, name),
        "Parts": _parts(pipe),
        "Metrics": _metrics(origin),
        "Evaluation": evaluation,
        "Classes": _classes(pipe.class_names),
        "Licence": f"`{origin[LICENSE]}`" if origin.get(LICENSE) else "Not stated.",
        "How it was made": _origin(origin),
    }
    parts += [f"## {title}\n\n{content}" for title, content in sections.items() if content]
    return _with_hash(encodable("\n\n".join(parts)) + "\n")


def _summary(pipe: Pipeline) -> str:
    size = pipe.tokenizer.image_size
    images = f"Generates images of {size} x {size} pixels of {len(pipe.class_names)} classes"
    if pipe.fine is None:
        return (
            f"{images} with an autoregressive model over the full codebook "
            f"([LlamaGen]({LLAMAGEN})), the baseline of "
            f"[coarse-to-fine token prediction]({PAPER})."
        )
    return (
        f"{images} by [coarse-to-fine token prediction]({PAPER}): a coarse model samples the "
        "cluster of each code, one after another; then a fine model samples all codes at once. "
        f"Tokenizer and transformers have the architecture of [LlamaGen]({LLAMAGEN})."
    )


def _use(pipe: Pipeline, name: str) -> str:
    first = pipe.class_names[0]
    class_name = json.dumps(first, ensure_ascii=first != encodable(first))
    return f"""```python
from ctf import Pipeline
pipe = Pipeline.from_pretrained("{name}")
pipe.sample(classes=[{class_name}], seed=0).images[0].save("image.png")
```

```sh
ctf sample {name} --out sheet.png
```"""


def _parts(pipe: Pipeline) -> str:
    tokenizer: Any = pipe.tokenizer  # a VQModel, as in all pipelines on disk
    grid, clusters = tokenizer.grid, pipe.clusters
    rows = {
        "codes of an image": f"{grid} x {grid} of {clusters.codebook_size}",
        "tokenizer": describe_parameters(tokenizer),
        "clusters": f"{clusters.count} of up to {clusters.largest} codes"
        if clusters.largest > 1
        else "none",
        "coarse model": _transformer(pipe.coarse),
        "fine model": "none" if pipe.fine is None else _transformer(pipe.fine),
        "sampling": format_settings(dataclasses.asdict(pipe.sampling)),
    }
    return markdown_table(("part", ""), [*rows.items()], DIVIDER)


def _transformer(model: Any) -> str:
    shape = model.config
    layers = f"{shape.layers} layers, {shape.heads} heads, width {shape.width}"
    return f"{describe_parameters(model)}: {layers}"


def _metrics(origin: dict[str, Any]) -> str:
    rows = dict(_flatten(origin.get("metrics", {})))
    if not rows:
        return ""
    note = "On held-out images; losses in nats per token.\n\n" if "recipe" in origin else ""
    return note + markdown_table(("metric", "value"), [*rows.items()], DIVIDER)


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values in nested dictionaries, named by all keys that lead to them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{name} {key}".strip())
    else:
        yield name, f"{value:.6g}" if isinstance(value, float) else str(value)


def _classes(names: tuple[str, ...]) -> str:
    more = f"; and {len(names) - MAX_CLASS_NAMES} more" if len(names) > MAX_CLASS_NAMES else ""
    return "; ".join(names[:MAX_CLASS_NAMES]) + more


def _origin(origin: dict[str, Any]) -> str:
    """Return all of `origin` that has no section of its own, as JSON."""
    rest = {key: value for key, value in origin.items() if key not in ("metrics", LICENSE)}
    if not rest:
        return ""
    return _start(origin) + f"```json\n{json.dumps(rest, indent=2, ensure_ascii=False)}\n```"


def _start(origin: dict[str, Any]) -> str:
    """Say which pipeline this one was started from, if it was."""
    if (name := _started_from(origin)) is None:
        return ""
    repo = _base_model(origin)
    shown = f"`{name}`" if repo is None else f"[`{name}`](https://huggingface.co/{repo})"
    match origin["from"].get("train_tokenizer"):
        case None:  # a stage alone
            taken = "the weights of a transformer"
        case trained:
            tokenizer = "trained on" if trained else "as it is"
            taken = f"its tokenizer, {tokenizer}, its clusters, and the weights of its transformers"
    return f"Started from {shown}: {taken}.\n\n"


def _started_from(origin: dict[str, Any]) -> str | None:
    start = origin.get("from")
    name = start.get("pipeline") if isinstance(start, dict) else None
    return name if isinstance(name, str) and name else None


def _base_model(origin: dict[str, Any]) -> str | None:
    """Return the repository on the Hub that the pipeline was started from; folders have no "/"."""
    repo, _, _ = (_started_from(origin) or "").partition("@")
    return repo if "/" in repo else None
