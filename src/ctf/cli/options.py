"""Options of commands: how they are shown and parsed, and those that several commands share."""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeVar, Union, get_type_hints

from tyro.conf import OmitArgPrefixes, Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ctf.common.options import Maybe as Maybe
from ctf.evaluation.options import EvaluationOptions
from ctf.evaluation.options import Weights as Weights

T = TypeVar("T")
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Engine = Literal["auto", "eager", "compile", "int8", "bf16"]
LlamaGenSize = Literal["B", "L", "XL", "XXL", "3B"]
LlamaGenWeights = Literal["model", "module", "state_dict", "model_state_dict", "ema"]
Size = Literal["S", "B", "L", "XL", "XXL", "3B"]

registry = ConstructorRegistry()


@registry.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Show and parse `X | None` like X; "None" is accepted, too."""
    inner = [member for member in typing.get_args(info.type) if member is not NoneType]
    if typing.get_origin(info.type) not in (Union, UnionType) or len(inner) != 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(inner[0], info.markers))
    assert isinstance(spec, PrimitiveConstructorSpec)
    return dataclasses.replace(
        spec,
        instance_from_str=lambda args: None if args == ["None"] else spec.instance_from_str(args),
        choices=spec.choices and (*spec.choices, "None"),
    )


@registry.primitive_rule
def _plain(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Parse numbers and paths, with messages that say what was expected."""
    if info.type not in _EXPECTED:
        return None

    def parse(words: list[str]) -> Any:
        try:
            if words[0].strip():
                return info.type(words[0])
        except ValueError:
            pass
        raise ValueError(f"got {words[0]!r}, expected {_EXPECTED[info.type]}")

    metavar = {Path: "PATH", int: "INT", float: "FLOAT"}[info.type]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, info.type),
        str_from_instance=lambda value: [str(value)],
    )


_EXPECTED: dict[Any, str] = {int: "a whole number", float: "a number", Path: "a path"}

Flat = Annotated[T, arg(name="")]  # a dataclass whose fields are options of the command

Images = Annotated[
    str,
    Positional,
    arg(
        metavar="IMAGES",
        help="fashion-mnist, eurosat, a folder of images with one subfolder per class (or none, "
        "for a single class), which may be split into train/, val/ and test/, or .tar, .zip or "
        ".parquet files: one, a folder of them, or a quoted pattern",
    ),
]
Run = Annotated[Path, Positional, arg(metavar="RUN", help="folder of the run")]
Model = Annotated[
    str,
    Positional,
    arg(
        metavar="MODEL",
        help="fashion-mnist, eurosat, the folder of a run or pipeline, or org/name[@revision] on "
        "the Hugging Face Hub",
    ),
]
PRESETS = "tiny, small, base, imagenet256-B, imagenet256-L or imagenet256-XL"
Preset = Annotated[str, arg(metavar="NAME", help=f"recipe to start from: {PRESETS}")]
FitPreset = Annotated[
    Maybe[str],
    arg(
        metavar="NAME",
        help=f"recipe to start from: {PRESETS}; by default small, with --from the pipeline's own, "
        "and in both cases what fits fewer than 1,000 images",
    ),
]
From = Annotated[Maybe[str], arg(name="from", metavar="MODEL")]
# tyro shows aliases first, so the former name is the one that is not an alias.
WarmStart = Annotated[Maybe[str], arg(name="warm-start", aliases=("--from",), metavar="MODEL")]
Overrides = Annotated[
    tuple[str, ...],
    arg(
        metavar="KEY=VALUE ...",
        help="values of the recipe to change, e.g. coarse.width=256 clusters.count=128",
        help_behavior_hint="",
    ),
]
Steps = Annotated[Maybe[int], arg(help="training steps; by default the preset's")]
ImageSize = Annotated[
    Maybe[int],
    arg(help="side in pixels; by default 32 for fashion-mnist, 64 for eurosat, else the preset's"),
]
Views = Annotated[
    Maybe[Literal["plain", "flip", "five-crop", "ten-crop"]],
    arg(
        help="augmentation of the training images: mirrored (flip), 10 crops of each (five-crop), "
        "or these and mirrored ones (ten-crop); by default flip, or plain for fashion-mnist; ctf "
        "fit takes crops where there are fewer than 1,000 images"
    ),
]
Device = Annotated[
    DeviceName, arg(help="where to compute; auto is a GPU if there is one, else the CPU")
]
Window = Annotated[
    str,
    arg(
        metavar="auto|INT",
        help="coarse labels of an image in a pass of the coarse model; the images are the same, up "
        "to rounding. auto is what is fastest here, by measured times",
    ),
]
DryRun = Annotated[
    bool, arg(help="check the arguments and print what would be done, but write nothing")
]


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """How image files are read.

    Attributes:
        background: colour behind transparent pixels, a name or #rrggbb
        skip_bad: leave out images that cannot be used
        classes_at_depth: which folders are the classes: 1 those in IMAGES, 2 those in these, and so
            on, 0 none, so that all images are of one class; by default it is found out
        image_column: column of the images in .parquet files; in .tar and .zip files the ending of
            the images of samples, e.g. jpg; by default the one of the usual name
        class_column: column of the classes in .parquet files; in .tar and .zip files the ending of
            the labels of samples, e.g. cls, or their key in .json files; by default one of the
            usual name
    """

    background: str = "white"
    skip_bad: bool = False
    classes_at_depth: Maybe[int] = None
    image_column: Maybe[str] = None
    class_column: Maybe[str] = None


