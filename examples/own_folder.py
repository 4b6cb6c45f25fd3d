"""Train a pipeline on a folder of images, sample from it, and save it.

    python examples/own_folder.py my-images --minutes 30

The folder has a subfolder for each class, or images of a single class. If it is missing, some
simple images are drawn into it. Run the same command again to resume an interrupted training.
"""

from pathlib import Path

import torch
import tyro
from PIL import Image, ImageDraw

from ctf import fit, open_images, resolve
from ctf.data.image_grid import image_grid


def main(
    folder: Path,
    /,
    out: Path = Path("own-folder"),
    minutes: float | None = None,
    steps: int | None = None,
) -> None:
    """Write a run, a grid of samples, and a pipeline.

    Args:
        folder: folder of images
        out: folder of the results
        minutes: time for all stages together; by default the steps of the preset
        steps: training steps of each stage, instead of minutes
    """
    if not folder.exists():
        draw_images(folder)
    images = open_images(str(folder), 32)  # pixels a side
    recipe = resolve("tiny", images, steps=steps, overrides=["clusters.count=64"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = fit(images, out / "run", recipe, minutes=minutes, device=device)
    rows = [(name, pipe.sample([name] * 8, seed=0).images) for name in pipe.class_names]
    image_grid(rows).save(out / "samples.png")
    pipe.save_pretrained(out / "pipeline", half=True)  # the run, without what only training needs


def draw_images(folder: Path, count: int = 100) -> None:
    """Draw `count` discs and as many squares of many colors."""
    for name in ("disc", "square"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (64, 64), "white")
            draw = ImageDraw.Draw(image)
            shape = draw.ellipse if name == "disc" else draw.rectangle
            x, y, hue = i % 24, i % 30, 360 * i // count
            shape((x, y, x + 30, y + 30), fill=f"hsl({hue}, 80%, 50%)")
            image.save(folder / name / f"{i:03d}.png")


if __name__ == "__main__":
    tyro.cli(main)
