"""Pictures as tensors: PIL in, ``(B, 3, H, W)`` floats in [-1, 1] out, and back."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; transparency is laid on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Stack images of one size into ``(B, 3, H, W)`` float32 in [-1, 1]; see :func:`as_rgb`.

    Raises:
        ValueError: if the list is empty or the sizes differ.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"images: need one or more images of one size, got sizes {sorted(sizes)}; resize them first.")
    arrays = np.stack([np.asarray(as_rgb(image)) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Round ``(B, 3, H, W)`` in [-1, 1] to uint8 in [0, 255]; values outside the range saturate."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turn ``(B, 3, H, W)`` in [-1, 1] into a list of RGB images."""
    return [Image.fromarray(array) for array in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()]
