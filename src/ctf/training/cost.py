"""What a recipe costs before anything is run: FLOPs, hours and memory, by calculation.

Functions of configurations alone. Parameters are counted, and the tokenizer is measured, on
torch's meta device, where tensors have shapes and no memory.

A transformer's training FLOPs are counted as in PaLM (arXiv 2204.02311, appendix B): a position
costs 6 N for the N weights of the matrices it is multiplied with (2 forward, 4 backward), and
12 layers * D * T for attention to T positions, causal or not. Hours are
FLOPs / (devices * peak * utilisation). What is left out costs little: evaluation, saving, the
optimiser, the perceptual network, decoding of pictures.

Shapes: B batch, T positions, L labels of an image, D width, F hidden width of SwiGLU, V codes,
K clusters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ctf.common.errors import UserError
from ctf.data.transforms import VIEWS
from ctf.kernels.logits import SLICE
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.models.transformer import Backbone, TransformerConfig, zero_head
from ctf.training.loop import DEFAULT_EXECUTION, Execution
from ctf.training.recipes import IMAGENET, Recipe
from ctf.training.tokenizer import PatchDiscriminator, TokenizerTraining
from ctf.training.transformers import TrainingConfig

# FLOP/s at the peak, dense bfloat16, by NVIDIA's data sheets of the 80 GB SXM boards.
PEAKS = {"A100": 312e12, "H100": 989e12}
UTILISATION = 0.3  # of the peak; an assumption, not a measurement
FLOAT, HALF = 4, 2  # bytes


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a recipe is calculated for."""

    image_size: int
    pictures: int = IMAGENET.pictures  # to train on
    classes: int = IMAGENET.classes
    devices: int = 8
    utilisation: float = UTILISATION
    execution: Execution = DEFAULT_EXECUTION  # of the transformers; it changes their memory

    def __post_init__(self) -> None:
        for name in ("image_size", "pictures", "classes", "devices"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        if not 0 < self.utilisation <= 1:
            raise UserError(f"utilisation: got {self.utilisation:g}, expected above 0, at most 1")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one stage. Bytes are those of one device while it trains `micro_batch` images at once.

    Args:
        memory: neither sharded nor with activation checkpointing.
        sharded: what of it is of another size with --shard.
        checkpointed: the same with --checkpoint-activations.
    """

    name: str
    parameters: int
    images: int  # that pass through, each as often as it does
    flops_each: int  # of one of them
    formula: str  # of `flops_each`
    work: str  # how many images, in words
    micro_batch: int = 0
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    sharded: dict[str, int] = dataclasses.field(default_factory=dict)
    checkpointed: dict[str, int] = dataclasses.field(default_factory=dict)

    def memory_of(self, execution: Execution) -> dict[str, int]:
        """Bytes of a device, by what they are for, where the stage is computed like that."""
        memory = dict(self.memory)
        if execution.shard:
            memory |= self.sharded
        if execution.checkpoint_activations:
            memory |= self.checkpointed
        return memory

    @property
    def flops(self) -> int:
        return self.images * self.flops_each

    def hours(self, peak: float, devices: int, utilisation: float) -> float:
        return self.flops / (devices * peak * utilisation) / 3600


def count(build: Callable[[], nn.Module]) -> int:
    """Parameters of a module, which is built without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


# --- Transformers ---------------------------------------------------------------------------------


def transformer(config: TransformerConfig, labels: int, outputs: int) -> nn.Module:
    """What has the parameters of a model that reads `labels` labels and has `outputs` outputs."""
    return nn.Sequential(Backbone(config, labels), zero_head(config.width, outputs))


def block_weights(config: TransformerConfig) -> int:
    """Weights of a block's matrices: four of D x D in attention, three of D x F in SwiGLU."""
    return 4 * config.width**2 + 3 * config.width * config.ffn_width


def transformer_flops(config: TransformerConfig, positions: int, outputs: int) -> int:
    """Training FLOPs of one image: all blocks at T positions, the head at L of them.

    Args:
        outputs: K, or how many choices a token of the fine model has on average.
    """
    weights, width = config.layers * block_weights(config), config.width
    attention = 12 * config.layers * width * positions
    return positions * (6 * weights + attention) + 6 * config.length * width * outputs


def activation_bytes(config: TransformerConfig, positions: int, *, checkpointing: bool) -> int:
    """What the backward pass of one image needs of the forward one, on a GPU, bfloat16 autocast.

    A block keeps, for each position, in bytes: 8 D for the sums (float32) that its two norms
    read, 6 D for what these give to three matrices, 10 D for q, k and v before and after RoPE,
    2 D for attention's output, 8 F for the four products within SwiGLU, and with dropout 2 D for
    two masks. With checkpointing, only its input of 4 D, and all of that for one block at a time.
    """
    dropout = 2 if config.dropout else 0
    block = (26 + dropout) * config.width + 8 * config.ffn_width
    if checkpointing:
        return positions * (config.layers * FLOAT * config.width + block)
    return positions * config.layers * block


def _transformer_cost(
    name: str,
    config: TransformerConfig,
    training: TrainingConfig,
    setting: Setting,
    *,
    positions: int,
    labels: int,
    head: int,
    outputs: int,
    logits: Callable[[int], int],
) -> Cost:
    """Cost of training a transformer.

    Args:
        head: rows of the output layer.
        outputs: of them that a token is multiplied with.
        logits: bytes of so many tokens' logits and of what is made of them.
    """
    parameters = count(lambda: transformer(config, labels, head))
    micro_batch = -(-training.batch_size // setting.devices)
    micro_batch = min(micro_batch, setting.execution.micro_batch or micro_batch)
    weights = config.layers * block_weights(config)
    memory = {
        **_states(parameters, averaged=True),
        "bf16 copies": HALF * weights,
        "logits": logits(micro_batch * config.length),
        "activations": micro_batch * activation_bytes(config, positions, checkpointing=False),
    }
    sharded = {key: -(-size // setting.devices) for key, size in memory.items() if key in _STATES}
    # FSDP2 gathers a block while the one before it computes; what is outside of them stays.
    block = block_weights(config)
    sharded["gathered"] = FLOAT * (2 * block + parameters - weights)
    checkpointed = {
        "bf16 copies": HALF * block,
        "activations": micro_batch * activation_bytes(config, positions, checkpointing=True),
    }
    return Cost(
        name=name,
        parameters=parameters,
        images=training.steps * training.batch_size,
        flops_each=transformer_flops(config, positions, outputs),
        formula=(
            f"{positions} positions x (6 x {_si(weights)} + 12 x {config.layers} layers x "
            f"{config.width} x {positions}) + 6 x {config.length} x {config.width} x {outputs}"
        ),
        work=_work(training, setting),
        micro_batch=micro_batch,
        memory=memory,
        sharded=sharded if setting.devices > 1 else {},  # alone, there is nobody to share with
        checkpointed=checkpointed,
    )


_STATES = ("weights", "gradients", "AdamW", "EMA")


def _states(parameters: int, *, averaged: bool) -> dict[str, int]:
    """What a parameter is kept as, all in float32: AdamW has two moments."""
    copies = zip(_STATES, (1, 1, 2, 1 if averaged else 0), strict=True)
    return {name: number * FLOAT * parameters for name, number in copies if number}


# --- The tokenizer --------------------------------------------------------------------------------


def tokenizer_flops(config: TokenizerConfig) -> tuple[int, int]:
    """Forward FLOPs of one image: (encoding with the look-up, decoding), counted on the meta
    device."""
    with torch.device("meta"):
        model = VQModel(config)
        images_BCHW = torch.empty(1, 3, config.image_size, config.image_size)
        codes_BL = torch.empty(1, config.grid**2, dtype=torch.int64)
    with torch.no_grad():
        return (
            _counted(lambda: model.encode(images_BCHW)),
            _counted(lambda: model.decode(codes_BL)),
        )


def discriminator_flops(image_size: int) -> int:
    """Forward FLOPs of judging one image."""
    with torch.device("meta"):
        model, images_BCHW = PatchDiscriminator(), torch.empty(1, 3, image_size, image_size)
    with torch.no_grad():
        return _counted(lambda: model(images_BCHW))


def _counted(work: Callable[[], Tensor]) -> int:
    # Attention by its products: the fused kernels have no shapes on the meta device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def saved_bytes(
    module: nn.Module, work: Callable[[], Tensor], attention: SDPBackend = SDPBackend.MATH
) -> int:
    """Memory that autograd keeps of `work` for the backward pass, without the parameters."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), sdpa_kernel(attention):
        work()
    for parameter in module.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _tokenizer_cost(config: TokenizerConfig, training: TokenizerTraining, setting: Setting) -> Cost:
    parameters = count(lambda: VQModel(config))
    encoding, decoding = tokenizer_flops(config)
    flops, formula = 3 * (encoding + decoding), f"3 x ({_si(encoding)} + {_si(decoding)})"
    states = parameters
    if training.adversarial_weight:
        # To fool it, one picture forward and backward; to train it, two.
        judging = round(
            9 * (1 - training.adversarial_start) * discriminator_flops(setting.image_size)
        )
        flops, formula = flops + judging, f"{formula} + discriminator {_si(judging)}"
        states += count(PatchDiscriminator)
    micro_batch = -(-training.batch_size // setting.devices)
    with torch.device("meta"):
        model = VQModel(config)
        images_BCHW = torch.empty(1, 3, config.image_size, config.image_size)
    each = saved_bytes(model, lambda: model.decode_vectors(model.encode_vectors(images_BCHW)))
    return Cost(
        name="tokenizer",
        parameters=parameters,
        images=training.steps * training.batch_size,
        flops_each=flops,
        formula=formula,
        work=_work(training, setting),
        micro_batch=micro_batch,
        memory={**_states(states, averaged=False), "activations": micro_batch * each},
    )


# --- All stages -----------------------------------------------------------------------------------


def costs(recipe: Recipe, setting: Setting) -> Iterator[Cost]:
    """The cost of each stage that computes much: tokenizer, tokens, coarse and fine model.

    Raises:
        UserError: no such models can be built.
    """
    shape = recipe.tokenizer.config(setting.image_size)
    yield _tokenizer_cost(shape, recipe.tokenizer_training, setting)
    views, (encoding, _) = len(VIEWS[recipe.tokens.views]), tokenizer_flops(shape)
    yield Cost(
        name="tokens",
        parameters=0,
        images=setting.pictures * views,
        flops_each=encoding,
        formula=f"encoding {_si(encoding)}",
        work=f"{setting.pictures} pictures x {views} views",
    )
    codes = shape.codebook_size
    clusters = codes if recipe.clusters.method == "identity" else recipe.clusters.count
    coarse = recipe.coarse.config(shape.grid, setting.classes)
    yield coarse_cost(coarse, recipe.coarse_training, setting, clusters)
    if clusters == codes:
        return  # nothing is left to choose
    fine = recipe.fine.config(shape.grid, setting.classes)
    # How large the largest cluster is shows only when there are clusters: 4 times the mean here.
    largest = min(codes, 4 * math.ceil(codes / clusters))
    yield fine_cost(
        fine, recipe.fine_training, setting, clusters, codes, largest, recipe.fine_softmax
    )


def coarse_cost(
    config: TransformerConfig, training: TrainingConfig, setting: Setting, clusters: int
) -> Cost:
    """The cost of the coarse model; with as many clusters as codes, of the baseline."""
    return _transformer_cost(
        "coarse", config, training, setting,
        positions=config.length, labels=clusters, head=clusters, outputs=clusters,
        logits=lambda tokens: _sliced(tokens, clusters),
    )  # fmt: skip


def fine_cost(
    config: TransformerConfig,
    training: TrainingConfig,
    setting: Setting,
    clusters: int,
    codes: int,
    largest: int,
    softmax: Literal["members", "full"],
) -> Cost:
    """The cost of the fine model; `largest` is how many members the largest cluster has."""
    full = softmax == "full"

    def logits(tokens: int) -> int:
        # Of members: sorted by cluster and not, log-probabilities, gradient.
        return _sliced(tokens, codes) if full else tokens * largest * 4 * FLOAT

    return _transformer_cost(
        "fine", config, training, setting,
        positions=config.length + 1, labels=clusters, head=codes,
        outputs=codes if full else math.ceil(codes / clusters), logits=logits,
    )  # fmt: skip


def _sliced(tokens: int, outputs: int) -> int:
    """Bytes of `logits.cross_entropy`: a slice in single precision, its products, its gradient."""
    return min(SLICE, tokens * outputs) * (FLOAT + 2 * HALF)


def describe(recipe: Recipe, setting: Setting) -> str:
    """The cost of every stage in lines, with the sums that they come from."""
    return "\n".join(line for cost in costs(recipe, setting) for line in lines(cost, setting))


def lines(cost: Cost, setting: Setting) -> Iterator[str]:
    """What a stage costs, in lines."""
    size = f"{cost.parameters / 1e6:.1f} M parameters, " if cost.parameters else ""
    yield f"{cost.name}: {size}{cost.work}"
    each = f"{cost.formula} = {_si(cost.flops_each)}FLOP an image"
    yield f"  {each}, x {cost.images} images = {cost.flops:.2e} FLOP"
    devices, utilisation = setting.devices, setting.utilisation
    for name, peak in PEAKS.items():
        time = _time(cost.hours(peak, devices, utilisation))
        sum_ = f"{cost.flops:.2e} / ({devices} x {peak:.3g} x {utilisation:g})"
        yield f"  {devices} x {name}: {sum_} = {time}"
    if not cost.memory:
        return
    chosen = setting.execution
    options = {"checkpoint_activations": "--checkpoint-activations"} if cost.checkpointed else {}
    options |= {"shard": "--shard"} if cost.sharded else {}
    said = "".join(f", {text}" for name, text in options.items() if getattr(chosen, name))
    memory = _sum(cost.memory_of(chosen))
    yield f"  memory at {cost.micro_batch} images a device{said}: {memory}"

    def less(*names: str) -> str:
        changes: dict[str, Any] = dict.fromkeys(names, True)
        other = dataclasses.replace(chosen, **changes)
        return _gigabytes(sum(cost.memory_of(other).values()))

    left = {name: text for name, text in options.items() if not getattr(chosen, name)}
    more = [f"with {text} {less(name)}" for name, text in left.items()]
    if len(left) > 1:
        more.append(f"with both {less(*left)}")
    if more:
        yield f"    {', '.join(more)}"


def _work(training: TokenizerTraining | TrainingConfig, setting: Setting) -> str:
    images = training.steps * training.batch_size
    return (
        f"{training.steps} steps of {training.batch_size}, {images / setting.pictures:.3g} epochs"
    )


def _sum(memory: dict[str, int]) -> str:
    parts = " + ".join(f"{name} {_gigabytes(size)}" for name, size in memory.items())
    return f"{parts} = {_gigabytes(sum(memory.values()))}"


def _gigabytes(size: float) -> str:
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