@dataclasses.dataclass(frozen=True)
class ExecutionOptions:
    """How training is computed; results are the same up to rounding.

    Attributes:
        micro_batch: images that a process computes at a time; the batch size is unchanged
        checkpoint_activations: save memory by computing activations again in the backward pass
        compile: use torch.compile
        precision: precision of matrix products and of the tokenizer's convolutions; auto is bf16 on
            GPUs that support it, else fp32; bf16 is also much faster for transformers on CPUs with
            bfloat16 instructions
    """

    micro_batch: Maybe[int] = None
    checkpoint_activations: bool = False
    compile: bool = False
    precision: Precision = "auto"

    def resolve(self, device: Any, *, shard: bool = False, warn: bool = True) -> Any:
        """Return the `loop.Execution` on a device.

        Raises:
            UserError: the device does not support the precision.
        """
        from ctf.common.precision import uses_bf16
        from ctf.kernels.compiled import compiles
        from ctf.training.loop import Execution

        compiled = self.compile and compiles(device.type)
        if self.compile and not compiled and warn:
            print("--compile: PyTorch finds no compiler, continuing without", file=sys.stderr)
        uses_bf16(self.precision, device)
        return Execution(
            self.micro_batch, self.checkpoint_activations, shard, compiled, self.precision
        )


@dataclasses.dataclass(frozen=True)
class TransformerOptions:
    """Options of all trainings of transformers.

    Attributes:
        size: size of the transformer, as in LlamaGen and the paper; by default the preset's
        shard: split weights, gradients and optimizer states among the processes (FSDP)
    """

    preset: Preset = "small"
    size: Maybe[Size] = None
    steps: Steps = None
    set: Overrides = ()
    shard: bool = False
    device: Device = "auto"
    dry_run: DryRun = False


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(EvaluationOptions):
    """Options of `ctf evaluate`: those of the evaluation, and how to run it."""

    device: Device = "auto"
    dry_run: DryRun = False


# These options are shown in boxes of their own, below the others.
ImageGroup = Annotated[ImageOptions, OmitArgPrefixes, arg(name="image")]
ExecutionGroup = Annotated[ExecutionOptions, OmitArgPrefixes, arg(name="execution")]

if TYPE_CHECKING:
    SamplingGroup = dict[str, Any]  # the fields of Sampling that are given
else:

    def __getattr__(name: str) -> Any:
        """Make SamplingGroup from the fields of Sampling on first use, since it imports torch."""
        if name != "SamplingGroup":
            raise AttributeError(name)
        from ctf.models.sampling import Sampling

        hint = arg(help_behavior_hint="(default: the pipeline's)")
        fields = {key: Annotated[kind, hint] for key, kind in get_type_hints(Sampling).items()}
        options = TypedDict("SamplingOptions", fields, total=False)
        _, _, arguments = Sampling.__doc__.partition("Args:")
        options.__doc__ = f"How images are sampled.\n\n    Args:{arguments}"
        group = Annotated[options, OmitArgPrefixes, arg(name="sampling")]
        return globals().setdefault(name, group)
