"""Tokens of a data set of ImageNet's size: opened, read, and shuffled among processes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ctf.bench import tokens
from ctf.bench.shapes import IMAGENET
from ctf.bench.tokens import IMAGENET_IMAGES
from ctf.common.distributed import World
from ctf.data.tokens import Tokens
from ctf.training import optim

BATCH = 256


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("imagenet")
    tokens.write_cache(folder, IMAGENET_IMAGES)  # 660 MB
    yield folder
    shutil.rmtree(folder)


def test_opening_takes_little_memory(cache: Path) -> None:
    script = (
        "import json, pathlib, sys; from ctf.bench import tokens as tokens_bench; "
        "print(json.dumps(tokens_bench.read(pathlib.Path(sys.argv[1]))))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, cache], check=True, capture_output=True, text=True
    )
    found = json.loads(process.stdout)
    assert found["images"] == IMAGENET_IMAGES
    assert found["open_seconds"] < 1
    assert found["private_megabytes"] < 100 and found["resident_megabytes"] < 200
    assert found["codes_per_second"] > 2e6


def test_an_epoch_is_a_permutation_for_any_number_of_processes(cache: Path) -> None:
    """Judged by what is read: the codes of each image contain its number."""
    reader = Tokens(cache, "train")
    steps = -(-IMAGENET_IMAGES // BATCH)
    seen = np.empty((steps, BATCH), np.int64)
    for step in range(steps):
        processes = 8 if step < steps // 3 else 4
        for rank in range(processes):
            share = World(rank, processes).share(BATCH, "batch_size")
            codes_BL = reader.codes(optim.batch_indices(IMAGENET_IMAGES, BATCH, 7, step)[share])
            seen[step, share] = codes_BL[:, 0] + IMAGENET.codes * codes_BL[:, 1]
    first, next_epoch = np.split(seen.ravel(), [IMAGENET_IMAGES])
    assert np.array_equal(np.sort(first), np.arange(IMAGENET_IMAGES))
    assert not np.array_equal(first, np.arange(IMAGENET_IMAGES))
    assert len(np.unique(next_epoch)) == len(next_epoch) == steps * BATCH - IMAGENET_IMAGES


MEMORY = """
import sys
sys.path.insert(0, {tests!r})
from ctf.data.extraction import extract
from tests.data.tiny_tokens import *
from ctf.common import memory
grown = []
def progress(done, total):
    if done % 200 == 0:
        grown.append(memory.resident()[1])
config = TokensConfig(shard_images=10, batch_size=10)
extract(make_tokenizer(), "abc", Splits(Noise(2000, 0), IMAGES.val), Path({folder!r}), config,
               progress=progress)
print(*grown)
"""


def test_the_memory_of_an_extraction_does_not_grow(tmp_path: Path) -> None:
    script = MEMORY.format(tests=str(Path(__file__).parents[2]), folder=str(tmp_path))
    process = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    megabytes = [float(x) for x in process.stdout.split()]
    assert len([*tmp_path.glob("train-0*.npy")]) == 200 and len(megabytes) == 20
    assert max(megabytes[5:]) - megabytes[4] < 4
