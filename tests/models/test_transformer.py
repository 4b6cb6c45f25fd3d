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
    Backbone,
    KVCache,
    TransformerConfig,
    rotate,
    rotation_table,
    zero_head,
)

CONFIG = TransformerConfig(width=48, layers=2, heads=2, grid=4, classes=3, ffn_multiple=16)
LABELS = 7
CPU = torch.device("cpu")


def make_backbone(config: TransformerConfig = CONFIG) -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(config, LABELS).eval()
    for parameter in backbone.parameters():
        if parameter.ndim == 2:  # larger than at the start, so that each part has its effect
            nn.init.normal_(parameter, std=0.2)
    return backbone


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
        {"ffn_hidden": 0},
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
    table = rotation_table(CONFIG, CPU)
    half = CONFIG.head_dim // 2
    assert table.shape == (1 + CONFIG.length, half, 2)
    for row in range(CONFIG.grid):
        for column in range(CONFIG.grid):
            for pair in range(half):
                step, i = (row, pair) if pair < half // 2 else (column, pair - half // 2)
                angle = step * CONFIG.rope_base ** (-2 * i / half)
                cos, sin = table[1 + row * CONFIG.grid + column, pair].tolist()
                assert cos == pytest.approx(math.cos(angle), abs=1e-6)
                assert sin == pytest.approx(math.sin(angle), abs=1e-6)


def at(x_E: torch.Tensor, position: int, config: TransformerConfig = CONFIG) -> torch.Tensor:
    """`x_E` as a query or key at `position`."""
    return rotate(
        x_E[None, None, None, None], rotation_table(config, CPU)[position : position + 1]
    ).flatten()


def test_rotation_turns_neighbouring_pairs():
    x_E = torch.randn(CONFIG.head_dim, generator=torch.Generator().manual_seed(0))
    position = 1 + CONFIG.grid + 2
    for pair, (cos, sin) in enumerate(rotation_table(CONFIG, CPU)[position]):
        a, b = x_E[2 * pair : 2 * pair + 2]
        expected = torch.stack([a * cos - b * sin, a * sin + b * cos])
        torch.testing.assert_close(at(x_E, position)[2 * pair : 2 * pair + 2], expected)


cells = st.integers(0, CONFIG.grid - 1)


@given(cells, cells, cells, cells, st.integers(0, 1000))
def test_attention_depends_on_relative_positions_only(row_a, column_a, row_b, column_b, seed):
    generator = torch.Generator().manual_seed(seed)
    q_E, k_E = torch.randn(2, CONFIG.head_dim, generator=generator, dtype=torch.float64)

    def product(rows: tuple[int, int], columns: tuple[int, int]) -> float:
        q, k = (1 + r * CONFIG.grid + c for r, c in zip(rows, columns, strict=True))
        return float(at(q_E, q) @ at(k_E, k))

    # The same pair of cells, pushed into the upper left corner.
    top, left = min(row_a, row_b), min(column_a, column_b)
    here = product((row_a, row_b), (column_a, column_b))
    there = product((row_a - top, row_b - top), (column_a - left, column_b - left))
    assert here == pytest.approx(there, abs=1e-5)


def test_class_token_is_left_alone_or_zero():
    x_E = torch.randn(CONFIG.head_dim, generator=torch.Generator().manual_seed(0))
    assert torch.equal(at(x_E, 0), x_E)
    zero = dataclasses.replace(CONFIG, class_token_rope="zero")
    assert torch.equal(at(x_E, 0, zero), torch.zeros_like(x_E))
    assert torch.equal(rotation_table(zero, CPU)[1:], rotation_table(CONFIG, CPU)[1:])


def test_rotations_are_in_single_precision_and_no_part_of_the_state():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        backbone = Backbone(CONFIG, LABELS).to(dtype)
        assert backbone.rotation(0, 17).dtype == torch.float32
        assert torch.equal(backbone.rotation(3, 2), rotation_table(CONFIG, CPU)[3:5])
    with torch.device("meta"):
        assert Backbone(CONFIG, LABELS).rotation(0, 17).is_meta
    assert not any("rot" in key for key in backbone.state_dict())


