"""LlamaGen models of any shape: converted, they compute what the plain formulas do."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from ctf.common.errors import UserError
from ctf.pipelines import llamagen
from ctf.pipelines.llamagen.transformer import transformer_shape
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import Command
from tests.pipelines import llamagen_plain as plain

VQ = plain.VQ(
    32, (1, 1), (1, 1), 1, 8, 20, 4, frozenset([1]), middle=True, l2_norm=True, decoder_blocks=2
)
GPT = plain.GPT(width=128, layers=2, heads=2, kv_heads=2, hidden=96, codes=20, classes=5)
VQ_WEIGHTS = plain.random_weights(plain.vq_shapes(VQ))
GPT_WEIGHTS = plain.random_weights(plain.gpt_shapes(GPT), seed=1)

multipliers = st.lists(st.integers(1, 2), min_size=1, max_size=4)


@st.composite
def vqs(draw: st.DrawFn) -> plain.VQ:
    encoder = tuple(draw(multipliers))
    levels = len(encoder)
    decoder = draw(st.just(encoder) | st.tuples(*[st.integers(1, 2)] * levels))
    last, blocks = frozenset([levels - 1]), draw(st.integers(1, 3))
    some = st.frozensets(st.integers(0, levels - 1))
    return plain.VQ(
        channels=32 * draw(st.integers(1, 2)),
        encoder=encoder,
        decoder=decoder,
        blocks=blocks,
        latent=draw(st.integers(1, 40)),
        codes=draw(st.integers(2, 50)),
        code_dim=draw(st.integers(1, 9)),
        attention=draw(st.just(last) | some),
        middle=draw(st.booleans()),
        l2_norm=draw(st.booleans()),
        decoder_blocks=draw(st.just(blocks + 1) | st.integers(1, 3)),
    )


@st.composite
def gpts(draw: st.DrawFn, codes: int) -> plain.GPT:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * group
    return plain.GPT(
        width=4 * heads * draw(st.integers(1, 5)),
        layers=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=kv_heads,
        hidden=draw(st.integers(1, 80)),
        codes=codes,
        classes=draw(st.integers(1, 12)),
    )


def check(pipe: Pipeline, vq: plain.VQ, gpt: plain.GPT, *weights: dict[str, Tensor]) -> None:
    """Check that a pipeline computes what the plain formulas do."""
    vq_weights, gpt_weights = weights
    grid = pipe.tokenizer.grid
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vq.codes, (2, grid**2), generator=generator)
    labels = torch.randint(gpt.classes + 1, (2,), generator=generator)
    size = pipe.tokenizer.image_size
    images = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    logits = plain.gpt_logits(gpt_weights, gpt, grid, labels, tokens)
    torch.testing.assert_close(pipe.coarse(tokens, labels), logits, rtol=1e-3, atol=1e-3)
    decoded = plain.vq_decode(vq_weights, vq, tokens)
    vectors = pipe.tokenizer.codebook()[tokens]
    torch.testing.assert_close(
        pipe.tokenizer.decode_vectors(vectors), decoded, rtol=1e-3, atol=1e-3
    )
    distances = plain.vq_distances(vq_weights, vq, images)
    codes = pipe.tokenizer.encode(images)
    chosen = distances.gather(2, codes[..., None]).squeeze(2)
    # Where two codes are as near, rounding may choose.
    torch.testing.assert_close(chosen, distances.amin(2), rtol=1e-3, atol=1e-4)
    assert len(pipe.class_names) == gpt.classes


@torch.no_grad()
@settings(max_examples=20)
@given(st.data())
def test_any_shape_computes_what_llamagen_does(data: st.DataObject) -> None:
    vq = data.draw(vqs())
    gpt = data.draw(gpts(vq.codes))
    grid = data.draw(st.integers(1, 3))
    weights = (
        plain.random_weights(plain.vq_shapes(vq)),
        plain.random_weights(plain.gpt_shapes(gpt), seed=1),
    )
    table, safe = data.draw(st.booleans()), data.draw(st.booleans())
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("vq.bin", "gpt.bin")]
        for path, content in zip(paths, weights, strict=True):
            if path.stem == "gpt" and table:
                content = {**content, "freqs_cis": plain.rope_table(grid, gpt.width // gpt.heads)}
            if safe:
                save_file(content, path)
            else:
                torch.save({"model": content}, path)
        given_options: dict[str, Any] = {} if table else {"heads": gpt.heads, "grid": grid}
        norm = "l2" if vq.l2_norm else "none"
        out = Path(folder) / "out"
        text = llamagen.convert(*paths, out, codebook_norm=norm, **given_options)
        assert f"heads {gpt.heads}" in text and f"layers {gpt.layers};" in text
        check(Pipeline.from_pretrained(out), vq, gpt, *weights)
        check(llamagen.load(*paths, codebook_norm=norm, **given_options), vq, gpt, *weights)


# --- Forms of files -------------------------------------------------------------------------------


@pytest.fixture
def vq_path(tmp_path: Path) -> Path:
    return write(tmp_path / "vq.pt", VQ_WEIGHTS)


def write(path: Path, weights: dict[str, Tensor], **more: Any) -> Path:
    torch.save({"model": weights, **more}, path)
    return path


def refused(vq: Path, gpt: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        llamagen.load(vq, gpt, **options)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2 and len(message) < 500
    return message


def same_logits(gpt: Path, vq: Path, **options: Any) -> bool:
    """Whether the transformer in a file is the one of GPT_WEIGHTS."""
    model = llamagen.load(vq, gpt, **{"grid": 2, **options}).coarse
    tokens, labels = torch.tensor([[1, 7, 3, 19]]), torch.tensor([2])
    with torch.no_grad():
        logits = model(tokens, labels)
    expected = plain.gpt_logits(GPT_WEIGHTS, GPT, 2, labels, tokens)
    return torch.allclose(logits, expected, rtol=1e-3, atol=1e-3)


NAMES: dict[str, Callable[[str], str]] = {
    "ddp and compile": lambda name: f"module._orig_mod.{name}",
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        ".attention.", "._fsdp_wrapped_module._checkpoint_wrapped_module.attention."
    ),
    "compiled layers": lambda name: name.replace(".attention.", "._orig_mod.attention."),
    "part of another module": lambda name: f"net.gpt.{name}",
}


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("safe", [False, True])
def test_names_of_wrapped_modules(tmp_path: Path, vq_path: Path, form: str, safe: bool) -> None:
    weights = {NAMES[form](name): value for name, value in GPT_WEIGHTS.items()}
    if safe:
        save_file(weights, path := tmp_path / "gpt.safetensors")
    else:
        path = write(tmp_path / "gpt.pt", weights)
    assert same_logits(path, vq_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("safe", [False, True])
def test_half_precision_is_kept_on_disk_and_computed_in_single(
    tmp_path: Path, vq_path: Path, dtype: torch.dtype, safe: bool
) -> None:
    weights = {name: value.to(dtype) for name, value in GPT_WEIGHTS.items()}
    if safe:
        save_file(weights, path := tmp_path / "gpt.safetensors")
    else:
        path = write(tmp_path / "gpt.pt", weights)
    text = llamagen.convert(vq_path, path, tmp_path / "out", grid=2)
    assert str(dtype).removeprefix("torch.") in text
    stored = (tmp_path / "out" / "coarse" / "model.safetensors").stat().st_size
    assert stored < 2.1 * sum(value.numel() for value in weights.values())
    weight = Pipeline.from_pretrained(tmp_path / "out").coarse.head.weight
    assert torch.equal(weight, weights["output.weight"].float())


class Tied(nn.Module):
    """A transformer whose output layer has the weights of its embedding."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in weights.items():
            module: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(value.clone()))
        self.output.weight = self.tok_embeddings.weight


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_tied_weights_are_read_under_both_names(tmp_path: Path, vq_path: Path, form: str) -> None:
    tied = Tied(GPT_WEIGHTS)
    path = tmp_path / f"gpt.{form}"
    if form == "pt":
        torch.save(tied.state_dict(), path)
    else:
        save_model(tied, str(path))
    llamagen.convert(vq_path, path, tmp_path / "out", grid=2)
    model = Pipeline.from_pretrained(tmp_path / "out").coarse
    assert torch.equal(model.head.weight, GPT_WEIGHTS["tok_embeddings.weight"])
    assert torch.equal(model.backbone.label_embedding.weight, model.head.weight)


