"""The torture script: a short run, and that it detects a training that cannot be resumed."""

import os
import subprocess
import sys
from pathlib import Path

import ctf

ROOT = Path(__file__).parents[2]
SOURCE = Path(ctf.__file__).parents[1]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip


def test_runs_killed_in_each_stage_end_the_same() -> None:
    done = python("-m", "tests.torture", "--kills", "6", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    *kills, verdict = (line for line in done.stdout.splitlines() if "run" in line)
    assert sum(" SIGKILL " in line or " SIGTERM " in line for line in kills) == 6
    assert verdict.startswith("the same: 6 kills in ")


def test_a_training_that_depends_on_its_process_is_detected() -> None:
    done = python(
        "-c",
        "import os, sys\n"
        "from ctf.training import optim\n"
        "batches = optim.batch_indices\n"
        "optim.batch_indices = lambda n, b, seed, step: batches(n, b, os.getpid(), step)\n"
        "from tests import torture\n"
        "sys.argv[1:] = ['--kills', '1']\n"
        "sys.exit(torture.main())\n",
    )
    assert done.returncode == 1, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("DIFFERENT: run 1: ") and "tokenizer/model.safetensors" in last
