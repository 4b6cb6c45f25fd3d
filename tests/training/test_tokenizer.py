"""Training of the tokenizer: its losses, the revival of codes, options, resuming, evaluation."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ctf.common.distributed import ALONE
from ctf.common.errors import UserError
from ctf.common.precision import supports_bf16
from ctf.data.image_set import ImageSet, Splits
from ctf.data.transforms import PLAIN, View, as_tensor, from_pixels
from ctf.evaluation import metrics
from ctf.evaluation.reconstruction import reconstruction_metrics
from ctf.models.tokenizer import TokenizerConfig
from ctf.pipelines.folder import load_tokenizer
from ctf.training import loop, optim
from ctf.training.discriminator import PatchDiscriminator
from ctf.training.tokenizer import (
    TokenizerTrainer,
    TokenizerTraining,
    train,
)
from tests.conftest import without_times
from tests.stalls import no_stalls
from tests.training.parted import assert_steps_agree

CPU = torch.device("cpu")
SIZE = 32
MODEL = TokenizerConfig(
    image_size=SIZE, codebook_size=48, channels=8, multipliers=(1, 1, 2), blocks=1,
    latent_channels=8, groups=4,
)  # fmt: skip
TRAINING = TokenizerTraining(
    free_until=0.0,
    steps=40,
    batch_size=4,
    learning_rate=3e-3,
    warm_up=4,
    revive_every=5,
    evaluate_every=20,
)


class Stripes(ImageSet):
    """Colored stripes of many directions, never symmetric, so that mirrored ones differ."""

    def __init__(self, count: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
        waves = [
            np.sin(
                6 * (x * random.normal() + y * random.normal()) + random.uniform(0, 6, (3, 1, 1))
            )
            + x
            for _ in range(count)
        ]
        self.pixels = ((np.stack(waves) + 1) / 3 * 255).clip(0, 255).astype(np.uint8)
        self.pixels = self.pixels.transpose(0, 2, 3, 1).copy()
        classes_N = np.zeros(count, np.int64)
        super().__init__("stripes", ("stripes",), classes_N, SIZE, f"stripes {count} {seed}")

    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        pixels = self.pixels[np.asarray(indices, np.int64)]
        return pixels[:, :, ::-1].copy() if view.flip else pixels


IMAGES = Splits(Stripes(30, seed=0), Stripes(70, seed=1))


def trainer(training: TokenizerTraining = TRAINING, **changes: Any) -> TokenizerTrainer:
    return TokenizerTrainer(MODEL, dataclasses.replace(training, **changes), IMAGES, ALONE)


def watch(obj: Any, name: str) -> list[tuple[Tensor, Tensor]]:
    """The inputs and outputs of a method of one tensor, both with retained gradients."""
    calls: list[tuple[Tensor, Tensor]] = []
    method: Callable[[Tensor], Tensor] = getattr(obj, name)

    def watched(x: Tensor) -> Tensor:
        out = method(x)
        for tensor in (x, out):
            if tensor.requires_grad:
                tensor.retain_grad()
        calls.append((x, out))
        return out

    setattr(obj, name, watched)
    return calls


# --- the losses -----------------------------------------------------------------------------------


def test_the_gradient_passes_the_quantization_unchanged() -> None:
    t = trainer(codebook_weight=0.0, commitment_weight=0.0, clip=1e9)
    encoded, decoded = watch(t.model, "encode_vectors"), watch(t.model, "decode_vectors")
    codebook_VC = t.model.codebook().detach().clone()
    t.step(0)
    vectors_BLC, quantized_BLC = encoded[0][1], decoded[0][0]
    codes_BL = (vectors_BLC @ codebook_VC.T).argmax(-1)
    torch.testing.assert_close(quantized_BLC, codebook_VC[codes_BL])  # the decoder's input
    assert vectors_BLC.grad is not None and quantized_BLC.grad is not None
    assert torch.equal(vectors_BLC.grad, quantized_BLC.grad)
    assert bool(vectors_BLC.grad.any())


def test_the_losses_by_hand() -> None:
    t = trainer(commitment_weight=0.3, codebook_weight=0.7)
    model = copy.deepcopy(t.model)
    encoded = watch(t.model, "encode_vectors")
    logged = t.step(0)
    with torch.no_grad():
        images_BCHW = encoded[0][0]
        vectors_BLC = model.encode_vectors(images_BCHW)
        quantized_BLC = model.codebook()[model.encode(images_BCHW)]
        reconstruction = F.mse_loss(model.decode_vectors(quantized_BLC), images_BCHW)
        # On the unit sphere the squared distance is 2 - 2 cos.
        distance = (2 - 2 * (vectors_BLC * quantized_BLC).sum(-1)).mean()
    assert float(logged["reconstruction"]) == pytest.approx(float(reconstruction), rel=1e-4)
    assert float(logged["commitment"]) == pytest.approx(float(distance), rel=1e-3)
    expected = float(reconstruction) + (0.3 + 0.7) * float(distance)
    assert float(logged["loss"]) == pytest.approx(expected, rel=1e-4)


def test_the_codebook_loss_moves_codes_and_the_commitment_loss_the_encoder() -> None:
    for weights, moves in (((1.0, 0.0), "embedding"), ((0.0, 1.0), "encoder")):
        t = trainer(codebook_weight=weights[0], commitment_weight=weights[1])
        model = t.model
        model.decode_vectors = lambda vectors: torch.zeros(4, 3, SIZE, SIZE)  # type: ignore[method-assign]
        t.step(0)
        gradient = {
            "embedding": model.embedding.weight.grad,
            "encoder": model.encoder.input.weight.grad,
        }
        for name, value in gradient.items():
            assert (value is not None and bool(value.any())) == (name == moves), (weights, name)


def test_half_of_the_images_are_mirrored() -> None:
    t = trainer(batch_size=30)
    encoded = watch(t.model, "encode_vectors")
    mirrored = []
    for step in range(4):  # each an epoch
        t.step(step)
        indices = optim.batch_indices(30, 30, 0, step)
        for image, index in zip(encoded[-1][0], indices, strict=True):
            plain, flipped = (
                torch.equal(image, as_tensor(IMAGES.train.read([index], View(flip=flip)))[0])
                for flip in (False, True)
            )
            assert plain != flipped
            mirrored.append(flipped)
    assert 40 <= sum(mirrored) <= 80  # of 120: 3.6 standard deviations
    t = trainer(flip=False)
    encoded = watch(t.model, "encode_vectors")
    t.step(0)
    expected = as_tensor(IMAGES.train.read(optim.batch_indices(30, 4, 0, 0)))
    assert torch.equal(encoded[0][0], expected)


def test_it_learns() -> None:
    t = trainer()
    before = t.evaluate()
    for step in range(TRAINING.steps):
        t.step(step)
    after = t.evaluate()
    assert after["mse"] < 0.75 * before["mse"]
    assert after["psnr"] > before["psnr"] + 1.5


def test_it_stops_before_what_is_not_finite() -> None:
    t = trainer()
    with torch.no_grad():
        t.model.decoder.output.bias[0] = torch.nan
    before = {k: v.clone() for k, v in t.model.state_dict().items()}
    with pytest.raises(UserError, match="step 3: tokenizer's loss is nan"):
        t.step(3)
    for name, value in t.model.state_dict().items():
        assert torch.equal(value.nan_to_num(9), before[name].nan_to_num(9)), name


# --- dead codes -----------------------------------------------------------------------------------


def used(t: TokenizerTrainer) -> float:
    return t.evaluate()["usage"]


def test_revival_raises_the_usage() -> None:
    """Where all codes but one lie behind the encoder's vectors, only revival brings them back."""
    usage = {}
    for name, until in (("revived", 0.7), ("left alone", 0.0)):
        t = trainer(revive_until=until)
        with torch.no_grad():
            middle_C = F.normalize(
                t.model.encode_vectors(as_tensor(IMAGES.val.read(range(4)))).mean((0, 1)), dim=0
            )
            t.model.embedding.weight.copy_(-middle_C + 0.01 * t.model.embedding.weight)
            t.model.embedding.weight[0] = middle_C
        assert used(t) < 0.1
        for step in range(TRAINING.steps):
            t.step(step)
        usage[name] = used(t)
    assert usage["left alone"] < 0.1 < 0.7 < usage["revived"]


