import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctf.checkpoint import load_strict
from ctf.coarse import CoarseModel
from ctf.sampling import Sampling, sample_coarse, uniforms
from ctf.transformer import KVCache, TransformerConfig

FIXTURES = Path(__file__).parent / "fixtures" / "llamagen"
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
    logits_BLK = torch.stack([model.step(x, i, cache) for i, x in enumerate(inputs)], dim=1)
    torch.testing.assert_close(logits_BLK, model(labels_BL, classes_B), rtol=1e-4, atol=1e-5)


def test_first_predictions_are_uniform():
    labels_BL, classes_B = make_inputs(2)
    loss = F.cross_entropy(CoarseModel(CONFIG, COUNT)(labels_BL, classes_B).mT, labels_BL)
    assert float(loss.detach()) == pytest.approx(np.log(COUNT))


@pytest.mark.parametrize(
    ("width", "layers", "heads", "full", "coarse"),
    [(768, 12, 12, 111, 87), (1024, 24, 16, 343, 310), (1280, 36, 20, 775, 734)],
)
def test_has_as_many_parameters_as_the_paper_says(width, layers, heads, full, coarse):
    config = TransformerConfig(width, layers, heads, grid=16, classes=1000)
    with torch.device("meta"):
        for count, millions in ((16384, full), (512, coarse)):
            parameters = sum(p.numel() for p in CoarseModel(config, count).parameters())
            assert parameters / 1e6 == pytest.approx(millions, abs=1)


def llamagen_key(name: str) -> str:
    """The name here of a tensor in LlamaGen's checkpoints."""
    for theirs, ours in (
        ("cls_embedding.embedding_table.", "class_embedding."),
        ("tok_embeddings.", "label_embedding."),
        ("attention.wqkv.", "attention.qkv."),
        ("attention.wo.", "attention.out."),
        ("feed_forward.", "ffn."),
    ):
        name = name.replace(theirs, ours)
    return name.replace("output.", "head.") if name.startswith("output.") else f"trunk.{name}"


@pytest.fixture(scope="module")
def original() -> tuple[CoarseModel, dict[str, Tensor]]:
    """LlamaGen's own tiny model in ours (K = V), and what LlamaGen computed with it."""
    expected = {k: torch.from_numpy(v) for k, v in np.load(FIXTURES / "gpt_expected.npz").items()}
    width, layers, heads, codes, grid, classes = expected["config"].tolist()
    config = TransformerConfig(width, layers, heads, grid, classes, class_token_rope="zero")
    model = CoarseModel(config, codes).eval()
    weights = torch.load(FIXTURES / "gpt.pt", weights_only=True)["model"]
    load_strict(model, {llamagen_key(k): v for k, v in weights.items()}, "gpt.pt")
    return model, expected


@torch.no_grad()
def test_teacher_forced_logits_are_llamagens(original):
    model, expected = original
    logits_BLK = model(expected["tokens"], expected["labels"])
    torch.testing.assert_close(logits_BLK, expected["teacher_forced_logits"], rtol=0, atol=1e-4)
    loss = F.cross_entropy(logits_BLK.mT, expected["tokens"])
    torch.testing.assert_close(loss, expected["teacher_forced_loss"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_released_weights_need_the_zero_entry_of_the_class_token(original):
    model, expected = original
    straight = CoarseModel(
        dataclasses.replace(model.config, class_token_rope="identity"), model.count
    ).eval()
    straight.load_state_dict(model.state_dict())
    logits_BLK = straight(expected["tokens"], expected["labels"])
    assert float((logits_BLK - expected["teacher_forced_logits"]).abs().max()) > 1e-3


@pytest.mark.parametrize("guidance", [1, 2])
def test_greedy_tokens_are_llamagens(original, guidance):
    model, expected = original
    numbers_BL = uniforms([0, 1, 2], model.config.length)[:, 0]
    settings = Sampling(guidance=guidance, top_k=1)
    tokens_BL = sample_coarse(model, expected["labels"], numbers_BL, settings)
    assert torch.equal(tokens_BL, expected[f"greedy_guidance_{guidance}"].long())
