"""scripts/gpu.py: every part in small on a processor; on a GPU, everything is what it is here."""

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ctf
from ctf.common import storage
from ctf.data.image_set import Splits
from ctf.pipelines.pipeline import Pipeline

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_script"] = module
    spec.loader.exec_module(module)
    return module


gpu = load()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_images(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "included_images", lambda small: splits)


def run(part: str, out: Path, *options: object) -> dict[str, Any]:
    """Run a part; its results, none of which has failed."""
    arguments = ("--part", part, "--device", "cpu", "--minutes", 4, "--out", out, *options)
    assert gpu.main([*map(str, arguments)]) == 0
    content = storage.load_object(out / f"gpu-{part}.json")
    failed = {name: x["failed"] for name, x in content["results"].items() if "failed" in x}
    assert not failed
    text = (out / f"gpu-{part}.md").read_text()
    rows = [row for entry in content["results"].values() for row in entry.get("rows", ())]
    assert text.count("\n| ") >= len(rows) and "failed" not in text
    return dict(content["results"])


# --- what is right --------------------------------------------------------------------------------

IN_PROCESS = [name for name in gpu.CHECKS if name != "processes"]


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_processor_agrees_with_itself(name: str, splits: Splits) -> None:
    differences = list(gpu.CHECKS[name](CPU, splits))
    assert differences and [d for d in differences if not d.holds] == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_gpu_agrees_with_a_processor(name: str, splits: Splits) -> None:
    differences = list(gpu.CHECKS[name](torch.device("cuda"), splits))
    assert differences and [d for d in differences if not d.holds] == []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ddp_and_sharding_agree_in_one_process(device: str, tmp_path: Path) -> None:
    """In a process of its own, since a process group stays."""
    code = f"""
import runpy, sys, torch
sys.argv = ["gpu.py"]
script = runpy.run_path({str(SCRIPT)!r}, run_name="script")
differences = list(script["CHECKS"]["processes"](torch.device({device!r}), None))
assert len(differences) == 3 and all(d.holds for d in differences), differences
"""
    path = str(Path(ctf.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr


def test_differences_that_are_too_large_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(device: torch.device, images: Splits) -> Iterator[Any]:
        yield gpu.Difference("codes", 0.5, 0.1)

    def failing(device: torch.device, images: Splits) -> Iterator[Any]:
        yield gpu.Difference("lost", 0.0, 0.1)
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(gpu, "CHECKS", {"wrong": wrong, "failing": failing, "again": wrong})
    assert gpu.main(["--part", "right", "--device", "cpu", "--out", str(tmp_path)]) == 0
    results = storage.load_object(tmp_path / "gpu-right.json")["results"]
    assert results["failing"]["failed"].startswith("RuntimeError: no kernel image (test_gpu.py")
    assert results["again"]["rows"] == [
        {"what": "codes", "value": 0.5, "limit": 0.1, "holds": "NO"}
    ]
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"part": "right", "failed": ["failing"], "wrong": ["codes", "codes"]}


# --- the other parts ------------------------------------------------------------------------------


def test_sampling(tmp_path: Path) -> None:
    results = run("sampling", tmp_path)
    rows = [row for entry in results.values() for row in entry.get("rows", ()) if "images/s" in row]
    assert {row["way"] for row in rows} == {
        "LlamaGen, plain", "baseline", "CTF, fine S", "CTF, fine L", "CTF",
    }  # fmt: skip
    assert all(row["images/s"] == row["images"] / row["seconds"] for row in rows)
    for row in results["goals"]["rows"]:
        if row["way"] == "baseline":
            assert row["baseline = 1"] == 1.0 and row["LlamaGen = 1"] > 0
        if row["mode"] == "one by one":
            assert row["one by one = 1"] == 1.0
    assert (tmp_path / "gpu-sampling.png").is_file()


def test_training(tmp_path: Path) -> None:
    results = run("training", tmp_path)
    rows = results["steps"]["rows"]
    assert {"plain", "baseline", "coarse", "S", "L"} <= {row["way"] for row in rows}
    assert all(row["tokens/s"] > 0 and row["TFLOP/s"] > 0 for row in rows)
    assert all("share of the peak" not in row for row in rows)  # that of a processor is unknown


def test_a_training_from_tokens_comes_back_in_parts(
    tmp_path: Path, fitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "WEIGHTS_PART", 10_000)
    monkeypatch.setattr(gpu, "training_end", lambda report, share, for_after: time.monotonic() + 1)
    changes = ("coarse.width=32", "coarse.layers=1", "coarse.heads=2", "clusters.count=8")
    changes += ("fine.width=32", "fine.layers=1", "fine.heads=2", "tokenizer_training.batch_size=2")
    results = run("fit", tmp_path, "--run", fitted, "--set", *changes)
    assert {row["stage"] for row in results["metrics"]["rows"]} == {"tokenizer", "coarse", "fine"}
    for row in results["weights"]["rows"]:
        name = row["file"].split("/")[0]
        parts = sorted((tmp_path / "weights").glob(f"{name}.safetensors.*"))
        joined = b"".join(part.read_bytes() for part in parts)
        assert len(joined) == row["bytes"] and len(parts) == -(-len(joined) // 10_000)
        assert hashlib.sha256(joined).hexdigest() == row["SHA-256"]
        (tmp_path / "weights" / name / "model.safetensors").write_bytes(joined)
    assert (tmp_path / "weights/new-tokenizer/tokenizer.safetensors.000").is_file()
    pipe = Pipeline.from_pretrained(tmp_path / "weights")  # what came back is a pipeline
    assert pipe.coarse.config.width == 32
    assert (tmp_path / "gpu-fit.png").is_file() and (tmp_path / "gpu-fit-curves.png").is_file()


def test_of_a_training_that_was_cut_off_the_newest_state_comes_back(tmp_path: Path) -> None:
    for step in (20, 40):
        tensors = {"x": torch.full((3,), float(step))}
        storage.save_tensors(tmp_path / f"run/coarse/state/step-{step:08d}.safetensors", tensors)
    (row,) = gpu.packed(tmp_path / "run", tmp_path / "out")
    (part,) = (tmp_path / "out").glob(row["parts"])
    assert part.name == "coarse.step-00000040.safetensors.000"
    assert part.read_bytes() == (tmp_path / "run" / row["file"]).read_bytes()


@pytest.fixture
def fitted(run: Path) -> Path:
    """The run of the other tests, by another name than the helper here."""
    return run


# --- limits ---------------------------------------------------------------------------------------


def test_what_takes_too_long_is_stopped_and_what_was_measured_stays(tmp_path: Path) -> None:
    report = gpu.Report("right", tmp_path, CPU, 1.5)
    attempts: dict[str, Callable[[], Any]] = {
        "first": lambda: [{"what": "a|b", "value": 1234.5}],
        "slow": lambda: time.sleep(60),
        "late": lambda: [{"what": "c"}],
    }
    for name, function in attempts.items():
        report.attempt(name, function)
    results = storage.load_object(tmp_path / "gpu-right.json")["results"]
    assert results["first"]["rows"] == [{"what": "a|b", "value": 1234.5}]
    assert results["slow"]["failed"].startswith("stopped after")
    assert results["late"]["failed"] == "no time left"
    text = (tmp_path / "gpu-right.md").read_text()
    assert "| a\\|b | 1,234 |" in text and "- failed: late: no time left" in text


def test_a_limit_leaves_no_alarm_behind() -> None:
    with contextlib.suppress(gpu.TimeIsUp), gpu.limited(0.05):
        time.sleep(5)
    with gpu.limited(0.05):
        pass
    time.sleep(0.1)  # nothing happens


@pytest.mark.parametrize(
    ("name", "peak", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H100 PCIe", 756e12, 2.0e12),
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.04e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1.56e12),
    ],
)
def test_cards_are_known_by_name(name: str, peak: float, bandwidth: float) -> None:
    assert gpu.card_of(name) == (peak, bandwidth)
    assert gpu.card_of(name.replace("100", "1").replace("200", "2")) is None
