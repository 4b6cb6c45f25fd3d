"""The peer of `ctf bench fit`: batches, network, training and samples."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ctf.bench.peers import diffusers as peer
from ctf.bench.peers.diffusers import Diffusers, DiffusionConfig, DiffusionModel
from ctf.common.errors import UserError
from ctf.common.progress import show_progress
from ctf.data.image_set import Splits
from ctf.data.transforms import View
from ctf.training import loop
from tests.conftest import comparable

CPU = torch.device("cpu")
SMALL = DiffusionConfig(channels=(16, 16), batch_size=8, sampling_steps=3, learning_rate=2e-3)


def test_larger_images_have_more_resolutions() -> None:
    assert peer.config_for(32) == peer.config_for(28) == DiffusionConfig()
    assert peer.config_for(64).channels == (32, 64, 128, 128)
    for size in (32, 64, 128):  # attention at 16 pixels, as in DDPM
        config = peer.config_for(size)
        assert size >> config.attention == 16 and size >> (len(config.channels) - 1) == 8
    with pytest.raises(UserError, match="got images of 36 pixels, expected a multiple of 8"):
        peer.config_for(36)


def test_batches_are_mirrored_where_images_may_be(
    splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = splits.train

    def mirrored(step: int) -> np.ndarray:
        indices_B, (pixels_BHWC, *_) = peer.read_batch(SMALL, train, step)
        plain, flipped = train.read(indices_B), train.read(indices_B, View(flip=True))
        is_plain = (pixels_BHWC.numpy() == plain).all(axis=(1, 2, 3))
        assert (is_plain | (pixels_BHWC.numpy() == flipped).all(axis=(1, 2, 3))).all()
        return ~is_plain

    share = np.mean([mirrored(step) for step in range(30)])
    assert 0.35 < share < 0.65
    monkeypatch.setattr(train, "mirrors", False, raising=False)
    assert not any(mirrored(step).any() for step in range(5))


def test_batches_depend_on_their_step_and_leave_classes_out(splits: Splits) -> None:
    images, dropped = splits.train, []
    for step in range(100):
        indices_B, (_, noise_BCHW, levels_B, classes_B) = peer.read_batch(SMALL, images, step)
        no_class = classes_B.numpy() == 3
        assert (classes_B.numpy() == images.classes_N[indices_B])[~no_class].all()
        assert noise_BCHW.shape == (8, 3, 32, 32) and 0 <= levels_B.min() <= levels_B.max() < 1000
        dropped.append(no_class)
    assert 0.07 < np.mean(dropped) < 0.13
    again = peer.read_batch(SMALL, images, 99)[1]
    for one, other in zip(again[1:], (noise_BCHW, levels_B, classes_B), strict=True):
        assert torch.equal(one, other)


class TestWithTheLibrary:
    @pytest.fixture(autouse=True)
    def _needs_diffusers(self) -> None:
        pytest.importorskip("diffusers")

    @pytest.mark.parametrize("size", [32, 64])
    def test_the_network_has_about_4_4_million_parameters(self, size: int) -> None:
        with torch.device("meta"):
            network = peer.make_network(peer.config_for(size), size, 10)
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(4.4, abs=0.1)

    @pytest.mark.parametrize("size", [32, 64])
    def test_predictions_depend_on_noise_level_and_class(self, size: int) -> None:
        torch.manual_seed(0)
        network = peer.make_network(peer.config_for(size), size, 10).eval()
        images_BCHW = torch.randn(1, 3, size, size).expand(3, -1, -1, -1)
        with torch.no_grad():
            one, level, class_ = network(
                images_BCHW, torch.tensor([500, 100, 500]), class_labels=torch.tensor([1, 1, 2])
            ).sample
        assert (one - level).std() > 0.01 and (one - class_).std() > 0.01

    def test_a_killed_training_ends_with_the_same_bits(
        self, splits: Splits, tmp_path: Path
    ) -> None:
        def train(folder: Path, steps: int) -> None:
            trainer = peer.DiffusionTrainer(SMALL, splits, 30, CPU)
            loop.run(trainer, folder, steps, evaluate_every=30)
            if steps == 30:
                loop.finish(folder, trainer.averaged.state_dict())

        train(tmp_path / "whole", 30)
        train(tmp_path / "killed", 20)
        train(tmp_path / "killed", 30)
        whole, killed = (comparable(tmp_path / name) for name in ("whole", "killed"))
        lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open()]
        assert lines[-1]["split"] == "val" and lines[-1]["loss"] < 1  # predicting 0 gives 1
        assert whole["model.safetensors"] == killed["model.safetensors"]

    def test_a_training_takes_its_minutes_and_is_found_again(
        self, splits: Splits, tmp_path: Path
    ) -> None:
        way = Diffusers(dataclasses.replace(SMALL, channels=(16,)))
        trained = way.train(splits, tmp_path, 0.01, CPU, show_progress)
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert trained.steps == {"network": max(1, int(0.95 * 0.6 / plan["seconds_per_step"]))}
        assert trained.seconds > 0 and trained.parameters > 0
        before = (tmp_path / "model.safetensors").read_bytes()
        again = way.train(splits, tmp_path, 0.01, CPU, show_progress)
        assert (again.steps, again.seconds) == (trained.steps, trained.seconds)
        assert (tmp_path / "model.safetensors").read_bytes() == before
        with pytest.raises(UserError, match=r"another configuration: minutes was 0\.01, now 1"):
            way.train(splits, tmp_path, 1, CPU, show_progress)

    @pytest.fixture
    def model(self) -> DiffusionModel:
        torch.manual_seed(0)
        network = peer.make_network(SMALL, 16, 3).eval()
        return DiffusionModel(network, SMALL, 16, ("a", "b", "c"), CPU)

    def test_an_image_depends_on_its_seed_and_class_alone(self, model: DiffusionModel) -> None:
        together = model.sample([0, 2, 1], seed=5).images
        assert together[0].size == (16, 16) and together[0].mode == "RGB"
        alone = np.asarray(model.sample([2], seed=6).images[0]).astype(int)
        assert np.abs(alone - np.asarray(together[1])).max() <= 1
        other = np.asarray(model.sample([1], seed=6).images[0]).astype(int)
        assert np.abs(alone - other).max() > 1

    def test_guidance_of_1_is_the_conditional_model(self, model: DiffusionModel) -> None:
        calls = []

        def conditional(images: torch.Tensor, level: torch.Tensor, class_labels: torch.Tensor):  # type: ignore[no-untyped-def]
            calls.append(class_labels.tolist())
            output = model.network(images, level, class_labels=class_labels)
            half = len(images) // 2
            output.sample[half:] = 7.0  # what is predicted without the class
            return output

        spoilt = dataclasses.replace(model, network=conditional)
        same = model.sample([0, 1], guidance=1.0).images, spoilt.sample([0, 1], guidance=1.0).images
        for one, other in zip(*same, strict=True):
            assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
        assert calls == [[0, 1, 3, 3]] * SMALL.sampling_steps
