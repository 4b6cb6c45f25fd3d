"""What trained models cost."""

from ctf.reproduce import systems
from ctf.reproduce.cells import Workspace
from tests.conftest import CLASSES
from tests.reproduce.conftest import BATCH, COARSE, CODES, STEPS

LENGTH = 16


def test_flops_and_parameters_of_the_baseline(space: Workspace) -> None:
    outcome = space.outcome(systems.baseline(space.plan, CODES, 0))
    assert outcome is not None
    width, layers, hidden = COARSE.width, COARSE.layers, 256  # SwiGLU is rounded up to 256
    blocks = layers * (4 * width**2 + 3 * width * hidden)
    each = LENGTH * (6 * blocks + 12 * layers * width * LENGTH) + 6 * LENGTH * width * CODES
    assert outcome["flops"] == STEPS * BATCH * each
    assert outcome["tokens_seen"] == STEPS * BATCH * LENGTH
    norms = (2 * layers + 1) * width
    tables = (2 * CODES + len(CLASSES) + 1) * width
    assert outcome["parameters"] == blocks + norms + tables
