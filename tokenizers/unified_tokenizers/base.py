"""What every image tokenizer offers, whatever its architecture."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class ImageTokenizer(Protocol):
    """Images to grids of integer codes and back.

    Attributes:
        codebook_size: number of codes K; codes are in [0, K).
        downsample: pixels per code along each side.
        fingerprint: identifies the weights; caches and models of one tokenizer refuse another.
    """

    @property
    def codebook_size(self) -> int:
        """Number of codes."""

    @property
    def downsample(self) -> int:
        """Pixels per code along each side."""

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of what gives them meaning."""

    def encode(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [-1, 1] to codes ``(B, H / downsample, W / downsample)``, int64."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``(B, h, w)`` to images ``(B, 3, h * downsample, w * downsample)`` in [-1, 1]."""

    def codebook_vectors(self) -> Tensor | None:
        """Vectors ``(K, d)`` of the codes as the decoder gets them; None for a tokenizer without."""

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Write the configuration and the safetensors weights to a folder."""


def fingerprint_of(state: dict[str, Tensor], config: dict[str, Any]) -> str:
    """Hash weights and the configuration that gives them meaning; independent of dtype casts, device and file format."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_images(images: Tensor, downsample: int) -> None:
    """Refuse a batch that is not ``(B, 3, H, W)`` finite floating point with sides divisible by ``downsample``."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images: need a tensor (B, 3, H, W), got {type(images).__name__}; see images.to_tensor.")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images: need float (B, 3, H, W), got {images.dtype} {tuple(images.shape)}; see images.to_tensor."
        )
    height, width = images.shape[-2:]
    if height % downsample or width % downsample or not images.numel():
        raise ValueError(
            f"images: size {height}x{width} does not divide by the tokenizer's stride {downsample}; resize or crop first."
        )
    if not bool(images.isfinite().all()):
        raise ValueError("images: some values are not finite.")


@contextmanager
def full_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute in float32 whatever is switched on around it: autocast and TF32 turn some codes into others.

    Args:
        device, dtype: of the weights.

    Raises:
        ValueError: if the weights are in half precision, which no later cast repairs.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"image_tokenizer: its weights are in {str(dtype).removeprefix('torch.')}, which turns some codes into others; "
            "load it in float32 to encode. To decode, half precision is fine."
        )
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Refuse codes that are not ``(B, h, w)`` int64 within the codebook."""
    if not isinstance(codes, Tensor):
        raise ValueError(f"codes: need a tensor (B, h, w), got {type(codes).__name__}.")
    if codes.ndim != 3 or codes.dtype != torch.int64:
        raise ValueError(f"codes: need int64 (B, h, w), got {codes.dtype} {tuple(codes.shape)}.")
    if codes.numel() and (codes.min() < 0 or codes.max() >= codebook_size):
        raise ValueError(
            f"codes: values {int(codes.min())}..{int(codes.max())} leave the codebook [0, {codebook_size}); "
            "were they made by another tokenizer?"
        )
