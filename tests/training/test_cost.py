"""The cost of a recipe, held to what torch counts on real models, and to what is known."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ctf import kernels
from ctf.common import config
from ctf.common.errors import UserError
from ctf.data import image_set
from ctf.kernels import train_cpu
from ctf.models import sizes
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.sizes import SIZES
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.models.transformer import TransformerConfig
from ctf.pipelines.folder import load_clusters
from ctf.training import cost, fit, optim
from ctf.training.loop import Execution
from ctf.training.recipes import IMAGENET, preset
from ctf.training.tokenizer import PatchDiscriminator
from tests.conftest import Command, recipe_options

CODES, K = 48, 12
CLUSTERS = Clusters.from_labels(torch.arange(CODES) % K)  # 4 members each
SHAPE = TransformerConfig(width=32, layers=3, heads=2, grid=4, classes=5, ffn_multiple=16)
TOKENIZER = TokenizerConfig(
    image_size=32, codebook_size=64, channels=8, multipliers=(1, 2, 2), blocks=1,
    latent_channels=16, groups=4,
)  # fmt: skip
RECIPES = ("imagenet256-B", "imagenet256-L", "imagenet256-XL")


def codes() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randint(CODES, (1, SHAPE.length)), torch.tensor([3])


# --- parameters -----------------------------------------------------------------------------------


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape", [SHAPE, dataclasses.replace(SHAPE, width=64, layers=1)])
def test_parameters_are_those_of_real_models(shape: TransformerConfig) -> None:
    assert sizes.parameters(shape, K, K) == parameters(CoarseModel(shape, K))
    assert sizes.parameters(shape, K, CODES) == parameters(FineModel(shape, CLUSTERS))
    weights = shape.layers * sizes.block_weights(shape)
    matrices = [p for name, p in CoarseModel(shape, K).named_parameters() if "layers" in name]
    assert weights == sum(p.numel() for p in matrices if p.dim() == 2)


def test_the_tokenizers_parameters() -> None:
    (first, *_) = cost.costs(preset("imagenet256-B"), cost.Setting(256))
    assert (first.name, round(first.parameters / 1e6, 1)) == ("tokenizer", 71.9)


# --- FLOPs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["coarse", "members", "full"])
def test_flops_of_a_transformers_step(kind: str) -> None:
    """Exactly what torch counts in a forward and a backward pass."""
    codes_BL, classes_B = codes()
    labels_BL = CLUSTERS.labels_V[codes_BL]
    if kind == "coarse":
        model: torch.nn.Module = CoarseModel(SHAPE, K)
        targets_BL, positions, outputs = labels_BL, SHAPE.length, K
    else:
        softmax = "members" if kind == "members" else "full"
        model = fine = FineModel(SHAPE, CLUSTERS, softmax)  # type: ignore[arg-type]
        targets_BL, positions = fine.choices(codes_BL), SHAPE.length + 1
        outputs = CODES // K if kind == "members" else CODES
    kernels.for_evaluation(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits_BLK = model(labels_BL, classes_B)
        F.cross_entropy(logits_BLK.flatten(0, 1), targets_BL.flatten()).backward()
    assert counter.get_total_flops() == sizes.training_flops(SHAPE, positions, outputs)


def test_flops_of_the_tokenizer() -> None:
    """Forward as torch counts it; a step is 3 times that, but for the gradient of the image."""
    encoding, decoding = cost.tokenizer_flops(TOKENIZER)
    model, images_BCHW = VQModel(TOKENIZER), torch.rand(1, 3, 32, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.decode(model.encode(images_BCHW))
    assert counter.get_total_flops() == encoding + decoding
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.decode_vectors(model.encode_vectors(images_BCHW)).sum().backward()
    look_up = 2 * TOKENIZER.grid**2 * TOKENIZER.codebook_size * TOKENIZER.code_dim
    whole = 3 * (encoding + decoding - look_up)
    assert 0.97 * whole < counter.get_total_flops() < whole


def test_flops_of_the_discriminator() -> None:
    model, images_BCHW = PatchDiscriminator(), torch.rand(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(images_BCHW)
    assert counter.get_total_flops() == cost.discriminator_flops(32)


def test_published_sizes() -> None:
    """LlamaGen's table 1 has 111 M for B with V = 16384, of which 85 M are in its blocks."""
    shape = SIZES["B"].config(16, 1000)
    assert round(sizes.parameters(shape, 16384, 16384) / 1e6) == 111
    assert round(shape.layers * sizes.block_weights(shape) / 1e6) == 85


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("width", [64, 128])
def test_activations_are_those_that_autograd_saves(dropout: float, width: int) -> None:
    shape = dataclasses.replace(SHAPE, width=width, layers=4, grid=16, dropout=dropout)
    model = CoarseModel(shape, K).train()
    kernels.replace(model, {torch.nn.Dropout: train_cpu.Dropout})  # its masks are as on a GPU
    labels_BL = torch.zeros(2, shape.length, dtype=torch.int64)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.backbone(labels_BL[:, 1:], torch.zeros(2, dtype=torch.int64), causal=True)

    saved = cost.saved_bytes(model, forward, SDPBackend.FLASH_ATTENTION)
    # Autocast's copies of the weights are saved, too; they are counted separately.
    saved -= cost.HALF * shape.layers * sizes.block_weights(shape)
    # RMSNorm is not fused on a CPU and keeps its result (float32); and there are the last norm and
    # the mask of the embedded tokens.
    each = shape.layers * 8 + 8 + bool(dropout)
    expected = cost.activation_bytes(shape, shape.length, checkpointing=False)
    assert saved == pytest.approx(2 * (expected + shape.length * width * each), rel=0.02)


