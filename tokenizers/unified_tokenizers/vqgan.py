"""The VQGAN design (arXiv 2012.09841) that the image tokenizers of LlamaGen, Janus and Chameleon share.

A convolutional encoder halves the sides level by level, each position of its output takes the nearest entry of the
codebook, and a mirrored decoder turns the codes into an image. :mod:`unified_tokenizers.layouts` reads the published weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from unified_tokenizers.base import check_codes, check_images, fingerprint_of
from unified_tokenizers.checkpoint import WholeModel
from unified_tokenizers.fields import YES_OR_NO, Rule, check_fields, is_finite, is_whole, sizes, whole

_GROUPS = 32  # of channels that are normalised together
_FIELDS: dict[str, Rule] = {
    "channels": (f"a multiple of {_GROUPS}", lambda value: is_whole(value) and value % _GROUPS == 0),
    "multipliers": (f"{sizes()[0]}, one or more", lambda value: sizes()[1](value) and len(value) > 0),
    "residual_blocks": whole(),
    "attention_levels": sizes(0),
    "latent_channels": whole(),
    "codebook_size": whole(),
    "code_dim": whole(),
    "normalize_codes": YES_OR_NO,
    "commitment_weight": ("a finite number of at least 0", lambda value: is_finite(value) and value >= 0),
}
_NEAREST_CHUNK = 4096  # positions compared with the whole codebook at once; bounds the memory
_MOST_LEVELS = 16  # where a code stands for 32768 pixels along each side


class VQGANConfig(PreTrainedConfig):
    """Architecture of a :class:`VQGAN`.

    Args:
        channels: width of the convolutions at full resolution.
        multipliers: width of every level relative to ``channels``; every level but the last halves the sides.
        residual_blocks: blocks of an encoder level; a decoder level has one more.
        attention_levels: levels with self-attention after every block; the middle always has one.
        latent_channels: width between the convolutions and the quantizer.
        codebook_size, code_dim: shape of the codebook.
        normalize_codes: compare and decode on the unit sphere (LlamaGen, Janus), or plainly (Chameleon).
        commitment_weight: weight of the encoder's pull towards its codes when the tokenizer is trained.
    """

    model_type = "unified_vqgan"

    channels: int = 128
    multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    residual_blocks: int = 2
    attention_levels: list[int] | tuple[int, ...] = (4,)
    latent_channels: int = 256
    codebook_size: int = 16384
    code_dim: int = 8
    normalize_codes: bool = True
    commitment_weight: float = 0.25

    def __post_init__(self, **kwargs: object) -> None:
        """Refuse values that are out of range."""
        super().__post_init__(**kwargs)
        check_fields(self, _FIELDS)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a skip; ``(B, C_in, H, W)`` to ``(B, C_out, H, W)``."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions beside a skip; shape is kept."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        normed = self.norm(x)
        q, k, v = (project(normed).flatten(2).transpose(1, 2)[:, None] for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    """Halve both sides; the image is padded at its right and lower edge only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if ``attention``, then a change of resolution."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, resample: str | None):
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs) for _ in range(blocks if attention else 0))
        if resample == "down":
            self.downsample = Downsample(outputs)
        elif resample == "up":
            self.upsample = Upsample(outputs)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


class Encoder(nn.Module):
    """``(B, 3, H, W)`` to latents ``(B, latent_channels, H / stride, W / stride)``."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                before,
                width,
                config.residual_blocks,
                level in config.attention_levels,
                "down" if level < last else None,
            )
            for level, (before, width) in enumerate(zip([config.channels, *widths], widths, strict=False))
        )
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        x = self.conv_in(images)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents ``(B, latent_channels, h, w)`` to images; its levels are stored in the order in which they run."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(
                before, width, config.residual_blocks + 1, level in config.attention_levels, "up" if level > 0 else None
            )
            for level, before, width in zip(reversed(range(len(widths))), [widths[0], *widths], widths, strict=False)
        )
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:  # noqa: D102
        x = self.mid(self.conv_in(latents))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """``codebook_size`` vectors of ``code_dim`` numbers."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.normalize = config.normalize_codes
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)

    @property
    def vectors(self) -> Tensor:
        """The codes' vectors ``(K, D)`` as they are compared and decoded."""
        return F.normalize(self.embedding.weight, dim=-1) if self.normalize else self.embedding.weight

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest code for each row of ``(N, D)``, compared in float32."""
        vectors = self.vectors.float()
        offset = vectors.square().sum(-1) / 2  # least distance is the greatest x.c - |c|^2 / 2
        return torch.cat([(rows.float() @ vectors.T - offset).argmax(-1) for rows in latents.split(_NEAREST_CHUNK)])


class VQGAN(WholeModel):
    """Encoder, codebook, decoder; implements :class:`unified_tokenizers.base.ImageTokenizer`."""

    config: VQGANConfig
    config_class = VQGANConfig
    main_input_name = "images"

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        if not 1 <= len(config.multipliers) <= _MOST_LEVELS:
            raise ValueError(f"multipliers: {len(config.multipliers)} levels; give 1 to {_MOST_LEVELS}.")
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's own initialisation."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct ``(B, 3, H, W)`` in [-1, 1]; returns the reconstruction, the codes ``(B, h, w)`` and the loss that
        samples codes to latents and, weighted, latents to codes.
        """
        latents = self._latents(images)
        codes = self._codes(latents)
        chosen = self._vectors(codes)
        pull = F.mse_loss(chosen, latents.detach()) + self.config.commitment_weight * F.mse_loss(
            latents, chosen.detach()
        )
        straight_through = latents + (chosen - latents).detach()
        return self.decoder(self.post_quant_conv(straight_through)), codes, pull

    def _latents(self, images: Tensor) -> Tensor:
        latents = self.quant_conv(self.encoder(images))
        return F.normalize(latents, dim=1) if self.config.normalize_codes else latents

    def _codes(self, latents: Tensor) -> Tensor:
        batch, dim, height, width = latents.shape
        return self.quantize.nearest(latents.permute(0, 2, 3, 1).reshape(-1, dim)).reshape(batch, height, width)

    def _vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.quantize.vectors).permute(0, 3, 1, 2)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.encode`. Raises ValueError on a wrong shape or a size the stride does not divide."""
        check_images(images, self.downsample)
        return self._codes(self._latents(images.to(self.device, self.dtype)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.decode`. Raises ValueError on codes outside the codebook."""
        check_codes(codes, self.codebook_size)
        return self.decoder(self.post_quant_conv(self._vectors(codes.to(self.device)))).clamp(-1, 1)

    def codebook_vectors(self) -> Tensor:
        """Vectors ``(K, d)`` of the codes as the decoder gets them."""
        return self.quantize.vectors.detach()

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last convolution, where the adversarial weight is measured."""
        return self.decoder.conv_out.weight

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.config.codebook_size

    @property
    def downsample(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (len(self.config.multipliers) - 1)

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of what gives them meaning."""
        described = {name: list(getattr(self.config, name)) for name in ("multipliers", "attention_levels")}
        return fingerprint_of(self.state_dict(), described | {"normalize_codes": self.config.normalize_codes})
