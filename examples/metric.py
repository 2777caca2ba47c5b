"""A custom metric: how sharp generated images are, beside the real images of their captions.

unified evaluate --import examples/metric.py --metrics sharpness --pipeline DIR --data data/openmoji --out runs/sharpness
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from unified import register
from unified_eval import Inputs, Metric
from unified_eval.results import Bound, Results


def sharpness(images: Sequence[Image.Image]) -> np.ndarray:
    """Mean absolute difference of neighbouring pixels of every image, ``(N,)`` in [0, 255]."""
    greys = [np.asarray(image.convert("L"), dtype=np.float64) for image in images]
    return np.array(
        [(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2 for grey in greys]
    )


class Sharpness(Metric):
    """Mean absolute difference of neighbouring pixels.

    ``sharpness``, and ``sharpness_real`` of the real images.
    """

    needs = ()

    def add(self, inputs: Inputs, results: Results) -> None:
        """See :class:`unified_eval.Metric`."""
        label = "sharpness (difference of neighbouring pixels)"
        results.add_mean("sharpness", sharpness(inputs.generated), f"{label}, generated", inputs.prompts, **inputs.size)
        results.add_mean(
            "sharpness_real", sharpness(inputs.real), f"{label}, real", given=True,
            bound=Bound("sharpness", "real images"), **inputs.size,
        )  # fmt: skip


register("sharpness", metric=Sharpness())
