"""Coarse-to-fine token prediction: autoregressive image generation in two stages.

from ctf import Pipeline
pipe = Pipeline.from_pretrained("fashion-mnist")
pipe.sample(classes=["sneaker", "bag"], seed=0).images[0].save("sneaker.png")
"""

from ctf.common.errors import UserError
from ctf.common.version import __version__
from ctf.models.sampling import Sampling
from ctf.pipelines.pipeline import Pipeline, Samples

__all__ = ["Pipeline", "Samples", "Sampling", "UserError", "__version__"]
