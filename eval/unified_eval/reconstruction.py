"""How well an image tokenizer gives images back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from unified_tokenizers.base import ImageTokenizer

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
    for field, pictures in (("a", a), ("b", b)):
        if not bool(((pictures >= 0) & (pictures <= 1)).all()):
            raise ValueError(
                f"{field}: values {float(pictures.min()):.3g}..{float(pictures.max()):.3g} leave [0, 1]; "
                "rescale and clamp."
            )
    return (a.double() - b.double()).square().mean((1, 2, 3))


def psnr_summary(originals: Sequence[Image.Image], reconstructed: Sequence[Image.Image]) -> dict[str, float]:
    """PSNR over a set of 8-bit images, in dB.

    Returns:
        ``mean_db``, the mean of per-picture PSNR, where an image given back exactly counts as 58.92 dB (the error of
        8-bit rounding) so that the mean stays finite; and ``pooled_db``, the PSNR of the mean squared error of the set.

    Raises:
        ValueError: if the lists are empty, or differ in length or image size.
    """
    if len(originals) != len(reconstructed) or not originals:
        raise ValueError(
            f"reconstructed: {len(reconstructed)} images for {len(originals)} originals; need one for each."
        )
    errors = torch.cat([squared_error(_unit(a), _unit(b)) for a, b in zip(originals, reconstructed, strict=True)])
    mean = (-10 * torch.log10(errors.clamp(min=ROUNDING_MSE))).mean()
    pooled = -10 * torch.log10(errors.mean().clamp(min=ROUNDING_MSE))
    return {"mean_db": float(mean), "pooled_db": float(pooled)}


def _unit(image: Image.Image) -> Tensor:
    from unified_tokenizers.images import to_tensor

    return to_tensor([image]).add(1).div(2).clamp(0, 1)


def reconstruct(
    tokenizer: "ImageTokenizer", images: Sequence[Image.Image], batch_size: int = 32, progress: bool = False
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
    from unified_tokenizers.images import to_pil, to_tensor

    if not images:
        raise ValueError("images: the list is empty; give at least one image.")
    device = next(tokenizer.parameters()).device if isinstance(tokenizer, nn.Module) else "cpu"
    out: list[Image.Image] = []
    with (
        tqdm(total=len(images), desc="reconstruct", unit="picture", disable=not progress) as bar,
        torch.inference_mode(),
    ):
        for start in range(0, len(images), batch_size):
            batch = to_tensor(images[start : start + batch_size]).to(device)
            out += to_pil(tokenizer.decode(tokenizer.encode(batch)))
            bar.update(len(batch))
    return out
