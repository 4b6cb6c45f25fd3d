"""What a recipe costs, by calculation: FLOPs, hours on GPUs, and memory.

Everything follows from configurations; the tokenizer is built and measured on torch's meta device.
FLOPs of transformers are those of `models.sizes`. Hours are FLOPs / (devices * peak *
utilization). Left out is what costs little: evaluation, saving, the optimizer, the perceptual
network, decoding of image files.

Shapes: B batch, T positions, L labels of an image, D width, F hidden width of SwiGLU, V codes,
K clusters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from ctf.common.errors import UserError
from ctf.common.weights import count_parameters
from ctf.data.transforms import VIEWS
from ctf.kernels.logits import SLICE
from ctf.models import sizes
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.models.transformer import TransformerConfig
from ctf.training.discriminator import PatchDiscriminator
from ctf.training.loop import DEFAULT_EXECUTION, Execution
from ctf.training.recipes import IMAGENET, KINDS, Kind, Recipe
from ctf.training.tokenizer import TokenizerTraining
from ctf.training.transformers import TrainingConfig

# Peak FLOP/s, dense bfloat16, by NVIDIA's data sheets of the 80 GB SXM boards.
PEAKS = {"A100": 312e12, "H100": 989e12}
UTILIZATION = 0.3  # of the peak; an assumption, not a measurement
FLOAT, HALF = 4, 2  # bytes


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a recipe is calculated for.

    Raises:
        UserError: A value is out of its range.
    """

    image_size: int
    images: int = IMAGENET.images  # to train on
    classes: int = IMAGENET.classes
    devices: int = 8
    utilization: float = UTILIZATION
    execution: Execution = DEFAULT_EXECUTION  # of the transformers; changes their memory

    def __post_init__(self) -> None:
        for name in ("image_size", "images", "classes", "devices"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        if not 0 < self.utilization <= 1:
            raise UserError(f"utilisation: got {self.utilization:g}, expected above 0, at most 1")


Memory = Callable[[Execution], dict[str, int]]


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one stage."""

    name: str
    parameters: int
    images: int  # that pass through the model, repetitions included
    flops_each: int  # of one of them
    formula: str  # of `flops_each`
    work: str  # how `images` came about, in words
    micro_batch: int = 0  # images that a device takes at a time
    memory: Memory | None = None  # bytes on one device, by what they are for
    options: Sequence[str] = ()  # fields of the execution that change the memory

    @property
    def flops(self) -> int:
        """FLOPs of the stage."""
        return self.images * self.flops_each

    def hours(self, peak: float, devices: int, utilization: float) -> float:
        """Return the hours that devices of `peak` FLOP/s take."""
        return self.flops / (devices * peak * utilization) / 3600


# --- Transformers ---------------------------------------------------------------------------------


def model_cost(
    kind: Kind,
    config: TransformerConfig,
    training: TrainingConfig,
    setting: Setting,
    *,
    clusters: int,
    codes: int,
    largest: int,
    softmax: Literal["members", "full"],
) -> Cost:
    """Return the cost of a coarse or a fine model; with as many clusters as codes, of the baseline.

    Of `largest`, the size of the largest cluster, and of `softmax` only a fine model depends.
    """
    micro_batch = -(-training.batch_size // setting.devices)
    micro_batch = min(micro_batch, setting.execution.micro_batch or micro_batch)
    tokens = micro_batch * config.length
    positions, rows, outputs = config.length, clusters, clusters  # rows and logits of the head
    if kind == "fine":
        full = softmax == "full"
        positions, rows, outputs = positions + 1, codes, codes if full else -(-codes // clusters)
    # Of `logits.cross_entropy`: a slice in float32, its products, its gradient. Of members: sorted
    # by cluster and not, log-probabilities, gradient.
    logits = min(SLICE, tokens * rows) * (FLOAT + 2 * HALF)
    if kind == "fine" and softmax == "members":
        logits = tokens * largest * 4 * FLOAT
    parameters = sizes.parameters(config, clusters, rows)
    block = sizes.block_weights(config)
    blocks = config.layers * block
    shardable = setting.devices > 1

    def memory(execution: Execution) -> dict[str, int]:
        sharded, checkpointing = execution.shard and shardable, execution.checkpoint_activations
        states = _states(parameters, averaged=True)
        if sharded:
            states = {name: -(-size // setting.devices) for name, size in states.items()}
        each = activation_bytes(config, positions, checkpointing=checkpointing)
        memory = {
            **states,
            "bf16 copies": HALF * (block if checkpointing else blocks),
            "logits": logits,
            "activations": micro_batch * each,
        }
        if sharded:
            # FSDP2 gathers a block while the one before it computes; the rest stays gathered.
            memory["gathered"] = FLOAT * (2 * block + parameters - blocks)
        return memory

    return Cost(
        name=kind,
        parameters=parameters,
        images=training.steps * training.batch_size,
        flops_each=sizes.training_flops(config, positions, outputs),
        formula=(
            f"{positions} positions x (6 x {_si(blocks)} + 12 x {config.layers} layers x "
            f"{config.width} x {positions}) + 6 x {config.length} x {config.width} x {outputs}"
        ),
        work=_work(training, setting),
        micro_batch=micro_batch,
        memory=memory,
        options=("checkpoint_activations", *(["shard"] if shardable else [])),
    )


def parametrization_flops(model: nn.Module) -> int:
    """Return the FLOPs of computing once all weights that are functions of other tensors.

    With `models.points` these are the rows that know the codebook: in training once a step.
    """
    layers = [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]
    with torch.no_grad():
        return sum(_count_flops(functools.partial(getattr, m, "weight")) for m in layers)


def activation_bytes(
    config: TransformerConfig, positions: int, *, checkpointing: bool = False
) -> int:
    """Return the bytes that one image's backward pass needs of the forward pass in bfloat16.

    On a GPU, a block stores for each position: 8 D bytes for the sums (float32) that its two norms
    read, 6 D for what these pass to three matrices, 10 D for q, k and v before and after RoPE, 2 D
    for the attention's output, 8 F for the four products within SwiGLU, and with dropout 2 D for
    two masks. With checkpointing only its input, 4 D, and the rest for one block at a time.
    """
    dropout = 2 if config.dropout else 0
    block = (26 + dropout) * config.width + 8 * config.ffn_width
    if checkpointing:
        return positions * (config.layers * FLOAT * config.width + block)
    return positions * config.layers * block


def _states(parameters: int, *, averaged: bool) -> dict[str, int]:
    """Return the bytes of the weights and of what training adds, in float32."""
    size = FLOAT * parameters
    states = {"weights": size, "gradients": size, "AdamW": 2 * size}  # which has two moments
    return {**states, "EMA": size} if averaged else states


# --- The tokenizer --------------------------------------------------------------------------------


def tokenizer_flops(config: TokenizerConfig) -> tuple[int, int]:
    """Return the FLOPs of encoding (with the codebook look-up) and of decoding one image."""
    with torch.device("meta"):
        model = VQModel(config)
        images_BCHW = torch.empty(1, 3, config.image_size, config.image_size)
        codes_BL = torch.empty(1, config.grid**2, dtype=torch.int64)
    with torch.no_grad():
        return (
            _count_flops(lambda: model.encode(images_BCHW)),
            _count_flops(lambda: model.decode(codes_BL)),
        )


def discriminator_flops(image_size: int) -> int:
    """Return the FLOPs of the discriminator's forward pass of one image."""
    with torch.device("meta"):
        model, images_BCHW = PatchDiscriminator(), torch.empty(1, 3, image_size, image_size)
    with torch.no_grad():
        return _count_flops(lambda: model(images_BCHW))


def _count_flops(work: Callable[[], Tensor]) -> int:
    # Attention as plain products: the fused kernels don't run on the meta device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def saved_bytes(
    module: nn.Module, work: Callable[[], Tensor], attention: SDPBackend = SDPBackend.MATH
) -> int:
    """Return the bytes that autograd saves during `work`, without the module's parameters."""
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor), sdpa_kernel(attention):
        work()
    for parameter in module.parameters():
        saved.pop(parameter.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _tokenizer_cost(config: TokenizerConfig, training: TokenizerTraining, setting: Setting) -> Cost:
    with torch.device("meta"):
        model, discriminator = VQModel(config), PatchDiscriminator()
        images_BCHW = torch.empty(1, 3, config.image_size, config.image_size)
    parameters = trained = count_parameters(model)
    encoding, decoding = tokenizer_flops(config)
    flops, formula = 3 * (encoding + decoding), f"3 x ({_si(encoding)} + {_si(decoding)})"
    if training.adversarial_weight:
        # The tokenizer's loss: one image forward and backward; the discriminator's own: two.
        share = 1 - training.adversarial_start
        adversarial = round(9 * share * discriminator_flops(setting.image_size))
        flops, formula = flops + adversarial, f"{formula} + discriminator {_si(adversarial)}"
        trained += count_parameters(discriminator)
    micro_batch = -(-training.batch_size // setting.devices)
    each = saved_bytes(model, lambda: model.decode_vectors(model.encode_vectors(images_BCHW)))
    return Cost(
        name="tokenizer",
        parameters=parameters,
        images=training.steps * training.batch_size,
        flops_each=flops,
        formula=formula,
        work=_work(training, setting),
        micro_batch=micro_batch,
        memory=lambda _: {**_states(trained, averaged=False), "activations": micro_batch * each},
    )


# --- All stages -----------------------------------------------------------------------------------


def costs(recipe: Recipe, setting: Setting) -> Iterator[Cost]:
    """Yield the cost of tokenizer, tokens, coarse and fine model; clusters cost nothing beside it.

    Raises:
        UserError: The recipe doesn't fit the image size.
    """
    shape = recipe.tokenizer.config(setting.image_size)
    yield _tokenizer_cost(shape, recipe.tokenizer_training, setting)
    views, (encoding, _) = len(VIEWS[recipe.tokens.views]), tokenizer_flops(shape)
    yield Cost(
        name="tokens",
        parameters=0,
        images=setting.images * views,
        flops_each=encoding,
        formula=f"encoding {_si(encoding)}",
        work=f"{setting.images} images x {views} views",
    )
    codes = shape.codebook_size
    clusters = codes if recipe.clusters.method == "identity" else recipe.clusters.count
    # The largest cluster's size is unknown before there are clusters; taken as 4 times the mean.
    largest = min(codes, 4 * math.ceil(codes / clusters))
    for kind in KINDS[: 1 if clusters == codes else 2]:  # identity clusters have no fine model
        config = recipe.shape(kind).config(shape.grid, setting.classes)
        yield model_cost(
            kind, config, recipe.training(kind), setting,
            clusters=clusters, codes=codes, largest=largest, softmax=recipe.fine_softmax,
        )  # fmt: skip


def describe(recipe: Recipe, setting: Setting) -> str:
    """Return the cost of every stage in lines, with the sums it comes from."""
    stages = costs(recipe, setting)
    return "\n".join(line for stage in stages for line in describe_cost(stage, setting))


def describe_cost(cost: Cost, setting: Setting) -> Iterator[str]:
    """Yield what a stage costs, in lines."""
    size = f"{cost.parameters / 1e6:.1f} M parameters, " if cost.parameters else ""
    yield f"{cost.name}: {size}{cost.work}"
    each = f"{cost.formula} = {_si(cost.flops_each)}FLOP an image"
    yield f"  {each}, x {cost.images} images = {cost.flops:.2e} FLOP"
    devices, utilization = setting.devices, setting.utilization
    for name, peak in PEAKS.items():
        time = _time(cost.hours(peak, devices, utilization))
        quotient = f"{cost.flops:.2e} / ({devices} x {peak:.3g} x {utilization:g})"
        yield f"  {devices} x {name}: {quotient} = {time}"
    if cost.memory is not None:
        yield from _describe_memory(cost, cost.memory, setting.execution)


def _describe_memory(cost: Cost, memory: Memory, execution: Execution) -> Iterator[str]:
    """Yield the memory as it is, and what it would be with options that are not used."""
    flags = {name: f"--{name.replace('_', '-')}" for name in cost.options}
    unused = [name for name in flags if not getattr(execution, name)]
    used = "".join(f", {flag}" for name, flag in flags.items() if name not in unused)
    parts = memory(execution)
    summands = " + ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    total = _bytes(sum(parts.values()))
    yield f"  memory at {cost.micro_batch} images a device{used}: {summands} = {total}"

    def total_with(*names: str) -> str:
        changes: dict[str, Any] = dict.fromkeys(names, True)
        return _bytes(sum(memory(dataclasses.replace(execution, **changes)).values()))

    others = [f"with {flags[name]} {total_with(name)}" for name in unused]
    if len(unused) > 1:
        others.append(f"with both {total_with(*unused)}")
    if others:
        yield f"    {', '.join(others)}"


def _work(training: TokenizerTraining | TrainingConfig, setting: Setting) -> str:
    epochs = training.steps * training.batch_size / setting.images
    return f"{training.steps} steps of {training.batch_size}, {epochs:.3g} epochs"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _si(number: float) -> str:
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {letter}"
    return f"{number:.3g} "


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{hours * 60:.3g} minutes" if hours * 60 >= 1 else f"{hours * 3600:.2g} seconds"
