"""A small convolutional VQ autoencoder: images to codes and back, trainable on a laptop.

Pixels are folded into channels at once (space-to-depth), so that every convolution runs on the code grid: at stride 4
this costs a sixteenth of a classic VQGAN stem. Quantizers come from `vector-quantize-pytorch`.
"""

import math
import reprlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from unified_tokenizers.base import check_codes, check_images, fingerprint_of, full_precision
from unified_tokenizers.checkpoint import WholeModel
from unified_tokenizers.fields import WEIGHT, Rule, check_fields, is_whole, sizes, whole
from unified_tokenizers.quantizers import BinaryQuantizer, IndexQuantizer

_GROUPS = 8  # of channels that are normalised together
_QUANTIZERS = ("vq", "ibq", "fsq", "lfq", "bsq")
_FIELDS: dict[str, Rule] = {
    "downsample": whole(),
    "channels": (f"a multiple of {_GROUPS}", lambda value: is_whole(value) and value % _GROUPS == 0),
    "local": ("true or false", lambda value: isinstance(value, bool)),
    "encoder_blocks": whole(0),
    "decoder_blocks": whole(0),
    "quantizer": (f"one of {_QUANTIZERS}", lambda value: value in _QUANTIZERS),
    "codebook_size": whole(),
    "code_dim": whole(),
    "entropy_weight": WEIGHT,
    "fsq_levels": (f"null or {sizes(2)[0]}", lambda value: value is None or sizes(2)[1](value)),
}
MAX_CODES = 2**24


class VQConfig(PreTrainedConfig):
    """Architecture of a :class:`VQModel`.

    Args:
        downsample: pixels per code along each side.
        channels: width of the convolutions.
        local: whether a code depends on its own ``downsample`` x ``downsample`` pixels alone. Equal patches then have equal
            codes wherever they are and whatever is around them, which a language model predicts far more easily; a wider view
            describes real images better.
        encoder_blocks, decoder_blocks: residual blocks on either side.
        quantizer: ``vq`` (L2-normalised codebook with EMA updates and dead-code revival), ``ibq`` (a codebook that gradients
            reach through the indices, arXiv 2412.02692), ``fsq`` (finite scalar quantisation, arXiv 2309.15505), ``lfq``
            (lookup-free quantisation, arXiv 2310.05737) or ``bsq`` (binary spherical quantisation, arXiv 2406.07548).
        codebook_size: number of codes; for ``fsq`` the product of ``fsq_levels``, for ``lfq`` and ``bsq`` a power of two.
        code_dim: dimension of a ``vq`` or ``ibq`` code.
        fsq_levels: levels per dimension for ``fsq``.
        entropy_weight: for ``ibq``, ``lfq`` and ``bsq``, weight of the term of the loss that makes each choice sure and all
            codes equally frequent.
    """

    model_type = "unified_vq"

    downsample: int = 4
    channels: int = 64
    local: bool = False
    encoder_blocks: int = 3
    decoder_blocks: int = 3
    quantizer: str = "vq"
    codebook_size: int = 512
    code_dim: int = 8
    fsq_levels: list[int] | None = None
    entropy_weight: float = 0.1

    def __post_init__(self, **kwargs: object) -> None:
        """Refuse values that are out of range."""
        super().__post_init__(**kwargs)
        check_fields(self, _FIELDS)
        if self.quantizer == "fsq" and not self.fsq_levels:
            raise ValueError("fsq_levels: missing, which the quantizer 'fsq' needs; give the levels of each dimension.")


