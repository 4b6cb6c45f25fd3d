"""Searches, and the fine stage alone."""

import dataclasses
import shutil
from pathlib import Path

import torch

from ctf.common import storage
from ctf.data.image_set import ImageSet
from ctf.data.images import open_images
from ctf.models.noise import noise_keys
from ctf.models.parallel import CoarseSampler
from ctf.models.sampling import Sampling
from ctf.pipelines.folder import load_clusters, load_coarse
from ctf.reproduce import additions, experiments, report, runner, systems
from ctf.reproduce.cells import Workspace
from tests.conftest import CLASSES, SIDE
from tests.reproduce.conftest import CLUSTERS, CODES, store


def test_searches_have_images_of_their_own(space: Workspace) -> None:
    """They are of all classes, and no model is trained on them."""
    everything = open_images(space.plan.source, space.plan.image_size).train
    train, reserved = space.images.train, space.reserved
    assert len(reserved) == space.plan.reserved
    assert len(train) + len(reserved) == len(everything)
    assert {*reserved.classes_N} == {*range(len(CLASSES))}

    def images(part: ImageSet) -> list[bytes]:
        return [image.tobytes() for image in part.read(range(len(part)))]

    assert sorted(images(train) + images(reserved)) == sorted(images(everything))
    assert not {*images(train)} & {*images(reserved)}
    tokens = space.outcome(systems.clusters(space.plan, CODES).tokens)
    assert tokens == {"pictures": len(train) + len(space.images.val)}


def test_details_do_not_depend_on_the_networks_that_score_them(
    copied: Workspace, tmp_path: Path
) -> None:
    cells = experiments.details(copied.plan)
    runner.compute(copied, [*cells.values()])
    outcomes = {label: copied.outcome(cell) for label, cell in cells.items()}
    assert all({*outcome} == {"FID-fashion"} for outcome in outcomes.values() if outcome)
    values = {label: o["FID-fashion"]["value"] for label, o in outcomes.items() if o is not None}
    assert len({*values.values()}) == len(cells)
    report.write(copied)
    text = (copied.results / "report.md").read_text()
    assert all(f"| {label} | {value:.4g} |" in text for label, value in values.items())
    other = dataclasses.replace(
        copied,
        work=tmp_path / "work",
        results=tmp_path / "again",
        plan=dataclasses.replace(copied.plan, features=("lite0", "fashion")),
    )
    ours = shutil.ignore_patterns(*(cell.name for cell in cells.values()))
    shutil.copytree(copied.work, other.work, symlinks=True, ignore=ours)
    cell = cells["random members"]
    runner.compute(other, [cell])
    again = other.outcome(cell)
    assert again is not None
    assert again["FID-fashion"] == outcomes["random members"]["FID-fashion"]  # type: ignore[index]
    assert again["FID-Lite0"]["value"] > 0


def test_both_samplers_are_timed_with_and_without_parallel_sampling(copied: Workspace) -> None:
    """In few rounds; the report shows them as those of the plan."""
    cell = experiments.table2(copied.plan, parallel=True)
    short = dataclasses.replace(cell, name="speed", batches=(1, 2), rounds=2)
    runner.compute(copied, [short])
    outcome = copied.outcome(short)
    assert outcome is not None
    names = ["baseline", "CTF", "baseline, in parallel", "CTF, in parallel"]
    assert [*outcome["seconds"]] == [*outcome["passes"]] == names
    length = (SIDE // 8) ** 2
    for name, each in outcome["seconds"].items():
        assert {batch: len(rounds) for batch, rounds in each.items()} == {"1": 2, "2": 2}
        for passes in outcome["passes"][name].values():
            assert passes == length if "parallel" not in name else 1 <= passes <= length
    storage.save_json(
        copied.results / "cells" / f"{cell.name}.json",
        {"asked": cell.to_json(), "found": outcome, "seconds": 1, "where": {}},
    )
    report.write(copied)
    text = (copied.results / "report.md").read_text()
    for slower, faster in (names[::2], names[1::2], names[2:]):
        assert f"| batch | {slower} | {faster} | how many times as fast |" in text
    one = outcome["passes"]["CTF, in parallel"]["1"]
    assert f"CTF {one:.0f}." in text


def test_passes_are_counted_for_baseline_and_ctf(copied: Workspace) -> None:
    """Of the plan's models; the report has them by window, guidance and temperature."""
    cells = {
        key: dataclasses.replace(cell, name=f"short-{cell.name}", images=6)
        for key, cell in additions.passes(copied.plan).items()
        if key[1] in (CLUSTERS, CODES)  # no other models are there
    }
    assert [*cells] == [(CODES, CLUSTERS), (CODES, CODES)]
    report.write(copied)
    text = (copied.results / "report.md").read_text()
    assert "## Passes of an image" in text and not (copied.results / "passes.png").exists()
    runner.compute(copied, [*cells.values()])
    length = (SIDE // 8) ** 2
    for (codes, labels), cell in cells.items():
        outcome = copied.outcome(cell)
        assert outcome is not None
        assert outcome["length"] == length and outcome["labels"] == labels
        ways = {
            (p["window"], p["guidance"], p["temperature"], p["drafts"]): p
            for p in outcome["passes"]
        }
        assert len(ways) == 3 + 9 + 4  # W = 16 once for both tables
        for (window, *_), each in ways.items():
            assert max(1, length / window) <= each["mean"] <= length
            assert each["standard_error"] >= 0
        run = copied.run(cell.coarse)
        clusters = load_clusters(run / "clusters" / "clusters.safetensors")
        model = load_coarse(run / "coarse", clusters, copied.device)
        assert model.drafts is not None  # those of the same tokens
        for guidance, temperature, with_drafts in ((2.0, 1.0, True), (4.0, 0.8, False)):
            sampled = Sampling(guidance=guidance, temperature=temperature)
            model.drafts = model.drafts if with_drafts else None
            sampler = CoarseSampler(
                model,
                torch.arange(6) % model.config.classes,
                noise_keys(range(6), length)[:, 0],
                sampled,
            )
            while not sampler.done:
                sampler.advance(16)
            way = 16, guidance, temperature, with_drafts
            assert ways[way]["mean"] == sum(sampler.passes) / 6
        whole = additions.passes(copied.plan)[codes, labels]
        store(copied, whole, cell)
    report.write(copied)
    text = (copied.results / "report.md").read_text()
    assert (copied.results / "passes.png").is_file()
    outcome = copied.outcome(cells[CODES, CODES])
    assert outcome is not None
    first = outcome["passes"][0]
    assert (
        f"| baseline, V = {CODES} | {first['mean']:.1f} ({first['standard_error']:.1f}) |" in text
    )
    assert f"| CTF, V = {CODES}, K = 4 | not computed yet |" in text
    assert f"at V = {CODES}. With passes that take equally long" in text
