"""Packed layers: equal in float32, near in int8, and left alone where the machine cannot."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ctf.bench import llamagen_reference
from ctf.common import memory
from ctf.common.errors import UserError
from ctf.data import images, transforms
from ctf.kernels import sampling_cpu, tokenizer_cpu
from ctf.models import sampling
from ctf.models.coarse import CoarseModel
from ctf.models.sampling import Sampling, sample_coarse, uniforms
from ctf.models.tokenizer import TokenizerConfig, Upsample, VQModel
from ctf.models.transformer import TransformerConfig
from ctf.pipelines import llamagen, pipeline
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import Command

FIXTURES = Path(__file__).parents[1] / "fixtures" / "llamagen"
CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    not sampling_cpu.available("auto", CPU), reason="nothing to pack with here"
)
needs_int8 = pytest.mark.skipif(
    not sampling_cpu.available("int8", CPU), reason="no int8 kernels here"
)


def make(width: int = 64) -> CoarseModel:
    torch.manual_seed(0)
    config = TransformerConfig(width=width, layers=3, heads=4, grid=4, classes=5)
    model = CoarseModel(config, 40).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1)
    return model


def logits(model: CoarseModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    labels_BL = torch.randint(40, (6, 16), generator=generator)
    return model(labels_BL, torch.arange(6) % 6)


def draw(model: CoarseModel, **settings: Any) -> torch.Tensor:
    numbers_BL = uniforms(range(5), 16)[:, 0]
    chosen = Sampling(**settings)
    return sample_coarse(model, torch.arange(5), numbers_BL, chosen)


# --- the plain way --------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1])
def test_the_plain_way_draws_the_same(guidance: float, top_k: int) -> None:
    model = make()
    numbers_BL = uniforms(range(5), 16)[:, 0]
    settings = Sampling(guidance=guidance, top_k=top_k)
    expected = sample_coarse(model, torch.arange(5), numbers_BL, settings)
    assert torch.equal(
        llamagen_reference.sample(model, torch.arange(5), numbers_BL, settings), expected
    )


@pytest.mark.parametrize("guidance", [1, 2])
def test_the_plain_way_is_llamagens(guidance: int) -> None:
    import numpy as np

    stored = np.load(FIXTURES / "gpt_expected.npz")
    model = llamagen.load(FIXTURES / "vq.pt", FIXTURES / "gpt.pt").coarse
    classes_B = torch.from_numpy(stored["labels"]).long()
    settings = Sampling(guidance=guidance, top_k=1)
    drawn = llamagen_reference.sample(model, classes_B, uniforms([0, 1, 2], 16)[:, 0], settings)
    assert drawn.tolist() == stored[f"greedy_guidance_{guidance}"].tolist()


# --- packed ---------------------------------------------------------------------------------------


@needs_packing
def test_packed_is_equal_up_to_rounding() -> None:
    model, packed = make(), make()
    sampling_cpu.prepare(packed, None, None, "auto")
    assert not any(isinstance(module, nn.Linear) for module in packed.modules())
    torch.testing.assert_close(logits(packed), logits(model), rtol=0, atol=1e-4)
    assert torch.equal(draw(packed, guidance=2.0, top_k=1), draw(model, guidance=2.0, top_k=1))


@needs_packing
def test_packed_keeps_its_weights() -> None:
    model, packed = make(), make()
    sampling_cpu.prepare(packed, None, None, "auto")
    own, kept = model.state_dict(), packed.state_dict()
    assert own.keys() == kept.keys()
    assert all(torch.equal(own[name], kept[name]) for name in own)


@needs_int8
def test_int8_is_near() -> None:
    model, packed = make(128), make(128)
    sampling_cpu.prepare(packed, None, None, "int8")
    exact, near = logits(model), logits(packed)
    assert float((exact - near).abs().mean()) < 0.1 * float(exact.std())
    assert not torch.equal(exact, near)


def test_a_cache_in_bfloat16_is_near_and_half_as_large() -> None:
    model, low = make(128), make(128)
    low.trunk.cache_dtype = torch.bfloat16
    labels_BL = torch.randint(40, (6, 16), generator=torch.Generator().manual_seed(1))
    exact, near = (
        torch.stack([decoder.logits(labels_BL, i, 2.0) for i in range(16)])
        for decoder in (sampling.Decoder(m, torch.arange(6) % 6, guided=True) for m in (model, low))
    )
    assert near.dtype == torch.float32 and not torch.equal(exact, near)
    assert float((exact - near).abs().mean()) < 0.02 * float(exact.std())
    sizes = [m.trunk.cache(2).k[0].element_size() for m in (model, low)]
    assert sizes == [4, 2]


@needs_int8
def test_int8_keeps_its_cache_in_what_the_processor_multiplies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for able, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(sampling_cpu, "multiplies_bfloat16", lambda able=able: able)
        model = make()
        sampling_cpu.prepare(model, None, None, "int8")
        assert model.trunk.cache(2).k[0].dtype == expected
        assert draw(model).shape == (5, 16)


@needs_int8
def test_int8_cannot_be_saved(run: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(run, engine="int8")
    with pytest.raises(UserError, match="weights in int8 cannot be saved"):
        pipe.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["auto", "int8"])
def test_where_it_is_not_available_nothing_changes(
    name: sampling_cpu.Engine, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(sampling_cpu, "_works", lambda kind: False)
    sampling_cpu._say_once.cache_clear()
    model, same = make(), make()
    for _ in range(2):
        sampling_cpu.prepare(same, None, None, name)
    assert torch.equal(logits(model), logits(same))
    assert len(recwarn) == (1 if name == "int8" else 0)  # said once


# --- the decoder ----------------------------------------------------------------------------------

VQ = TokenizerConfig(
    image_size=32,
    codebook_size=50,
    channels=16,
    multipliers=(1, 2, 2),
    latent_channels=16,
    groups=4,
)


def make_tokenizer() -> VQModel:
    torch.manual_seed(0)
    return VQModel(VQ).eval().requires_grad_(False)


@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99)
)
def test_doubling_by_a_transposed_convolution(
    batch: int, height: int, width: int, channels: int, seed: int
) -> None:
    torch.manual_seed(seed)
    up = Upsample(channels).requires_grad_(False)
    x = torch.randn(batch, channels, height, width)
    prepared = tokenizer_cpu.PreparedUpsample(up, torch.float32)
    torch.testing.assert_close(prepared(x), up(x), rtol=0, atol=1e-5)


@needs_packing
def test_a_prepared_decoder_draws_the_same() -> None:
    plain_model, prepared = make_tokenizer(), make_tokenizer()
    sampling_cpu.prepare(None, None, prepared, "auto")
    codes_BL = torch.arange(3 * 64).view(3, 64) % 50
    images = plain_model.decode(codes_BL)
    torch.testing.assert_close(prepared.decode(codes_BL), images, rtol=0, atol=1e-5)
    assert torch.equal(prepared.encode(images), plain_model.encode(images))
    own, kept = plain_model.state_dict(), prepared.state_dict()
    assert own.keys() == kept.keys()
    assert all(torch.equal(own[name], kept[name]) for name in own)
    assert any(isinstance(part, tokenizer_cpu.PreparedUpsample) for part in prepared.modules())


@needs_int8
def test_low_precision_changes_pixels_by_less_than_a_grey_level() -> None:
    pipe = Pipeline.from_pretrained("fashion-mnist")
    low = copy.deepcopy(pipe.tokenizer)
    tokenizer_cpu.prepare(low, "decoder", torch.bfloat16)
    codes_BL = pipe.sample(list(range(10)), seed=5).codes
    change = (low.decode(codes_BL) - pipe.tokenizer.decode(codes_BL)).abs() * 127.5
    assert 0 < float(change.mean()) < 1


def test_a_prepared_encoder_is_the_same() -> None:
    tokenizer = Pipeline.from_pretrained("fashion-mnist", engine="eager").tokenizer
    images_BCHW = transforms.as_tensor(held_out(tokenizer), CPU)
    vectors_BLC, codes_BL = tokenizer.encode_vectors(images_BCHW), tokenizer.encode(images_BCHW)
    for dtype, atol, equal in ((torch.float32, 1e-5, 1.0), (torch.bfloat16, 0.02, 0.9)):
        prepared = copy.deepcopy(tokenizer)
        tokenizer_cpu.prepare(prepared, "encoder", dtype)
        near_BLC = prepared.encode_vectors(images_BCHW)
        torch.testing.assert_close(near_BLC, vectors_BLC, rtol=0, atol=atol)
        share = float((prepared.encode(images_BCHW) == codes_BL).float().mean())
        assert share >= equal
        assert dtype == torch.float32 or not torch.equal(near_BLC, vectors_BLC)


def held_out(tokenizer: VQModel) -> Any:
    return images.open_images("fashion-mnist", tokenizer.config.image_size).val.read(range(50))


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.skipif(not sampling_cpu.available("compile", CPU), reason="there is no compiler here")
def test_compiled_steps_draw_the_same() -> None:
    model, compiled = make(), make()
    for each in (model, compiled):
        del each.trunk.layers[1:]  # to compile is slow
    sampling_cpu.prepare(compiled, None, None, "compile")
    assert model.state_dict().keys() == compiled.state_dict().keys()
    for settings in (
        {"guidance": 2.0},
        {"guidance": 2.0, "top_k": 1},
        {"guidance": 1.5, "guidance_window": (0.25, 0.75)},  # halves that catch up, uncompiled
    ):
        assert torch.equal(draw(compiled, **settings), draw(model, **settings))


def test_where_nothing_compiles_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    sampling_cpu._compiles.cache_clear()
    sampling_cpu._say_once.cache_clear()
    model, same = make(), make()
    for _ in range(2):
        sampling_cpu.prepare(same, None, None, "compile")
    assert torch.equal(draw(model), draw(same))
    assert [str(warning.message) for warning in recwarn] == [
        "compile is not available for cpu here; computing without it"
    ]
    sampling_cpu._compiles.cache_clear()


# --- in parts -------------------------------------------------------------------------------------


def test_what_does_not_fit_into_memory_is_drawn_in_parts(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = Pipeline.from_pretrained(run)
    classes = [0, 1, 2, 0, 1, 2, 0]
    whole = pipe.sample(classes, seed=3)
    shape = pipe.coarse.config
    image = 2 * 4 * shape.layers * shape.length * shape.width  # keys and values of one half
    drawn: list[int] = []
    sample_coarse_before = sampling.sample_coarse

    def watched(model: CoarseModel, classes_B: torch.Tensor, *given: object) -> torch.Tensor:
        drawn.append(len(classes_B))
        return sample_coarse_before(model, classes_B, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(sampling, "sample_coarse", watched)
    monkeypatch.setattr(memory, "available", lambda device: 3 * 2 * 2 * image)
    monkeypatch.setattr(sampling, "FINE_TOKENS", 2 * shape.length)
    monkeypatch.setattr(pipeline, "DECODED", 1)
    parts = pipe.sample(classes, seed=3)
    assert drawn == [3, 3, 1]
    assert torch.equal(parts.codes, whole.codes)
    assert all(
        abs(a - b) <= 1
        for one, other in zip(parts.images, whole.images, strict=True)
        for a, b in zip(one.tobytes(), other.tobytes(), strict=True)
    )
    drawn.clear()
    pipe.sample(classes, seed=3, guidance=1.0)  # which needs half of it
    assert drawn == [6, 1]
    monkeypatch.setattr(memory, "available", lambda device: 0)
    with pytest.raises(UserError, match="got 2 images to stream, expected 1 or fewer"):
        pipe.stream([0, 1])


# --- in a pipeline --------------------------------------------------------------------------------


@needs_packing
def test_a_pipeline_draws_the_same_by_any_exact_engine(run: Path, tmp_path: Path) -> None:
    eager = Pipeline.from_pretrained(run)
    packed = Pipeline.from_pretrained(run, engine="auto")
    one, other = (pipe.sample([0, 1, 2], seed=3) for pipe in (eager, packed))
    assert torch.equal(one.codes, other.codes)
    packed.save_pretrained(tmp_path / "copy")
    eager.save_pretrained(tmp_path / "eager")
    for part in ("coarse", "fine", "tokenizer"):
        files = [tmp_path / name / part / "model.safetensors" for name in ("copy", "eager")]
        assert files[0].read_bytes() == files[1].read_bytes()


@needs_int8
def test_the_command(ctf: Command, run: Path, tmp_path: Path) -> None:
    for name in ("auto", "eager", "int8", "compile"):
        out = tmp_path / f"{name}.png"
        result = ctf("sample", run, "--count", 1, "--engine", name, "--out", out)
        assert result.code == 0 and out.is_file(), result.err
