"""The pipeline: loaded, drawn from, saved; the same image in any batch; parts that do not match."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ctf as package
from ctf.common import storage
from ctf.common.errors import UserError
from ctf.models import clusters
from ctf.models.sampling import Sampling
from ctf.pipelines import generation
from ctf.pipelines.folder import PIPELINE_FILES, save_clusters
from ctf.pipelines.generation import Samples
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import CLASSES, SIDE, read_files

LENGTH = 16  # of the run's 4 x 4 tokens
PARTS = (
    "pipeline.json", "clusters/clusters.safetensors", "tokenizer/config.json",
    "tokenizer/model.safetensors", "coarse/config.json", "coarse/model.safetensors",
    "fine/config.json", "fine/model.safetensors",
)  # fmt: skip


@pytest.fixture
def parts(run: Path, tmp_path: Path) -> Path:
    """What of the run is a pipeline, to be changed."""
    for part in PARTS:
        (tmp_path / "parts" / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / part, tmp_path / "parts" / part)
    return tmp_path / "parts"


def pixels(samples: Samples) -> np.ndarray:
    return np.stack([np.asarray(image) for image in samples.images])


def same(one: Samples, other: Samples) -> bool:
    return (
        torch.equal(one.codes, other.codes)
        and torch.equal(one.coarse, other.coarse)
        and bool((pixels(one) == pixels(other)).all())
    )


# --- what is drawn --------------------------------------------------------------------------------


def test_samples(pipe: Pipeline) -> None:
    drawn = pipe.sample([0, 1, 2, 1], seed=5)
    assert [image.size for image in drawn.images] == [(SIDE, SIDE)] * 4
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in drawn.images)
    assert drawn.codes.shape == drawn.coarse.shape == (4, LENGTH)
    assert drawn.codes.dtype == drawn.coarse.dtype == torch.int64
    assert int(drawn.codes.min()) >= 0 and int(drawn.codes.max()) < pipe.clusters.codebook_size
    # A sampled code is always a member of its coarse label.
    assert torch.equal(pipe.clusters.labels_V[drawn.codes], drawn.coarse)
    members = pipe.clusters.members_KS[drawn.coarse]
    assert bool((members == drawn.codes[..., None]).any(-1).all())
    # The images are the codes, decoded.
    decoded = pipe.tokenizer.decode(drawn.codes)
    expected = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert int(np.abs(pixels(drawn).astype(int) - expected).max()) <= 1


@pytest.mark.parametrize(
    "settings", [{}, {"guidance": 1.0, "fine_guidance": 3.0}, {"top_k": 3, "fine_top_p": 0.5}]
)
def test_an_image_depends_on_its_seed_class_and_settings_alone(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, settings: dict[str, float]
) -> None:
    classes = [0, 1, 2, 2, 1, 0, 0]
    together = pipe.sample(classes, seed=10, **settings)
    monkeypatch.setattr(generation, "BATCH_SIZE", 3)
    reported: list[tuple[int, int]] = []
    in_batches = pipe.sample(
        classes, seed=10, progress=lambda *given: reported.append(given), **settings
    )
    assert reported == [(3, 7), (6, 7), (7, 7)]
    alone = [pipe.sample([c], seed=10 + i, **settings) for i, c in enumerate(classes)]
    for other in (in_batches, Samples(
        [a.images[0] for a in alone],
        torch.cat([a.codes for a in alone]),
        torch.cat([a.coarse for a in alone]),
    )):  # fmt: skip
        assert torch.equal(together.codes, other.codes)
        assert torch.equal(together.coarse, other.coarse)
        # Up to the rounding of the kernels.
        assert int(np.abs(pixels(together).astype(int) - pixels(other)).max()) <= 1


def test_again_is_the_same_and_another_seed_is_not(pipe: Pipeline) -> None:
    torch.manual_seed(1)
    first = pipe.sample([0, 1], seed=3)
    torch.manual_seed(2)
    assert same(first, pipe.sample([0, 1], seed=3))
    assert not torch.equal(first.codes, pipe.sample([0, 1], seed=5).codes)
    assert torch.equal(first.codes[1], pipe.sample([1], seed=4).codes[0])


def test_the_class_matters(pipe: Pipeline) -> None:
    drawn = [pipe.sample([c] * 8, seed=0).codes for c in range(3)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_classes_by_name(pipe: Pipeline) -> None:
    assert pipe.class_names == CLASSES == ("blue", "green", "red")
    assert pipe.class_numbers(["red", 0, "1", np.int64(2)]) == [2, 0, 1, 2]
    assert same(pipe.sample(["red", "blue"], seed=1), pipe.sample([2, 0], seed=1))


def test_a_class_whose_name_is_a_number_goes_before_the_number(pipe: Pipeline) -> None:
    named = dataclasses.replace(pipe, class_names=("2", "1", "0"))
    assert named.class_numbers(["2", "0", 2]) == [0, 2, 2]


def test_defaults_are_the_pipelines(pipe: Pipeline) -> None:
    greedy = dataclasses.replace(pipe, sampling=Sampling(top_k=1, fine_top_k=1))
    assert same(greedy.sample([1], seed=0), pipe.sample([1], seed=0, top_k=1, fine_top_k=1))
    assert same(greedy.sample([1], seed=0), greedy.sample([1], seed=99))
    assert not same(greedy.sample([1], seed=0), greedy.sample([1], seed=0, top_k=0))


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        ([3], {}, "class 3 of 3: expected 0 to 2, or a name: blue, green, red"),
        ([-1], {}, "class -1 of 3"),
        (["gren"], {}, "unknown class 'gren': did you mean 'green'?"),
        (["7"], {}, "class 7 of 3"),
        ([], {}, "got 0 images to sample, expected 1 or more"),
        ([0], {"guidence": 2.0}, "unknown setting 'guidence': did you mean 'guidance'?"),
        ([0], {"temperature": 0.0}, "temperature: got 0.0"),
        ([0], {"fine_top_p": 1.5}, "fine_top_p: got 1.5"),
        ([0], {"top_k": -1}, "top_k: got -1"),
        ([0], {"guidance_window": (1, 0)}, "guidance_window: got (1, 0)"),
        ([0], {"guidance_schedule": "lin"}, "got 'lin': did you mean 'linear'?"),
    ],
)
def test_mistakes(
    pipe: Pipeline, classes: list[Any], settings: dict[str, Any], message: str
) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: pipe.sample(classes, **settings),
        lambda: pipe.stream(classes, **settings),  # at once, not at the first event
        lambda: pipe.refine(classes, torch.zeros(LENGTH, dtype=torch.int64), **settings),
    )
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        assert message in str(caught.value)


def test_a_class_that_is_no_number_is_the_programs_mistake(pipe: Pipeline) -> None:
    with pytest.raises(TypeError):
        pipe.sample([0.5])  # type: ignore[list-item]


# --- saved and loaded -----------------------------------------------------------------------------


def test_saved_and_loaded(pipe: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "copy"
    sampling = Sampling(guidance=1.5, guidance_schedule="linear", guidance_window=(0.25, 1.0))
    chosen = dataclasses.replace(pipe, sampling=sampling)
    chosen.save_pretrained(folder)
    assert sorted(read_files(folder)) == sorted((*PARTS, "README.md"))
    assert sorted(PIPELINE_FILES) == sorted(PARTS)  # which is what is downloaded
    copy = Pipeline.from_pretrained(folder)
    assert copy.class_names == pipe.class_names
    assert copy.sampling == sampling
    card = (folder / "README.md").read_text()
    assert "guidance_schedule linear, guidance_window 0.25 to 1 |" in card
    assert copy.origin == pipe.origin
    assert same(copy.sample([0, 1, 2], seed=4), chosen.sample([0, 1, 2], seed=4))
    before = read_files(folder)
    copy.save_pretrained(folder)  # over itself
    assert read_files(folder) == before


def test_equal_pipelines_are_equal_bytes(pipe: Pipeline, tmp_path: Path) -> None:
    for name in ("one", "other"):
        pipe.save_pretrained(tmp_path / name, license="mit")
    assert read_files(tmp_path / "one") == read_files(tmp_path / "other")
    # The licence stays with the pipeline.
    copy = Pipeline.from_pretrained(tmp_path / "one")
    assert copy.origin == {**pipe.origin, "license": "mit"} != pipe.origin
    copy.save_pretrained(tmp_path / "third")
    assert read_files(tmp_path / "third") == read_files(tmp_path / "one")


def test_a_run_is_a_pipeline_wherever_it_is(parts: Path, pipe: Pipeline) -> None:
    moved = Pipeline.from_pretrained(str(parts))
    assert same(moved.sample([0, 2], seed=1), pipe.sample([0, 2], seed=1))


def test_ready_to_draw(pipe: Pipeline) -> None:
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


def test_half_precision_weights_load(parts: Path) -> None:
    for stage in ("tokenizer", "coarse", "fine"):
        path = parts / stage / "model.safetensors"
        tensors, _ = storage.load_tensors(path)
        storage.save_tensors(path, {name: value.half() for name, value in tensors.items()})
    pipe = Pipeline.from_pretrained(parts)
    assert {p.dtype for p in pipe.coarse.parameters()} == {torch.float32}
    assert len(pipe.sample([0], seed=0).images) == 1


def test_names_of_the_package() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert package.Pipeline is Pipeline


def test_no_pipeline_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pipeline 'fashion': not a folder, a shipped"):
        Pipeline.from_pretrained("fashion")
    with pytest.raises(UserError, match=r"pipeline\.json: not found; is .* a folder made by ctf"):
        Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_something_else_is_not_written_over(pipe: Pipeline, tmp_path: Path, what: str) -> None:
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


# --- parts that do not match ----------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_missing_or_damaged_part_is_named(parts: Path, part: str, damage: str) -> None:
    path = parts / part
    content = path.read_bytes()
    path.unlink()
    if damage == "cut short":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as caught:
        Pipeline.from_pretrained(parts)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_models_of_other_clusters(parts: Path, pipe: Pipeline, stage: str) -> None:
    """Of the same shape, so that nothing but the fingerprint tells them apart."""
    labels_V = pipe.clusters.labels_V.roll(1)
    save_clusters(clusters.Clusters.from_labels(labels_V), parts / "clusters/clusters.safetensors")
    other = "fine" if stage == "coarse" else "coarse"
    config = json.loads((parts / other / "config.json").read_text())
    config["clusters"] = clusters.fingerprint(clusters.Clusters.from_labels(labels_V))
    (parts / other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{stage}: trained with other clusters than those of"):
        Pipeline.from_pretrained(parts)


def test_clusters_of_another_codebook(parts: Path) -> None:
    save_clusters(clusters.identity(63), parts / "clusters" / "clusters.safetensors")
    with pytest.raises(UserError, match=r"clusters of 63 codes, .* has 64: parts of different"):
        Pipeline.from_pretrained(parts)


def test_names_of_other_classes(parts: Path) -> None:
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


def test_stages_in_each_others_place(parts: Path) -> None:
    shutil.rmtree(parts / "fine")
    shutil.copytree(parts / "coarse", parts / "fine")
    with pytest.raises(UserError, match="fine"):
        Pipeline.from_pretrained(parts)


@pytest.mark.parametrize("part", [p for p in PARTS if p.endswith(".json")])
@pytest.mark.parametrize("content", ["[]", "{}", '{"model": 3, "class_names": 4}', '"x"'])
def test_json_of_something_else(parts: Path, part: str, content: str) -> None:
    (parts / part).write_text(content)
    with pytest.raises(UserError) as caught:
        Pipeline.from_pretrained(parts)
    assert str((parts / part).parent) in str(caught.value)
