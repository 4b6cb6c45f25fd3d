"""Packed layers: equal in float32, near in int8, and left alone where the machine cannot."""

from pathlib import Path

import pytest
import torch
from conftest import Command
from torch import nn

from ctf import engine, llamagen, plain
from ctf.coarse import CoarseModel
from ctf.errors import UserError
from ctf.pipeline import Pipeline
from ctf.sampling import Sampling, sample_coarse, uniforms
from ctf.transformer import TransformerConfig

FIXTURES = Path(__file__).parent / "fixtures" / "llamagen"
CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    not engine.available("auto", CPU), reason="PyTorch here is without oneDNN"
)
needs_int8 = pytest.mark.skipif(
    not engine.available("int8", CPU), reason="PyTorch here is without int8 kernels"
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


def draw(model: CoarseModel, **settings: float) -> torch.Tensor:
    numbers_BL = uniforms(range(5), 16)[:, 0]
    chosen = Sampling(**settings)  # type: ignore[arg-type]
    return sample_coarse(model, torch.arange(5), numbers_BL, chosen)


# --- the plain way --------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1])
def test_the_plain_way_draws_the_same(guidance: float, top_k: int) -> None:
    model = make()
    numbers_BL = uniforms(range(5), 16)[:, 0]
    settings = Sampling(guidance=guidance, top_k=top_k)
    expected = sample_coarse(model, torch.arange(5), numbers_BL, settings)
    assert torch.equal(plain.sample(model, torch.arange(5), numbers_BL, settings), expected)


@pytest.mark.parametrize("guidance", [1, 2])
def test_the_plain_way_is_llamagens(guidance: int) -> None:
    import numpy as np

    stored = np.load(FIXTURES / "gpt_expected.npz")
    model = llamagen.load(FIXTURES / "vq.pt", FIXTURES / "gpt.pt").coarse
    classes_B = torch.from_numpy(stored["labels"]).long()
    settings = Sampling(guidance=guidance, top_k=1)
    drawn = plain.sample(model, classes_B, uniforms([0, 1, 2], 16)[:, 0], settings)
    assert drawn.tolist() == stored[f"greedy_guidance_{guidance}"].tolist()


# --- packed ---------------------------------------------------------------------------------------


@needs_packing
def test_packed_is_equal_up_to_rounding() -> None:
    model, packed = make(), make()
    engine.prepare(packed, None, None, "auto")
    assert not any(isinstance(module, nn.Linear) for module in packed.modules())
    torch.testing.assert_close(logits(packed), logits(model), rtol=0, atol=1e-4)
    assert torch.equal(draw(packed, guidance=2.0, top_k=1), draw(model, guidance=2.0, top_k=1))


@needs_packing
def test_packed_keeps_its_weights() -> None:
    model, packed = make(), make()
    engine.prepare(packed, None, None, "auto")
    own, kept = model.state_dict(), packed.state_dict()
    assert own.keys() == kept.keys()
    assert all(torch.equal(own[name], kept[name]) for name in own)


@needs_int8
def test_int8_is_near() -> None:
    model, packed = make(128), make(128)
    engine.prepare(packed, None, None, "int8")
    exact, near = logits(model), logits(packed)
    assert float((exact - near).abs().mean()) < 0.1 * float(exact.std())
    assert not torch.equal(exact, near)


@needs_int8
def test_int8_cannot_be_saved(run: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(run, engine="int8")
    with pytest.raises(UserError, match="weights in int8 cannot be saved"):
        pipe.save_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("name", ["auto", "int8"])
def test_where_it_is_not_available_nothing_changes(
    name: engine.Engine, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    engine._say_once.cache_clear()
    model, same = make(), make()
    for _ in range(2):
        engine.prepare(same, None, None, name)
    assert torch.equal(logits(model), logits(same))
    assert len(recwarn) == (1 if name == "int8" else 0)  # said once


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
    for name in ("auto", "eager", "int8"):
        out = tmp_path / f"{name}.png"
        result = ctf("sample", run, "--count", 1, "--engine", name, "--out", out)
        assert result.code == 0 and out.is_file(), result.err