def test_dead_codes_become_vectors_of_the_batch() -> None:
    t = trainer(revive_every=3)
    t.step(0)
    t.step(1)
    dead = [3, 17, 40]
    with torch.no_grad():  # far from all vectors, so that this step does not use them
        vectors_BLC = t.model.encode_vectors(as_tensor(IMAGES.train.read(range(30))))
        t.model.embedding.weight[dead] = -vectors_BLC.mean((0, 1))
    t.usage_V.fill_(100.0)
    t.usage_V[dead] = 0.0
    encoded = watch(t.model, "encode_vectors")
    logged = t.step(2)
    assert float(logged["revived"]) == 3
    embedding = t.model.embedding.weight
    vectors_NC = encoded[0][1].detach().flatten(0, 1)
    # In double: by products of matrices, as here, equal vectors are 3e-4 apart otherwise.
    distances = torch.cdist(embedding[dead].detach().double(), vectors_NC.double())
    assert float(distances.min(1).values.max()) < 1e-6
    assert len(set(distances.argmin(1).tolist())) == 3  # three different ones
    moments = t.optimizer.state[embedding]
    for name in ("exp_avg", "exp_avg_sq"):
        rows = moments[name].any(-1)
        assert not bool(rows[dead].any()) and bool(rows.any())
    assert t.usage_V[dead].tolist() == [1.0] * 3


