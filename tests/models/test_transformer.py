import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ctf.common.config import from_json, to_json
from ctf.common.errors import UserError
from ctf.models.transformer import (
    Dropout,
    KVCache,
    Rope,
    TransformerConfig,
    Trunk,
    rotate,
    zero_head,
)

CONFIG = TransformerConfig(width=48, layers=2, heads=2, grid=4, classes=3, ffn_multiple=16)
LABELS = 7


def make_trunk(config: TransformerConfig = CONFIG) -> Trunk:
    torch.manual_seed(0)
    trunk = Trunk(config, LABELS).eval()
    for parameter in trunk.parameters():
        if parameter.ndim == 2:  # larger than at the start, so that each part has its effect
            nn.init.normal_(parameter, std=0.2)
    return trunk


def make_inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels_BL = torch.randint(LABELS, (batch, CONFIG.length), generator=generator)
    return labels_BL, torch.randint(CONFIG.classes + 1, (batch,), generator=generator)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 50},
        {"heads": 5},
        {"heads": 24},  # head width 2 has no pair for the columns
        {"layers": 0},
        {"grid": 0},
        {"classes": 0},
        {"ffn_multiple": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"rope_base": 0.0},
        {"norm_eps": -1.0},
    ],
)
def test_impossible_shapes_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change)


def test_config_survives_json():
    config = dataclasses.replace(CONFIG, class_token_rope="zero")
    assert from_json(TransformerConfig, to_json(config), "config") == config


@pytest.mark.parametrize(
    ("width", "heads", "hidden"),
    [(768, 12, 2048), (1024, 16, 2816), (1280, 20, 3584), (1536, 24, 4096), (3200, 32, 8704)],
)
def test_swiglu_has_the_hidden_width_of_llamagen(width, heads, hidden):
    config = TransformerConfig(width, 1, heads, 16, 1000)
    assert config.ffn_width == hidden


def test_rope_angles_in_closed_form():
    table = Rope(CONFIG).table
    half = CONFIG.head_width // 2
    assert table.shape == (1 + CONFIG.length, half, 2)
    for row in range(CONFIG.grid):
        for column in range(CONFIG.grid):
            for pair in range(half):
                step, place = (row, pair) if pair < half // 2 else (column, pair - half // 2)
                angle = step * CONFIG.rope_base ** (-2 * place / half)
                cos, sin = table[1 + row * CONFIG.grid + column, pair].tolist()
                assert cos == pytest.approx(math.cos(angle), abs=1e-6)
                assert sin == pytest.approx(math.sin(angle), abs=1e-6)


def at(x_E: torch.Tensor, position: int, config: TransformerConfig = CONFIG) -> torch.Tensor:
    """`x_E` as a query or key at `position`."""
    return rotate(x_E[None, None, None, None], Rope(config)(position, position + 1)).flatten()


def test_rotation_turns_neighbouring_pairs():
    x_E = torch.randn(CONFIG.head_width, generator=torch.Generator().manual_seed(0))
    position = 1 + CONFIG.grid + 2
    for pair, (cos, sin) in enumerate(Rope(CONFIG).table[position]):
        a, b = x_E[2 * pair : 2 * pair + 2]
        expected = torch.stack([a * cos - b * sin, a * sin + b * cos])
        torch.testing.assert_close(at(x_E, position)[2 * pair : 2 * pair + 2], expected)


cells = st.integers(0, CONFIG.grid - 1)


@given(cells, cells, cells, cells, st.integers(0, 1000))
def test_attention_sees_only_relative_places(row_a, column_a, row_b, column_b, seed):
    generator = torch.Generator().manual_seed(seed)
    q_E, k_E = torch.randn(2, CONFIG.head_width, generator=generator, dtype=torch.float64)

    def product(rows: tuple[int, int], columns: tuple[int, int]) -> float:
        q, k = (1 + r * CONFIG.grid + c for r, c in zip(rows, columns, strict=True))
        return float(at(q_E, q) @ at(k_E, k))

    # The same pair of cells, pushed into the upper left corner.
    top, left = min(row_a, row_b), min(column_a, column_b)
    here = product((row_a, row_b), (column_a, column_b))
    there = product((row_a - top, row_b - top), (column_a - left, column_b - left))
    assert here == pytest.approx(there, abs=1e-5)


