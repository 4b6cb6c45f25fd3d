"""`ctf reproduce` at the size of seconds: cells, kills, the report."""

import contextlib
import dataclasses
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.data.image_set import ImageSet
from ctf.data.images import open_images
from ctf.data.transforms import View
from ctf.evaluation.extractors import open_extractor
from ctf.models.clusters import ClustersConfig
from ctf.models.sizes import TokenizerShape, TransformerShape
from ctf.reproduce import cells, experiments, figure1, report, table1, table3
from ctf.reproduce.cells import Desk
from ctf.reproduce.plan import BUDGETS, FULL, Plan
from ctf.reproduce.subset import split_off
from ctf.training import cost
from ctf.training.recipes import GroupLoss, with_steps
from tests.conftest import CLASSES, SIDE, Command, save_pictures

COARSE = TransformerShape(width=32, layers=2, heads=2)
CODES, COUNT, LENGTH, STEPS, BATCH = 64, 8, 16, 20, 4


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    pictures = save_pictures(tmp_path_factory.mktemp("reproduce") / "discs", 40)
    training = dataclasses.replace(with_steps(FULL.training, STEPS), batch_size=BATCH)
    return Plan(
        source=str(pictures),
        image_size=SIDE,
        features=("fashion",),  # the faster one
        codebooks=(CODES,),
        counts=(COUNT,),
        other_counts=(4,),
        seeds=(0,),
        tokenizer=TokenizerShape(channels=8, latent_channels=16, largest_grid=4),
        tokenizer_training=dataclasses.replace(
            with_steps(FULL.tokenizer_training, STEPS), batch_size=8, perceptual_weight=0.0
        ),
        backbone=COARSE,
        baselines=(COARSE,),
        fine=TransformerShape(width=32, layers=1, heads=2),
        other_fines=(TransformerShape(width=16, layers=1, heads=2),),
        training=training,
        fine_training=training,
        samples=12,
        kept_back=12,
        search_samples=12,
        search_points=2,
        lengths=(0.5,),
        group_loss=GroupLoss(1.0, ClustersConfig(method="balanced", count=4)),
        pictures_of_details=12,
    )


@contextlib.contextmanager
def silent(name: str) -> Iterator[Callable[..., None]]:
    yield lambda *_: None


def desk(plan: Plan, folder: Path, progress: Any = silent) -> Desk:
    place = torch.device("cpu")
    return experiments.open_desk(plan, folder / "work", folder / "results", place, progress)


