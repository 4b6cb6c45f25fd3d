"""Coarse-to-fine token prediction: autoregressive image generation in two stages.

from ctf import Pipeline
pipe = Pipeline.from_pretrained("fashion-mnist")
pipe.sample(classes=["sneaker", "bag"], seed=0).images[0].save("sneaker.png")
"""

import importlib
from typing import TYPE_CHECKING, Any

from ctf.common.version import __version__

if TYPE_CHECKING:
    from ctf.common.errors import UserError
    from ctf.data.images import open_images
    from ctf.models.sampling import Sampling
    from ctf.pipelines.generation import Samples
    from ctf.pipelines.pipeline import Pipeline
    from ctf.training.fit import fit
    from ctf.training.recipes import resolve
    from ctf.training.start import open_start

__all__ = [
    "Pipeline",
    "Samples",
    "Sampling",
    "UserError",
    "__version__",
    "fit",
    "open_images",
    "open_start",
    "resolve",
]

# Imported when they are first used, so that `import ctf` does not import torch.
_MODULES = {
    "Pipeline": "ctf.pipelines.pipeline",
    "Samples": "ctf.pipelines.generation",
    "Sampling": "ctf.models.sampling",
    "UserError": "ctf.common.errors",
    "fit": "ctf.training.fit",
    "open_images": "ctf.data.images",
    "open_start": "ctf.training.start",
    "resolve": "ctf.training.recipes",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ctf' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
