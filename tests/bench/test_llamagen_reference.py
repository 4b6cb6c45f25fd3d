"""LlamaGen's way computes what ours does: `ctf bench` compares equal work."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctf.bench import llamagen_reference
from ctf.bench.tokens import NoiseImages
from ctf.data.extraction import TokensConfig, extract
from ctf.data.image_set import Splits
from ctf.data.tokens import Tokens
from ctf.data.transforms import VIEWS
from ctf.models.coarse import CoarseModel
from ctf.models.noise import noise_keys
from ctf.models.parallel import sample_coarse
from ctf.models.sampling import Sampling
from ctf.models.tokenizer import VQModel
from ctf.models.transformer import TransformerConfig
from ctf.pipelines import llamagen
from ctf.training import optim
from ctf.training.transformers import TrainingConfig

FIXTURES = Path(__file__).parents[1] / "fixtures" / "llamagen"


def test_the_cache_is_rounded_up_as_llamagens() -> None:
    config = TransformerConfig(width=48, layers=3, heads=3, grid=4, classes=7)
    caches, masks = llamagen_reference.make_caches(config, 2)
    assert caches.shape == (3, 2, 2, 3, 24, 16) and masks.shape == (2, 24, 24)


def test_the_training_step_computes_what_ours_does() -> None:
    """Without dropout; at the class that is hidden by neither."""
    config = TransformerConfig(width=48, layers=2, heads=3, grid=4, classes=7, dropout=0.0)
    torch.manual_seed(0)
    model = CoarseModel(config, 40).train()
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, std=0.2)
    labels_BL, classes_B = torch.randint(40, (3, 16)), torch.full((3,), model.no_class)
    logits_BLK = model(labels_BL, classes_B)
    ours = F.cross_entropy(logits_BLK.flatten(0, 1), labels_BL.flatten())
    expected = torch.autograd.grad(ours, list(model.parameters()))
    theirs = llamagen_reference.loss(model, labels_BL, classes_B)
    torch.testing.assert_close(theirs, ours)
    gradients = torch.autograd.grad(theirs, list(model.parameters()))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    # A whole step of it: clipped gradients, then AdamW.
    t = TrainingConfig()
    optimizer = optim.make_optimizer(model, 1e-3, t.betas, t.weight_decay)
    norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in expected]))
    before = model.head.weight.detach().clone()
    loss = llamagen_reference.train_step(model, optimizer, labels_BL, classes_B)
    assert float(loss) == pytest.approx(ours.item(), rel=1e-4)
    moment = optimizer.state[model.head.weight]["exp_avg"]
    clipped = expected[-1] * min(1.0, float(1 / norm))
    torch.testing.assert_close(moment, 0.1 * clipped, atol=1e-6, rtol=1e-3)
    assert not torch.equal(model.head.weight, before) and model.head.weight.grad is None


def test_extraction_makes_the_codes_of_ours(tokenizer: VQModel, tmp_path: Path) -> None:
    images = NoiseImages(20, 32)
    llamagen_reference.extract(tokenizer, images, tmp_path, VIEWS["flip"])
    splits = Splits(images, NoiseImages(1, 32))
    extract(tokenizer, "", splits, tmp_path / "tokens", TokensConfig(views="flip"))
    reader = Tokens(tmp_path / "tokens", "train")
    same = [
        np.array_equal(
            np.load(tmp_path / f"{i}.npy")[0, view], reader.codes(np.array([i]), view)[0]
        )
        for i in range(20)
        for view in range(2)
    ]
    assert np.mean(same) > 0.9  # but for codes that are equally near, up to rounding
    assert len({*reader.codes(np.arange(20)).flatten().tolist()}) > 5


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1])
def test_the_plain_loop_samples_the_same_labels(guidance: float, top_k: int) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(width=64, layers=3, heads=4, grid=4, classes=5)
    model = CoarseModel(config, 40).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1)
    keys_BL = noise_keys(range(5), 16)[:, 0]
    settings = Sampling(guidance=guidance, top_k=top_k)
    expected = sample_coarse(model, torch.arange(5), keys_BL, settings)
    assert torch.equal(
        llamagen_reference.sample(model, torch.arange(5), keys_BL, settings), expected
    )


@pytest.mark.parametrize("guidance", [1, 2])
def test_the_plain_loop_samples_what_llamagen_does(guidance: int) -> None:
    stored = np.load(FIXTURES / "gpt_expected.npz")
    model = llamagen.load(FIXTURES / "vq.pt", FIXTURES / "gpt.pt", image_size=8, heads=4).coarse
    classes_B = torch.from_numpy(stored["labels"]).long()
    settings = Sampling(guidance=guidance, top_k=1)
    drawn = llamagen_reference.sample(model, classes_B, noise_keys([0, 1, 2], 16)[:, 0], settings)
    assert drawn.tolist() == stored[f"greedy_guidance_{guidance}"].tolist()
