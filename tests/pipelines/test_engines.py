"""Pipelines by each engine, and in batches that fit into memory."""

from pathlib import Path

import pytest
import torch

from ctf import kernels
from ctf.common import memory
from ctf.common.errors import UserError
from ctf.models import sampling
from ctf.models.coarse import CoarseModel
from ctf.pipelines import generation
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import Command

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    not kernels.available("auto", CPU), reason="no packed layers here"
)
needs_int8 = pytest.mark.skipif(not kernels.available("int8", CPU), reason="no int8 layers here")


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
    monkeypatch.setattr(generation, "DECODER_ELEMENTS", 1)
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


@needs_int8
def test_int8_cannot_be_saved(run: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(run, engine="int8")
    with pytest.raises(UserError, match="int8 cannot be saved"):
        pipe.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
