"""How well an image tokenizer gives images back."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from unified_eval.extraction import batches
from unified_eval.results import Results
from unified_tokenizers.base import ImageTokenizer
from unified_tokenizers.images import to_pil, to_tensor

# Mean squared error of rounding to 8 bits: the least error an 8-bit image can be said to have (58.92 dB).
ROUNDING_MSE = (1 / 255) ** 2 / 12


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, ``10 log10(1 / MSE)`` over all its pixels and channels.

    Args:
        a: ``(B, 3, H, W)`` in [0, 1].
        b: the same shape and range.

    Returns:
        ``(B,)`` float64 in dB; infinite where two images are equal.

    Raises:
        ValueError: if the shapes differ or are not ``(B, 3, H, W)``, B is 0, or a value is outside [0, 1].
    """
    return -10 * torch.log10(squared_error(a, b))


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each image, ``(B,)`` float64. Arguments and errors as for :func:`psnr`."""
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or len(a) == 0:
        raise ValueError(f"a, b: need two equal shapes (B, 3, H, W), got {tuple(a.shape)} and {tuple(b.shape)}.")
    for field, pixels in (("a", a), ("b", b)):
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError(
                f"{field}: values {float(pixels.min()):.3g}..{float(pixels.max()):.3g} leave [0, 1]; rescale and clamp."
            )
    return (a.cpu().double() - b.cpu().double()).square().mean((1, 2, 3))


def image_errors(originals: Sequence[Image.Image], reconstructed: Sequence[Image.Image]) -> Tensor:
    """Mean squared error of each pair of 8-bit images, ``(N,)`` float64.

    Raises:
        ValueError: if the lists are empty, or differ in length or image size.
    """
    if len(originals) != len(reconstructed) or not originals:
        raise ValueError(
            f"reconstructed: {len(reconstructed)} images for {len(originals)} originals; need one for each."
        )
    return torch.cat([squared_error(_unit(a), _unit(b)) for a, b in zip(originals, reconstructed, strict=True)])


def summarise_errors(errors: Tensor) -> dict[str, float]:
    """PSNR in dB over a set of images, from the :func:`image_errors` of all of them.

    Returns:
        ``mean_db``, the mean of the PSNR of each image, where an image given back exactly counts as 58.92 dB (the error
        of 8-bit rounding) so that the mean stays finite; and ``pooled_db``, the PSNR of the mean squared error of the set.
    """
    mean = (-10 * torch.log10(errors.clamp(min=ROUNDING_MSE))).mean()
    pooled = -10 * torch.log10(errors.mean().clamp(min=ROUNDING_MSE))
    return {"mean_db": float(mean), "pooled_db": float(pooled)}


def psnr_summary(originals: Sequence[Image.Image], reconstructed: Sequence[Image.Image]) -> dict[str, float]:
    """:func:`summarise_errors` of two lists of images. Errors as for :func:`image_errors`."""
    return summarise_errors(image_errors(originals, reconstructed))


def _unit(image: Image.Image) -> Tensor:
    return to_tensor([image]).add(1).div(2).clamp(0, 1)


def reconstruct(
    tokenizer: ImageTokenizer, images: Sequence[Image.Image], batch_size: int = 32, progress: bool = False
) -> list[Image.Image]:
    """Encode images to codes and decode them again.

    Args:
        tokenizer: any image tokenizer.
        images: images of one size, with sides divisible by ``tokenizer.downsample``.
        batch_size: images per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: if the list is empty, the sizes differ or do not divide by the tokenizer's stride.
    """
    if not images:
        raise ValueError("images: the list is empty; give at least one image.")
    return [rebuilt for _, rebuilt in stream_reconstructions(tokenizer, images, batch_size, progress)]


def stream_reconstructions(
    tokenizer: ImageTokenizer, images: Iterable[Image.Image], batch_size: int = 32, progress: bool = False
) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Yield each image of a stream with its reconstruction, one batch in memory at a time.

    Arguments and errors as for :func:`reconstruct`.
    """
    device = next(tokenizer.parameters()).device if isinstance(tokenizer, nn.Module) else "cpu"
    with tqdm(desc="reconstruct", unit="image", disable=not progress) as bar:
        for batch in batches(images, batch_size):
            with torch.inference_mode():
                rebuilt = to_pil(tokenizer.decode(tokenizer.encode(to_tensor(batch).to(device))))
            yield from zip(batch, rebuilt, strict=True)
            bar.update(len(batch))


def add_tokenizer_psnr(
    results: Results,
    tokenizer: ImageTokenizer,
    images: Iterable[Image.Image],
    reference: str,
    batch_size: int = 32,
    progress: bool = False,
) -> None:
    """Add how well an image tokenizer gives back images that it should not have been trained on.

    The values are ``tokenizer_psnr_db`` (mean over images) and ``tokenizer_psnr_pooled_db`` (of the mean squared error of
    the set).

    Args:
        results: the results to add them to.
        tokenizer: any image tokenizer.
        images: a stream of images of one size, of which one batch is kept at a time.
        reference: the name of the images, for the recipe.
        batch_size: images per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: as for :func:`reconstruct`.
    """
    errors, size = [], (0, 0)
    for original, rebuilt in stream_reconstructions(tokenizer, images, batch_size, progress):
        errors.append(image_errors([original], [rebuilt]))
        size = original.size
    if not errors:
        raise ValueError("images: there is none; give at least one.")
    summary = summarise_errors(torch.cat(errors))
    recipe: dict[str, Any] = {
        "n": len(errors), "size": list(size), "reference": reference, "tokenizer_fingerprint": tokenizer.fingerprint,
        "peak": "255, on images rounded to 8 bits",
    }  # fmt: skip
    for name, key, label in (
        ("tokenizer_psnr_db", "mean_db", "tokenizer PSNR in dB, mean over images"),
        ("tokenizer_psnr_pooled_db", "pooled_db", "tokenizer PSNR in dB, of the pooled error"),
    ):
        results.add(name, summary[key], label, given=True, **recipe)
