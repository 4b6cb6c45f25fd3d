"""Pipelines on disk: saving and loading; parts that are missing, damaged or of other runs."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ctf import kernels
from ctf.common import storage
from ctf.common.errors import UserError
from ctf.models import clusters, drafts
from ctf.models.clusters import Clusters
from ctf.models.sampling import Sampling
from ctf.pipelines.folder import (
    CLUSTERS,
    PIPELINE_FILES,
    hash_pipeline,
    load_clusters,
    save_clusters,
)
from ctf.pipelines.pipeline import Pipeline
from ctf.training import stages
from tests.conftest import SIDE, read_files
from tests.pipelines.helpers import DRAFTS, LENGTH, PARTS, same, same_codes

CPU = torch.device("cpu")

# --- Saving and loading ---------------------------------------------------------------------------


def test_a_saved_pipeline_loads_as_it_was(pipe: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "copy"
    sampling = Sampling(guidance=1.5, guidance_schedule="linear", guidance_window=(0.25, 1.0))
    original = dataclasses.replace(pipe, sampling=sampling)
    original.save_pretrained(folder)
    assert sorted(read_files(folder)) == sorted((*PARTS, DRAFTS, "README.md"))
    assert sorted(PIPELINE_FILES) == sorted((*PARTS, DRAFTS))  # what is downloaded
    copy = Pipeline.from_pretrained(folder)
    assert copy.class_names == pipe.class_names
    assert copy.sampling == sampling
    card = (folder / "README.md").read_text()
    assert "guidance_schedule linear, guidance_window 0.25 to 1, fine_choice sample |" in card
    assert copy.origin == pipe.origin
    assert same(copy.sample([0, 1, 2], seed=4), original.sample([0, 1, 2], seed=4))
    before = read_files(folder)
    copy.save_pretrained(folder)  # over itself
    assert read_files(folder) == before


def test_equal_pipelines_give_equal_bytes(pipe: Pipeline, tmp_path: Path) -> None:
    for name in ("one", "other"):
        pipe.save_pretrained(tmp_path / name, license="mit")
    assert read_files(tmp_path / "one") == read_files(tmp_path / "other")
    # The licence is stored in the pipeline.
    copy = Pipeline.from_pretrained(tmp_path / "one")
    assert copy.origin == {**pipe.origin, "license": "mit"} != pipe.origin
    copy.save_pretrained(tmp_path / "third")
    assert read_files(tmp_path / "third") == read_files(tmp_path / "one")


def test_the_folder_of_a_run_can_be_moved(parts: Path, pipe: Pipeline) -> None:
    moved = Pipeline.from_pretrained(str(parts))
    assert same(moved.sample([0, 2], seed=1), pipe.sample([0, 2], seed=1))


def test_loaded_models_are_in_evaluation_mode(pipe: Pipeline) -> None:
    assert pipe.fine is not None
    for model in (pipe.tokenizer, pipe.coarse, pipe.fine):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert pipe.device == torch.device("cpu")
    images_BCHW = torch.zeros(2, 3, SIDE, SIDE)
    codes_BL = pipe.tokenizer.encode(images_BCHW)
    labels_BL = pipe.clusters.labels_V[codes_BL]
    classes_B = torch.tensor([0, 1])
    assert codes_BL.shape == (2, LENGTH)
    assert pipe.coarse(labels_BL, classes_B).shape == (2, LENGTH, pipe.clusters.count)
    assert pipe.fine(labels_BL, classes_B).shape == (2, LENGTH, pipe.clusters.largest)


def test_weights_in_half_precision_load_in_single(parts: Path) -> None:
    for stage in ("tokenizer", "coarse", "fine"):
        path = parts / stage / "model.safetensors"
        tensors, _ = storage.load_tensors(path)
        storage.save_tensors(path, {name: value.half() for name, value in tensors.items()})
    pipe = Pipeline.from_pretrained(parts)
    assert {p.dtype for p in pipe.coarse.parameters()} == {torch.float32}
    assert len(pipe.sample([0], seed=0).images) == 1


def test_a_name_without_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pipeline 'fashion': not a folder, a shipped"):
        Pipeline.from_pretrained("fashion")
    with pytest.raises(UserError, match=r"pipeline\.json: not found; is .* a folder made by ctf"):
        Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_other_folders_and_files_are_not_overwritten(
    pipe: Pipeline, tmp_path: Path, what: str
) -> None:
    target = tmp_path / "mine"
    if what == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "thesis.tex").write_text("mine")
    before = read_files(tmp_path)
    with pytest.raises(UserError, match="exists, but is not a pipeline"):
        pipe.save_pretrained(target)
    assert read_files(tmp_path) == before


@pytest.mark.skipif(not kernels.available("auto", CPU), reason="no packed layers")
def test_exact_engines_sample_and_save_the_same(run: Path, tmp_path: Path) -> None:
    eager = Pipeline.from_pretrained(run)
    packed = Pipeline.from_pretrained(run, engine="auto")
    assert same_codes(eager.sample([0, 1, 2], seed=3), packed.sample([0, 1, 2], seed=3))
    packed.save_pretrained(tmp_path / "packed")
    eager.save_pretrained(tmp_path / "eager")
    assert read_files(tmp_path / "packed") == read_files(tmp_path / "eager")


@pytest.mark.skipif(not kernels.available("int8", CPU), reason="no int8 layers")
def test_int8_cannot_be_saved(run: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(run, engine="int8")
    with pytest.raises(UserError, match="int8 or bf16 cannot be saved"):
        pipe.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# --- Drafts ---------------------------------------------------------------------------------------


def test_drafts_change_nothing_but_passes(parts: Path, run: Path, pipe: Pipeline) -> None:
    """A pipeline is the same without them."""
    without = Pipeline.from_pretrained(parts)
    assert without.coarse.drafts is None and pipe.coarse.drafts is not None
    assert hash_pipeline(parts) == hash_pipeline(run)
    for window in (1, 4, LENGTH):
        one, other = (p.sample([0, 1, 2], seed=3, window=window) for p in (pipe, without))
        assert same(one, other)


def test_drafts_are_saved_and_those_of_another_pipeline_removed(
    parts: Path, pipe: Pipeline, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "copy")
    copy = Pipeline.from_pretrained(tmp_path / "copy")
    assert pipe.coarse.drafts is not None and copy.coarse.drafts is not None
    tables, copies = pipe.coarse.drafts.tables(), copy.coarse.drafts.tables()
    assert all(torch.equal(tables[name], copies[name]) for name in tables)
    Pipeline.from_pretrained(parts).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / DRAFTS).exists()


def test_drafts_of_a_run_are_counted_in_its_training_images(run: Path, pipe: Pipeline) -> None:
    train, _ = stages.open_tokens(run)
    labels_NL = pipe.clusters.labels_V[train.codes(np.arange(len(train)))]
    expected = drafts.fit([labels_NL], pipe.coarse.config.grid, pipe.clusters.count)
    assert expected is not None and pipe.coarse.drafts is not None
    tables, got = expected.tables(), pipe.coarse.drafts.tables()
    assert all(torch.equal(tables[name], got[name]) for name in tables)


def test_drafts_that_are_none_are_refused(parts: Path, run: Path, tmp_path: Path) -> None:
    path = parts / DRAFTS
    tables, _ = storage.load_tensors(run / DRAFTS)
    for changed, message in (
        ({"left": tables["left"]}, "not a file of drafts: its tensors are left"),
        (
            {**tables, "position": tables["position"][1:]},
            f"drafts of {LENGTH - 1} labels of 8 clusters, expected {LENGTH} of 8",
        ),
    ):
        storage.save_tensors(path, changed)
        with pytest.raises(UserError) as error:
            Pipeline.from_pretrained(parts)
        assert message in str(error.value) and f"{path}: " in str(error.value)
        assert "delete it" in str(error.value)


# --- Parts that do not match ----------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_damaged_part_is_named(parts: Path, part: str, damage: str) -> None:
    path = parts / part
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as error:
        Pipeline.from_pretrained(parts)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_models_trained_with_other_clusters(parts: Path, pipe: Pipeline, stage: str) -> None:
    """They have the same shape; only the fingerprint differs."""
    labels_V = pipe.clusters.labels_V.roll(1)
    others = clusters.Clusters.from_labels(labels_V)
    save_clusters(others, parts / "clusters/clusters.safetensors")
    other = "fine" if stage == "coarse" else "coarse"
    config = json.loads((parts / other / "config.json").read_text())
    config["clusters"] = clusters.fingerprint(others)
    (parts / other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{stage}: trained with other clusters than those of"):
        Pipeline.from_pretrained(parts)


def test_clusters_of_another_codebook(parts: Path) -> None:
    save_clusters(clusters.identity(63), parts / "clusters" / "clusters.safetensors")
    with pytest.raises(UserError, match=r"clusters of 63 codes, .* has 64: parts of different"):
        Pipeline.from_pretrained(parts)


def test_another_number_of_classes(parts: Path) -> None:
    settings = json.loads((parts / "pipeline.json").read_text())
    settings["class_names"].append("violet")
    (parts / "pipeline.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"coarse: made for .* 3 classes, expected 4 and 4"):
        Pipeline.from_pretrained(parts)


def test_a_tokenizer_of_another_grid(parts: Path) -> None:
    config = json.loads((parts / "tokenizer" / "config.json").read_text())
    config["model"]["image_size"] = 2 * SIDE
    (parts / "tokenizer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"coarse: made for a grid of 4 .* expected 8 and 3"):
        Pipeline.from_pretrained(parts)


def test_a_coarse_model_instead_of_the_fine_one(parts: Path) -> None:
    shutil.rmtree(parts / "fine")
    shutil.copytree(parts / "coarse", parts / "fine")
    with pytest.raises(UserError, match="fine"):
        Pipeline.from_pretrained(parts)


@pytest.mark.parametrize("part", [p for p in PARTS if p.endswith(".json")])
@pytest.mark.parametrize("content", ["[]", "{}", '{"model": 3, "class_names": 4}', '"x"'])
def test_json_of_another_kind(parts: Path, part: str, content: str) -> None:
    (parts / part).write_text(content)
    with pytest.raises(UserError) as error:
        Pipeline.from_pretrained(parts)
    assert str((parts / part).parent) in str(error.value)


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [2, 0, 1], [0, 1, 0, 1, 2, 2, 2]])
def test_clusters_are_saved_and_loaded(tmp_path: Path, labels: list[int]) -> None:
    clusters = Clusters.from_labels(torch.tensor(labels))
    save_clusters(clusters, tmp_path / CLUSTERS)
    loaded = load_clusters(tmp_path / CLUSTERS)
    assert torch.equal(loaded.labels_V, clusters.labels_V)
    assert torch.equal(loaded.members_KS, clusters.members_KS)


def test_damaged_clusters(tmp_path: Path) -> None:
    path = tmp_path / CLUSTERS
    clusters = Clusters.from_labels(torch.tensor([0, 1, 0, 1]))

    def check(tensors: dict[str, Tensor], reason: str) -> None:
        storage.save_tensors(path, tensors)
        with pytest.raises(UserError, match=reason):
            load_clusters(path)

    good = {"labels_V": clusters.labels_V, "members_KS": clusters.members_KS}
    check({**good, "members_KS": clusters.members_KS.flip(1)}, "members do not match labels")
    check({**good, "labels_V": torch.tensor([0, 0, 0, 1])}, "members do not match labels")
    check({**good, "labels_V": torch.tensor([0, 2, 0, 2])}, "cluster 1 is empty")
    check({**good, "labels_V": torch.tensor([0, 1, 0, 9])}, "label 9 is above")
    check({"labels_V": clusters.labels_V}, "its tensors are labels_V;")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="truncated"):
        load_clusters(path)
    path.unlink()
    with pytest.raises(UserError, match="not found"):
        load_clusters(path)
