"""The weights of the best evaluation: with few images, the held-out loss turns before the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ctf.common import storage
from ctf.common.distributed import ALONE, World, full_tensor
from ctf.common.errors import UserError

FILE = "best.safetensors"  # in the folder of the states


class BestWeights:
    """Keeps the weights of the evaluation with the lowest held-out loss, on disk.

    Called by `loop.run` after each evaluation. A resumed training finds what was kept before; the
    evaluations that it repeats give the same losses, and of equal ones the first counts.

    Args:
        folder: Of the training's states.
        weights: Returns what is kept; called by all processes.
        world: All processes.
    """

    def __init__(
        self, folder: Path, weights: Callable[[], Mapping[str, Tensor]], world: World = ALONE
    ) -> None:
        self._path, self._weights, self._world = folder / FILE, weights, world
        self.step, self.loss = self._read() if world.is_main else (0, math.inf)

    def _read(self) -> tuple[int, float]:
        try:
            metadata = storage.load_tensors(self._path)[1] if self._path.is_file() else {}
        except UserError as error:
            print(f"{error}\nevaluations before are forgotten", flush=True)
            metadata = {}
        return int(metadata.get("step", 0)), float(metadata.get("loss", math.inf))

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the weights after `step` steps if their loss is the lowest so far."""
        if not self._world.broadcast(metrics["loss"] < self.loss):  # the first process decides
            return
        self.step, self.loss = step, metrics["loss"]
        full = {name: full_tensor(tensor) for name, tensor in self._weights().items()}
        # `repr` of a float gives the same float back.
        metadata = {"step": str(step), "loss": repr(self.loss)}
        self._world.on_main(lambda: storage.save_tensors(self._path, full, metadata))

    def load(self) -> dict[str, Tensor]:
        """Return the weights of the best evaluation."""
        return storage.load_tensors(self._path)[0]
