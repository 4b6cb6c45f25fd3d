"""Tokens of hundreds of thousands of images: opened, read, and shuffled among processes."""

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
from ctf.common.distributed import World
from ctf.data.tokens import Tokens
from ctf.training import optim

COUNT, BATCH = 320_000, 256  # images: a quarter of ImageNet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tokens")
    tokens.write_cache(folder, COUNT)  # 165 MB
    yield folder
    shutil.rmtree(folder)


READ = """
import json, pathlib, sys, time
import numpy as np
from ctf.bench import tokens
from ctf.data.tokens import Tokens
folder = pathlib.Path(sys.argv[1])
result = tokens.read(folder, steps=500)  # first: it measures the growth of memory
reader = Tokens(folder, "train")
maps = [np.load(folder / shard.file, mmap_mode="r") for shard in reader.manifest.train.shards]
size = len(maps[0])
ratios = []
for seed in range(3):
    indices = np.random.default_rng(seed).integers(0, len(reader), 20_000)
    times = [time.process_time()]
    codes = reader.codes(indices)
    times.append(time.process_time())
    mapped = np.stack([maps[i // size][i % size, 0] for i in indices]).astype(np.int64)
    times.append(time.process_time())
    assert (codes.numpy() == mapped).all()
    ratios.append((times[1] - times[0]) / (times[2] - times[1]))
print(json.dumps(result | {"ratio": min(ratios)}))
"""


def test_opening_and_reading_are_fast_and_take_little_memory(folder: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", READ, folder], check=True, capture_output=True, text=True
    )
    result = json.loads(process.stdout)
    assert result["images"] == COUNT
    assert result["private_megabytes"] < 40 and result["resident_megabytes"] < 60
    assert result["ratio"] < 2  # of reading by memory maps
    seconds_to_read_all = COUNT * IMAGENET.length / result["codes_per_second"]
    assert result["open_seconds"] < seconds_to_read_all / 4


def test_an_epoch_is_a_permutation_for_any_number_of_processes(folder: Path) -> None:
    """As seen in the codes, which contain the number of each image."""
    reader = Tokens(folder, "train")
    steps = -(-COUNT // BATCH) + 3
    seen = np.empty((steps, BATCH), np.int64)
    for step in range(steps):
        processes = 8 if step < steps // 3 else 4
        for rank in range(processes):
            share = World(rank, processes).share(BATCH, "batch_size")
            codes_BL = reader.codes(optim.batch_indices(COUNT, BATCH, 7, step)[share])
            seen[step, share] = codes_BL[:, 0] + IMAGENET.codes * codes_BL[:, 1]
    first, next_epoch = np.split(seen.ravel(), [COUNT])
    assert np.array_equal(np.sort(first), np.arange(COUNT))
    assert not np.array_equal(first, np.arange(COUNT))
    assert len(np.unique(next_epoch)) == len(next_epoch) == steps * BATCH - COUNT


MEMORY = """
import sys
sys.path.insert(0, {tests!r})
from ctf.data.extraction import extract
from tests.data.tiny_tokens import *
from ctf.common import memory
megabytes = []
def progress(done, total):
    if done % 200 == 0:
        megabytes.append(memory.resident()[1])
config = TokensConfig(shard_images=10, batch_size=10)
extract(make_tokenizer(), "abc", Splits(Noise(2000, 0), IMAGES.val), Path({folder!r}), config,
        progress=progress)
print(*megabytes)
"""


def test_the_memory_of_an_extraction_does_not_grow(tmp_path: Path) -> None:
    script = MEMORY.format(tests=str(Path(__file__).parents[2]), folder=str(tmp_path))
    process = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    megabytes = [float(x) for x in process.stdout.split()]
    assert len([*tmp_path.glob("train-0*.npy")]) == 200 and len(megabytes) == 20
    assert max(megabytes[5:]) - megabytes[4] < 4
