"""Stages of a run one by one: in order, out of order, and shared with a baseline."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ctf.cli import main as cli
from ctf.common import storage
from ctf.pipelines.pipeline import Pipeline
from ctf.training.metrics_log import read_metrics
from tests.conftest import STEPS, Command, read_files, recipe_options, weights


def test_single_stages_end_with_the_same_bits(
    run: Path, image_folder: Path, tmp_path: Path, ctf: Command
) -> None:
    """The commands of the single stages end with the same bits as `ctf fit`."""
    out = tmp_path / "run"
    recipe = ["--preset", "tiny", *recipe_options()]
    steps = ["--steps", STEPS]
    for arguments in (
        ["tokenizer", "train", image_folder, "--out", out, "--image-size", 32, *steps, *recipe],
        ["tokens", "extract", image_folder, "--run", out, *recipe],
        ["clusters", "fit", out, "--count", 8],
        ["train", "coarse", out, *steps, *recipe],
        ["train", "fine", out, *steps, *recipe],
    ):
        result = ctf(*arguments)
        assert result.code == 0, result.err
        before = read_files(out)
        assert ctf(*arguments).code == 0  # it is done
        assert read_files(out) == before
    assert weights(out) == weights(run)
    samples, expected = (
        Pipeline.from_pretrained(folder).sample([0, 1, 2], seed=3) for folder in (out, run)
    )
    assert torch.equal(samples.codes, expected.codes)

    result = ctf("tokenizer", "evaluate", out, "--images", image_folder)
    assert result.code == 0 and "psnr" in result.out and " dB" in result.out
    result = ctf("clusters", "show", out)
    assert result.code == 0 and "clusters   8" in result.out and "swaps.png" in result.out


def test_stages_in_the_wrong_order_are_refused(
    image_folder: Path, tmp_path: Path, ctf: Command
) -> None:
    out = tmp_path / "run"
    recipe = ["--preset", "tiny", *recipe_options()]
    for arguments, missing in (
        (["tokens", "extract", image_folder, "--run", out, *recipe], "tokenizer/config.json"),
        (["clusters", "fit", out], "tokenizer/config.json"),
        (["clusters", "show", out], "clusters/report.json"),
        (["train", "coarse", out, *recipe], "clusters/clusters.safetensors"),
        (["train", "baseline", out, "--out", tmp_path / "b", *recipe], "tokenizer/config.json"),
        (["sample", out], "no pipeline"),
    ):
        result = ctf(*arguments)
        assert result.code == 2 and missing in result.err, (arguments, result.err)
        assert len(result.err.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_a_changed_tokenizer_are_refused(run: Path, tmp_path: Path, ctf: Command) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name, content in read_files(run).items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    path = out / "tokenizer" / "model.safetensors"
    tensors, _ = storage.load_tensors(path)
    storage.save_tensors(path, {k: v + 1e-3 for k, v in tensors.items()})
    for kind in ("coarse", "fine"):
        result = ctf("train", kind, out, "--steps", STEPS, "--preset", "tiny", *recipe_options())
        assert result.code == 2 and "the tokenizer has changed" in result.err
    result = ctf("clusters", "fit", out, "--count", 8)
    assert result.code == 2 and "the tokenizer has changed" in result.err


# --- the full-vocabulary baseline -----------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("baseline") / "run"
    arguments = ["--preset", "tiny", "--steps", "20", *recipe_options()]
    assert cli.main(["train", "baseline", str(run), "--out", str(out), *arguments]) == 0
    return out


def test_the_baseline_is_a_pipeline_without_a_fine_stage(run: Path, baseline: Path) -> None:
    pipe = Pipeline.from_pretrained(baseline)
    assert pipe.fine is None
    assert pipe.clusters.count == pipe.clusters.codebook_size == pipe.coarse.vocab_size == 64
    samples = pipe.sample([0, 1, 2], seed=0)
    assert torch.equal(samples.codes, samples.coarse)
    assert samples.images[0].size == (32, 32)
    for name in ("config.json", "model.safetensors"):
        tokenizers = [folder / "tokenizer" / name for folder in (run, baseline)]
        assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()
    assert (baseline / "tokens").resolve() == (run / "tokens").resolve()
    assert not (baseline / "fine").exists()
    first = read_metrics(baseline / "coarse")[0]
    assert first["loss"] < np.log(64)


def test_a_saved_baseline_loads(baseline: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(baseline)
    pipe.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "fine").exists()
    copy = Pipeline.from_pretrained(tmp_path / "copy")
    assert copy.fine is None
    assert torch.equal(copy.sample([1], seed=0).codes, pipe.sample([1], seed=0).codes)


def test_a_baseline_is_trained_once(
    run: Path, baseline: Path, tmp_path: Path, ctf: Command
) -> None:
    before = read_files(baseline)
    recipe = ["--preset", "tiny", *recipe_options()]
    result = ctf("train", "baseline", run, "--out", baseline, "--steps", 20, *recipe)
    assert result.code == 0 and "done" in result.out
    result = ctf("train", "baseline", run, "--out", baseline, "--steps", 40, *recipe)
    assert result.code == 2 and "another configuration: training.steps was 20" in result.err
    result = ctf("train", "fine", baseline, "--steps", 20, *recipe)
    assert result.code == 2 and "leaves a fine model nothing to predict" in result.err
    result = ctf("train", "baseline", run, "--out", run, "--steps", 20, *recipe)
    assert result.code == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    result = ctf("train", "baseline", run, "--out", tmp_path / "mine", *recipe)
    assert result.code == 2 and "is not a run with the tokens of" in result.err
    assert read_files(baseline) == before
    assert read_files(tmp_path / "mine") == {"thesis.tex": b"mine"}
    new = tmp_path / "new"
    result = ctf("train", "baseline", run, "--out", new, "--steps", 20, "--dry-run", *recipe)
    assert result.code == 0 and not new.exists()


@pytest.mark.parametrize("link", ["as made", "of an earlier version"])
def test_a_run_and_its_baseline_move_together(
    run: Path, tmp_path: Path, ctf: Command, link: str
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(run, old / "run")
    make = ("--preset", "tiny", "--steps", 2, *recipe_options())
    assert ctf("train", "baseline", old / "run", "--out", old / "baseline", *make).code == 0
    if link == "as made":
        assert os.readlink(old / "baseline" / "tokens") == "../run/tokens"
    else:
        (old / "baseline" / "tokens").unlink()
        (old / "baseline" / "tokens").symlink_to(old / "run" / "tokens")
    shutil.rmtree(old / "baseline" / "coarse")
    old.rename(new)
    result = ctf("tokens", "check", new / "baseline")
    assert result.code == 0, result.err
    result = ctf("train", "coarse", new / "baseline", *make)
    assert result.code == 0, result.err
    result = ctf("train", "baseline", new / "run", "--out", new / "baseline", *make)
    assert result.code == 0 and os.readlink(new / "baseline" / "tokens") == "../run/tokens"


def test_a_baseline_without_its_run_says_where_its_tokens_were(
    run: Path, tmp_path: Path, ctf: Command
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "tokens").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "tokens").symlink_to("../gone/tokens")
    result = ctf("train", "coarse", tmp_path / "run", "--preset", "tiny", *recipe_options())
    assert result.code == 2 and "a link to ../gone/tokens, which is not there" in result.err
