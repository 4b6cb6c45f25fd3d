"""A grid of images: rows of images below their names."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels between images
NAME_HEIGHT = 20  # pixels
MIN_TILE_WIDTH = 64  # pixels; smaller images are enlarged by an integer factor


def image_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Arrange images in rows, each below its name, as an RGB image on white.

    Args:
        rows: name and images of each row; all images have the same size, and an empty name takes
            no space.
    """
    width, height = rows[0][1][0].size
    scale = max(1, math.ceil(MIN_TILE_WIDTH / width))
    tile_width, tile_height = width * scale, height * scale
    font = ImageFont.load_default(12)
    columns = max(len(images) for _, images in rows)
    name_width = max(math.ceil(font.getlength(name)) for name, _ in rows)
    inner_width = max(columns * (tile_width + GAP), name_width + GAP)
    heights = [(NAME_HEIGHT if name else 0) + tile_height + GAP for name, _ in rows]
    grid = Image.new("RGB", (GAP + inner_width, GAP + sum(heights)), "white")
    canvas = ImageDraw.Draw(grid)
    bottom = GAP
    for (name, images), row_height in zip(rows, heights, strict=True):
        bottom += row_height
        if name:
            canvas.text((GAP, bottom - row_height + 10), name, "black", font, anchor="lm")
        for i, image in enumerate(images):
            tile = image.resize((tile_width, tile_height), Image.Resampling.NEAREST)
            grid.paste(tile, (GAP + i * (tile_width + GAP), bottom - GAP - tile_height))
    return grid
