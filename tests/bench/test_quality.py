"""`ctf bench quality`: likelihoods are right, engines are compared."""

from pathlib import Path

import pytest
import torch

from ctf.bench import quality
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import Command


def test_likelihoods_are_those_of_the_teacher_forced_models(run: Path) -> None:
    pipe = Pipeline.from_pretrained(run)
    codes_NL = torch.randint(pipe.clusters.codebook_size, (3, pipe.coarse.config.length))
    classes_N = torch.tensor([0, 1, 0])
    labels_NL = pipe.clusters.labels_V[codes_NL]
    coarse, fine = quality.cross_entropy(pipe, codes_NL, classes_N)
    assert pipe.fine is not None
    for nats, logits, targets in (
        (coarse, pipe.coarse(labels_NL, classes_N), labels_NL),
        (fine, pipe.fine(labels_NL, classes_N), pipe.fine.choices(codes_NL)),
    ):
        expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
        assert nats == pytest.approx(float(expected), rel=1e-5)


def test_engines_are_compared_on_the_shipped_pipeline(ctf: Command) -> None:
    result = ctf("bench", "quality", "--samples", 20, "--held-out", 100)
    assert result.code == 0, result.err
    cells = {
        row[0]: row[1:]
        for line in result.out.splitlines()
        if (row := [cell.strip() for cell in line.split("│")[1:-1]])
    }
    exact, same, near = (cells[name] for name in ("eager", "auto", "int8"))
    assert same[:3] == exact[:3]
    assert abs(float(near[3].rstrip("%"))) < 1


@pytest.mark.parametrize("option", ["samples", "held-out"])
def test_a_number_below_1_is_an_error(ctf: Command, option: str) -> None:
    result = ctf("bench", "quality", f"--{option}", 0)
    assert result.code == 2
    assert f"{option.replace('-', '_')}: got 0, expected 1 or more" in result.err