@pytest.fixture(scope="module")
def done(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table 1, computed."""
    folder = tmp_path_factory.mktemp("done")
    experiments.run(desk(plan, folder), plan, experiments.chosen(plan, "table1", None))
    return folder


def copied(plan: Plan, done: Path, folder: Path) -> Desk:
    """Of what is done, with results that a test may add to."""
    shutil.copytree(done / "results" / "cells", folder / "cells")
    return dataclasses.replace(desk(plan, done), results=folder)


def test_a_table_from_pictures_to_report(plan: Plan, done: Path) -> None:
    found = desk(plan, done)
    rows = [report.row(found, table1.row(plan, CODES, 0, ctf=ctf)) for ctf in (False, True)]
    for row in rows:
        assert row is not None
        low, high = row.interval("FID-fashion")
        assert low < row.value("FID-fashion") < high
        assert row.found["samples"] == plan.samples
    text = (done / "results" / "report.md").read_text()
    assert f"{rows[1].value('FID-fashion'):.4g}" in text  # type: ignore[union-attr]
    assert report.MISSING in text  # the other tables
    assert (done / "results" / "table1.png").is_file()
    settings = found.result(f"search-ctf-{CODES}")["found"]["best"]  # type: ignore[index]
    assert settings.keys() == {"guidance", "temperature", "fine_temperature"}
    for value in settings.values():
        assert f"| {value:g}, found by the search |" in text  # a line of Table 3


def test_a_random_member_has_no_cost(plan: Plan, done: Path, tmp_path: Path) -> None:
    here = copied(plan, done, tmp_path)
    (line,) = (line for line in table3.lines(plan) if line.choice == table3.MEMBER)
    drawn = storage.load_object(tmp_path / "cells" / f"table1-ctf-{CODES}-s0.json")
    drawn["asked"] = here.asked(line.cells[-1].name)
    drawn["found"]["settings"]["fine_temperature"] = table3.UNIFORM
    storage.save_json(tmp_path / "cells" / f"{line.cells[-1].name}.json", drawn)
    found, coarse = report.row(here, line.cells), here.result(f"coarse-{CODES}-{COUNT}-s0")
    assert found is not None and coarse is not None
    assert found.parameters == coarse["found"]["parameters"]
    assert found.flops == coarse["found"]["flops"]


def test_a_model_costs_what_it_was_started_from(plan: Plan, done: Path, tmp_path: Path) -> None:
    here = copied(plan, done, tmp_path)
    (line,) = (line for line in table3.lines(plan) if line.cells[-1].name == "table3-warm")
    of_usual = {
        "table3-warm": f"table1-ctf-{CODES}-s0",
        f"coarse-{CODES}-{COUNT}-s0-warm": f"coarse-{CODES}-{COUNT}-s0",
    }
    for name, usual in of_usual.items():
        result = storage.load_object(tmp_path / "cells" / f"{usual}.json")
        result["asked"] = here.asked(name)
        storage.save_json(tmp_path / "cells" / f"{name}.json", result)
    found = report.row(here, line.cells)
    alone = report.row(here, table1.row(plan, CODES, 0, ctf=True))
    start = report.row(here, table1.row(plan, CODES, 0, ctf=False))
    assert found is not None and alone is not None and start is not None
    assert found.flops == alone.flops + start.flops
    assert found.seconds == alone.seconds + start.seconds
    assert found.parameters == alone.parameters


@pytest.mark.parametrize(
    ("change", "holds"),
    [(100.0, "yes"), (-100.0, "no: the contrary"), (0.0, report.OVERLAP)],
)
def test_lines_are_compared_by_their_intervals(
    plan: Plan, done: Path, tmp_path: Path, change: float, holds: str
) -> None:
    here = copied(plan, done, tmp_path)
    likeliest = storage.load_object(tmp_path / "cells" / f"table1-ctf-{CODES}-s0.json")
    score = likeliest["found"]["scores"]["FID-fashion"]
    score.update({key: score[key] + change for key in ("value", "low", "high")})
    likeliest["asked"] = here.asked("table3-fine-top-k-1")
    storage.save_json(tmp_path / "cells" / "table3-fine-top-k-1.json", likeliest)
    report.write(here, plan)
    lines = (tmp_path / "report.md").read_text().splitlines()
    (line,) = (line for line in lines if "drawing details beats" in line)
    assert line.endswith(f"| {holds} |")


def test_the_fine_stage_alone(plan: Plan, done: Path, tmp_path: Path) -> None:
    """Every network looks at the same draws, so its scores do not depend on those before it."""
    here = copied(plan, done, tmp_path)
    ways = {way: cell.name for way, cell in figure1.details(plan).items()}
    here.compute([*ways.values()])
    found = {way: here.result(name)["found"] for way, name in ways.items()}  # type: ignore[index]
    assert len({distances["FID-fashion"]["value"] for distances in found.values()}) == len(ways)
    report.write(here, plan)
    text = (tmp_path / "report.md").read_text()
    for way, distances in found.items():
        assert {*distances} == {"FID-fashion"}
        assert f"| {way} | {distances['FID-fashion']['value']:.4g} |" in text
    other = dataclasses.replace(
        here,
        work=tmp_path / "work",
        results=tmp_path / "again",
        place=dataclasses.replace(here.place, features=("lite0", "fashion")),
    )
    made = shutil.ignore_patterns(*ways.values())
    shutil.copytree(here.work, other.work, symlinks=True, ignore=made)
    name = ways["random members"]
    other.compute([name])
    again = other.result(name)["found"]  # type: ignore[index]
    assert again["FID-fashion"] == found["random members"]["FID-fashion"]
    assert again["FID-Lite0"]["value"] > 0


def test_searches_have_pictures_of_their_own(plan: Plan, done: Path) -> None:
    """They are of all classes, and no training sees them."""
    here = desk(plan, done)
    everything = open_images(plan.source, plan.image_size).train
    left, kept = here.place.images.train, here.place.kept_back
    assert len(kept) == plan.kept_back and len(left) + len(kept) == len(everything)
    assert {*kept.classes_N} == {*range(len(CLASSES))}

    def pictures(images: ImageSet) -> list[bytes]:
        return [picture.tobytes() for picture in images.read(range(len(images)))]

    assert sorted(pictures(left) + pictures(kept)) == sorted(pictures(everything))
    assert not {*pictures(left)} & {*pictures(kept)}
    found = here.result(f"tokens-{CODES}")
    assert found is not None
    assert found["found"]["pictures"] == len(left) + len(here.place.images.val)


def test_some_pictures_are_split_off(pictures: Path) -> None:
    whole = open_images(str(pictures), 16).train
    rest, some = split_off(whole, 3)
    assert len(some) == 3 and len(rest) == len(whole) - 3
    apart = [0, len(whole) // 3, 2 * len(whole) // 3]
    left = [row for row in range(len(whole)) if row not in apart]
    for part, numbers in ((some, apart), (rest, left)):
        assert np.array_equal(part.classes_N, whole.classes_N[numbers])
        assert part.class_names == whole.class_names and part.mirrors == whole.mirrors
        assert np.array_equal(part.read([2, 0]), whole.read([numbers[2], numbers[0]]))
        views = (View(), View(flip=True))
        for one, other in zip(
            part.read_views([1, 2], views), whole.read_views(numbers[1:3], views), strict=True
        ):
            assert np.array_equal(one, other)
    assert len({whole.fingerprint, rest.fingerprint, some.fingerprint}) == 3
    assert split_off(whole, 3)[1].fingerprint == some.fingerprint
    for count in (0, len(whole)):
        with pytest.raises(ValueError, match=f"{count} pictures of {len(whole)}"):
            split_off(whole, count)


@pytest.mark.parametrize(("ours", "holds"), [([2.0, 1.0, 0.5], "no"), ([1.0, 1.0, 4.0], "yes")])
def test_speeds_are_compared_round_by_round(
    plan: Plan, done: Path, tmp_path: Path, ours: list[float], holds: str
) -> None:
    """The machine may slow down between rounds: the baseline's median is 1.0 both times."""
    here = copied(plan, done, tmp_path)
    name, theirs = f"table2-{CODES}", [1.0, 0.5, 4.0]
    batches = ("1", "64")
    times = {"baseline": dict.fromkeys(batches, theirs), "CTF": dict.fromkeys(batches, ours)}
    stored = {"cell": name, "asked": here.asked(name), "found": {"seconds": times}}
    storage.save_json(tmp_path / "cells" / f"{name}.json", {**stored, "seconds": 1, "where": {}})
    report.write(here, plan)
    text = (tmp_path / "report.md").read_text()
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    assert f"| 64 | 64.00 (16.00 to 128.00) | {64 / sorted(ours)[1]:.2f}" in text
    assert f"| {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f}) |" in text
    (line,) = (line for line in text.splitlines() if "sampling is no slower" in line)
    assert line.endswith(f"| {holds} |")


def test_what_is_done_is_not_computed_again(plan: Plan, done: Path, tmp_path: Path) -> None:
    def fail(name: str) -> Any:
        raise AssertionError(f"{name} is computed")

    names = experiments.chosen(plan, "table1", None)
    before = {path: path.stat().st_mtime_ns for path in (done / "results" / "cells").iterdir()}
    desk(plan, done, fail).compute(names)
    assert {p: p.stat().st_mtime_ns for p in (done / "results" / "cells").iterdir()} == before
    # Nor is it where only the results are at hand.
    desk_elsewhere = dataclasses.replace(desk(plan, done, fail), work=tmp_path)
    desk_elsewhere.compute(names)
    states = dict(row[:2] for row in experiments.status(desk_elsewhere))
    assert states[f"baseline-{CODES}-s0"] == "done, its files are elsewhere"


def test_status(plan: Plan, done: Path) -> None:
    (begun := done / "work" / f"table2-{CODES}").mkdir()
    states = {name: how for name, how, _ in experiments.status(desk(plan, done))}
    begun.rmdir()
    assert list(states) == list(experiments.cells(plan, "all"))
    assert {states[name] for name in experiments.chosen(plan, "table1", None)} == {"done"}
    assert states[f"table2-{CODES}"] == "begun"
    assert states["table3-random"] == "left"


def test_killed_cells_end_the_same(plan: Plan, done: Path, tmp_path: Path) -> None:
    """In the middle of every stage of CTF, and of its scores."""
    name = f"table1-ctf-{CODES}-s0"
    left = 0

    @contextlib.contextmanager
    def dying(stage: str) -> Iterator[Callable[..., None]]:
        nonlocal left

        def report(*_: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt

        yield report

    kills = 0
    while True:
        left = 1 + kills // 2  # further on in the end, so it comes to one
        try:
            desk(plan, tmp_path, dying).compute([name])
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 3
    one, other = (desk(plan, f).result(name) for f in (done, tmp_path))
    assert one is not None
    assert other is not None
    for part in ("scores", "settings", "pictures"):
        assert one["found"][part] == other["found"][part]
    assert other["seconds"] > 0


def _made(plan: Plan, folder: Path, names: list[str]) -> list[str]:
    """Computes cells in a process of its own; returns those that it made itself."""
    made = []
    here = desk(plan, folder)
    make_alone = Desk._make_alone

    def counted(self: Desk, name: str) -> None:
        made.extend([] if (self.work / name / cells.RESULT).is_file() else [name])
        make_alone(self, name)

    Desk._make_alone = counted  # type: ignore[method-assign]
    experiments.run(here, plan, names)
    return made


def test_processes_share_the_cells(plan: Plan, done: Path, tmp_path: Path) -> None:
    names = experiments.chosen(plan, "table1", None)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        both = [pool.submit(_made, plan, tmp_path, names) for _ in range(2)]
        made = [name for each in both for name in each.result(timeout=120)]
    assert sorted(made) == sorted(names)
    for name in names:
        one, other = (desk(plan, folder).result(name) for folder in (done, tmp_path))
        assert one is not None and other is not None
        assert one["found"].get("scores") == other["found"].get("scores")
        assert one["found"].get("loss") == other["found"].get("loss")


def test_what_another_makes_is_left_to_it(plan: Plan, done: Path, tmp_path: Path) -> None:
    """And what is timed waits until nothing else is left."""
    here = dataclasses.replace(desk(plan, done), results=tmp_path)
    timed, clusters = f"table2-{CODES}", f"clusters-{CODES}-{COUNT}"
    lock = FileLock(here.work / f".{clusters}.lock", blocking=False)
    order = []

    def then() -> None:
        order.append({path.stem for path in (tmp_path / "cells").iterdir()})
        lock.release(force=True)

    with lock:
        here.compute([timed, clusters, f"clusters-{CODES}-identity"], then)
    assert len(order) == 3
    assert clusters not in order[0] and timed not in order[1] and timed in order[2]


def test_helpers(tmp_path: Path) -> None:
    with experiments.helpers(2, ["cost", "--help"], tmp_path):
        pass
    logs = [(tmp_path / f"helper-{number}.log").read_text() for number in (1, 2)]
    assert all(log.startswith("usage: ctf cost") for log in logs)
    began = time.monotonic()
    serve = ["studio", "fashion-mnist", "--port", "0"]
    with pytest.raises(KeyboardInterrupt), experiments.helpers(1, serve, tmp_path):
        raise KeyboardInterrupt
    assert time.monotonic() - began < 60


def test_flops_and_parameters(plan: Plan, done: Path) -> None:
    width, layers, hidden = COARSE.width, COARSE.layers, 256  # SwiGLU is rounded up to 256
    blocks = layers * (4 * width**2 + 3 * width * hidden)
    each = LENGTH * (6 * blocks + 12 * layers * width * LENGTH) + 6 * LENGTH * width * CODES
    baseline = desk(plan, done).result(f"baseline-{CODES}-s0")
    assert baseline is not None
    assert baseline["found"]["flops"] == STEPS * BATCH * each
    assert baseline["found"]["tokens_seen"] == STEPS * BATCH * LENGTH
    norms = (2 * layers + 1) * width
    tables = (2 * CODES + len(CLASSES) + 1) * width
    assert baseline["found"]["parameters"] == blocks + norms + tables


def test_another_question_is_refused(plan: Plan, done: Path) -> None:
    other = dataclasses.replace(plan, samples=24)
    with pytest.raises(UserError, match=r"samples was 12, now 24"):
        desk(other, done).compute([f"table1-ctf-{CODES}-s0"])


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_cell_comes_after_what_it_needs(budget: str) -> None:
    plan = BUDGETS[budget]
    for what in (*experiments.PARTS, "all"):
        seen: set[str] = set()
        for name, cell in experiments.cells(plan, what).items():
            assert {*cell.job.needs} <= seen
            seen.add(name)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_baseline_is_not_smaller(budget: str) -> None:
    """Nor cheaper: a fair comparison."""
    plan = BUDGETS[budget]
    for codes in plan.codebooks:
        count = plan.count(codes)
        base, backbone, fine = (
            shape.config(8, 10)
            for shape in (plan.baselines[plan.codebooks.index(codes)], plan.backbone, plan.fine)
        )
        parameters = [
            cost.count(lambda c=config, i=inputs, o=outputs: cost.transformer(c, i, o))  # type: ignore[misc]
            for config, inputs, outputs in (
                (base, codes, codes),
                (backbone, count, count),
                (fine, count, codes),
            )
        ]
        assert parameters[0] >= parameters[1] + parameters[2]
        flops = [
            cost.transformer_flops(base, 64, codes),
            cost.transformer_flops(backbone, 64, count),
            cost.transformer_flops(fine, 65, codes // count),
        ]
        assert flops[0] >= flops[1] + flops[2]


def test_lines_of_table_3(plan: Plan) -> None:
    lines = table3.lines(plan)
    parts = list(dict.fromkeys(line.part for line in lines))
    assert [part[0] for part in parts[:6]] == [*"abcdef"]
    assert set(parts) - set(report.PAPER_TABLE3) == {"beyond the paper"}
    for line in lines:
        assert line.cells[-1].name.startswith(("table1-", "table3-"))


def test_the_command(ctf: Command, tmp_path: Path) -> None:
    common = ("--budget", "small", "--out", tmp_path / "out", "--results", tmp_path / "results")
    listed = ctf("reproduce", "status", *common)
    assert listed.code == 0
    assert f"0 of {len(experiments.cells(BUDGETS['small'], 'all'))} cells are done" in listed.out
    dry = ctf("reproduce", "table1", *common, "--dry-run")
    assert dry.code == 0
    assert "tokenizer-16384" in dry.out
    wrong = ctf("reproduce", "table1", *common, "--only", "tokenizer-16348")
    assert wrong.code == 2
    assert "did you mean 'tokenizer-16384'" in wrong.err
    assert not list(tmp_path.iterdir())
    assert ctf("reproduce", "report", *common).code == 0
    assert report.MISSING in (tmp_path / "results" / "small" / "report.md").read_text()


def test_results_are_plain_json(done: Path) -> None:
    for path in (done / "results" / "cells").iterdir():
        stored = json.loads(path.read_text())
        assert stored.keys() == {"cell", "asked", "found", "seconds", "where"}
        assert stored["cell"] == path.stem
        assert stored["where"]["threads"] == "1"
        assert storage.load_object(path) == stored


def test_names_of_scores_are_those_of_the_networks() -> None:
    for name, suffix in report.SUFFIXES.items():
        assert open_extractor(name).suffix == suffix
    assert {name for plan in BUDGETS.values() for name in plan.features} <= report.SUFFIXES.keys()