def test_rotations_first_computed_while_sampling_serve_training():
    backbone = make_backbone(dataclasses.replace(CONFIG, grid=3))
    labels_BL, classes_B = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        backbone(labels_BL, classes_B, causal=True)
    backbone(labels_BL, classes_B, causal=True).sum().backward()


def test_starts_as_llamagen():
    torch.manual_seed(0)
    backbone = Backbone(dataclasses.replace(CONFIG, width=192), 64)
    for name, parameter in backbone.state_dict().items():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert float(parameter.mean()) == pytest.approx(0, abs=0.004), name
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.15), name
    assert not zero_head(8, 5).weight.any()


@pytest.mark.parametrize("class_token_rope", ["identity", "zero"])
def test_steps_with_cache_equal_one_causal_pass(class_token_rope):
    backbone = make_backbone(dataclasses.replace(CONFIG, class_token_rope=class_token_rope))
    labels_BL, classes_B = make_inputs(3)
    with torch.no_grad():
        expected = backbone(labels_BL[:, :-1], classes_B, causal=True)
        cache = KVCache(CONFIG, 3, CPU, torch.float32)
        inputs = [classes_B, *labels_BL[:, :-1].unbind(1)]
        steps = []
        for position, x_B in enumerate(inputs):
            steps.append(backbone.step(x_B[:, None], position, cache)[:, 0])
            for stored in (*cache.k, *cache.v):
                stored[:, :, position + 1 :] = 1e6  # positions to come, which must not be seen
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [(16,), (1, 15), (5, 1, 1, 9), (3, 4, 5, 4)])
def test_several_positions_at_once_equal_one_causal_pass(parts):
    backbone = make_backbone(CONFIG)
    labels_BL, classes_B = make_inputs(3)
    inputs_BT = torch.cat([classes_B[:, None], labels_BL[:, :-1]], dim=1)
    with torch.no_grad():
        expected = backbone(labels_BL[:, :-1], classes_B, causal=True)
        cache = KVCache(CONFIG, 3, CPU, torch.float32)
        start, steps = 0, []
        for count in parts:
            # The images one by one: each finds its own rows in the cache.
            part = inputs_BT[:, start : start + count]
            one = [backbone.step(part[i : i + 1], start, cache, slice(i, i + 1)) for i in range(3)]
            steps.append(torch.cat(one))
            start += count
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_only_dropout_depends_on_training_mode():
    labels_BL, classes_B = make_inputs(2)
    plain = make_backbone(dataclasses.replace(CONFIG, dropout=0.0))
    dropping = make_backbone(CONFIG)
    expected = plain(labels_BL, classes_B, causal=False)
    assert torch.equal(plain.train()(labels_BL, classes_B, causal=False), expected)
    assert torch.equal(dropping(labels_BL, classes_B, causal=False), expected)
    assert not torch.equal(dropping.train()(labels_BL, classes_B, causal=False), expected)
    # Token, attention and SwiGLU: as in LlamaGen.
    dropouts = [module for module in dropping.modules() if isinstance(module, nn.Dropout)]
    assert len(dropouts) == 1 + 2 * CONFIG.layers


def test_memory_of_a_cache_is_that_of_its_tensors():
    backbone = Backbone(CONFIG, LABELS)
    for dtype in (None, torch.bfloat16):
        backbone.cache_dtype = dtype
        cache = backbone.cache(3)
        total = sum(stored.nbytes for stored in (*cache.k, *cache.v))
        assert total == 3 * backbone.cache_bytes()


def test_half_precision_is_near_single():
    labels_BL, classes_B = make_inputs(2)
    with torch.no_grad():
        single = make_backbone()(labels_BL, classes_B, causal=True)
        half = make_backbone().bfloat16()(labels_BL, classes_B, causal=True)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - single).abs().mean()) < 0.02 * float(single.abs().mean()) + 0.02
