import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctf.models.coarse import CoarseModel
from ctf.models.transformer import KVCache, TransformerConfig

CONFIG = TransformerConfig(width=48, layers=2, heads=2, grid=4, classes=3, ffn_multiple=16)
COUNT = 11


def make_model() -> CoarseModel:
    torch.manual_seed(0)
    model = CoarseModel(CONFIG, COUNT).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def make_inputs(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels_BL = torch.randint(COUNT, (batch, CONFIG.length), generator=generator)
    return labels_BL, torch.randint(CONFIG.classes, (batch,), generator=generator)


@torch.no_grad()
def test_label_changes_the_logits_after_it_and_no_others():
    model = make_model()
    labels_BL, classes_B = make_inputs(2)
    before = model(labels_BL, classes_B)
    assert before.shape == (2, CONFIG.length, COUNT)
    for j in range(CONFIG.length):
        changed_BL = labels_BL.clone()
        changed_BL[:, j] = (labels_BL[:, j] + 1) % COUNT
        difference_BL = (model(changed_BL, classes_B) - before).abs().amax(-1)
        assert float(difference_BL[:, : j + 1].max()) == 0
        assert bool((difference_BL[:, j + 1 :] > 1e-4).all())


@torch.no_grad()
def test_class_changes_all_logits():
    model = make_model()
    labels_BL, classes_B = make_inputs(2)
    without = model(labels_BL, torch.full_like(classes_B, model.no_class))
    assert bool(((model(labels_BL, classes_B) - without).abs().amax(-1) > 1e-4).all())


@torch.no_grad()
def test_cached_equals_uncached():
    model = make_model()
    labels_BL, classes_B = make_inputs(3)
    cache = KVCache(CONFIG, 3, torch.device("cpu"), torch.float32)
    inputs = [classes_B, *labels_BL[:, :-1].unbind(1)]
    logits_BLK = torch.stack(
        [model.step(x[:, None], i, cache) for i, x in enumerate(inputs)], dim=1
    )
    torch.testing.assert_close(logits_BLK, model(labels_BL, classes_B), rtol=1e-4, atol=1e-5)


def test_first_predictions_are_uniform():
    labels_BL, classes_B = make_inputs(2)
    loss = F.cross_entropy(CoarseModel(CONFIG, COUNT)(labels_BL, classes_B).mT, labels_BL)
    assert float(loss.detach()) == pytest.approx(np.log(COUNT))
