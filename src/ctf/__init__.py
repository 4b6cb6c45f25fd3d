"""Coarse-to-fine token prediction: autoregressive image generation in two stages.

from ctf import Pipeline
pipe = Pipeline.from_pretrained("fashion-mnist")
pipe.sample(classes=["sneaker", "bag"], seed=0).images[0].save("sneaker.png")
"""

from ctf.errors import UserError
from ctf.pipeline import Pipeline, Samples
from ctf.sampling import Sampling
from ctf.version import __version__

__all__ = ["Pipeline", "Samples", "Sampling", "UserError", "__version__"]
