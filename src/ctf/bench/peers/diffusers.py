"""A class-conditional diffusion model of the library diffusers, as its users train and sample it.

UNet2DModel predicts the noise of DDPM (arXiv 2006.11239) with the squared-cosine schedule (arXiv
2102.09672). AdamW with warm-up, an exponential moving average, classes left out now and then for
classifier-free guidance (arXiv 2207.12598). Samples are those of DDIM (arXiv 2010.02502).

It trains in the loop of our trainings and with their threads, images, order and mirroring, so that
only the methods differ; and like `ctf fit` it plans its steps by a measured speed.

Shapes: B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ctf.bench.ways import Trained, parameter_count
from ctf.common import config, rng, storage, threads
from ctf.common.distributed import World
from ctf.common.errors import UserError
from ctf.common.precision import autocast, uses_bf16
from ctf.common.progress import OpenProgress
from ctf.common.weights import load_strict
from ctf.data.image_set import ImageSet, Splits
from ctf.data.transforms import View, as_pil, from_pixels
from ctf.pipelines.folder import to_channels_last
from ctf.training import loop, metrics_log, optim
from ctf.training.batches import Batch, Batches
from ctf.training.fit import OVERHEAD
from ctf.training.state import Part

PLAN = "plan.json"  # the number of steps, and the speed that it was planned by
LEVELS = 1000  # of noise
SCHEDULE: dict[str, Any] = {"num_train_timesteps": LEVELS, "beta_schedule": "squaredcos_cap_v2"}
EVALUATED = 64  # held-out images
SMALLEST_PART = 2  # images of a batch that a thread takes


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Network, training and sampling. The defaults are for images of 32 pixels: 4.4 M parameters.

    Attributes:
        channels: Of each resolution, from the images' own to the lowest.
        attention: Which of the resolutions have self-attention, 0 being the first.
        blocks: Residual blocks of each resolution.
        groups: Of normalization. By default the library has 32: with 32 channels, a group would be
            a single one, and normalization would remove what noise level and class add to it.
        warm_up: Steps, or a tenth of a short training.
        class_dropout: How often the class is left out.
        guidance: Of samples: uncond + guidance * (cond - uncond).
        sampling_steps: Of DDIM.
    """

    channels: tuple[int, ...] = (64, 128, 128)
    attention: int = 1
    blocks: int = 1
    groups: int = 8
    batch_size: int = 32
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.02  # of the peak
    warm_up: int = 100
    betas: tuple[float, ...] = (0.95, 0.999)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    class_dropout: float = 0.1
    guidance: float = 1.5
    sampling_steps: int = 25
    seed: int = 0


def config_for(image_size: int) -> DiffusionConfig:
    """Return the configuration for an image size in pixels.

    Larger images get more resolutions, of 32 channels, so that the lowest stays at 8 pixels or
    less, and the number of parameters about the same.

    Raises:
        UserError: The size cannot be halved so often.
    """
    default = DiffusionConfig()
    larger = 0
    while image_size > 32 << larger:
        larger += 1
    factor = 2 ** (larger + len(default.channels) - 1)
    if image_size % factor:
        raise UserError(
            f"diffusers: got images of {image_size} pixels, expected a multiple of {factor}"
        )
    return dataclasses.replace(
        default, channels=(*[32] * larger, *default.channels), attention=larger + default.attention
    )


def make_network(config: DiffusionConfig, image_size: int, classes: int) -> nn.Module:
    """Return a UNet2DModel; class number `classes` is none."""
    from diffusers import UNet2DModel

    attention = [level == config.attention for level in range(len(config.channels))]
    network: nn.Module = UNet2DModel(
        sample_size=image_size,
        layers_per_block=config.blocks,
        block_out_channels=config.channels,
        down_block_types=tuple("Attn" * here + "DownBlock2D" for here in attention),
        up_block_types=tuple("Attn" * here + "UpBlock2D" for here in attention[::-1]),
        norm_num_groups=config.groups,
        num_class_embeds=classes + 1,
    )
    return network