def test_class_token_is_left_alone_or_zero():
    x_E = torch.randn(CONFIG.head_width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(at(x_E, 0), x_E)
    zero = dataclasses.replace(CONFIG, class_token_rope="zero")
    assert torch.equal(at(x_E, 0, zero), torch.zeros_like(x_E))
    assert torch.equal(Rope(zero).table[1:], Rope(CONFIG).table[1:])


def test_rope_keeps_its_precision_and_survives_to_empty():
    expected = Rope(CONFIG).table
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        trunk = Trunk(CONFIG, LABELS).to(dtype)
        assert trunk.rope.table.dtype == torch.float32
        assert torch.equal(trunk.rope.table, expected)
    with torch.device("meta"):
        trunk = Trunk(CONFIG, LABELS)
    assert trunk.rope.table.is_meta
    assert torch.equal(trunk.to_empty(device="cpu").rope.table, expected)
    assert not any("rope" in key for key in trunk.state_dict())


def test_starts_as_llamagen():
    torch.manual_seed(0)
    trunk = Trunk(dataclasses.replace(CONFIG, width=192), 64)
    for name, parameter in trunk.state_dict().items():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert float(parameter.mean()) == pytest.approx(0, abs=0.004), name
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.15), name
    assert not zero_head(8, 5).weight.any()


@pytest.mark.parametrize("class_token_rope", ["identity", "zero"])
def test_steps_with_cache_equal_one_causal_pass(class_token_rope):
    trunk = make_trunk(dataclasses.replace(CONFIG, class_token_rope=class_token_rope))
    labels_BL, classes_B = make_inputs(3)
    with torch.no_grad():
        expected = trunk(labels_BL[:, :-1], classes_B, causal=True)
        cache = KVCache(CONFIG, 3, torch.device("cpu"), torch.float32)
        inputs = [classes_B, *labels_BL[:, :-1].unbind(1)]
        steps = []
        for position, x_B in enumerate(inputs):
            steps.append(trunk.step(x_B[:, None], position, cache)[:, 0])
            for stored in (*cache.k, *cache.v):
                stored[:, :, position + 1 :] = 1e6  # is not there yet, and must not be seen
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [(16,), (1, 15), (5, 1, 1, 9), (3, 4, 5, 4)])
def test_several_positions_at_once_equal_one_causal_pass(parts, monkeypatch):
    monkeypatch.setattr(KVCache, "BLOCK", 6)  # which the length is no multiple of
    trunk = make_trunk(CONFIG)
    labels_BL, classes_B = make_inputs(3)
    inputs_BT = torch.cat([classes_B[:, None], labels_BL[:, :-1]], dim=1)
    with torch.no_grad():
        expected = trunk(labels_BL[:, :-1], classes_B, causal=True)
        cache = KVCache(CONFIG, 3, torch.device("cpu"), torch.float32)
        start, steps = 0, []
        for count in parts:
            # The images one by one: each finds its own rows in the cache.
            given = inputs_BT[:, start : start + count]
            one = [trunk.step(given[i : i + 1], start, cache, slice(i, i + 1)) for i in range(3)]
            steps.append(torch.cat(one))
            start += count
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_only_dropout_depends_on_training_mode():
    labels_BL, classes_B = make_inputs(2)
    plain = make_trunk(dataclasses.replace(CONFIG, dropout=0.0))
    dropping = make_trunk(CONFIG)
    expected = plain(labels_BL, classes_B, causal=False)
    assert torch.equal(plain.train()(labels_BL, classes_B, causal=False), expected)
    assert torch.equal(dropping(labels_BL, classes_B, causal=False), expected)
    assert not torch.equal(dropping.train()(labels_BL, classes_B, causal=False), expected)
    # Token, attention and SwiGLU: LlamaGen's three places, in each of them.
    places = [name for name, module in dropping.named_modules() if isinstance(module, nn.Dropout)]
    assert len(places) == 1 + 2 * CONFIG.layers


def test_half_precision_is_near_single():
    labels_BL, classes_B = make_inputs(2)
    with torch.no_grad():
        single = make_trunk()(labels_BL, classes_B, causal=True)
        half = make_trunk().bfloat16()(labels_BL, classes_B, causal=True)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - single).abs().mean()) < 0.02 * float(single.abs().mean()) + 0.02


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_drops_that_share_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(0)
    dropout = Dropout(probability)
    x = torch.ones(401, 503, requires_grad=True)
    y = dropout(x)
    kept = y != 0
    # Within 4 standard deviations, also of each row and column, and of neighbours together.
    share, deviation = 1 - probability, (probability * (1 - probability)) ** 0.5
    assert abs(float(kept.float().mean()) - share) < 4 * deviation / x.numel() ** 0.5
    for axis in (0, 1):
        spread = kept.float().mean(axis) - share
        assert float(spread.abs().max()) < 5 * deviation / x.shape[axis] ** 0.5
        both = (kept.roll(1, axis) & kept).float().mean() - share**2
        assert abs(float(both)) < 0.01
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / share), rtol=2e-4, atol=0)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y)
    assert not torch.equal(dropout(x), y)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)


def test_no_dropout_where_there_is_none() -> None:
    x = torch.randn(3, 5)
    assert Dropout(0.5).eval()(x) is x and Dropout(0.0)(x) is x
    assert Dropout(0.5)(torch.ones(0)).shape == (0,)