def test_more_dead_codes_than_vectors() -> None:
    t = trainer(revive_every=1, batch_size=1)
    small = dataclasses.replace(MODEL, codebook_size=300)
    t = TokenizerTrainer(small, t.training, IMAGES, ALONE)
    t.usage_V.zero_()
    assert float(t.step(0)["revived"]) <= 64  # as many vectors as one image has


def test_codes_settle_in_the_end() -> None:
    t = trainer(revive_every=1, revive_until=0.5)
    for step, revives in ((19, True), (20, False), (39, False)):
        assert ("revived" in t.step(step)) == revives


def test_usage_is_a_moving_average() -> None:
    t = trainer(revive_every=10)
    encoded = watch(t.model, "encode_vectors")
    codebook_VC = t.model.codebook().detach().clone()
    t.step(0)
    codes_N = (encoded[0][1] @ codebook_VC.T).argmax(-1).flatten()
    counts_V = torch.bincount(codes_N, minlength=MODEL.codebook_size)
    expected_V = 0.8 + 0.2 * counts_V * MODEL.codebook_size / len(codes_N)
    torch.testing.assert_close(t.usage_V, expected_V)


# --- options and resuming -------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "perceptual": {"perceptual_weight": 0.5, "steps": 6},
    "adversarial": {"adversarial_weight": 0.5, "adversarial_start": 0.5, "steps": 6},
}


class Killed(Exception):
    pass


