"""Models prepared for training, evaluation and sampling: the same models, faster."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from ctf import kernels
from ctf.kernels import compiled, graphs, sampling_cpu, train_cpu
from ctf.kernels.logits import LeanCoarseModel, LeanFineModel
from ctf.kernels.tokenizer_cpu import CpuVQModel
from ctf.models.clusters import Clusters
from ctf.models.coarse import CoarseModel
from ctf.models.fine import FineModel
from ctf.models.noise import noise_keys
from ctf.models.parallel import CoarseDecoder, sample_coarse
from ctf.models.sampling import Sampling
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.models.transformer import Attention, KVCache, SwiGLU
from tests.kernels.conftest import CONFIG, VOCAB_SIZE, logits, make_coarse

CPU = torch.device("cpu")
CLUSTERS = Clusters.from_labels(torch.arange(VOCAB_SIZE) % 8)
needs_int8 = pytest.mark.skipif(not kernels.available("int8", CPU), reason="no int8 layers here")


def sampled(model: CoarseModel) -> Tensor:
    return sample_coarse(model, torch.arange(5), noise_keys(range(5), 16)[:, 0], Sampling())


def classes_of(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules()}


# --- training and evaluation ----------------------------------------------------------------------


def test_a_model_for_training_has_the_parameters_of_the_plain_one() -> None:
    plain = CoarseModel(CONFIG, VOCAB_SIZE)
    model = copy.deepcopy(plain)
    hooked: list[str] = []
    model.backbone.norm.register_forward_hook(lambda *_: hooked.append("norm"))
    kernels.for_training(model)
    assert classes_of(model).isdisjoint({CoarseModel, Attention, SwiGLU, nn.RMSNorm, nn.Dropout})
    assert list(model.state_dict()) == list(plain.state_dict())
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, other)
    assert isinstance(model, CoarseModel) and type(model.head) is nn.Linear
    loss = model.loss(torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    loss.backward()
    assert hooked == ["norm"] and all(p.grad is not None for p in model.parameters())
    again = copy.deepcopy(model)
    kernels.for_training(again)
    assert classes_of(again) == classes_of(model)


def test_a_model_for_evaluation_has_plain_blocks() -> None:
    for plain, lean in (
        (CoarseModel(CONFIG, 8), LeanCoarseModel), (FineModel(CONFIG, CLUSTERS), LeanFineModel),
    ):  # fmt: skip
        blocks = classes_of(plain.backbone)
        kernels.for_evaluation(plain)
        assert type(plain) is lean and classes_of(plain.backbone) == blocks


def test_what_is_compiled_in_training_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    model = make_coarse()
    kernels.for_training(model, compile=True)
    assert compiled.Attention in classes_of(model) and SwiGLU in classes_of(model)
    assert type(model.backbone.norm) is train_cpu.RMSNorm
    assert type(model.backbone.layers[0].ffn_norm) is nn.RMSNorm
    plain = make_coarse()
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)


def test_subclasses_of_ones_own_are_left_alone() -> None:
    class Own(CoarseModel):
        def loss(self, labels_BL: Tensor, classes_B: Tensor) -> Tensor:
            return 2 * super().loss(labels_BL, classes_B)

    model = Own(CONFIG, VOCAB_SIZE)
    kernels.for_evaluation(model)
    assert type(model) is Own


def test_each_kind_of_model_can_be_prepared() -> None:
    config = TokenizerConfig(
        image_size=16, codebook_size=50, channels=8, multipliers=(1, 2), latent_channels=8, groups=4
    )
    tokenizer = VQModel(config)
    kernels.for_training(tokenizer)
    assert type(tokenizer) is CpuVQModel
    with torch.device("meta"):
        tokenizer, coarse = VQModel(config), CoarseModel(CONFIG, 8)
    kernels.for_training(tokenizer)
    kernels.for_training(coarse)
    assert type(tokenizer) is VQModel and Attention in classes_of(coarse)  # not on a processor


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_exact_engines_sample_the_same(engine: kernels.Engine) -> None:
    model = make_coarse()
    kernels.for_sampling(model, None, None, engine)
    assert model.backbone.cache_class is sampling_cpu.GrowingCache
    assert torch.equal(sampled(model), sampled(make_coarse()))


@pytest.mark.parametrize("engine", ["eager", "auto", pytest.param("int8", marks=needs_int8)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_engines_sample_windows_as_one_by_one(engine: kernels.Engine, guidance: float) -> None:
    """Images of a batch in different places, too. Int8 makes more of the rounding of attention."""
    model = make_coarse()
    kernels.for_sampling(model, None, None, engine)
    keys_BL, classes_B = noise_keys(range(5), 16)[:, 0], torch.arange(5)
    settings = Sampling(guidance=guidance)
    expected = sample_coarse(model, classes_B, keys_BL, settings)
    for window in (2, 5, 16):
        for rows in (slice(0, 1), slice(None)):
            got = sample_coarse(
                model, classes_B[rows], keys_BL[rows], settings, None, window=window
            )
            if engine == "int8":
                assert float((got == expected[rows]).double().mean()) > 0.8
            else:
                assert torch.equal(got, expected[rows])


def test_a_cache_in_bfloat16_is_near_and_half_as_large() -> None:
    labels_BL = torch.randint(40, (6, 16), generator=torch.Generator().manual_seed(1))
    for cache_class in (KVCache, sampling_cpu.GrowingCache):
        both = []
        for dtype in (torch.float32, torch.bfloat16):
            model = make_coarse(128)
            model.backbone.cache_class, model.backbone.cache_dtype = cache_class, dtype
            decoder = CoarseDecoder(model, torch.arange(6) % 6, [2.0] * 16)
            both.append(torch.cat([decoder.logits(labels_BL, [i] * 6, 1) for i in range(16)], 1))
            assert decoder.cache.k[0].dtype == dtype
        exact, near = both
        assert near.dtype == torch.float32 and not torch.equal(exact, near)
        assert float((exact - near).abs().mean()) < 0.02 * float(exact.std())


@needs_int8
@pytest.mark.parametrize("has_bf16", [True, False])
def test_int8_caches_in_bfloat16_where_the_processor_multiplies_it(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "supports_bf16", lambda _: has_bf16)
    model = make_coarse()
    kernels.for_sampling(model, None, None, "int8")
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert model.backbone.cache(2).k[0].dtype == expected
    assert sampled(model).shape == (5, 16)


@pytest.mark.parametrize("engine", ["auto", "int8", "compile"])
def test_an_engine_that_is_not_available_is_eager(
    engine: kernels.Engine, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(kernels, "has_layer", lambda kind: False)
    monkeypatch.setattr(compiled, "compiles", lambda device: False)
    model = make_coarse()
    kernels.for_sampling(model, None, None, engine)
    assert torch.equal(logits(model), logits(make_coarse()))
    assert torch.equal(sampled(model), sampled(make_coarse()))
    message = f"engine {engine} is not available on this cpu; using eager instead"
    assert [str(w.message) for w in recwarn] == ([] if engine == "auto" else [message])


def test_without_a_compiler_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    compiled.compiles.cache_clear()
    assert not kernels.available("compile", CPU)
    compiled.compiles.cache_clear()


def test_packed_layers_are_for_processors() -> None:
    cuda = torch.device("cuda")
    assert kernels.available("eager", CPU) and kernels.available("eager", cuda)
    assert not kernels.available("auto", cuda) and not kernels.available("int8", cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["auto", "compile", "bf16"])
def test_engines_record_passes_on_a_gpu(engine: kernels.Engine) -> None:
    model = make_coarse().to("cuda")
    kernels.for_sampling(model, None, None, engine)
    keys_BL, classes_B = noise_keys(range(5), 16)[:, 0].cuda(), torch.arange(5).cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of passes that cannot be recorded
        sampler = kernels.coarse_sampler(model, classes_B, keys_BL, Sampling())
        while not sampler.done:
            sampler.advance(4)
    assert isinstance(sampler, graphs.GraphedSampler)
    assert kernels.is_exact(model) == (engine != "bf16")
    agreement = float((sampler.labels_BT.cpu() == sampled(make_coarse())).double().mean())
    assert agreement == 1 or (engine == "bf16" and agreement > 0.6)
