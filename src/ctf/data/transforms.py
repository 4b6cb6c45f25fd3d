"""Views and crops of images, and conversion between PIL images, arrays and tensors.

Shape suffixes: B images of a batch, C channels, H and W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 2048  # side in pixels


@dataclass(frozen=True)
class View:
    """One way to cut a square crop out of an image; see `crop`.

    Attributes:
        flip: mirror the image before the crop is taken.
        scale: side of the central square that the crop is taken from, as a multiple of the crop's
            side; at least 1.
        x: horizontal position of the crop within that square, 0 (left) to 1 (right).
        y: vertical position, 0 (top) to 1 (bottom).
    """

    flip: bool = False
    scale: float = 1.0
    x: float = 0.5
    y: float = 0.5

    def side(self, size: int) -> int:
        """Return the side in pixels of the square that a crop of `size` pixels is taken from."""
        return int(size * self.scale)


PLAIN = View()


def _crops(flips: tuple[bool, ...]) -> tuple[View, ...]:
    corners_and_centre = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5))
    return tuple(
        View(flip, scale, x, y)
        for scale in (1.1, 1.05)
        for flip in flips
        for x, y in corners_and_centre
    )


VIEWS: dict[str, tuple[View, ...]] = {
    "plain": (PLAIN,),
    "flip": (PLAIN, View(flip=True)),
    # LlamaGen's ten-crop augmentation, in its order: the four corners and the centre, mirrored or
    # not, at --crop-range 1.1 and then at 1.05.
    "ten-crop": _crops(flips=(False, True)),
    "five-crop": _crops(flips=(False,)),  # the same without mirrored ones
}


def crop(image: Image.Image, size: int, view: View = PLAIN) -> Image.Image:
    """Crop an RGB or grey image to `size` x `size` pixels.

    The plain view is the central square, computed as by ADM's `center_crop_arr`. Other views are
    crops of a larger central square, as in LlamaGen's ten-crop augmentation.
    """
    return crop_square(central_square(image, view.side(size)), size, view)


def central_square(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side` pixels and crop the central square.

    The image is halved with a box filter as long as that is possible, and then resized with an
    antialiased bicubic filter.
    """
    while min(image.size) >= 2 * side:
        halved = (image.width // 2, image.height // 2)
        image = image.resize(halved, Image.Resampling.BOX)
    ratio = side / min(image.size)
    resized = (round(image.width * ratio), round(image.height * ratio))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def crop_square(square: Image.Image, size: int, view: View) -> Image.Image:
    """Take a view's crop from the `central_square` of side `view.side(size)`."""
    if view.flip:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = (round((square.width - size) * position) for position in (view.x, view.y))
    return square.crop((left, top, left + size, top + size))


def as_tensor(pixels_BHWC: NDArray[np.uint8], device: torch.device | str = "cpu") -> Tensor:
    """Convert uint8 RGB pixels to floats in [-1, 1], (B, 3, H, W), channels-last in memory."""
    return from_pixels(torch.from_numpy(pixels_BHWC).to(device))


def from_pixels(pixels_BHWC: Tensor) -> Tensor:
    """Convert as `as_tensor` does what is on its device already."""
    return pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def as_pil(images_BCHW: Tensor) -> list[Image.Image]:
    """Convert images in [-1, 1], (B, 3, H, W), to RGB PIL images; other values are clipped."""
    pixels = ((images_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]
