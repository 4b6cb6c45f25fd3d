"""What the commands share: how they are registered, the words they take, where they print."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeVar, get_type_hints

import tyro
from rich.console import Console

from ctf.common.errors import UserError
from ctf.models.sampling import Sampling

app = tyro.extras.SubcommandApp()
groups = {
    name: tyro.extras.SubcommandApp()
    for name in (
        "tokenizer",
        "tokens",
        "clusters",
        "train",
        "runs",
        "classifier",
        "convert",
        "bench",
    )
}
# Standard output for what was asked for, standard error for progress and errors.
console = Console(highlight=False)

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., None])
Positional = Annotated[T, tyro.conf.Positional]
Flat = Annotated[T, tyro.conf.arg(name="")]  # a dataclass whose fields are options of the command
Folder = Annotated[Path, tyro.conf.arg(metavar="RUN")]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Engine = Literal["auto", "eager", "compile", "int8"]
LlamaGenSize = Literal["B", "L", "XL", "XXL", "3B"]
Size = Literal["S", "B", "L", "XL", "XXL", "3B"]


def command(name: str) -> Callable[[F], F]:
    """Registers a command, e.g. "sample" or "tokens extract"."""
    group, _, inner = name.rpartition(" ")

    def register(function: F) -> F:
        # Parsing only returns what is to be run: the two fail in different ways.
        @functools.wraps(function)
        def later(*args: Any, **kwargs: Any) -> Callable[[], None]:
            return functools.partial(function, *args, **kwargs)

        parent = groups[group] if group else app
        parent.command(name=inner)(later)
        return function

    return register


if TYPE_CHECKING:
    SamplingOptions = dict[str, Any]  # fields of Sampling, those that are given
else:
    _hint = tyro.conf.arg(help_behavior_hint="(default: the pipeline's)")
    SamplingOptions = TypedDict(
        "SamplingOptions",
        {name: Annotated[kind, _hint] for name, kind in get_type_hints(Sampling).items()},
        total=False,
    )
    SamplingOptions.__doc__ = Sampling.__doc__


@dataclasses.dataclass(frozen=True)
class ExecutionOptions:
    """How a training is computed, which changes nothing of what comes out but the rounding.

    Args:
        micro_batch: pictures that a process takes at a time; the batch stays the recipe's
        checkpoint_activations: keep less for the backward pass, and compute it again
        compile: let torch.compile fuse what can be fused
        precision: of a transformer's products; auto: bf16 on GPUs that have it, fp32 on CPUs. bf16:
            also on CPUs that multiply bfloat16, and much faster there
    """

    micro_batch: int | None = None
    checkpoint_activations: bool = False
    compile: bool = False
    precision: Precision = "auto"

    def on(self, device: Any, *, shard: bool = False, say: bool = True) -> Any:
        """The `loop.Execution`. Raises UserError for what the device cannot do."""
        from ctf.common.precision import uses_bf16
        from ctf.kernels import sampling_cpu
        from ctf.training.loop import Execution

        compiled = self.compile and sampling_cpu.available("compile", device)
        if self.compile and not compiled and say:
            print("--compile: PyTorch finds no compiler here; going on without", file=sys.stderr)
        execution = Execution(
            self.micro_batch, self.checkpoint_activations, shard, compiled, self.precision
        )
        uses_bf16(self.precision, device)  # a mistake is told before there is anything on the disk
        return execution


@dataclasses.dataclass(frozen=True)
class TrainOptions(ExecutionOptions):
    """What all trainings of transformers have in common.

    Args:
        preset: tiny, small, base, or imagenet256-B, -L, -XL
        size: of the transformer, as LlamaGen's and the paper's, instead of the preset's
        steps: instead of the preset's
        set: values of the recipe to replace, e.g. coarse.layers=8 or fine_softmax=full
        shard: cut weights, gradients, moments and averages into parts, one for each process
        device: where to compute; auto takes a GPU if there is one
        dry_run: say what would be done, and write nothing
    """

    preset: str = "small"
    size: Size | None = None
    steps: int | None = None
    set: tuple[str, ...] = ()
    shard: bool = False
    device: Device = "auto"
    dry_run: bool = False


def open_device(name: Device) -> Any:
    import torch

    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if has["cuda"] else "cpu")
    if not has[name]:
        raise UserError(f"device {name}: there is none here; expected auto or cpu")
    return torch.device(name)


def parse_engines(text: str) -> Any:
    from typing import get_args

    from ctf.common.config import did_you_mean

    engines = tuple(part.strip() for part in text.split(","))
    for name in engines:
        if name not in get_args(Engine):
            raise UserError(f"unknown engine {name!r}{did_you_mean(name, get_args(Engine))}")
    return engines


def open_pictures(
    images: str,
    image_size: int | None,
    background: str,
    skip_bad: bool,
    preset: str | None = None,
    world: Any = None,
) -> Any:
    from ctf.data.images import INCLUDED, open_images
    from ctf.training.recipes import preset as preset_named

    if image_size is None and preset is not None and images not in INCLUDED:
        image_size = preset_named(preset).image_size

    def opened() -> Any:
        with open_progress("pictures", world) as progress:
            return open_images(
                images, image_size, background=background, skip_bad=skip_bad, progress=progress
            )

    if world is not None:
        world.on_main(opened)  # what it finds out is kept, so that the others know it, too
    pictures = opened()
    if pictures.skipped and (world is None or world.is_main):
        names = ", ".join(f"{bad.name} ({bad.reason})" for bad in pictures.skipped)
        console.print(f"{len(pictures.skipped)} pictures left out: {names}", soft_wrap=True)
    return pictures


def open_progress(name: str, world: Any = None) -> Any:
    from ctf.common.progress import show_progress

    if world is not None and not world.is_main:
        return contextlib.nullcontext()
    return show_progress(name)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    if console.is_terminal:
        console.print(table)
    else:  # a file has no width that the words must be cut to
        width = Measurement.get(console, console.options.update(width=1000), table).maximum
        console.print(table, width=width, crop=False)


def say(world: Any, text: str) -> None:
    if world.is_main:
        console.print(text, soft_wrap=True)


def parse_classes(text: str, pipe: Any) -> list[int]:
    if text == "all":
        return list(range(len(pipe.class_names)))
    numbers: list[int] = pipe.class_numbers([part.strip() for part in text.split(",")])
    return numbers


def check_minutes(minutes: float) -> None:
    if not 0 < minutes < 1e6:
        raise UserError(f"minutes: got {minutes:g}, expected more than 0")
