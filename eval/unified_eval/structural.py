"""Structural similarity of images, and statistics of the codes of a tokenizer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each pair of images, over colour channels and all whole windows.

    Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, data range 1, population variances.

    Args:
        a: ``(B, 3, H, W)`` in [0, 1], at least 11 pixels a side.
        b: the same shape and range.

    Returns:
        ``(B,)`` float64; 1 for equal images.

    Raises:
        ValueError: if the shapes differ or are not ``(B, 3, H, W)``, a side is too short, or a value is outside [0, 1].
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[-2:]) < _WINDOW:
        raise ValueError(
            f"a, b: need two equal shapes (B, 3, H, W) of {_WINDOW} or more pixels a side, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
    for field, images in (("a", a), ("b", b)):
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(f"{field}: values leave [0, 1]; rescale and clamp.")
    x, y = a.cpu().double(), b.cpu().double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    light, structure = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + light) * (2 * covariance + structure)
    similarity = similarity / ((mean_x**2 + mean_y**2 + light) * (variance_x + variance_y + structure))
    return similarity.mean(dim=(1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    offsets = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    bell = (-(offsets**2) / (2 * _SIGMA**2)).exp()
    bell = (bell / bell.sum()).expand(x.shape[1], 1, -1)
    return F.conv2d(F.conv2d(x, bell[..., None], groups=x.shape[1]), bell[:, :, None], groups=x.shape[1])


def code_statistics(counts: Tensor, downsample: int) -> dict[str, float]:
    """How much of the codebook a set of images uses, and the bits a pixel costs.

    Args:
        counts: ``(K,)``, how often each code occurs in all images.
        downsample: pixels per code along each side.

    Returns:
        ``codes_used`` (share of the codebook seen at least once), ``perplexity`` (2 to the entropy of the code
        frequencies), ``bits_per_pixel`` (a fixed-length code: ``ceil(log2 K) / downsample^2``) and
        ``entropy_bits_per_pixel`` (an ideal code for these frequencies).

    Raises:
        ValueError: if no code was counted.
    """
    if not int(counts.sum()):
        raise ValueError("counts: no code was counted; give one or more images.")
    frequency = counts.cpu().double() / float(counts.sum())
    entropy = float(torch.special.entr(frequency).sum()) / math.log(2)
    return {
        "codes_used": float((frequency > 0).double().mean()),
        "perplexity": 2**entropy,
        "bits_per_pixel": math.ceil(math.log2(len(counts))) / downsample**2,
        "entropy_bits_per_pixel": entropy / downsample**2,
    }
