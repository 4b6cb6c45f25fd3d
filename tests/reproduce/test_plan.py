"""The budgets compare fairly."""

import pytest

from ctf.common.errors import UserError
from ctf.models.sizes import parameters as count_parameters
from ctf.models.sizes import training_flops
from ctf.reproduce.plan import BUDGETS, plan_of


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_baseline_is_neither_smaller_nor_cheaper_than_ctf(budget: str) -> None:
    plan = BUDGETS[budget]
    for codes, clusters, baseline in zip(
        plan.codebooks, plan.clusters, plan.baselines, strict=True
    ):
        base, backbone, fine = (
            shape.config(8, 10) for shape in (baseline, plan.backbone, plan.fine)
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
            training_flops(base, 64, codes),
            training_flops(backbone, 64, clusters),
            training_flops(fine, 65, codes // clusters),
        ]
        assert flops[0] >= flops[1] + flops[2]


def test_a_budget_that_there_is_not_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown budget 'fulll': did you mean 'full'"):
        plan_of("fulll")
