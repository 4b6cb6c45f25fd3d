"""Packed and int8 transformers, and the cache that grows."""

import pytest
import torch

from ctf import kernels
from ctf.kernels.products import Int8, Packed, has_layer
from ctf.kernels.sampling_cpu import GrowingCache, PackedSwiGLU, pack
from ctf.models.coarse import CoarseModel
from ctf.models.transformer import KVCache, SwiGLU
from tests.kernels.conftest import CONFIG, VOCAB_SIZE, logits, make_coarse

CPU = torch.device("cpu")
needs_packed = pytest.mark.skipif(not has_layer(Packed), reason="no packed layers here")
needs_int8 = pytest.mark.skipif(not has_layer(Int8), reason="no int8 layers here")


@needs_packed
def test_packed_is_equal_up_to_rounding_and_keeps_its_weights() -> None:
    model, packed = make_coarse(), make_coarse()
    pack(packed, Packed)
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    assert sum(isinstance(module, PackedSwiGLU) for module in packed.modules()) == CONFIG.layers
    torch.testing.assert_close(logits(packed), logits(model), rtol=0, atol=1e-4)
    own, stored = model.state_dict(), packed.state_dict()
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[name], stored[name]) for name in own)


@needs_int8
def test_int8_is_near_and_has_no_weights_to_save() -> None:
    model, packed = make_coarse(128), make_coarse(128)
    pack(packed, Int8)
    exact, near = logits(model), logits(packed)
    assert float((exact - near).abs().mean()) < 0.1 * float(exact.std())
    assert not torch.equal(exact, near)
    assert not kernels.is_exact(packed) and kernels.is_exact(model)


@needs_int8
def test_layers_know_how_many_bytes_they_hold() -> None:
    ffn = SwiGLU(CONFIG)
    matrices = sum(p.numel() for p in ffn.parameters())
    rows = sum(p.shape[0] for p in ffn.parameters())
    for kind, expected in ((Packed, 4 * matrices), (Int8, matrices + 4 * rows)):
        assert sum(kind(p).bytes() for p in ffn.parameters()) == expected


def with_cache(model: CoarseModel, kind: type[KVCache], parts: tuple[int, ...]) -> torch.Tensor:
    """Hidden vectors by steps over so many positions, the images of a batch one by one."""
    model.backbone.cache_class = kind
    labels_BL = torch.randint(VOCAB_SIZE, (3, 16), generator=torch.Generator().manual_seed(1))
    inputs_BT = torch.cat([torch.arange(3)[:, None], labels_BL[:, :-1]], dim=1)
    cache, start, out = model.backbone.cache(3), 0, []
    for length in parts:
        own = inputs_BT[:, start : start + length]
        steps = [
            model.backbone.step(own[i : i + 1], start, cache, slice(i, i + 1)) for i in range(3)
        ]
        out.append(torch.cat(steps))
        start += length
        for stored in (*cache.k, *cache.v):
            assert stored.shape[2] >= start
            stored[:, :, start:] = 1e6  # positions to come, which must not be seen
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("parts", [(16,), (1,) * 16, (1, 15), (5, 1, 1, 9), (3, 4, 5, 4)])
def test_a_cache_that_grows_is_the_cache(
    parts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GrowingCache, "BLOCK", 6)  # which the length is no multiple of
    plain, growing = (with_cache(make_coarse(), kind, parts) for kind in (KVCache, GrowingCache))
    torch.testing.assert_close(growing, plain, rtol=1e-4, atol=1e-5)


def test_a_cache_grows_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrowingCache, "BLOCK", 6)
    cache = GrowingCache(CONFIG, 2, CPU, torch.float32)
    rooms = []
    for start in range(16):
        q, k, v = torch.randn(3, 2, CONFIG.heads, 1, CONFIG.head_dim)
        cache.attend(0, start, slice(None), q, k, v)
        rooms.append(cache.k[0].shape[2])
    assert rooms == [6] * 6 + [12] * 6 + [16] * 4
    assert cache.k[1].shape[2] == 0  # each layer for itself


@needs_int8
def test_int8_products_of_a_row_do_not_depend_on_the_others() -> None:
    layer, x_TD = Int8(torch.randn(48, 64)), torch.randn(9, 64) * torch.logspace(-3, 3, 9)[:, None]
    together = layer(x_TD)
    for row, alone in enumerate(x_TD):
        assert torch.equal(layer(alone[None])[0], together[row])
    assert torch.equal(layer(x_TD.view(3, 3, 64)).flatten(0, 1), together)
    assert not layer(torch.zeros(2, 64)).any()
