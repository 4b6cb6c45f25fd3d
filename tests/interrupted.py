"""`ctf` whose last process gets a SIGTERM in the middle of a step; for torchrun, or alone.

python -m tests.interrupted STEP ARGUMENTS...
"""

import os
import signal
import sys

from ctf import cli, loop

last = int(os.environ.get("RANK", 0)) + 1 == int(os.environ.get("WORLD_SIZE", 1))
at, *arguments = sys.argv[1:]
make_step = loop._step


def step(trainable: loop.Trainable, number: int, sums: dict[str, float]) -> None:
    if number == int(at) and last:
        os.kill(os.getpid(), signal.SIGTERM)
    make_step(trainable, number, sums)


loop._step = step
sys.exit(cli.main(arguments))
