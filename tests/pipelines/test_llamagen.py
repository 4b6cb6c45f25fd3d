"""LlamaGen checkpoints: parity with the original, forms of files, and files that are wrong."""

import argparse
import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctf.common.errors import UserError
from ctf.data import transforms
from ctf.models import clusters, sizes
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.tokenizer import VQModel
from ctf.pipelines import llamagen
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import Command
from tests.pipelines import llamagen_files

FIXTURES = Path(__file__).parents[1] / "fixtures" / "llamagen"
VQ, GPT = FIXTURES / "vq.pt", FIXTURES / "gpt.pt"
SIDE, HEADS = 8, 4  # pixels of their images; heads of width 16


def arrays(name: str) -> dict[str, Tensor]:
    stored = {k: torch.from_numpy(v) for k, v in np.load(FIXTURES / f"{name}_expected.npz").items()}
    return {k: v if v.is_floating_point() else v.long() for k, v in stored.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return arrays("gpt") | {f"vq_{k}": v for k, v in arrays("vq").items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("llamagen") / "converted"
    llamagen.convert(VQ, GPT, out, image_size=SIDE, heads=HEADS)
    return out


@pytest.fixture(scope="module", params=["loaded", "converted"])
def pipe(request: pytest.FixtureRequest, folder: Path) -> Pipeline:
    if request.param == "loaded":
        return llamagen.load(VQ, GPT, image_size=SIDE, heads=HEADS)
    return Pipeline.from_pretrained(folder)


def weights(path: Path) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = torch.load(path, weights_only=True)["model"]
    return stored


# --- Parity with the original ---------------------------------------------------------------------


@torch.no_grad()
def test_teacher_forced_logits_are_the_originals(
    pipe: Pipeline, expected: dict[str, Tensor]
) -> None:
    logits_BLK = pipe.coarse(expected["tokens"], expected["labels"])
    torch.testing.assert_close(logits_BLK, expected["teacher_forced_logits"], rtol=0, atol=1e-4)
    loss = F.cross_entropy(logits_BLK.mT, expected["tokens"])
    torch.testing.assert_close(loss, expected["teacher_forced_loss"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [1, 2])
def test_greedy_tokens_are_the_originals(
    pipe: Pipeline, expected: dict[str, Tensor], guidance: int
) -> None:
    out = pipe.sample(expected["labels"].tolist(), guidance=guidance, top_k=1)
    assert torch.equal(out.codes, expected[f"greedy_guidance_{guidance}"])
    assert torch.equal(out.codes, out.coarse)


@torch.no_grad()
def test_codes_and_decoded_images_are_the_originals(
    pipe: Pipeline, expected: dict[str, Tensor]
) -> None:
    codes_BL = pipe.tokenizer.encode(expected["vq_images"])
    assert torch.equal(codes_BL, expected["vq_codes"])
    for codes, decoded in (
        (codes_BL, expected["vq_decoded"]),
        (expected["greedy_guidance_2"], expected["vq_greedy_decoded"]),
    ):
        # The original does not clip what it decodes.
        images_BCHW = pipe.tokenizer.decode_vectors(pipe.tokenizer.codebook()[codes])
        torch.testing.assert_close(images_BCHW, decoded, rtol=0, atol=1e-4)
        assert torch.equal(pipe.tokenizer.decode(codes), images_BCHW.clamp(-1, 1))


@torch.no_grad()
def test_the_class_tokens_rope_entry_is_zero(pipe: Pipeline, expected: dict[str, Tensor]) -> None:
    """It is an option in their config, without which the logits differ."""
    shape = pipe.coarse.config
    assert shape.class_token_rope == "zero"
    model = CoarseModel(
        dataclasses.replace(shape, class_token_rope="identity"), pipe.coarse.vocab_size
    )
    model.eval().load_state_dict(pipe.coarse.state_dict())
    logits_BLK = model(expected["tokens"], expected["labels"])
    assert float((logits_BLK - expected["teacher_forced_logits"]).abs().max()) > 1e-3


# --- Converted pipelines --------------------------------------------------------------------------


def test_a_converted_pipeline_is_a_full_vocabulary_baseline(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.fine is None and pipe.clusters.largest == 1 and pipe.clusters.count == 256
    assert pipe.class_names == tuple("0123456789")
    assert pipe.tokenizer.config.image_size == 8 and pipe.coarse.config.grid == 4
    came_from = pipe.origin["converted_from"]
    assert came_from["vq"]["file"] == "vq.pt" and len(came_from["gpt"]["sha256"]) == 64
    # The tokenizer's weights are stored in half precision, as in the file, and loaded in single.
    assert (folder / "tokenizer" / "model.safetensors").stat().st_size < 0.6 * sum(
        4 * p.numel() for p in pipe.tokenizer.parameters()
    )
    assert {p.dtype for p in pipe.tokenizer.parameters()} == {torch.float32}


def test_saving_again_gives_identical_samples(folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "again")
    again = Pipeline.from_pretrained(tmp_path / "again")
    loaded = llamagen.load(VQ, GPT, image_size=SIDE, heads=HEADS)
    one, *others = (p.sample([0, 3, 9], seed=5) for p in (pipe, again, loaded))
    for other in others:
        assert torch.equal(one.codes, other.codes)
        assert all(
            a.tobytes() == b.tobytes() for a, b in zip(one.images, other.images, strict=True)
        )


def test_converting_again_writes_the_same(folder: Path, tmp_path: Path, ctf: Command) -> None:
    out = tmp_path / "out"
    arguments = (
        "convert",
        "llamagen",
        "--vq",
        VQ,
        "--gpt",
        GPT,
        "--image-size",
        SIDE,
        "--heads",
        HEADS,
        "--out",
        out,
    )
    dry = ctf(*arguments, "--dry-run")
    assert dry.code == 0 and "10 classes" in dry.out and not out.exists()
    assert ctf(*arguments).code == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}.keys() != before.keys()
    assert ctf(*arguments).code == 0
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert ctf("sample", out, "--count", 1, "--out", tmp_path / "sheet.png").code == 0
    other = ctf(*arguments[:-1], tmp_path / "sheet.png")
    assert other.code == 2 and len(other.err.splitlines()) <= 2


def test_other_pipelines_are_not_overwritten(run: Path, ctf: Command) -> None:
    before = (run / "pipeline.json").read_bytes()
    result = ctf(
        "convert", "llamagen", "--vq", VQ, "--gpt", GPT, "--grid", SIDE // 2, "--heads", HEADS,
        "--out", run,
    )  # fmt: skip
    assert result.code == 2 and "a pipeline of another configuration" in result.err
    assert (run / "pipeline.json").read_bytes() == before
    result = ctf("convert", "llamagen", "--vq", VQ, "--image-size", 8, "--out", run)
    assert result.code == 2 and "a tokenizer of another configuration" in result.err


def test_a_tokenizer_is_converted_alone(tmp_path: Path, ctf: Command) -> None:
    out = tmp_path / "run"
    result = ctf("convert", "llamagen", "--vq", VQ, "--image-size", 16, "--out", out)
    assert result.code == 0 and "16 pixels -> 8 x 8 of 256 codes" in result.out
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip


# --- Forms of checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["module", "state_dict", "bare", "compiled", "ddp", "old format"])
def test_all_forms_of_a_state_dict(tmp_path: Path, expected: dict[str, Tensor], form: str) -> None:
    own = weights(GPT)
    table = torch.zeros(17, 8, 2)
    extra = {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "steps": 3}
    content = {
        "module": {"module": own, "global_steps": 7, "ds_version": "0.14", "lr_scheduler": None},
        "state_dict": {"state_dict": own, "epoch": 3},
        "bare": {**own, **extra, "freqs_cis": table},
        "compiled": {"model": {f"_orig_mod.{k}": v for k, v in own.items()}, **extra},
        "ddp": {"model": {f"module.{k}": v for k, v in own.items()}, **extra},
        "old format": {"model": {**own, "freqs_cis": table}, "args": argparse.Namespace(lr=1e-4)},
    }[form]
    path = tmp_path / "gpt.pt"
    torch.save(content, path, _use_new_zipfile_serialization=form != "old format")
    pipe = llamagen.load(VQ, path, image_size=SIDE, heads=HEADS)
    out = pipe.sample(expected["labels"].tolist(), guidance=1, top_k=1)
    assert torch.equal(out.codes, expected["greedy_guidance_1"])


def test_the_training_arguments_have_the_image_size(tmp_path: Path) -> None:
    """They are stored as an argparse.Namespace."""
    arguments = argparse.Namespace(gpt_model="GPT-B", image_size=16, lr=1e-4, betas=[0.9, 0.95])
    path = llamagen_files.save(tmp_path / "gpt.pt", weights(GPT), args=arguments, steps=1)
    assert llamagen.load(VQ, path, heads=HEADS).coarse.config.grid == 8
    assert llamagen.load(VQ, path, heads=HEADS, image_size=8).coarse.config.grid == 4


def test_any_image_size_can_be_chosen() -> None:
    """Only the table of RoPE depends on it."""
    for size in (8, 12, 16):
        pipe = llamagen.load(VQ, GPT, image_size=size, heads=HEADS)
        out = pipe.sample([1], seed=0)
        assert out.images[0].size == (size, size) and out.codes.shape == (1, (size // 2) ** 2)


# --- Sizes ----------------------------------------------------------------------------------------


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("size", "full", "coarse"),
    [("B", 111, 87), ("L", 343, 310), ("XL", 775, 734), ("XXL", 1411, 1362), ("3B", 3097, 2995)],
)
def test_transformers_have_the_papers_sizes_and_the_originals_names(
    size: str, full: int, coarse: int
) -> None:
    shape = sizes.SIZES[size]
    config = shape.config(16, 1000)
    parts = clusters.Clusters.from_labels(torch.arange(16384) % 512)
    with torch.device("meta"):
        model = CoarseModel(config, 16384)
        assert millions(model) == pytest.approx(full, abs=1)
        assert millions(CoarseModel(config, 512)) == pytest.approx(coarse, abs=1)
        # The fine model has the backbone of the coarse one, K embeddings, and V rows at its end.
        fine = FineModel(config, parts)
        assert millions(fine) == pytest.approx(full - (16384 - 512) * shape.width / 1e6, abs=1)
    names = {llamagen.gpt_name(k): tuple(v.shape) for k, v in model.state_dict().items()}
    assert names == llamagen_files.gpt_shapes(shape.width, shape.layers)


@pytest.mark.parametrize(("name", "size"), [("VQ-16", 72), ("VQ-8", 70)])
def test_tokenizers_have_the_originals_sizes_and_names(name: str, size: int) -> None:
    config = sizes.TOKENIZERS[name]
    with torch.device("meta"):
        model = VQModel(config)
    assert millions(model) == pytest.approx(size, abs=1)
    names = {llamagen.vq_name(k, config): tuple(v.shape) for k, v in model.state_dict().items()}
    theirs = llamagen_files.vq_shapes(config.multipliers)
    del theirs["quantize.codebook_used"]
    assert names == theirs
    assert config.factor == int(name.removeprefix("VQ-"))


CONVERT = """
import re, sys
from pathlib import Path
from ctf.pipelines import llamagen
llamagen.convert(*map(Path, sys.argv[1:]), size="B", image_size=256)
# Not getrusage, which starts with the memory of the parent process.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture(scope="module")
def size_b(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files with random weights of the released size B and VQ-16."""
    root = tmp_path_factory.mktemp("size-b")
    shapes = llamagen_files.vq_shapes()
    vq = llamagen_files.save(root / "vq_ds16_c2i.pt", llamagen_files.random_weights(shapes))
    gpt = llamagen_files.save(
        root / "c2i_B_256.pt",
        llamagen_files.random_weights(llamagen_files.gpt_shapes(768, 12)),
        steps=1,
    )
    return vq, gpt


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_size_b_is_converted_in_bounded_memory(size_b: tuple[Path, Path], tmp_path: Path) -> None:
    vq, gpt = size_b
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, vq, gpt, tmp_path / "out"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak = int(done.stdout) * 1024
    assert peak <= 2 * (vq.stat().st_size + gpt.stat().st_size)
    config = json.loads((tmp_path / "out" / "coarse" / "config.json").read_text())
    assert (config["model"]["heads"], config["model"]["grid"]) == (12, 16)
    names = json.loads((tmp_path / "out" / "pipeline.json").read_text())["class_names"]
    assert len(names) == len(set(names)) == 1000 and names[207] == "golden retriever"
    # The weights are written bit for bit, under our names.
    from safetensors import safe_open

    given = weights(gpt)
    with safe_open(tmp_path / "out" / "coarse" / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert len(stored) == len(given)
    for name, value in stored.items():
        assert torch.equal(value, given[llamagen.gpt_name(name)])


@pytest.mark.parametrize(("pixels", "grid"), [(256, 16), (384, 24), (512, 32)])
def test_grids_of_the_released_models(
    size_b: tuple[Path, Path], tmp_path: Path, ctf: Command, pixels: int, grid: int
) -> None:
    vq, gpt = size_b
    out = tmp_path / "out"
    arguments = ("--vq", vq, "--gpt", gpt, "--image-size", pixels, "--out", out, "--dry-run")
    result = ctf("convert", "llamagen", *arguments)
    assert result.code == 0 and not out.exists()
    assert f"{pixels} pixels -> {grid} x {grid} of 16384 codes" in result.out
    assert "transformer of 110.9 M parameters, 1000 classes, guidance 2.0" in result.out


def test_a_size_that_does_not_match(size_b: tuple[Path, Path], ctf: Command) -> None:
    vq, gpt = size_b
    result = ctf("convert", "llamagen", "--vq", vq, "--gpt", gpt, "--size", "L", "--out", "x")
    assert result.code == 2
    assert "has shape (1001, 768), expected (1001, 1024)" in result.err
    assert "cls_embedding.embedding_table.weight" in result.err and "size B would fit" in result.err
    assert len(result.err.splitlines()) <= 2


# --- Files that are wrong -------------------------------------------------------------------------


def refused(vq: Path, gpt: Path, **more: object) -> str:
    with pytest.raises(UserError) as caught:
        llamagen.load(vq, gpt, **{"heads": HEADS, **more})  # type: ignore[arg-type]
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 2 and len(message) < 500
    return message


def changed(path: Path, tmp_path: Path, **replaced: Tensor | None) -> Path:
    """A copy of a checkpoint with tensors replaced, or removed where None."""
    stored = {**weights(path), **replaced}
    return llamagen_files.save(
        tmp_path / path.name, {k: v for k, v in stored.items() if v is not None}
    )


class Evil:
    """An object that runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("wrapped", [True, False])
def test_code_is_refused_and_not_executed(tmp_path: Path, wrapped: bool) -> None:
    mark = tmp_path / "executed"
    content = {"model": weights(GPT), "args": Evil(mark)} if wrapped else Evil(mark)
    path = tmp_path / "gpt.pt"
    torch.save(content, path)
    message = refused(VQ, path)
    assert "refused" in message and "system" in message and "nothing was executed" in message
    assert not mark.exists()
    # Unpickling it does run the command.
    buffer = io.BytesIO(pickle.dumps(Evil(mark)))
    pickle.load(buffer)
    assert mark.exists()


def test_other_classes_are_refused(tmp_path: Path) -> None:
    path = llamagen_files.save(tmp_path / "gpt.pt", weights(GPT), args=argparse.HelpFormatter("x"))
    assert "argparse.HelpFormatter" in refused(VQ, path)
    path = llamagen_files.save(
        tmp_path / "gpt.pt", weights(GPT), args=argparse.Namespace(inner=Evil(tmp_path / "run"))
    )
    assert "system" in refused(VQ, path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, share: float) -> None:
    path = tmp_path / "gpt.pt"
    data = GPT.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "truncated" in refused(VQ, path)


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02", b"PK\x03\x04", bytes(200)])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gpt.pt"
    path.write_bytes(content)
    assert "not a PyTorch checkpoint" in refused(VQ, path)


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": "text"}}, {1: torch.zeros(2)}, {}])
def test_content_that_is_not_a_state_dict(tmp_path: Path, content: object) -> None:
    path = tmp_path / "gpt.pt"
    torch.save(content, path)
    assert str(path) in refused(VQ, path)


def test_missing_files(tmp_path: Path) -> None:
    assert "not found" in refused(tmp_path / "vq.pt", GPT)
    assert "not found" in refused(VQ, tmp_path / "gpt.pt")
    assert "not found" in refused(VQ, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    for path, name in ((GPT, "layers.1.attention.wo.weight"), (VQ, "quant_conv.bias")):
        bad = weights(path)[name].clone()
        bad.view(-1)[3] = value
        copy = changed(path, tmp_path, **{name: bad})
        message = refused(*((VQ, copy) if path == GPT else (copy, GPT)))
        assert name in message and "not finite" in message


def test_missing_unknown_and_misshapen_tensors(tmp_path: Path) -> None:
    assert "tensor 'norm.weight' of shape (64,) is missing" in refused(
        VQ, changed(GPT, tmp_path, **{"norm.weight": None})
    )
    assert "unknown tensor 'extra'" in refused(VQ, changed(GPT, tmp_path, extra=torch.zeros(3)))
    assert "has shape (64, 63), expected (64, 64)" in refused(
        VQ, changed(GPT, tmp_path, **{"layers.0.attention.wo.weight": torch.zeros(64, 63)})
    )
    assert "of type torch.int64" in refused(
        VQ, changed(GPT, tmp_path, **{"norm.weight": torch.zeros(64, dtype=torch.int64)})
    )
    assert "conv_in.weight' is missing" in refused(
        changed(VQ, tmp_path, **{"encoder.conv_in.weight": None}), GPT
    )
    assert "class-conditional" in refused(
        VQ, changed(GPT, tmp_path, **{"cls_embedding.embedding_table.weight": None})
    )


def test_what_contradicts_the_tensors(tmp_path: Path) -> None:
    path = llamagen_files.save(
        tmp_path / "gpt.pt",
        llamagen_files.random_weights(llamagen_files.gpt_shapes(80, 3, 256, 10)),
    )
    assert "unknown size 'XB'" in refused(VQ, path, size="XB")
    assert "(11, 80), expected (11, 768) in size B" in refused(VQ, path, size="B")
    message = refused(VQ, path, heads=None)
    assert "width 80 and 3 layers" in message and "--heads" in message and "1, 2, 4, 5" in message
    assert "got 3 heads with width 80" in refused(VQ, path, heads=3)
    assert "got 0 heads" in refused(VQ, path, heads=0)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    assert "not a LlamaGen tokenizer: it is a transformer" in refused(GPT, GPT)
    assert "not a LlamaGen transformer: it is a tokenizer" in refused(VQ, VQ)
    path = llamagen_files.save(
        tmp_path / "gpt.pt",
        llamagen_files.random_weights(llamagen_files.gpt_shapes(64, 2, 128, 10)),
    )
    assert "predicts 128 codes" in refused(VQ, path) and "belong together" in refused(VQ, path)
    caption, table = "cls_embedding.cap_proj.fc1.weight", "cls_embedding.embedding_table.weight"
    text = changed(GPT, tmp_path, **{caption: torch.zeros(2, 2), table: None})
    assert "not those for text" in refused(VQ, text)


def test_wrong_image_sizes(tmp_path: Path) -> None:
    assert "image size 9 is not divisible" in refused(VQ, GPT, image_size=9)
    path = llamagen_files.save(
        tmp_path / "gpt.pt", {**weights(GPT), "freqs_cis": torch.zeros(17, 8, 2)}
    )
    assert "trained for 4 x 4 codes, expected 8 x 8" in refused(VQ, path, image_size=16)
    assert llamagen.load(VQ, path).coarse.config.grid == 4


# --- Resizing -------------------------------------------------------------------------------------


@torch.no_grad()
def test_resized_as_llamagen_does_before_it_scores(pipe: Pipeline) -> None:
    codes_BL = torch.arange(32).view(2, 16)
    raw_BCHW = pipe.tokenizer.decode_vectors(pipe.tokenizer.codebook()[codes_BL])
    theirs = F.interpolate(raw_BCHW, size=(6, 6), mode="bicubic")
    theirs = torch.clamp(127.5 * theirs + 128.0, 0, 255).byte().permute(0, 2, 3, 1).numpy()
    decoded = pipe.decode(codes_BL, resize=6)
    ours = np.stack([np.asarray(image) for image in transforms.as_pil(decoded)])
    assert int(np.abs(ours.astype(int) - theirs).max()) <= 1
    assert float((ours == theirs).mean()) > 0.99
    assert pipe.sample([1], resize=6).images[0].size == (6, 6)
    with pytest.raises(UserError, match="resize: got 0"):
        pipe.sample([1], resize=0)
