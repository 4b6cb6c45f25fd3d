"""Weights are loaded exactly, and modules that get them are not initialized before."""

import pytest
import torch
from torch import nn

from ctf.common.errors import UserError
from ctf.common.weights import init_empty_weights, load_strict


def test_names_and_shapes_must_match_exactly() -> None:
    module = nn.Linear(2, 3)
    own = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    load_strict(module, own, "here")
    assert bool((module.weight == 1).all())
    for wrong, message in (
        ({"weight": own["weight"]}, "here: tensor 'bias' is missing"),
        ({**own, "more": own["bias"]}, "here: unknown tensor 'more'"),
        ({**own, "bias": torch.ones(4)}, r"here: tensor 'bias' has shape \(4,\), expected \(3,\)"),
    ):
        with pytest.raises(UserError, match=message):
            load_strict(module, {k: 2 * v for k, v in wrong.items()}, "here")
        assert bool((module.weight == 1).all() and (module.bias == 1).all())


def test_an_empty_module_takes_the_tensors_themselves() -> None:
    with init_empty_weights():
        module = nn.Linear(2, 3)
    assert module.weight.is_meta
    own = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    load_strict(module, own, "here")
    assert module.weight.data_ptr() == own["weight"].data_ptr()
    assert torch.equal(module(torch.ones(1, 2)), torch.full((1, 3), 3.0))
