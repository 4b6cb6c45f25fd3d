"""Kills `ctf fit` at random moments of every stage, and compares the results.

    python -m tests.torture --kills 50 --seed 0

A run of tiny shapes is trained once without disturbance, then again and again with kills: two aimed
at each stage of a run, until all are used up. Three of four are SIGKILL, the others SIGTERM, on
which the run may die, or save and exit with 0. Each killed run is then resumed to its end. All its
files must be the same, to the bit; metrics.jsonl, fit.json and pipeline.json except for times. A
line for each kill says where it hit and what was on the disk; the last line is the verdict. Exits
with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import sklearn.cluster  # noqa: F401  imported before the forks: a kill costs no new start
import torch._dynamo  # noqa: F401

import ctf.training.fit  # noqa: F401
from ctf.cli import main as cli
from ctf.training import loop
from tests.conftest import SIDE, comparable, recipe_options, save_images

STAGES = ("tokenizer", "tokens", "clusters", "coarse", "fine", "end")
KILLS_A_STAGE = 2  # in each run
TERM_SHARE = 0.25  # of the kills
START_SECONDS = 0.3  # about what a run takes to find out where to resume
END_SECONDS = 0.2  # and to measure the finished pipeline
PATIENCE = 120.0  # seconds in which a run must end, by itself or after SIGTERM


class Run:
    """One attempt at `ctf fit`, in a process of its own, with its output in a file."""

    def __init__(self, images: Path, folder: Path, output: Path) -> None:
        self.folder, self.output = folder, output
        self.status: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            loop.LOG_EVERY, loop.SAVE_SECONDS = 2, -1.0  # a state every other step
            code = cli.main(arguments(images, folder))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def wait(self, seconds: float, stage: str | None = None) -> bool:
        """Waits that long, or until the run has reached a stage or ended: whether it did."""
        until = time.monotonic() + seconds
        while not (self.ended() or (stage is not None and reached(self.folder, stage))):
            if time.monotonic() > until:
                return False
            time.sleep(0.002)
        return True

    def kill(self, number: signal.Signals) -> None:
        """Raises RuntimeError if the run does not end by it as it should."""
        if not self.ended():
            os.kill(self.pid, number)
        if not self.wait(PATIENCE):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise RuntimeError(f"did not end within {PATIENCE:g} seconds of {number.name}")
        assert self.status is not None
        died = os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == number
        text = self.output.read_text(errors="replace")
        left = os.WIFEXITED(self.status) and os.WEXITSTATUS(self.status) == 0
        if not (died or (left and ("again" in text or "done" in text))) or "Traceback" in text:
            raise RuntimeError(f"status {self.status} after {number.name}:\n{text}")

    def finish(self) -> None:
        """Raises RuntimeError if the run does not end by itself with 0."""
        self.wait(PATIENCE)
        if self.status != 0:
            self.kill(signal.SIGKILL)
            raise RuntimeError(f"status {self.status}:\n{self.output.read_text(errors='replace')}")


def arguments(images: Path, folder: Path) -> list[str]:
    """`ctf fit` in seconds, with several evaluations and several shards."""
    return [
        "fit", str(images), "--out", str(folder), "--preset", "tiny", "--steps", "30",
        "--image-size", str(SIDE), *recipe_options(
            "tokens.shard_images=4", "tokenizer_training.evaluate_every=10",
            "coarse_training.evaluate_every=10", "fine_training.evaluate_every=10",
        ),
    ]  # fmt: skip


def log(folder: Path) -> dict[str, Any]:
    path = folder / "fit.json"
    return json.loads(path.read_text()) if path.is_file() else {"done": [], "seconds": {}}


def stage_of(folder: Path) -> str:
    """The stage that a run is in."""
    done = log(folder)["done"]
    return next(stage for stage in STAGES if stage not in done)


def reached(folder: Path, stage: str) -> bool:
    return STAGES.index(stage_of(folder)) >= STAGES.index(stage)


def on_disk(folder: Path) -> str:
    """Stage and step of a killed run, and the files it left."""
    stage = stage_of(folder)
    text = f"in {stage:<9}"
    if (metrics := folder / stage / "metrics.jsonl").is_file():
        lines = metrics.read_bytes().split(b"\n")
        steps = [json.loads(line)["step"] for line in lines[:-1]]
        text += f" step {max(steps, default=0):>2}" + ", half a line" * bool(lines[-1])
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    states = sum(path.name.startswith("step-") for path in folder.glob("*/state/*.safetensors"))
    temporary = sum(name.endswith(".tmp") for name in names)
    return f"{text}; {len(names)} files, {states} states, {temporary} half-written"


def differences(folder: Path, expected: dict[str, Any]) -> list[str]:
    """The files that differ."""
    found = comparable(folder)
    return [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]


def torture(root: Path, kills: int, seed: int) -> bool:
    """Whether all runs ended with the same files."""
    chance = random.Random(seed)
    images, output = save_images(root / "discs"), root / "output.txt"
    Run(images, root / "undisturbed", output).finish()
    expected = comparable(root / "undisturbed")
    seconds = {**log(root / "undisturbed")["seconds"], "end": END_SECONDS}
    print(f"undisturbed: {len(expected)} files; seconds of each stage: {seconds}", flush=True)

    killed, runs, hit = 0, 0, Counter[str]()
    each = min(KILLS_A_STAGE, -(-kills // len(STAGES)))
    while killed < kills:
        runs += 1
        folder = root / f"killed-{runs}"
        for stage in [stage for stage in STAGES for _ in range(each)]:
            if killed == kills:
                break
            began_in = stage_of(folder)
            if STAGES.index(began_in) > STAGES.index(stage):
                continue  # the kill before came late
            attempt = Run(images, folder, output)
            attempt.wait(PATIENCE, stage)
            delay = chance.uniform(0, seconds[stage] / 2 + START_SECONDS * (began_in == stage))
            number = signal.SIGTERM if chance.random() < TERM_SHARE else signal.SIGKILL
            if attempt.wait(delay):
                break  # it came to its end before the kill
            attempt.kill(number)
            killed += 1
            hit[stage_of(folder)] += 1
            where = f"{killed}/{kills} {number.name} after {delay:.3f} s of {stage}"
            print(f"run {runs}, {where}: {on_disk(folder)}", flush=True)
        Run(images, folder, output).finish()
        if different := differences(folder, expected):
            print(f"DIFFERENT: run {runs}: {', '.join(different)}")
            return False
        print(f"run {runs}: the same {len(expected)} files", flush=True)
    spread = ", ".join(f"{stage} {hit[stage]}" for stage in STAGES)
    print(f"the same: {killed} kills in {runs} runs ({spread}), {len(expected)} files each")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ctf-torture-") as folder:
        try:
            return 0 if torture(Path(folder), options.kills, options.seed) else 1
        except RuntimeError as error:
            print(f"FAILED: {error}")
            return 1


if __name__ == "__main__":
    sys.exit(main())
