"""Image files as upright 8-bit RGB, and images as tensors: ``(B, 3, H, W)`` floats in [-1, 1], and back."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from unified_tokenizers.hub import expanded

MAX_PIXELS = 2 * 89_478_485  # where Pillow, too, suspects a decompression bomb
_PHOTOMETRIC, _BITS = 262, 258  # tags of TIFF


def read_image(file: str | Path | bytes | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as viewers show it: turned upright as its EXIF data say, then :func:`as_rgb`.

    Args:
        file: path (``~`` is the home folder), content or open file; of an animation, the first frame is read.
        max_pixels: refuse larger images before they are decoded, because a small file may hold a huge one.

    Raises:
        ValueError: with path and reason, if the file is missing, is no image, is damaged or has too many pixels.
    """
    try:
        given = (
            io.BytesIO(file) if isinstance(file, bytes) else expanded(file) if isinstance(file, str | Path) else file
        )
        with Image.open(given) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"{image.width}x{image.height} pixels, at most {max_pixels / 1e6:g} million are allowed; make it smaller"
                )
            image.load()
            _turn_upright(image)
            return as_rgb(image)
    except Exception as error:  # decoders raise all sorts of errors on damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "cannot identify image file" if unknown else str(error) or type(error).__name__
        path = "" if isinstance(file, bytes) or hasattr(file, "read") else str(file)
        raise ValueError(reason if path in reason else f"{path}: {reason}") from error


def load_pixels(image: Image.Image, name: str) -> None:
    """Decode an image that is only opened. Raises ValueError, which calls it ``name``, if its file is damaged."""
    try:
        image.load()
    except Exception as error:  # decoders raise all sorts of errors on damaged files
        raise ValueError(f"{name}: {getattr(image, 'filename', '') or image} cannot be read ({error}).") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB; transparency is laid on white.

    Grey images of more than 8 bits are scaled and never clipped. 16-bit values (and 12-bit ones of TIFF) span their full
    range. Floats in [0, 1] and integers in [0, 255] are taken as such; any others are stretched from their minimum to
    their maximum.

    Raises:
        ValueError: if float values are not finite, or the colour space cannot be converted.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode == "La":
        image = image.convert("LA")  # premultiplied; Pillow goes no further in one step
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Stack images of one size into ``(B, 3, H, W)`` float32 in [-1, 1]; see :func:`as_rgb`.

    Raises:
        ValueError: if the list is empty, holds something else, or the sizes differ.
    """
    others = [type(image).__name__ for image in images if not isinstance(image, Image.Image)]
    if others:
        raise ValueError(f"images: need PIL images, got {others[0]}.")
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


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # EXIF data that cannot be read say nothing: the pixels stay as they are stored
        return


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits in 8, by the rules of :func:`as_rgb`."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") or image.format == "PPM":  # 16-bit PGM files open as 32-bit integers
        top = 2 ** int(tags[_BITS][0]) - 1 if _BITS in tags else 65535
        grey = (values.astype(np.uint32) * 255 + top // 2) // top
    else:
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(high - low):
            raise ValueError("its values are not finite")
        known = 1.0 if image.mode == "F" else 255.0
        if low >= 0 and high <= known:
            low, high = 0.0, known
        grey = ((values.astype(np.float64) - low) * (255 / ((high - low) or 1.0))).round()
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds in 8 bits only
        grey = 255 - grey
    grey_image = Image.fromarray(grey.astype(np.uint8))
    if "transparency" not in image.info:
        return grey_image
    opaque = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey_image, opaque))