def test_moving_averages_are_read_where_chosen(tmp_path: Path, vq_path: Path) -> None:
    other = {name: value + 1 for name, value in GPT_WEIGHTS.items()}
    path = write(tmp_path / "gpt.pt", other, ema=GPT_WEIGHTS)
    assert same_logits(path, vq_path, gpt_weights="ema")
    assert not same_logits(path, vq_path) and not same_logits(path, vq_path, gpt_weights="model")
    text = llamagen.convert(vq_path, path, tmp_path / "out", grid=2, dry_run=True)
    assert "weights 'model' (the file has ema, too)" in text
    with pytest.raises(UserError, match="got weights 'ema', expected model"):
        llamagen.load(vq_path, path, vq_weights="ema", grid=2)
    torch.save({"ema": GPT_WEIGHTS}, path)
    assert same_logits(path, vq_path)


def training(weights: dict[str, Tensor]) -> dict[str, Any]:
    """What a training stores."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    state = optimizer.state_dict()
    return {
        "LlamaGen, tokenizer": {
            "model": weights, "optimizer": state, "discriminator": {"main.0.weight": parameter},
            "optimizer_disc": state, "steps": 3, "args": argparse.Namespace(ema=True, lr=1e-4),
        },
        "DeepSpeed": {
            "module": weights, "buffer_names": ["x"], "sparse_tensor_module_names": {"a"},
            "param_shapes": [{"a": torch.Size([2])}], "ds_config": {"steps": 1}, "mp_world_size": 1,
        },
        "own loop": {"model_state_dict": weights, "epoch": 7, "best": 0.5, "args": {"lr": 1e-4}},
        "parameters": {name: nn.Parameter(value) for name, value in weights.items()},
        "views of one memory": views(weights),
    }  # fmt: skip


def views(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.cat([value.flatten() for value in weights.values()]).split(
        [value.numel() for value in weights.values()]
    )
    return {k: part.view_as(v) for (k, v), part in zip(weights.items(), parts, strict=True)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", training(VQ_WEIGHTS))
def test_what_trainings_store_beside_the_weights(tmp_path: Path, form: str) -> None:
    paths = [tmp_path / "vq.pt", tmp_path / "gpt.pt"]
    for path, weights in zip(paths, (VQ_WEIGHTS, GPT_WEIGHTS), strict=True):
        torch.save(training(weights)[form], path)
    llamagen.convert(*paths, tmp_path / "out", grid=2)
    with torch.no_grad():
        check(Pipeline.from_pretrained(tmp_path / "out"), VQ, GPT, VQ_WEIGHTS, GPT_WEIGHTS)


def test_tensors_without_values(tmp_path: Path, vq_path: Path) -> None:
    path, name = tmp_path / "gpt.pt", "norm.weight"
    write(path, {**GPT_WEIGHTS, name: torch.empty(0)})
    message = refused(vq_path, path)
    assert f"{name!r} is empty" in message and "ZeRO 3" in message
    sparse, meta = torch.ones(128).to_sparse(), torch.empty(128, device="meta")
    for value, kind in ((sparse, "sparse_coo, cpu"), (meta, "strided, meta")):
        write(path, {**GPT_WEIGHTS, name: value})
        assert f"of type torch.float32 ({kind})" in refused(vq_path, path)


def test_a_truncated_safetensors_file(tmp_path: Path, vq_path: Path) -> None:
    save_file(GPT_WEIGHTS, path := tmp_path / "gpt.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        llamagen.load(vq_path, path, grid=2)


# --- What the tensors do not tell -----------------------------------------------------------------


def shape_of(**changes: int) -> llamagen.Checkpoint:
    """A checkpoint without memory."""
    shapes = plain.gpt_shapes(GPT._replace(**changes))
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return llamagen.Checkpoint(Path("gpt.pt"), weights, None, {}, "")


@pytest.mark.parametrize(
    ("width", "layers", "heads", "reason"),
    [
        (768, 12, 12, "as in LlamaGen"),
        (3200, 24, 32, "as in LlamaGen"),  # 3B, heads of 100
        (4096, 32, 32, "as in LlamaGen"),  # 7B, heads of 128
        (3200, 2, 50, "width / 64"),
        (128, 1, 2, "width / 64"),
    ],
)
def test_heads_by_default(width: int, layers: int, heads: int, reason: str) -> None:
    gpt = shape_of(width=width, layers=layers, heads=1, kv_heads=1)
    config, text = transformer_shape(gpt)
    assert config.heads == heads and text.startswith(f"heads {heads} ({reason}")


def test_heads_that_cannot_be() -> None:
    gpt = shape_of(width=96, heads=8, kv_heads=4)  # keys and values of width 48
    assert transformer_shape(gpt, heads=8)[1] == "heads 8, of keys and values 4 (as chosen)"
    with pytest.raises(UserError, match=r"expected --heads as in its training, e\.g\. 2, 4"):
        transformer_shape(gpt)
    with pytest.raises(UserError, match="got 3 heads with width 96"):
        transformer_shape(gpt, heads=3)
    with pytest.raises(UserError, match="got width 70, expected a multiple of 4"):
        transformer_shape(shape_of(width=70, heads=1, kv_heads=1))
    with pytest.raises(UserError, match="got 6 heads, expected 12 in size B"):
        b = shape_of(width=768, layers=12, heads=12, kv_heads=12)
        transformer_shape(b, heads=6, size="B")
    with pytest.raises(UserError, match="got 11 layers, expected 12 in size B; omit the size"):
        transformer_shape(shape_of(width=768, layers=11, heads=12, kv_heads=12), size="B")


def test_the_table_of_rope_tells_heads_and_grid(tmp_path: Path, vq_path: Path) -> None:
    table = plain.rope_table(2, 64)
    path = write(tmp_path / "gpt.pt", {**GPT_WEIGHTS, "freqs_cis": table})
    pipe = llamagen.load(vq_path, path)
    assert (pipe.coarse.config.heads, pipe.tokenizer.image_size) == (2, 4)
    assert "got 4 heads, expected 2 by its table" in refused(vq_path, path, heads=4)
    assert "trained for 2 x 2 codes, expected 3 x 3" in refused(vq_path, path, grid=3)
    other = write(path, {**GPT_WEIGHTS, "freqs_cis": plain.rope_table(2, 64, base=500.0)})
    assert "not LlamaGen's of 2 x 2 codes with base 10000" in refused(vq_path, other)
    for wrong in (table[:4], torch.cat([table[:1]] * 7 + [table]), table[..., 0], table[:1]):
        write(path, {**GPT_WEIGHTS, "freqs_cis": wrong})
        assert "table of RoPE of shape" in refused(vq_path, path)
    table[0, :, 0] = 1  # a class token that is not rotated
    write(path, {**GPT_WEIGHTS, "freqs_cis": table.bfloat16()})
    assert llamagen.load(vq_path, path).coarse.config.class_token_rope == "identity"


def test_the_arguments_of_the_training(tmp_path: Path, vq_path: Path) -> None:
    def gpt(**args: Any) -> Path:
        return write(tmp_path / "gpt.pt", GPT_WEIGHTS, args=argparse.Namespace(**args))

    assert llamagen.load(vq_path, gpt(image_size=6, downsample_size=2)).tokenizer.grid == 3
    message = refused(vq_path, gpt(image_size=6, downsample_size=16))
    assert "trained with 16 pixels per code and side" in message and "has 2" in message
    assert "trained with 120 class tokens" in refused(vq_path, gpt(cls_token_num=120))
    message = refused(vq_path, gpt(image_size=6, num_classes=6))
    assert "6 rows for 6 classes, expected 7" in message
    args = argparse.Namespace(codebook_l2_norm=False, image_size=8)
    write(vq_path, VQ_WEIGHTS, args=args)
    tokenizer = llamagen.load(vq_path, gpt(image_size=4)).tokenizer
    assert isinstance(tokenizer, nn.Module) and not tokenizer.config.l2_norm
    text = llamagen.convert(vq_path, None, tmp_path / "out", dry_run=True)
    assert "8 pixels, by the arguments of its training" in text and "by distance" in text


def test_the_size_of_images_has_to_be_known(tmp_path: Path, vq_path: Path) -> None:
    path = write(tmp_path / "gpt.pt", GPT_WEIGHTS)
    message = refused(vq_path, path)
    assert "does not tell the size" in message and "--image-size" in message and "--grid" in message
    assert "got both --image-size 4 and --grid 3" in refused(vq_path, path, image_size=4, grid=3)
    assert llamagen.load(vq_path, path, image_size=4, grid=2).tokenizer.image_size == 4
    assert "grid: got 0, expected 1 or more" in refused(vq_path, path, grid=0)


def test_the_names_of_released_files_tell_the_size_of_images(tmp_path: Path, vq_path: Path) -> None:
    path = write(tmp_path / "c2i_L_384.pt", GPT_WEIGHTS)
    text = llamagen.convert(vq_path, path, tmp_path / "out", dry_run=True)
    assert "384 pixels, by the name c2i_L_384.pt" in text


def test_tokenizers_that_are_not_llamagens(tmp_path: Path, vq_path: Path) -> None:
    gpt = write(tmp_path / "gpt.pt", GPT_WEIGHTS)

    def changed(**tensors: Tensor) -> str:
        return refused(write(vq_path, {**VQ_WEIGHTS, **tensors}), gpt, grid=2)

    assert "got batch normalization" in changed(
        **{"encoder.norm_out.running_mean": torch.zeros(32)}
    )
    level = "encoder.conv_blocks.1.res.0.conv2.weight"
    assert f"{level!r} has 48 channels, expected a multiple of 32" in changed(
        **{level: torch.zeros(48, 48, 3, 3)}
    )
    stem = torch.zeros(24, 3, 3, 3)
    assert "24 channels in 32 groups" in changed(**{"encoder.conv_in.weight": stem})
    gray = torch.zeros(32, 1, 3, 3)
    assert "has shape (32, 1, 3, 3), expected (32, 3, 3, 3)" in changed(
        **{"encoder.conv_in.weight": gray}
    )
    taming = {k: v for k, v in VQ_WEIGHTS.items() if "conv_blocks" not in k}
    message = refused(write(vq_path, taming), gpt, grid=2)
    assert "'encoder.conv_blocks.0.res.0.conv2.weight' is missing" in message


def test_other_groups_are_chosen(tmp_path: Path) -> None:
    weights = plain.random_weights(plain.vq_shapes(VQ._replace(channels=24)))
    path = write(tmp_path / "vq.pt", weights)
    with pytest.raises(UserError, match="24 channels in 32 groups, expected a multiple"):
        llamagen.convert(path, None, tmp_path / "out")
    llamagen.convert(path, None, tmp_path / "out", groups=8)
    stored = json.loads((tmp_path / "out" / "tokenizer" / "config.json").read_text())["model"]
    assert (stored["channels"], stored["groups"]) == (24, 8)
    # Fields that this tokenizer does not need are left out, so that older versions read it.
    assert (
        not {"attention", "middle_attention", "l2_norm", "decoder_multipliers", "decoder_blocks"}
        & stored.keys()
    )


def test_the_command_tells_what_it_understood(tmp_path: Path, vq_path: Path, ctf: Command) -> None:
    gpt, out = write(tmp_path / "gpt.pt", GPT_WEIGHTS), tmp_path / "out"
    command = ("convert", "llamagen", "--vq", vq_path, "--gpt", gpt, "--grid", 3, "--out", out)
    dry = ctf(*command, "--dry-run")
    assert dry.code == 0 and not out.exists()
    for text in (
        "6 pixels -> 3 x 3 of 20 codes", "5 classes", "images: 6 pixels, as chosen",
        "tokenizer: channels 32 x 1, 1; residual blocks 1, 2; latent channels 8;",
        "code dimension 4, compared by cosine; float32",
        "transformer: width 128; layers 2; heads 2 (width / 64", "SwiGLU 96; float32",
    ):  # fmt: skip
        assert text in dry.out, text
    assert ctf(*command).out == dry.out
    assert ctf(*command).code == 0
    other = ctf(*command, "--heads", 4)
    assert other.code == 2 and "another configuration: heads was 2, now 4" in other.err
    assert Pipeline.from_pretrained(out).coarse.config.heads == 2
