"""`Pipeline`: what an image depends on, the settings, and what importing it imports."""

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ctf
from ctf.models.sampling import Sampling
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import SIDE, Command
from tests.pipelines.helpers import LENGTH, UPPER_L, pixels, same


def test_samples_are_decoded_members_of_their_clusters(pipe: Pipeline) -> None:
    out = pipe.sample([0, 1, 2, 1], seed=5)
    assert [image.size for image in out.images] == [(SIDE, SIDE)] * 4
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in out.images)
    assert out.codes.shape == out.coarse.shape == (4, LENGTH)
    assert out.codes.dtype == out.coarse.dtype == torch.int64
    assert int(out.codes.min()) >= 0 and int(out.codes.max()) < pipe.clusters.codebook_size
    assert torch.equal(pipe.clusters.labels_V[out.codes], out.coarse)
    members = pipe.clusters.members_KS[out.coarse]
    assert bool((members == out.codes[..., None]).any(-1).all())
    decoded = (pipe.decode(out.codes) + 1) * 127.5
    expected = decoded.round().byte().permute(0, 2, 3, 1).numpy()
    assert int(np.abs(pixels(out.images).astype(int) - expected).max()) <= 1


def test_a_seed_determines_the_image_whatever_the_global_generator(pipe: Pipeline) -> None:
    torch.manual_seed(1)
    first = pipe.sample([0, 1], seed=3)
    torch.manual_seed(2)
    assert same(first, pipe.sample([0, 1], seed=3))
    assert not torch.equal(first.codes, pipe.sample([0, 1], seed=5).codes)
    assert torch.equal(first.codes[1], pipe.sample([1], seed=4).codes[0])


def test_classes_have_different_images(pipe: Pipeline) -> None:
    codes = [pipe.sample([c] * 8, seed=0).codes for c in range(3)]
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[1], codes[2])


def test_the_pipelines_settings_are_the_default(pipe: Pipeline) -> None:
    greedy = dataclasses.replace(pipe, sampling=Sampling(top_k=1, fine_top_k=1))
    ones = [1] * 8
    assert same(greedy.sample(ones, seed=0), pipe.sample(ones, seed=0, top_k=1, fine_top_k=1))
    assert same(greedy.sample(ones, seed=0), greedy.sample(ones, seed=99))
    random = greedy.sample(ones, seed=0, top_k=0, temperature=2.0)
    assert not same(greedy.sample(ones, seed=0), random)


def test_former_keywords_work_and_warn(sharp: Pipeline) -> None:
    out = sharp.sample([0], codes=torch.zeros(LENGTH).long(), known=UPPER_L)
    calls: list[tuple[int, int]] = []
    former: dict[str, Any] = {"keep": UPPER_L, "apart": True, "report": lambda *c: calls.append(c)}
    with pytest.warns(DeprecationWarning, match="is deprecated, use"):
        again = sharp.sample([0], codes=torch.zeros(LENGTH).long(), **former)
    assert torch.equal(again.codes, out.codes) and calls == [(1, 1)]
    with pytest.warns(DeprecationWarning):
        refined = sharp.refine([0], out.coarse, apart=True)
    with pytest.warns(DeprecationWarning):
        *_, last = sharp.stream([0], wanted=lambda: [0], keep=UPPER_L, codes=out.codes)
    with pytest.warns(DeprecationWarning):
        sharp.preview(out.coarse, codes=out.codes, keep=UPPER_L)
    with pytest.warns(DeprecationWarning):
        members = sharp.members(chosen=0, coarse=out.coarse, position=0)
    assert refined.coarse.shape == last.coarse.shape and members.cluster == out.coarse[0, 0]


def test_all_engines_sample(ctf: Command, run: Path, tmp_path: Path) -> None:
    for engine in ("auto", "eager", "int8", "compile"):
        out = tmp_path / f"{engine}.png"
        result = ctf("sample", run, "--count", 1, "--engine", engine, "--out", out)
        assert result.code == 0 and out.is_file(), result.err


def test_public_names() -> None:
    assert {*ctf.__all__} <= {*dir(ctf)}
    for name in ctf.__all__:
        assert getattr(ctf, name) is not None
    assert ctf.Pipeline is Pipeline
    with pytest.raises(AttributeError, match="module 'ctf' has no attribute 'Pipelin'"):
        ctf.Pipelin  # noqa: B018


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import ctf", ["torch", "numpy", "PIL"]),
        (
            "from ctf import Pipeline; Pipeline.from_pretrained({run!r}).sample([0])",
            ["huggingface_hub", "httpx2", "matplotlib", "ctf.pipelines.card", "ctf.pipelines.hub",
             "ctf.data.images", "ctf.evaluation", "ctf.training", "ctf.studio"],
        ),
    ],
)  # fmt: skip
def test_imports_are_as_few_as_possible(run: Path, code: str, absent: list[str]) -> None:
    check = f"import sys; print(*[name for name in {absent!r} if name in sys.modules])"
    program = f"{code.format(run=str(run))}; {check}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_new_keywords_do_not_warn(pipe: Pipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        pipe.sample([0], codes=torch.zeros(LENGTH).long(), known=UPPER_L, decode_separately=True)
