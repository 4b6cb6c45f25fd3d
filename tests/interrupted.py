"""`ctf` whose last process gets a SIGTERM in the middle of a training's step, or while it encodes
that batch of pictures; for torchrun, or alone.

python -m tests.interrupted STEP ARGUMENTS...
"""

import os
import signal
import sys
from typing import Any

from ctf.cli import main as cli
from ctf.models.tokenizer import VQModel
from ctf.training import loop

last = int(os.environ.get("RANK", 0)) + 1 == int(os.environ.get("WORLD_SIZE", 1))
at, *arguments = sys.argv[1:]
make_step, encode = loop._step, VQModel.encode
encoded = 0


def step(trainable: loop.Trainable, number: int, sums: dict[str, float]) -> None:
    if number == int(at) and last:
        os.kill(os.getpid(), signal.SIGTERM)
    make_step(trainable, number, sums)


def counted(*given: Any) -> Any:
    global encoded
    encoded += 1
    if encoded == int(at) and last:
        os.kill(os.getpid(), signal.SIGTERM)
    return encode(*given)


loop._step, VQModel.encode = step, counted  # type: ignore[method-assign]
sys.argv = ["ctf", *arguments]
cli.program()
