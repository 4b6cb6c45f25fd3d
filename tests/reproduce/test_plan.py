"""The budgets compare fairly."""

import pytest

from ctf.common.errors import UserError
from ctf.data.images import open_images
from ctf.models.sizes import parameters as count_parameters
from ctf.models.sizes import training_flops
from ctf.reproduce import experiments
from ctf.reproduce.plan import FULL, PLANS, Plan, folder_of, plan_of

EACH = [pytest.param(p, id=f"{i}-{b}") for i, plans in PLANS.items() for b, p in plans.items()]


@pytest.mark.parametrize("plan", EACH)
def test_the_baseline_is_neither_smaller_nor_cheaper_than_ctf(plan: Plan) -> None:
    grid = plan.tokenizer.config(plan.image_size).grid
    length = grid**2
    for codes, clusters, baseline in zip(
        plan.codebooks, plan.clusters, plan.baselines, strict=True
    ):
        base, backbone, fine = (
            shape.config(grid, 10) for shape in (baseline, plan.backbone, plan.fine)
        )
        parameters = [
            count_parameters(config, inputs, outputs)
            for config, inputs, outputs in (
                (base, codes, codes),
                (backbone, clusters, clusters),
                (fine, clusters, codes),
            )
        ]
        assert parameters[0] >= parameters[1] + parameters[2]
        flops = [
            training_flops(base, length, codes),
            training_flops(backbone, length, clusters),
            training_flops(fine, length + 1, codes // clusters),
        ]
        assert flops[0] >= flops[1] + flops[2]


def test_a_budget_that_there_is_not_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown budget 'fulll': did you mean 'full'"):
        plan_of("fulll")
    with pytest.raises(UserError, match="no experiments on 'eurosat-rgb': did you mean 'eurosat'"):
        plan_of("full", "eurosat-rgb")


@pytest.mark.parametrize(("images", "plans"), PLANS.items())
def test_plans_are_of_included_images(images: str, plans: dict[str, Plan]) -> None:
    train = open_images(images).train
    for plan in plans.values():
        assert plan.source == images and plan.image_size == train.image_size
        assert 0 < plan.reserved < len(train)


def test_every_plan_has_a_folder_of_its_own() -> None:
    folders = {folder_of(budget, images) for images, each in PLANS.items() for budget in each}
    assert folders == {"small", "full", "eurosat-small", "eurosat-full"}


def test_on_eurosat_training_goes_on_for_ten_epochs() -> None:
    plan = plan_of("full", "eurosat")
    images = len(open_images("eurosat").train) - plan.reserved
    seen = [share * plan.training.steps * plan.training.batch_size for share in plan.lengths]
    assert len(experiments.figure2(plan)) >= 4
    assert max(seen) / images == 10
    assert plan.tokenizer.config(plan.image_size).grid ** 2 == 256
    assert plan.codebooks == FULL.codebooks and plan.seeds == FULL.seeds
