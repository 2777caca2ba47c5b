"""A custom reward: how much of an image has the colour that its caption names."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from unified import register

COLOURS = {"red": (230, 30, 30), "green": (30, 160, 60), "blue": (40, 80, 220), "yellow": (250, 220, 40)}


def named_colour(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
    """Share of pixels that are near to the first colour in the caption, for each image; 0 where it names none."""
    rewards = []
    for image, caption in zip(images, captions, strict=True):
        colour = next((COLOURS[word] for word in caption.lower().split() if word in COLOURS), None)
        distance = None if colour is None else np.linalg.norm(np.asarray(image.convert("RGB"), float) - colour, axis=2)
        rewards.append(0.0 if distance is None else float((distance < 80).mean()))
    return rewards


register("named_colour", reward=named_colour)
