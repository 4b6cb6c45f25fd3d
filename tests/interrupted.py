"""`ctf` whose last process gets SIGTERM in some step of a training, or batch that it encodes.

    python -m tests.interrupted STEP ARGUMENTS...

Alone, or by torchrun. STEP counts training steps from 0, and batches from 1.
"""

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ctf.cli import main as cli
from ctf.models.tokenizer import VQModel
from ctf.training.tokenizer import TokenizerTrainer
from ctf.training.transformers import Trainer

last = int(os.environ.get("RANK", 0)) + 1 == int(os.environ.get("WORLD_SIZE", 1))
at, *arguments = sys.argv[1:]
encoded = 0


def interrupt(number: int) -> None:
    if number == int(at) and last:
        os.kill(os.getpid(), signal.SIGTERM)


def interrupt_training(trainer: type[Any]) -> None:
    step = trainer.step

    def interrupted(self: Any, number: int) -> Mapping[str, Tensor | float]:
        interrupt(number)
        return step(self, number)

    trainer.step = interrupted


encode = VQModel.encode


def interrupted_encode(self: VQModel, images_BCHW: Tensor) -> Tensor:
    global encoded
    encoded += 1
    interrupt(encoded)
    return encode(self, images_BCHW)


interrupt_training(TokenizerTrainer)
interrupt_training(Trainer)
VQModel.encode = interrupted_encode  # type: ignore[method-assign]
sys.argv = ["ctf", *arguments]
cli.program()