class DiffusionTrainer:
    """The network, its moving average and its optimizer: a `loop.Trainable`."""

    def __init__(
        self, config: DiffusionConfig, images: Splits, steps: int, device: torch.device
    ) -> None:
        from diffusers import DDPMScheduler

        self.config, self.images, self.steps, self.device = config, images, steps, device
        self.in_bf16 = uses_bf16("auto", device)
        self.in_parts = threads.pays(device)
        torch.manual_seed(config.seed)
        network = make_network(config, images.train.image_size, len(images.train.class_names))
        self.network = to_channels_last(network, device).train()
        self.averaged = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.ema = dict(self.averaged.named_parameters())
        self.scheduler = DDPMScheduler(**SCHEDULE)
        self.optimizer = optim.make_optimizer(
            self.network, config.learning_rate, config.betas, config.weight_decay
        )
        self.batches = Batches(functools.partial(read_batch, config, images.train), steps, device)
        self.checks = optim.Checks(World(device=device))

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        """See `loop.Trainable.step`."""
        c = self.config
        rate = optim.learning_rate(
            step, self.steps, c.learning_rate, min(c.warm_up, self.steps // 10), "cosine",
            c.final_learning_rate,
        )  # fmt: skip
        indices_B, batch = self.batches(step)
        self.optimizer.zero_grad(set_to_none=True)
        means, _ = optim.backward(self._losses, batch, self.network.parameters())
        norm = optim.update(
            self.optimizer, means["loss"], rate, c.clip,
            step=step, name="loss", images_B=indices_B, checks=self.checks,
        )  # fmt: skip
        optim.update_ema(self.ema, self.network, c.ema, step)
        return {**means, "gradient_norm": norm, "learning_rate": rate, "images": c.batch_size}

    def _losses(self, *batch: Tensor) -> optim.Computed:
        return {"loss": self._loss(self.network, *batch)}, []

    def _loss(
        self,
        network: nn.Module,
        pixels_BHWC: Tensor,
        noise_BCHW: Tensor,
        levels_B: Tensor,
        classes_B: Tensor,
    ) -> Tensor:
        noisy_BCHW = self.scheduler.add_noise(from_pixels(pixels_BHWC), noise_BCHW, levels_B)
        with autocast(self.device, self.in_bf16):
            predicted_BCHW = network(noisy_BCHW, levels_B, class_labels=classes_B).sample
        return F.mse_loss(predicted_BCHW.float(), noise_BCHW)

    def check(self) -> None:
        """See `loop.Trainable.check`."""
        self.checks.check()

    @torch.no_grad()
    def evaluate(self) -> Mapping[str, float]:
        """Return the loss of held-out images under the averaged weights."""
        rows_B = np.arange(min(EVALUATED, len(self.images.val)))
        pixels_BHWC = self.images.val.read(rows_B)
        batch = [
            torch.from_numpy(pixels_BHWC),
            *_noise(rng.generator(self.config.seed, 2), pixels_BHWC.shape),
            torch.from_numpy(self.images.val.classes_N[rows_B]),
        ]
        sums = threads.over_parts(
            lambda *part: len(part[0]) * self._loss(self.averaged, *part),
            *(tensor.to(self.device) for tensor in batch),
            smallest=SMALLEST_PART,
        )
        return {"loss": float(torch.stack(sums).sum()) / len(rows_B)}

    def parts(self) -> Mapping[str, Part]:
        """See `loop.Trainable.parts`."""
        return {"network": self.network, "ema": self.averaged, "optimizer": self.optimizer}


def read_batch(config: DiffusionConfig, images: ImageSet, step: int) -> Batch:
    """Return the images of a step, with their noise, its levels and their classes."""
    random, count, size = rng.generator(config.seed, 1, step), config.batch_size, images.image_size
    indices_B = optim.batch_indices(len(images), count, config.seed, step)
    flip_B = random.random(count) < (0.5 if images.mirrors else 0.0)
    pixels_BHWC = np.empty((count, size, size, 3), np.uint8)
    for flip in (False, True):
        if (flip_B == flip).any():
            pixels_BHWC[flip_B == flip] = images.read(indices_B[flip_B == flip], View(flip=flip))
    dropped_B = random.random(count) < config.class_dropout
    classes_B = np.where(dropped_B, len(images.class_names), images.classes_N[indices_B])
    noise = _noise(random, pixels_BHWC.shape)
    return indices_B, [torch.from_numpy(pixels_BHWC), *noise, torch.from_numpy(classes_B)]


def _noise(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the noise (B, C, H, W) of images (B, H, W, C), and its levels (B,)."""
    count, height, width, channels = shape
    noise_BCHW = random.standard_normal((count, channels, height, width), np.float32)
    levels_B = random.integers(LEVELS, size=count)
    return torch.from_numpy(noise_BCHW), torch.from_numpy(levels_B)


@dataclasses.dataclass(frozen=True)
class DiffusionModel:
    """A trained network that samples images."""

    network: nn.Module
    config: DiffusionConfig
    image_size: int
    class_names: tuple[str, ...]
    device: torch.device

    def sample(self, classes: Sequence[int], seed: int = 0, **settings: Any) -> Sampled:
        """Sample an image for each class; image i depends on its class and seed + i alone.

        Args:
            classes: Their numbers.
            seed: Of the first image.
            settings: Fields of the configuration, such as `guidance`.
        """
        chosen = dataclasses.replace(self.config, **settings)
        shape = (3, self.image_size, self.image_size)
        noise_BCHW = torch.stack(
            [
                torch.randn(shape, generator=torch.Generator().manual_seed(seed + i))
                for i in range(len(classes))
            ]
        )
        classes_B = torch.as_tensor(classes)
        with threads.team(threads.pays(self.device)):
            parts = threads.over_parts(
                functools.partial(self._denoise, chosen), noise_BCHW, classes_B,
                smallest=SMALLEST_PART,
            )  # fmt: skip
        return Sampled(as_pil(torch.cat(parts)))

    @torch.inference_mode()
    def _denoise(self, config: DiffusionConfig, images_BCHW: Tensor, classes_B: Tensor) -> Tensor:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(**SCHEDULE)
        scheduler.set_timesteps(config.sampling_steps)
        images_BCHW = images_BCHW.to(self.device)
        both = torch.cat([classes_B, torch.full_like(classes_B, len(self.class_names))])
        both = both.to(self.device)
        for level in scheduler.timesteps:
            twice = torch.cat([images_BCHW, images_BCHW])
            predicted = self.network(twice, level, class_labels=both).sample
            cond_BCHW, uncond_BCHW = predicted.chunk(2)
            noise_BCHW = uncond_BCHW + config.guidance * (cond_BCHW - uncond_BCHW)
            images_BCHW = scheduler.step(noise_BCHW, level, images_BCHW).prev_sample
        return images_BCHW


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Images of PIL, as in `pipelines.generation.Samples`."""

    images: list[Image.Image]


@dataclasses.dataclass(frozen=True)
class Diffusers:
    """The library as a `bench.ways.Way`; by default with `config_for` the size of the images."""

    config: DiffusionConfig | None = None
    name: str = "diffusers"

    def describe(self, images: Splits) -> dict[str, Any]:
        """See `Way.describe`."""
        import diffusers

        chosen = self.config or config_for(images.train.image_size)
        return {"diffusers": diffusers.__version__, **SCHEDULE, **config.to_json(chosen)}

    def train(
        self,
        images: Splits,
        folder: Path,
        minutes: float,
        device: torch.device,
        open_progress: OpenProgress,
    ) -> Trained:
        """See `Way.train`."""
        train = images.train
        chosen = self.config or config_for(train.image_size)
        description = {
            "minutes": minutes,
            "images_fingerprint": train.fingerprint,
            **self.describe(images),
        }
        with loop.hold(folder, description) as unfinished:
            if unfinished:
                steps = _planned_steps(folder, minutes, chosen, images, device)
                trainer = DiffusionTrainer(chosen, images, steps, device)
                with open_progress("training") as progress:
                    loop.run(trainer, folder, steps, evaluate_every=steps, progress=progress)
                loop.finish(folder, trainer.averaged.state_dict())
        network = make_network(chosen, train.image_size, len(train.class_names))
        weights, _ = storage.load_tensors(folder / "model.safetensors")
        load_strict(network, weights, folder / "model.safetensors")
        network = to_channels_last(network, device).eval().requires_grad_(False)
        last = metrics_log.last_metrics(folder, "val")
        return Trained(
            DiffusionModel(network, chosen, train.image_size, train.class_names, device),
            last["seconds"],
            {"network": last["step"]},
            parameter_count(network),
        )


def _planned_steps(
    folder: Path, minutes: float, config: DiffusionConfig, images: Splits, device: torch.device
) -> int:
    """Return how many steps fit into the time, planned once for all attempts."""
    path = folder / PLAN
    if not path.is_file():
        trial = DiffusionTrainer(config, images, 100, device)
        # Not counted, unlike in `ctf fit`: a step takes seconds.
        seconds = loop.seconds_per_step(trial, warm_up=1, timed=3)
        steps = max(1, int(minutes * 60 * (1 - OVERHEAD) / seconds))
        storage.save_json(path, {"steps": steps, "seconds_per_step": seconds})
    return int(storage.load_object(path)["steps"])