def test_checkpointing_stores_the_inputs_of_blocks() -> None:
    many, one = (dataclasses.replace(SHAPE, layers=layers) for layers in (10, 1))
    plain, less = (
        cost.activation_bytes(many, 16, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert plain == 10 * cost.activation_bytes(one, 16, checkpointing=False)
    assert less == 10 * 16 * 32 * cost.FLOAT + plain // 10


def test_memory_of_the_states() -> None:
    recipe = preset("imagenet256-L")
    alone, eight = (
        next(
            c for c in cost.costs(recipe, cost.Setting(256, devices=devices)) if c.name == "coarse"
        )
        for devices in (1, 8)
    )
    assert alone.memory is not None and eight.memory is not None
    states = ("weights", "gradients", "AdamW", "EMA")
    one, several = alone.memory(Execution()), eight.memory(Execution())
    sharded = eight.memory(Execution(shard=True))
    assert sum(one[name] for name in states) == 20 * alone.parameters
    assert [several[name] for name in states] == [one[name] for name in states]
    for name in states:
        assert sharded[name] == math.ceil(one[name] / 8)
    assert alone.memory(Execution(shard=True)) == one
    assert 8 * several["activations"] == one["activations"]  # a batch is shared


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_papers_recipes(name: str) -> None:
    """LlamaGen's training; all on the meta device."""
    recipe = preset(name)
    stages = {c.name: c for c in cost.costs(recipe, cost.Setting(256))}
    assert list(stages) == ["tokenizer", "tokens", "coarse", "fine"]
    images = IMAGENET.images
    for stage, epochs in (("tokenizer", 40), ("coarse", 300), ("fine", 100)):
        assert stages[stage].images == pytest.approx(epochs * images, rel=1e-5)
    assert stages["tokens"].images == 20 * images
    t = recipe.coarse_training
    assert (t.batch_size, t.learning_rate, t.schedule, t.warm_up) == (256, 1e-4, "constant", 0)
    assert (t.betas, t.weight_decay, t.clip, t.class_dropout) == ((0.9, 0.95), 0.05, 1.0, 0.1)
    assert recipe.coarse.dropout == recipe.fine.dropout == 0.1
    # Table 1 and section 4 of the paper: 87, 310, 734 M; 343 M by LlamaGen's count, V + V rows.
    millions = {"B": 87, "L": 310, "XL": 734}[name.rpartition("-")[2]]
    assert math.floor(stages["coarse"].parameters / 1e6 + 0.5) == millions
    assert round(stages["fine"].parameters / 1e6) == 327
    assert recipe.clusters.count == 512
    assert optim.learning_rate(10**6, t.steps, t.learning_rate, 0, t.schedule, 0.0) == 1e-4


def test_hours_by_hand() -> None:
    one = cost.Cost("x", 1, images=1000, flops_each=10**15, formula="", work="")
    # 1e18 / (4 x 312e12 x 0.5)
    assert one.hours(312e12, 4, 0.5) == pytest.approx(1602.56 / 3600, rel=1e-5)


def test_identity_clusters_have_no_fine_stage() -> None:
    recipe = config.override(preset("base"), ["clusters.method=identity"])
    stages = {c.name: c for c in cost.costs(recipe, cost.Setting(256))}
    assert "fine" not in stages and round(stages["coarse"].parameters / 1e6) == 111


def test_the_tables_of_the_documentation(ctf: Command) -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "| " in line}
    for size in ("B", "L", "XL"):
        output = ctf("cost", f"imagenet256-{size}").out.splitlines()
        for name, row in (
            ("tokenizer", "tokenizer"), ("tokens", "tokens, 20 views"),
            ("coarse", f"coarse {size}"), ("fine", "fine (L)"),
        ):  # fmt: skip
            start = next(i for i, line in enumerate(output) if line.startswith(f"{name}: "))
            flop, *gpus = output[start + 1 : start + 4]
            cells = [flop.split()[-2], *(line.split(" = ")[1] for line in gpus)]
            if name != "tokens":
                cells.append(output[start + 4].split(" = ")[1])
            assert [cell.strip() for cell in rows[row].strip("|").split("|")][1:][
                : len(cells)
            ] == cells
    for option, expected in (("--size=3B", "97.2 GB"), ("--size=XXL", "with --shard 36.2 GB")):
        assert expected in ctf("cost", "imagenet256-XL", option).out


def test_command(ctf: Command) -> None:
    result = ctf("cost", "imagenet256-B", "--devices", 16, "--utilisation", "0.4")
    assert result.code == 0, result.err
    assert "coarse: 86.5 M parameters, 1501368 steps of 256, 300 epochs" in result.out
    assert "16 x H100: 5.32e+19 / (16 x 9.89e+14 x 0.4) = 2.33 hours" in result.out
    assert "with --checkpoint-activations" in result.out and "with --shard" in result.out
    few = ctf("cost", "tiny", "--images", 600, "--classes", 3, "--set", "coarse.layers=2")
    assert few.code == 0 and "coarse: 0.6 M parameters, 600 steps of 32, 32 epochs" in few.out
    for wrong, message in (
        (("x",), "unknown preset 'x'"),
        (("tiny", "--devices", 0), "devices: got 0, expected 1 or more"),
        (("tiny", "--utilisation", 2), "utilisation: got 2, expected above 0, at most 1"),
        (("tiny", "--image-size", 30), "image size 30 is not divisible"),
    ):
        result = ctf("cost", *wrong)
        assert result.code == 2 and message in result.err


def test_fit_describes_the_same_costs(splits: image_set.Splits) -> None:
    recipe = preset("tiny")
    setting = cost.Setting(32, len(splits.train), 3, devices=1)
    assert fit.describe(splits, recipe, None).endswith(cost.describe(recipe, setting))
    with pytest.raises(UserError, match="image_size: got 0"):
        cost.Setting(0)


def test_dry_runs_print_the_memory(
    run: Path, image_folder: Path, tmp_path: Path, ctf: Command
) -> None:
    options = ("--micro-batch", 2, "--checkpoint-activations", "--dry-run")
    output = "memory at 2 images a device, --checkpoint-activations: weights "
    for arguments in (
        ("train", "coarse", run, "--size", "XL"),
        ("train", "fine", run, "--preset", "base"),
        ("train", "baseline", run, "--out", tmp_path / "baseline"),
        ("fit", image_folder, "--out", tmp_path / "run", "--image-size", 32),
    ):
        result = ctf(*arguments, *options)
        assert result.code == 0, result.err
        assert output in result.out and "with" not in result.out.partition(output)[2]
    assert not [*tmp_path.iterdir()]


def test_dry_runs_use_the_real_clusters(run: Path, ctf: Command) -> None:
    """64 codes in 8 clusters of known sizes, on a grid of 4 x 4, and 3 classes."""
    parts = load_clusters(run / "clusters" / "clusters.safetensors")
    output = ctf("train", "fine", run, "--preset", "tiny", "--dry-run", *recipe_options()).out
    model = FineModel(TransformerConfig(width=32, layers=1, heads=2, grid=4, classes=3), parts)
    assert f"would train {parameters(model) / 1e6:.1f} M parameters" in output
    logits = 8 * 16 * parts.largest * 4 * cost.FLOAT
    assert f"logits {logits / 1e6:.3g} MB" in output


@pytest.mark.parametrize("execution", [Execution(), Execution(5, True, True)])
def test_memory_depends_on_the_execution(execution: Execution) -> None:
    setting = cost.Setting(256, execution=execution)
    (coarse,) = (c for c in cost.costs(preset("imagenet256-B"), setting) if c.name == "coarse")
    assert coarse.memory is not None
    memory, shape = coarse.memory(execution), SIZES["B"].config(16, 1000)
    images, parts = (5, 8) if execution.shard else (32, 1)
    assert coarse.micro_batch == images
    assert memory["AdamW"] == math.ceil(8 * coarse.parameters / parts)
    assert memory["activations"] == images * cost.activation_bytes(
        shape, 256, checkpointing=execution.shard
    )
    assert memory["logits"] == images * 256 * 512 * 8
    output = "".join(cost.describe_cost(coarse, setting))
    used = ", --checkpoint-activations, --shard: weights"
    assert (used in output) == execution.shard and ("with both" in output) != execution.shard


def test_a_single_device_cannot_shard(ctf: Command) -> None:
    assert "--shard" not in ctf("cost", "imagenet256-B", "--devices", 1).out