@pytest.mark.parametrize("option", OPTIONS)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    training = dataclasses.replace(TRAINING, **{"steps": 14, **OPTIONS[option]})
    train(MODEL, training, IMAGES, tmp_path / "whole")

    def kill(done: int, steps: int, _: object) -> None:
        if done in (4, 6):
            raise Killed

    for _ in range(2):  # the second time just after it has gone on from its state
        with pytest.raises(Killed):
            train(MODEL, training, IMAGES, tmp_path / "killed", ALONE, kill)
    train(MODEL, training, IMAGES, tmp_path / "killed")
    whole, killed = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()

    logged = without_times(tmp_path / "whole")
    assert logged == without_times(tmp_path / "killed")
    steps = [line["step"] for line in logged if line["split"] == "train"]
    assert steps == list(range(2, training.steps + 1, 2))
    names = {name for line in logged for name in line}
    assert ("perceptual" in names) == (option == "perceptual")
    assert ("discriminator" in names) == (option == "adversarial")


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_in_parts_is_that_of_the_whole_batch(option: str) -> None:
    # Step 0 has no codes yet and initializes them; steps 1 and 3 revive codes. 2, 2 and 3 images.
    options = {**OPTIONS[option], "steps": 6, "free_until": 0.2, "revive_every": 2, "warm_up": 0}
    options |= {"revive_below": 0.5, "batch_size": 7}
    assert_steps_agree(trainer(**options), trainer(**options), (0, 1, 3), parts=3)


@pytest.mark.usefixtures("three_threads")
def test_held_out_images_in_parts_measure_the_same() -> None:
    model = trainer().model.eval()
    parted = reconstruction_metrics(model, IMAGES.val)
    torch.set_num_threads(1)
    assert reconstruction_metrics(model, IMAGES.val) == pytest.approx(parted)


def test_the_discriminator_waits_for_its_start() -> None:
    t = trainer(adversarial_weight=0.5, adversarial_start=0.25, steps=8)
    assert t.discriminator is not None
    before = [p.clone() for p in t.discriminator.parameters()]
    assert "adversarial" not in t.step(1)
    assert all(map(torch.equal, before, t.discriminator.parameters()))
    logged = t.step(2)
    assert {"adversarial", "discriminator"} <= logged.keys()
    assert not torch.equal(before[0], next(t.discriminator.parameters()))
    assert float(logged["discriminator"]) == pytest.approx(2, abs=0.5)  # hinge of no idea


def test_options_act_on_the_tokenizer() -> None:
    plain = trainer(steps=2)
    plain.step(1)
    for option in ("perceptual", "adversarial"):
        other = trainer(steps=2, **{f"{option}_weight": 0.5})
        other.step(1)
        assert not torch.equal(
            plain.model.encoder.input.weight, other.model.encoder.input.weight
        ), option


@torch.no_grad()
def test_the_discriminator_rates_patches_alike_in_any_batch() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    images_BCHW = as_tensor(IMAGES.val.read(range(3)))
    logits = discriminator(images_BCHW)
    assert logits.shape == (3, 1, 6, 6)
    alone = torch.cat([discriminator(image[None]) for image in images_BCHW])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


