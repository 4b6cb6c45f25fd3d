"""A coarse model that starts from a full-vocabulary one, and CTF on a converted LlamaGen."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctf.cli import main as cli
from ctf.common.errors import UserError
from ctf.data.tokens import Tokens
from ctf.models.clusters import Clusters, identity
from ctf.models.coarse import CoarseModel
from ctf.models.transformer import TransformerConfig
from ctf.pipelines import llamagen
from ctf.pipelines.pipeline import Pipeline
from ctf.training import loop, recipes
from ctf.training.model_stage import ModelStage
from ctf.training.stages import tokenizer_hash
from ctf.training.warm_start import Source, first_weights, open_source
from tests.conftest import Command, read_files, recipe_options, save_images

FIXTURES = Path(__file__).parents[1] / "fixtures" / "llamagen"
CPU = torch.device("cpu")
V, K = 64, 8


@pytest.fixture(scope="module")
def tokens(run: Path) -> Tokens:
    return Tokens(run / "tokens", "train", tokenizer_hash(run))


def full_vocabulary(tokens: Tokens) -> CoarseModel:
    """One with random weights, large enough to predict something."""
    torch.manual_seed(0)
    config = TransformerConfig(width=32, layers=2, heads=2, grid=4, classes=3, dropout=0.1)
    model = CoarseModel(config, V).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def started(model: CoarseModel, parts: Clusters, tokens: Tokens) -> CoarseModel:
    new = CoarseModel(model.config, parts.count).eval()
    source = Source(model, tokens.manifest.class_names, "")
    new.load_state_dict(first_weights(source, parts, tokens, new, CPU))
    return new


@torch.no_grad()
def divergence(model: CoarseModel, old: CoarseModel, parts: Clusters, tokens: Tokens) -> float:
    """KL in nats a token, from the sums of the old model's probabilities to the new model's."""
    codes_BL = tokens.codes(np.arange(len(tokens)))
    classes_B = torch.from_numpy(tokens.classes_N)
    members = torch.zeros(V, parts.count).scatter_(1, parts.labels_V[:, None], 1)
    sums_BLK = old(codes_BL, classes_B).softmax(-1) @ members
    logs_BLK = model(parts.labels_V[codes_BL], classes_B).log_softmax(-1)
    return float((sums_BLK * (sums_BLK.log() - logs_BLK)).sum(-1).mean())


def test_a_cluster_for_each_code_is_a_copy(tokens: Tokens) -> None:
    old = full_vocabulary(tokens)
    new = started(old, identity(V), tokens)
    own = old.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in new.state_dict().items())


def test_equal_codes_make_a_cluster_with_their_probability_together(tokens: Tokens) -> None:
    """Eight equal codes in each cluster: nothing is lost, so nothing may change."""
    old = full_vocabulary(tokens)
    labels_V = torch.arange(V) % K
    with torch.no_grad():
        for weight in (old.head.weight, old.backbone.label_embedding.weight):
            weight.copy_(weight[labels_V])
    parts = Clusters.from_labels(labels_V)
    assert divergence(started(old, parts, tokens), old, parts, tokens) < 1e-4


def mean_rows(old: CoarseModel, parts: Clusters) -> Tensor:
    sums = torch.zeros(parts.count, old.config.width)
    return sums.index_add_(0, parts.labels_V, old.head.weight.detach()) / parts.sizes_K[:, None]


def test_clusters_of_any_size_are_nearer_than_the_mean_of_rows(tokens: Tokens) -> None:
    old = full_vocabulary(tokens)
    labels_V = torch.tensor([*range(K)] + [0] * 30 + [1] * 15 + [2] * (V - K - 45))
    with torch.no_grad():  # members that are alike, as k-means has them
        for weight in (old.head.weight, old.backbone.label_embedding.weight):
            weight.lerp_(weight[labels_V], 0.7)
    parts = Clusters.from_labels(labels_V)
    new = started(old, parts, tokens)
    fitted = divergence(new, old, parts, tokens)
    with torch.no_grad():
        new.head.weight.copy_(mean_rows(old, parts))
    means = divergence(new, old, parts, tokens)
    with torch.no_grad():
        new.head.weight.zero_()
    uniform = divergence(new, old, parts, tokens)
    assert fitted < 0.5 * means and means < uniform


def test_it_can_be_done_again(tokens: Tokens) -> None:
    old, parts = full_vocabulary(tokens), Clusters.from_labels(torch.arange(V) % K)
    one, other = (started(old, parts, tokens).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_classes_go_by_their_names(tokens: Tokens) -> None:
    """tokens has blue, green and red."""
    old = full_vocabulary(tokens)
    config = dataclasses.replace(old.config, classes=2)
    source = Source(CoarseModel(config, V), ("red", "mauve"), "")
    first = first_weights(source, identity(V), tokens, old, CPU)
    red, _, none = source.model.backbone.class_embedding.weight
    rows = first["backbone.class_embedding.weight"]
    for got, expected in zip(rows, (none, none, red, none), strict=True):
        assert torch.equal(got, expected)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("source") / "baseline"
    arguments = ["--preset", "tiny", "--steps", "60", *recipe_options("coarse.width=48")]
    assert cli.main(["train", "baseline", str(run), "--out", str(out), *arguments]) == 0
    return out


def lines(run: Path) -> list[dict[str, float]]:
    text = (run / "coarse" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_training_starts_below_a_cold_start(
    run: Path, baseline: Path, tmp_path: Path, ctf: Command
) -> None:
    warm, recipe = tmp_path / "warm", ("--preset", "tiny", *recipe_options())
    assert ctf("clusters", "fit", run, "--count", 8, "--out", warm).code == 0
    arguments = ("train", "coarse", warm, "--steps", 20, "--warm-start", baseline, *recipe)
    dry = ctf(*arguments, "--dry-run")
    assert dry.code == 0 and "would train" in dry.out and not (warm / "coarse").exists()
    result = ctf(*arguments)
    assert result.code == 0, result.err
    first = lines(warm)[0]
    assert first["step"] == 0 and first["split"] == "val"
    assert first["loss"] < 0.9 * np.log(8)
    # The shape is that of the model it started from.
    config = json.loads((warm / "coarse" / "config.json").read_text())
    assert config["model"]["width"] == 48 and len(config["warm_start"]) == 64
    before = read_files(warm)
    assert ctf(*arguments).code == 0 and read_files(warm) == before
    cold = ctf("train", "coarse", warm, "--steps", 20, *recipe)
    assert cold.code == 2 and "another configuration" in cold.err
    assert ctf("train", "fine", warm, "--steps", 20, *recipe).code == 0
    assert ctf("sample", warm, "--count", 1, "--out", tmp_path / "sheet.png").code == 0


def test_resumed_it_does_not_start_again(
    run: Path, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctf: Command
) -> None:
    options = ("--preset", "tiny", "--steps", 40, *recipe_options())
    for name in ("whole", "killed"):
        out = tmp_path / name
        assert ctf("clusters", "fit", run, "--count", 8, "--out", out).code == 0
        arguments = ("train", "coarse", out, "--warm-start", baseline, *options)
        if name == "killed":

            class Killed(BaseException):
                pass

            def stop(done: int, *_: object) -> None:
                if done == 40:
                    raise Killed

            monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
            recipe = recipes.adjust(recipes.preset("tiny"), 40, recipe_options()[1:])
            with pytest.raises(Killed):
                ModelStage.open(out, "coarse", recipe, warm_start_from=baseline).train(stop)
            assert (out / "coarse" / "state").is_dir()
        result = ctf(*arguments)
        assert result.code == 0, result.err
    one, other = (tmp_path / name / "coarse" / "model.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()
    assert [x["step"] for x in lines(tmp_path / "killed")] == [0, 20, 40, 40]


def test_what_it_cannot_start_from(run: Path, baseline: Path, tmp_path: Path, ctf: Command) -> None:
    names, other = [tokenizer_hash(run)], Clusters.from_labels(torch.arange(V) % 4)
    with pytest.raises(UserError, match="predicts 8 clusters, which are not those of the run"):
        open_source(run, "coarse", other, names)
    with pytest.raises(UserError, match="full-vocabulary pipeline, without a fine model"):
        open_source(baseline, "fine", other, names)
    with pytest.raises(UserError, match=r"model\.safetensors: not found"):
        open_source(tmp_path, "coarse", other, names)
    vq, gpt = FIXTURES / "vq.pt", FIXTURES / "gpt.pt"
    llamagen.convert(vq, gpt, tmp_path / "llamagen", image_size=8, heads=4)
    with pytest.raises(UserError, match="has another tokenizer than the run"):
        open_source(tmp_path / "llamagen", "coarse", other, names)
    shutil.copytree(baseline, tmp_path / "other", symlinks=True)
    (tmp_path / "other" / "coarse" / "drafts.safetensors").unlink()  # of the grid that it had
    config = tmp_path / "other" / "coarse" / "config.json"
    config.write_text(config.read_text().replace('"grid": 4', '"grid": 8'))
    out = tmp_path / "out"
    assert ctf("clusters", "fit", run, "--count", 8, "--out", out).code == 0
    result = ctf("train", "coarse", out, "--warm-start", tmp_path / "other", "--preset", "tiny")
    assert (
        result.code == 2
        and "trained on a grid of 8 x 8, the tokens have a grid of 4 x 4" in result.err
    )


# --- CTF on a converted LlamaGen ------------------------------------------------------------------


def test_every_stage_on_a_converted_llamagen(tmp_path: Path, ctf: Command) -> None:
    images = save_images(tmp_path / "images")
    source, run = tmp_path / "llamagen", tmp_path / "run"
    vq, gpt, shape = FIXTURES / "vq.pt", FIXTURES / "gpt.pt", ("--image-size", 8, "--heads", 4)
    recipe = ("--preset", "tiny", "--steps", 20, "--set", "coarse_training.batch_size=8")
    for arguments in (
        ("convert", "llamagen", "--vq", vq, "--gpt", gpt, *shape, "--out", source),
        ("tokenizer", "evaluate", source, "--images", images),
        ("tokens", "extract", images, "--run", source, "--preset", "tiny"),
        ("clusters", "fit", source, "--count", 16, "--out", run),
        ("train", "coarse", run, "--warm-start", source, *recipe),
        ("train", "fine", run, *recipe, "fine.width=32", "fine.layers=1", "fine.heads=2"),
        ("sample", run, "--count", 2, "--out", tmp_path / "sheet.png"),
    ):
        result = ctf(*arguments)
        assert result.code == 0, result.err
    # What was converted has clusters of its own, which stay.
    refused = ctf("clusters", "fit", source, "--count", 16)
    assert refused.code == 2 and "another run: --out" in refused.err
    assert Pipeline.from_pretrained(source).clusters.largest == 1
    pipe = Pipeline.from_pretrained(run)
    assert pipe.coarse.config.class_token_rope == "zero"
    assert pipe.class_names == ("blue", "green", "red") and pipe.clusters.count == 16
    assert pipe.tokenizer.config.image_size == 8 and pipe.fine is not None
