"""The coarse stage: exact sampling of labels, one after another or several in a pass.

A label is the largest sum of its logits and of noise that is fixed from the start (see
`ctf.models.noise`), so it is a function of the labels before it. A pass over a window of W
positions, of which the first n labels of an image are certain and the others guesses, gives

    new_i = argmax(logits_i + g_i)    for i = n ... n + W - 1.

Where the guesses are new_i themselves up to some label, the context of the label after it was
right, so it is certain, too. Wrong guesses become their new_i, and a pass makes at least one label
certain. By induction all labels are those of sampling one by one, which is W = 1. Labels that enter
the window are guessed by `ctf.models.drafts`, or are copies of the label above. (Predictive
sampling, arXiv 2002.09928; Jacobi decoding of images, 2410.01699; with coupled noise, 2510.24211.)

Shapes: B batch, T positions of a pass, W positions of a window, L labels of an image, K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctf.models.coarse import CoarseModel
from ctf.models.noise import Noise
from ctf.models.sampling import (
    CHOICES,
    Sampling,
    apply_guidance,
    guidance_scales,
    sample_logits,
    with_no_class,
)
from ctf.models.transformer import KVCache, window_positions


class CoarseDecoder:
    """Guided logits of a coarse model for windows of positions, with a cache.

    Under guidance the batch has a second half, the same images without their class. Each half is
    computed only where it is needed. One that was left out and is needed again catches up with
    all positions that it missed in a single pass.

    Args:
        model: In evaluation mode.
        classes_B: int64 in [0, classes].
        scales: The guidance scale of each label.
        cache: Of as many rows as `classes`; by default a new one.

    Attributes:
        classes: Of both halves, if a label is guided.
        cached: For each half, how many positions of each image are in the cache and final.
    """

    def __init__(
        self,
        model: CoarseModel,
        classes_B: Tensor,
        scales: Sequence[float],
        cache: KVCache | None = None,
    ) -> None:
        self.model, self.scales = model, scales
        guided = any(scale != 1 for scale in scales)
        self.classes = with_no_class(classes_B, model.no_class) if guided else classes_B
        self.cache = model.backbone.cache(len(self.classes)) if cache is None else cache
        self.cached = [[0] * len(classes_B), [0] * len(classes_B)]
        self._computed: Sequence[int] = ()  # halves of the last pass

    @torch.inference_mode()
    def logits(self, labels_BL: Tensor, starts: Sequence[int], window: int) -> Tensor:
        """Logits (B, W, K) of labels `starts` to `starts` + W - 1, each from those before it.

        Labels before `starts` are final; see `accept` for the others. Beyond the last label, the
        logits are those of the last.
        """
        scales = self._scales(starts, window)
        if self.halves(starts, window) == 1:
            return self._pass(0, 1, labels_BL, starts, window)
        if self.cached[0] == self.cached[1]:
            cond, uncond = self._pass(0, 2, labels_BL, starts, window).chunk(2)
        else:
            cond, uncond = (self._pass(h, h + 1, labels_BL, starts, window) for h in (0, 1))
        if len(scales) == 1:
            return apply_guidance(cond, uncond, scales.pop())
        last, table_L = len(self.scales) - 1, cond.new_tensor(self.scales)
        starts_B = torch.tensor(starts, device=cond.device)
        positions_BW = window_positions(starts_B, window, cond.device).clamp(max=last)
        return apply_guidance(cond, uncond, table_L[positions_BW][..., None])

    def halves(self, starts: Sequence[int], window: int) -> int:
        """How many halves windows from `starts` on need: 1 if none of their labels is guided."""
        return 1 if self._scales(starts, window) == {1.0} else 2

    def is_behind(self, starts: Sequence[int], halves: int) -> bool:
        """Whether positions before `starts` are missing in one of the first halves."""
        return any(cached != list(starts) for cached in self.cached[:halves])

    def computed(self, starts: Sequence[int], first: int, last: int) -> None:
        """Take note that halves `first` to `last` were computed from `starts` on."""
        self.cached[first:last] = [[min(s + 1, len(self.scales)) for s in starts]] * (last - first)
        self._computed = range(last)

    def accept(self, counts: Sequence[int]) -> None:
        """Declare so many of the labels from `starts` on of the last `logits` final."""
        for half in self._computed:
            self.cached[half] = [
                c + more for c, more in zip(self.cached[half], counts, strict=True)
            ]

    def select(self, rows: Sequence[int]) -> None:
        """Keep some images of the batch alone."""
        images, halves = len(self.cached[0]), len(self.classes) // len(self.cached[0])
        every = [half * images + row for half in range(halves) for row in rows]
        self.classes = self.classes[every]
        self.cache.select(every)
        self.cached = [[cached[row] for row in rows] for cached in self.cached]

    def _scales(self, starts: Sequence[int], window: int) -> set[float]:
        """The scales within the windows."""
        if len(every := set(self.scales)) == 1:
            return every
        return {
            scale for start in set(starts) for scale in self.scales[start : start + window]
        } or {1.0}

    def _pass(
        self, first: int, last: int, labels_BL: Tensor, starts: Sequence[int], window: int
    ) -> Tensor:
        """Logits of halves `first` to `last`, computed from where they are."""
        cached, length = self.cached[first], len(self.scales)
        behind = [start - c for start, c in zip(starts, cached, strict=True) if start < length]
        count = min(max(behind, default=0) + window, length)
        # Near the end, the last positions are computed again: all images have as many.
        begins = [min(c, length - count) for c in cached]
        images = slice(first * len(starts), last * len(starts))
        starts_B = torch.tensor(starts, device=labels_BL.device)
        start: int | Tensor = begins[0]
        # The class token is at position 0, label i at i + 1.
        if len(set(begins)) == 1:
            inputs_BT = labels_BL[:, max(begins[0] - 1, 0) : begins[0] + count - 1]
        else:
            start = torch.tensor(begins, device=labels_BL.device)
            inputs_BT = labels_BL.gather(1, window_positions(start - 1, count, start.device))
            start = start.repeat(last - first)
        inputs_BT = inputs_BT.repeat(last - first, 1)
        if begins[0] == 0:
            inputs_BT = torch.cat([self.classes[images, None], inputs_BT], dim=1)
        self.computed(starts, first, last)
        hidden_BTD = self.model.backbone.step(inputs_BT, start, self.cache, images)
        if count > 1:
            begins_B = torch.tensor(begins, device=labels_BL.device)
            wanted_BW = window_positions(starts_B, window, starts_B.device).clamp(max=length - 1)
            wanted_BW = (wanted_BW - begins_B[:, None]).clamp(max=count - 1)  # of finished ones
            wanted_BW = wanted_BW.repeat(last - first, 1)
            rows_B1 = torch.arange(len(wanted_BW), device=wanted_BW.device)[:, None]
            hidden_BTD = hidden_BTD[rows_B1, wanted_BW]
        logits_BWK: Tensor = self.model.head(hidden_BTD)
        return logits_BWK


class CoarseSampler:
    """Images whose coarse labels are sampled, some in every pass of the model.

    Args:
        model: In evaluation mode, for no dropout.
        classes_B: int64 in [0, classes], on the model's device.
        keys_BL: Of the noise, row 0 of `noise_keys`. Position i uses key i, whatever is known.
        settings: Of the coarse stage.
        known_labels_BL: int64 (B, L), -1 where a label is to be sampled. Positions that are known
            take no pass of their own.

    Attributes:
        certain: How many labels of each image are certain, from the first on.
        passes: How many passes each image took part in, until all its labels were certain.
    """

    def __init__(
        self,
        model: CoarseModel,
        classes_B: Tensor,
        keys_BL: Tensor,
        settings: Sampling,
        known_labels_BL: Tensor | None = None,
    ) -> None:
        batch, self.length = keys_BL.shape
        self.model, self.settings = model, settings
        self._classes_B, self._keys_BL = classes_B, keys_BL.to(classes_B.device)
        self._noise = Noise(self._keys_BL, model.vocab_size)
        # Labels, then room for windows that reach beyond the last. Created outside of inference
        # mode, so that a model can be trained on the labels.
        self._buffer_BM = classes_B.new_zeros(batch, 2 * self.length)
        self._fixed_BM: Tensor | None = None
        self._free = [list(range(self.length + 1))] * batch  # the first to sample from each on
        sampled_L = [True] * self.length
        if known_labels_BL is not None and bool((known_labels_BL >= 0).any()):
            known_BL = known_labels_BL.to(classes_B.device) >= 0
            self._buffer_BM[:, : self.length] = known_labels_BL.clamp(min=0)
            self._fixed_BM = torch.cat([known_BL, torch.zeros_like(known_BL)], dim=1)
            self._free = [_next_free(known_L) for known_L in known_BL.tolist()]
            sampled_L = (~known_BL).any(0).tolist()
        scales = guidance_scales(settings, self.length)
        self._scales = [s if sampled else 1.0 for s, sampled in zip(scales, sampled_L, strict=True)]
        self._decoder: CoarseDecoder | None = None
        self.certain = [free[0] for free in self._free]
        self._guessed = list(self.certain)  # how many labels are certain, or known, or guesses
        self.passes = [0] * batch
        self._images = list(range(batch))  # that passes compute

    @property
    def labels_BT(self) -> Tensor:
        """The labels that are certain in all images: int64 (B, T), the rows of a view."""
        return self._buffer_BM[:, : min(self.certain)]

    @property
    def certain_BL(self) -> Tensor:
        """All labels that are certain, in some images more than in others: -1 where none is."""
        device = self._buffer_BM.device
        certain_B1 = torch.tensor(self.certain, device=device)[:, None]
        is_open_BL = torch.arange(self.length, device=device) >= certain_B1
        return self._buffer_BM[:, : self.length].masked_fill(is_open_BL, -1)

    @property
    def done(self) -> bool:
        """Whether all labels of all images are certain."""
        return min(self.certain) == self.length

    @property
    def rows(self) -> int:
        """How many rows the next pass has for each label of the window."""
        scales = {self._scales[c] for c in self.certain if c < self.length}
        return len(self._images) * (1 if scales == {1.0} else 2)

    @torch.inference_mode()
    def advance(self, window: int = 1) -> list[int]:
        """Take a pass over `window` labels of each image, and return how many became certain."""
        window = min(window, self.length)
        self._guess(window)
        self._leave_out_done()
        if self._decoder is None:
            self._decoder = self._make_decoder()
        starts = [self.certain[image] for image in self._images]
        right = self._pass(self._decoder, window)
        right = [min(r, max(self.length - s - 1, 0)) for r, s in zip(right, starts, strict=True)]
        self._decoder.accept(right)
        before, self.certain = self.certain, list(self.certain)
        for image, start, r in zip(self._images, starts, right, strict=True):
            self.passes[image] += start < self.length
            self.certain[image] = self._free[image][min(start + r + 1, self.length)]
            reached = max(start + window, self.certain[image])
            self._guessed[image] = max(self._guessed[image], reached)
        return [now - then for now, then in zip(self.certain, before, strict=True)]

    def _make_decoder(self) -> CoarseDecoder:
        return CoarseDecoder(self.model, self._classes_B[self._images], self._scales)

    def _pass(self, decoder: CoarseDecoder, window: int) -> list[int]:
        """Compute the labels of a window; return how many guesses were right from its start on."""
        starts, buffer_BM = [self.certain[i] for i in self._images], self._buffer_BM[self._images]
        logits_BWK = decoder.logits(buffer_BM, starts, window)
        device = logits_BWK.device
        positions_BW = window_positions(torch.tensor(starts, device=device), window, device)
        guessed_BW = buffer_BM.gather(1, positions_BW)
        new_BW = self._choose(logits_BWK, positions_BW.clamp(max=self.length - 1))
        if self._fixed_BM is not None:
            is_fixed_BW = self._fixed_BM[self._images].gather(1, positions_BW)
            new_BW = torch.where(is_fixed_BW, guessed_BW, new_BW)
        self._buffer_BM[self._images] = buffer_BM.scatter(1, positions_BW, new_BW)
        if window == 1:
            return [0] * len(starts)
        is_right_BW = new_BW[:, :-1] == guessed_BW[:, :-1]
        right: list[int] = is_right_BW.cumprod(1).sum(1).tolist()
        return right

    def select(self, rows: Sequence[int]) -> None:
        """Keep some images of the batch alone; none of their passes is lost."""
        rows = list(rows)
        self._classes_B, self._keys_BL = self._classes_B[rows], self._keys_BL[rows]
        self._noise = Noise(self._keys_BL, self.model.vocab_size)
        self._buffer_BM = self._buffer_BM[rows]
        self._fixed_BM = None if self._fixed_BM is None else self._fixed_BM[rows]
        self._free = [self._free[row] for row in rows]
        self.certain = [self.certain[row] for row in rows]
        self._guessed = [self._guessed[row] for row in rows]
        self.passes = [self.passes[row] for row in rows]
        computed = [row for row in rows if row in self._images]
        if self._decoder is not None:
            self._decoder.select([self._images.index(row) for row in computed])
        self._images = [rows.index(row) for row in computed]

    def _leave_out_done(self) -> None:
        """Compute images whose labels are all certain no more, once they are a quarter or more.

        What is cached of the others is copied, which takes longer than a few rows of a pass.
        """
        left = [image for image in self._images if self.certain[image] < self.length]
        if self.model.backbone.fixed_batch or not 0 < len(left) <= 0.75 * len(self._images):
            return
        if self._decoder is not None:
            self._decoder.select([self._images.index(image) for image in left])
        self._images = left

    def _choose(self, logits_BWK: Tensor, positions_BW: Tensor) -> Tensor:
        """Labels from logits: int64 (B, W)."""
        limits = self.settings.temperature, self.settings.top_k, self.settings.top_p
        images = max(1, CHOICES // logits_BWK[0].numel())
        rows_B1 = torch.tensor(self._images, device=positions_BW.device)[:, None]
        parts = zip(*(of.split(images) for of in (logits_BWK, rows_B1, positions_BW)), strict=True)
        chosen = [
            sample_logits(logits.flatten(0, 1), self._noise[rows, at].flatten(0, 1), *limits)
            for logits, rows, at in parts
        ]
        return torch.cat(chosen).view(positions_BW.shape)

    def _guess(self, window: int) -> None:
        """Guess labels that enter the window, one after another."""
        while True:
            missing_B = [
                guessed < min(start + window - 1, self.length)
                for start, guessed in zip(self.certain, self._guessed, strict=True)
            ]
            if not any(missing_B):
                return
            device = self._buffer_BM.device
            # For an image that misses none it is the last one of all, which is never read.
            last = self._buffer_BM.shape[1] - 1
            at = [g if m else last for g, m in zip(self._guessed, missing_B, strict=True)]
            at_B1 = torch.tensor(at, device=device)[:, None]
            guess_B1 = self._draft(at_B1)
            if self._fixed_BM is not None:
                is_fixed_B1 = self._fixed_BM.gather(1, at_B1)
                guess_B1 = torch.where(is_fixed_B1, self._buffer_BM.gather(1, at_B1), guess_B1)
            self._buffer_BM.scatter_(1, at_B1, guess_B1)
            self._guessed = [g + m for g, m in zip(self._guessed, missing_B, strict=True)]

    def _draft(self, at_B1: Tensor) -> Tensor:
        """Guesses of labels that are not known, from those left and above: int64 (B, 1)."""
        grid, drafts = self.model.config.grid, self.model.drafts
        left_B1 = self._buffer_BM.gather(1, (at_B1 - 1).clamp(min=0))
        above_B1 = self._buffer_BM.gather(1, (at_B1 - grid).clamp(min=0))
        if drafts is None:
            return torch.where(at_B1 >= grid, above_B1, left_B1)
        none = self.model.vocab_size
        left_B = left_B1.masked_fill(at_B1 % grid == 0, none)[:, 0]
        above_B = above_B1.masked_fill(at_B1 < grid, none)[:, 0]
        at_B = at_B1[:, 0].clamp(max=self.length - 1)
        scores_BK = drafts(left_B, above_B, at_B)
        rows_B = torch.arange(len(at_B), device=at_B.device)
        temperature = self.settings.temperature
        top_k = min(self.settings.top_k, 1)  # greedy, or no limit: scores are no logits
        return sample_logits(scores_BK, self._noise[rows_B, at_B], temperature, top_k, 1.0)[:, None]


def _next_free(known_L: Sequence[bool]) -> list[int]:
    """For each position, L included, the first from there on that is not known, or L."""
    free = [len(known_L)]
    for position in reversed(range(len(known_L))):
        free.append(free[-1] if known_L[position] else position)
    return free[::-1]


def sample_coarse(
    model: CoarseModel,
    classes_B: Tensor,
    keys_BL: Tensor,
    settings: Sampling,
    known_labels_BL: Tensor | None = None,
    window: int = 1,
) -> Tensor:
    """Sample the labels of each image, int64 (B, L); arguments as of `CoarseSampler`.

    `window` is the number of labels in a pass, which changes how long it takes, and nothing else.
    """
    sampler = CoarseSampler(model, classes_B, keys_BL, settings, known_labels_BL)
    while not sampler.done:
        sampler.advance(window)
    return sampler.labels_BT
