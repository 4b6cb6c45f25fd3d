"""Pictures side by side on one sheet, each row with its name."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels
SMALLEST_TILE = 64  # pixels; smaller pictures are enlarged by a whole factor, undistorted


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """One row of pictures below each name; a row whose name is empty takes no room for it.

    All pictures must have the same size. The sheet is RGB on white.
    """
    width, height = rows[0][1][0].size
    scale = max(1, math.ceil(SMALLEST_TILE / width))
    tile_width, tile_height = width * scale, height * scale
    font = ImageFont.load_default(12)
    columns = max(len(pictures) for _, pictures in rows)
    names_width = max(math.ceil(font.getlength(name)) for name, _ in rows)
    inner_width = max(columns * (tile_width + GAP), names_width + GAP)
    heights = [(20 if name else 0) + tile_height + GAP for name, _ in rows]
    result = Image.new("RGB", (GAP + inner_width, GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(result)
    bottom = GAP
    for (name, pictures), row_height in zip(rows, heights, strict=True):
        bottom += row_height
        if name:
            draw.text((GAP, bottom - row_height + 10), name, "black", font, anchor="lm")
        for i, picture in enumerate(pictures):
            tile = picture.resize((tile_width, tile_height), Image.Resampling.NEAREST)
            result.paste(tile, (GAP + i * (tile_width + GAP), bottom - GAP - tile_height))
    return result
