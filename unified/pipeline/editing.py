"""Images as known codes: masks, shares that are kept, larger canvases, and images that are not finished."""

from collections.abc import Sequence
from reprlib import repr as short

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unified.pipeline.options import check_whole
from unified_tokenizers import ImageTokenizer
from unified_tokenizers.images import as_rgb, load_pixels, to_tensor


def as_images(images: Image.Image | Sequence[Image.Image], name: str = "image") -> list[Image.Image]:
    """One image or several as a list. Raises ValueError, which calls them ``name``, for anything else or damaged files."""
    several = [images] if isinstance(images, Image.Image) else images
    if not isinstance(several, Sequence) or not several or not all(isinstance(each, Image.Image) for each in several):
        raise ValueError(f"{name}: {short(images)} is not a PIL image; give one, or a list of them.")
    for each in several:
        load_pixels(each, name)
    return list(several)


def codes_to_keep(
    tokenizer: ImageTokenizer,
    image: Image.Image | Sequence[Image.Image],
    mask_image: Image.Image | Sequence[Image.Image] | None,
) -> Tensor:
    """Codes of images, -1 in every cell that a mask touches; without masks all of them.

    Args:
        tokenizer: the pipeline's image tokenizer.
        image: one image or several, of one size.
        mask_image: as many masks of the same size; what is brighter than middle grey, or transparent, is generated again.

    Returns:
        ``(N, h, w)``.

    Raises:
        ValueError: if a mask has another size or there are more or fewer masks than images.
    """
    images = as_images(image)
    codes = tokenizer.encode(to_tensor(images))
    if mask_image is None:
        return codes
    masks = as_images(mask_image, "mask_image")
    if len(masks) != len(images):
        raise ValueError(f"mask_image: {len(masks)} masks for {len(images)} images; give one mask per image.")
    for each, mask in zip(images, masks, strict=True):
        if each.size != mask.size:
            raise ValueError(
                f"mask_image: {mask.width}x{mask.height} pixels, the image has {each.width}x{each.height}; resize it."
            )
    stride = tokenizer.downsample
    bright = torch.from_numpy(np.stack([np.asarray(as_rgb(mask).convert("L")) for mask in masks]) > 127)
    touched = bright.unfold(1, stride, stride).unfold(2, stride, stride).any(dim=-1).any(dim=-1)
    return codes.masked_fill(touched.to(codes.device), -1)


def share_to_keep(codes: Tensor, keep: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Codes ``(N, h, w)``, all but a random share ``keep`` of each image's cells set to -1; its generator stays.

    Raises:
        ValueError: if ``keep`` is no share.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 <= keep <= 1:
        raise ValueError(f"keep: {keep!r} is not a share in [0, 1].")
    flat = codes.flatten(1).clone()
    for row, generator in zip(flat, generators, strict=True):
        # The second number: decoding seeds its own choices with the first.
        seed = int(torch.randint(2**63 - 1, (2,), generator=generator.clone_state(), device=generator.device)[1])
        order = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))
        row[order[round(keep * len(row)) :].to(row.device)] = -1
    return flat.reshape(codes.shape)


def outpainting_canvas(
    image: Image.Image, height: int, width: int, top: int = 0, left: int = 0
) -> tuple[Image.Image, Image.Image]:
    """A larger image with ``image`` at ``(top, left)``, and the mask of what is to be sampled around it.

    Raises:
        ValueError: if a number is not whole, or the image does not fit there.
    """
    for name, value, least in (("height", height, 1), ("width", width, 1), ("top", top, 0), ("left", left, 0)):
        check_whole(name, value, least)
    if top + image.height > height or left + image.width > width:
        raise ValueError(
            f"image: {image.width}x{image.height} pixels at top {top}, left {left} leave the canvas of {width}x{height}."
        )
    # The border repeats the image's edge, so that codes near it are those of an image that goes on.
    pixels = np.asarray(as_rgb(image))
    around = ((top, height - top - image.height), (left, width - left - image.width), (0, 0))
    canvas = Image.fromarray(np.pad(pixels, around, mode="edge"))
    mask = Image.new("L", (width, height), 255)
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return canvas, mask


def unfinished_images(tokenizer: ImageTokenizer, codes: Tensor) -> Tensor:
    """Decode ``(N, h, w)`` codes to ``(N, 3, H, W)``; cells of -1, which are not sampled yet, are grey."""
    missing = codes < 0
    if not bool(missing.any()):
        return tokenizer.decode(codes)
    # The decoder looks across cells: what is missing repeats the code before it, which harms its neighbours least.
    flat = codes.flatten(1)
    last = torch.arange(flat.shape[1], device=flat.device).where(flat >= 0, 0).cummax(dim=1).values
    images = tokenizer.decode(flat.gather(1, last).clamp_min(0).reshape(codes.shape))
    stride = tokenizer.downsample
    hidden = missing.repeat_interleave(stride, dim=1).repeat_interleave(stride, dim=2)
    return images.masked_fill(hidden[:, None].to(images.device), 0.0)