class ChannelNorm(nn.Module):
    """Root-mean-square normalisation over the channels of each position of ``(B, C, H, W)``."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight[:, None, None]


def _norm(channels: int, local: bool) -> nn.Module:
    return ChannelNorm(channels) if local else nn.GroupNorm(_GROUPS, channels)


def _convolution(channels_in: int, channels_out: int, local: bool) -> nn.Conv2d:
    size = 1 if local else 3
    return nn.Conv2d(channels_in, channels_out, size, padding=size // 2)


class ResidualBlock(nn.Module):
    """Pre-normalised convolutions, 3x3 or ``local`` (1x1), with a skip; ``(B, C, H, W)`` to the same shape."""

    def __init__(self, channels: int, local: bool = False):
        super().__init__()
        self.norm = _norm(channels, local)
        self.conv1 = _convolution(channels, channels, local)
        self.conv2 = _convolution(channels, channels, local)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class VQModel(WholeModel):
    """Encoder, quantizer, decoder; implements :class:`unified_tokenizers.base.ImageTokenizer`."""

    config: VQConfig
    config_class = VQConfig
    main_input_name = "images"

    def __init__(self, config: VQConfig):
        super().__init__(config)
        pixels = 3 * config.downsample**2
        self.quantizer: Any  # an FSQ, BinaryQuantizer, IndexQuantizer or VectorQuantize
        self.quantizer, code_dim = _build_quantizer(config)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(config.downsample),
            _convolution(pixels, config.channels, config.local),
            *[ResidualBlock(config.channels, config.local) for _ in range(config.encoder_blocks)],
            _norm(config.channels, config.local),
            nn.Conv2d(config.channels, code_dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, config.channels, 3, padding=1),
            *[ResidualBlock(config.channels) for _ in range(config.decoder_blocks)],
            nn.GroupNorm(_GROUPS, config.channels),
            nn.SiLU(),
            nn.Conv2d(config.channels, pixels, 3, padding=1),
            nn.PixelShuffle(config.downsample),
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's own initialisation; only constants of FSQ, which files do not hold, are made again."""
        from vector_quantize_pytorch import FSQ

        if isinstance(module, FSQ):
            constants = dict(_build_quantizer(self.config)[0].named_buffers())
            for name, buffer in module.named_buffers():
                buffer.copy_(constants[name])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct ``(B, 3, H, W)`` in [-1, 1]; returns the reconstruction, the codes ``(B, h, w)`` and the
        quantizer's commitment loss.
        """
        latents = self.encoder(images)
        quantized, codes, commitment = self._quantize(latents)
        return self.decoder(quantized), codes, commitment

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, dim, height, width = latents.shape
        flat = latents.permute(0, 2, 3, 1).reshape(batch, height * width, dim).float()
        quantized, codes, *loss = self.quantizer(flat)
        commitment = loss[0].sum() if loss else latents.new_zeros(())
        quantized = quantized.reshape(batch, height, width, dim).permute(0, 3, 1, 2).to(latents.dtype)
        return quantized, codes.reshape(batch, height, width).long(), commitment

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.encode`. Raises ValueError on a wrong shape or a size the stride does not divide."""
        check_images(images, self.downsample)
        training, _ = self.training, self.eval()  # a training-mode quantizer would update its codebook
        try:
            with full_precision(self.device, self.dtype):
                return self._quantize(self.encoder(images.to(self.device, self.dtype)))[1]
        finally:
            self.train(training)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.decode`. Raises ValueError on codes outside the codebook."""
        check_codes(codes, self.codebook_size)
        batch, height, width = codes.shape
        vectors = self._lookup(codes.to(self.device).reshape(batch, -1))
        latents = vectors.reshape(batch, height, width, -1).permute(0, 3, 1, 2).to(self.dtype)
        return self.decoder(latents).clamp(-1, 1)

    def _lookup(self, codes: Tensor) -> Tensor:
        if self.config.quantizer == "vq":
            return self.quantizer.get_output_from_indices(codes)
        return self.quantizer.indices_to_codes(codes)

    @torch.no_grad()
    def codebook_vectors(self) -> Tensor:
        """Vectors ``(K, d)`` of the codes as the decoder gets them; their levels unless they have a codebook."""
        return self._lookup(torch.arange(self.codebook_size, device=self.device)[None])[0]

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last convolution, where the adversarial weight is measured."""
        return self.decoder.get_submodule(str(len(self.decoder) - 2)).weight  # type: ignore[return-value]

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.config.codebook_size

    @property
    def downsample(self) -> int:
        """Pixels per code along each side."""
        return self.config.downsample

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of what gives them meaning."""
        described = ("downsample", "channels", "quantizer", "codebook_size", "code_dim", "fsq_levels")
        return fingerprint_of(self.state_dict(), {name: getattr(self.config, name) for name in described})


def _build_quantizer(config: VQConfig) -> tuple[nn.Module, int]:
    from vector_quantize_pytorch import (
        FSQ,
        VectorQuantize,
    )  # imported here: it loads torch's compiler, which takes seconds

    if not 2 <= config.codebook_size <= MAX_CODES:
        raise ValueError(f"codebook_size: {config.codebook_size} must lie in [2, {MAX_CODES}].")
    if config.quantizer == "vq":
        quantizer = VectorQuantize(
            dim=config.code_dim,
            codebook_size=config.codebook_size,
            use_cosine_sim=True,
            threshold_ema_dead_code=2,
            decay=0.95,
            commitment_weight=0.25,
        )
        return quantizer, config.code_dim
    if config.quantizer == "ibq":
        return IndexQuantizer(config.codebook_size, config.code_dim, config.entropy_weight), config.code_dim
    if config.quantizer == "fsq":
        levels = config.fsq_levels or []
        if math.prod(levels) != config.codebook_size:
            raise ValueError(
                f"codebook_size: {config.codebook_size} is not the product of fsq_levels {reprlib.repr(levels)}."
            )
        with torch.device("cpu"):  # FSQ reads values while it is built, which the meta device of from_pretrained lacks
            return FSQ(levels=levels), len(levels)
    if config.quantizer in ("lfq", "bsq"):
        bits = config.codebook_size.bit_length() - 1
        if config.codebook_size != 2**bits:
            raise ValueError(
                f"codebook_size: {config.codebook_size} is not a power of two, which {config.quantizer!r} needs."
            )
        return BinaryQuantizer(bits, config.quantizer == "bsq", config.entropy_weight), bits
    raise AssertionError(config.quantizer)  # checked by its configuration
