"""Complete the upper half of an image in several ways.

Encodes images of Fashion-MNIST, keeps the codes of their upper halves, and samples several lower
halves for each. Rows of the contact sheet: the image, its known half, its completions.

    python examples/inpainting.py --out inpainting.png
"""

from pathlib import Path

import torch
import tyro
from PIL import Image

from ctf import Pipeline, open_images
from ctf.data.image_grid import image_grid


def main(out: Path = Path("inpainting.png"), images: int = 4, completions: int = 8) -> None:
    """Write a contact sheet.

    Args:
        out: name of the sheet
        images: number of images to complete
        completions: of each image
    """
    pipe = Pipeline.from_pretrained("fashion-mnist")
    held_out = open_images("fashion-mnist").val
    originals = [Image.fromarray(pixels) for pixels in held_out.read(range(images))]
    classes = held_out.classes_N[:images].tolist()

    codes_BL = pipe.encode(originals)
    length = codes_BL.shape[1]
    known_L = torch.arange(length) < length // 2  # codes are in row-major order

    rows = []
    for original, number, codes_L in zip(originals, classes, codes_BL, strict=True):
        samples = pipe.sample([number] * completions, seed=0, codes=codes_L, known=known_L)
        rows.append((pipe.class_names[number], [original, upper_half(original), *samples.images]))
    image_grid(rows).save(out)
    print(f"{out}: {images} images, {completions} completions each")


def upper_half(image: Image.Image) -> Image.Image:
    """Return the image with its lower half in grey."""
    half = Image.new("RGB", image.size, "grey")
    half.paste(image.crop((0, 0, image.width, image.height // 2)))
    return half


if __name__ == "__main__":
    tyro.cli(main)