def test_a_finished_tokenizer_is_loaded_and_others_are_refused(tmp_path: Path) -> None:
    training = dataclasses.replace(TRAINING, steps=2)
    train(MODEL, training, IMAGES, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"config.json", "metrics.jsonl", "model.safetensors"}
    train(MODEL, training, IMAGES, tmp_path, ALONE, lambda *_: pytest.fail("it was trained again"))
    for model, images in (
        (dataclasses.replace(MODEL, codebook_size=64), IMAGES),
        (MODEL, Splits(IMAGES.val, IMAGES.train)),
    ):
        with pytest.raises(UserError, match="of another configuration"):
            train(model, training, images, tmp_path)
    with pytest.raises(UserError, match=r"training\.steps was 2, now 3"):
        train(MODEL, dataclasses.replace(TRAINING, steps=3), IMAGES, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def test_evaluation_by_hand() -> None:
    model = trainer().model
    images_BCHW = as_tensor(IMAGES.val.read(range(70)))  # more than one batch of it
    reported: list[tuple[int, int]] = []
    got = reconstruction_metrics(model, IMAGES.val, progress=lambda *args: reported.append(args))
    assert reported == [(64, 70), (70, 70)]
    codes_BL = model.encode(images_BCHW)
    decoded_BCHW = model.decode(codes_BL)
    assert got["images"] == 70
    assert got["mse"] == pytest.approx(float(F.mse_loss(decoded_BCHW, images_BCHW)), rel=1e-4)
    assert got["psnr"] == pytest.approx(float(metrics.psnr(decoded_BCHW, images_BCHW).mean()))
    ssim = float(metrics.ssim(decoded_BCHW, images_BCHW).mean())
    assert got["ssim"] == pytest.approx(ssim, rel=1e-4)
    counts = np.unique(codes_BL.numpy(), return_counts=True)[1]
    shares = counts / counts.sum()
    assert got["usage"] == len(counts) / MODEL.codebook_size
    assert got["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert reconstruction_metrics(model, IMAGES.val, limit=5)["images"] == 5


def test_loaded_is_what_was_trained(tmp_path: Path) -> None:
    trained = train(MODEL, dataclasses.replace(TRAINING, steps=2), IMAGES, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.config == MODEL
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected 1 or more"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"evaluate_images": 0}, "evaluate_images: got 0"),
        ({"revive_every": 0}, "revive_every: got 0"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0, expected more than 0"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1, expected 0 or more"),
        ({"warm_up": -1}, "warm_up: got -1"),
        ({"clip": 0.0}, "clip: got 0.0"),
        ({"betas": (0.9,)}, r"betas: got \[0.9\], expected two"),
        ({"betas": (0.9, 1.0)}, "betas: got"),
    ],
)
def test_values_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TRAINING, **change)


def test_most_steps_never_wait_for_a_gpu() -> None:
    t = trainer(revive_every=5, perceptual_weight=0.1, adversarial_weight=0.1, adversarial_start=0)
    t.checks = optim.Checks(deferred=True)
    t.step(0)
    with no_stalls():
        for step in range(1, 4):
            t.step(step)
        with pytest.raises(AssertionError, match="nonzero"):
            t.step(4)  # codes are revived


@pytest.mark.skipif(not supports_bf16(CPU), reason="no products in bfloat16 here")
def test_in_bfloat16_a_step_is_nearly_the_same() -> None:
    training = dataclasses.replace(TRAINING, adversarial_weight=0.1, adversarial_start=0.0)
    steps = []
    for precision in ("fp32", "bf16"):
        execution = loop.Execution(precision=precision)
        t = TokenizerTrainer(MODEL, training, IMAGES, ALONE, execution)
        images_BCHW = as_tensor(IMAGES.train.read(np.arange(4)))
        vectors_BLC, _, codes_N, decoded_BCHW = t.reconstruction(images_BCHW, True)
        assert vectors_BLC.dtype == decoded_BCHW.dtype == torch.float32
        assert torch.equal(codes_N, t.model.nearest(vectors_BLC.flatten(0, 1)))
        steps.append({k: float(v) for k, v in t.step(0).items()})
        assert {p.dtype for p in t.model.parameters()} == {torch.float32}
    for name, value in steps[0].items():
        assert steps[1][name] == pytest.approx(value, rel=0.05, abs=1e-3), name


def test_the_codebook_is_initialized_with_vectors() -> None:
    t = trainer(steps=20, free_until=0.5)
    before = t.model.embedding.weight.clone()
    for step in range(9):
        t.step(step)
    # No look-up yet, so no gradient: not even weight decay moves a code.
    assert torch.equal(t.model.embedding.weight, before)
    t.step(9)
    with torch.no_grad():
        batches = [t.model.encode_vectors(from_pixels(t.batches(i)[1][0])) for i in range(4)]
        vectors_NC = torch.cat(batches).flatten(0, 1)
        nearest_V = (t.model.codebook() @ vectors_NC.T).max(1).values
    torch.testing.assert_close(nearest_V, torch.ones_like(nearest_V))
