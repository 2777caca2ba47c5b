"""The VQGAN design (arXiv 2012.09841) that the image tokenizers of LlamaGen, Janus, Chameleon, IBQ, MoVQGAN and Cosmos share.

A convolutional encoder halves the sides level by level, each position of its output takes the nearest entry of the
codebook, and a mirrored decoder turns the codes into an image. :mod:`unified_tokenizers.layouts` reads the published weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from unified_tokenizers.base import check_codes, check_images, fingerprint_of, full_precision
from unified_tokenizers.checkpoint import WholeModel
from unified_tokenizers.fields import WEIGHT, YES_OR_NO, Rule, check_fields, is_whole, sizes, whole
from unified_tokenizers.quantizers import index_backpropagation

_GROUPS = 32  # of channels that are normalised together
_QUANTIZERS = ("vq", "ibq")
_FIELDS: dict[str, Rule] = {
    "channels": (f"a multiple of {_GROUPS}", lambda value: is_whole(value) and value % _GROUPS == 0),
    "multipliers": (f"{sizes()[0]}, one or more", lambda value: sizes()[1](value) and len(value) > 0),
    "residual_blocks": whole(),
    "attention_levels": sizes(0),
    "latent_channels": whole(),
    "codebook_size": whole(),
    "code_dim": whole(),
    "normalize_codes": YES_OR_NO,
    "quantizer": (f"one of {_QUANTIZERS}", lambda value: value in _QUANTIZERS),
    "commitment_weight": WEIGHT,
    "entropy_weight": WEIGHT,
    "spatial_norms": YES_OR_NO,
}
_NEAREST_CHUNK = 4096  # positions compared with the whole codebook at once; bounds the memory
_MOST_LEVELS = 16  # where a code stands for 32768 pixels along each side


@dataclass(frozen=True)
class Design:
    """What an encoder and its decoder are built of; all levels count from the highest resolution.

    Args:
        pixels: channels of an image.
        channels, multipliers, residual_blocks, attention_levels, latent_channels: as in :class:`VQGANConfig`.
        halving_levels, doubling_levels: levels of the encoder that end with half the sides, of the decoder with twice.
        groups: of channels that are normalised together.
        mixed: whether a :class:`Mix` follows attention, and a 1x1 convolution comes before doubling.
        code_dim: width of the codes' vectors that norms see (:class:`SpatialNorm`); None for norms that see none.
    """

    pixels: int
    channels: int
    multipliers: Sequence[int]
    residual_blocks: int
    attention_levels: Sequence[int]
    latent_channels: int
    halving_levels: Sequence[int]
    doubling_levels: Sequence[int]
    groups: int = _GROUPS
    mixed: bool = False
    code_dim: int | None = None

    @property
    def widths(self) -> list[int]:
        """Channels of every level."""
        return [self.channels * multiplier for multiplier in self.multipliers]

    def norm(self, channels: int) -> nn.Module:
        """The norm in front of a convolution."""
        norm = nn.GroupNorm(self.groups, channels, eps=1e-6)
        return norm if self.code_dim is None else SpatialNorm(norm, self.code_dim)

    def attention(self, channels: int) -> nn.Module:
        """Attention over an image, and over its one frame."""
        over_image = AttentionBlock(channels, self.norm)
        return nn.Sequential(over_image, Mix(channels, self.norm)) if self.mixed else over_image

    def middle(self) -> nn.Sequential:
        """The blocks at the lowest resolution."""
        width = self.widths[-1]
        first, second = (ResidualBlock(width, width, self.norm) for _ in range(2))
        return nn.Sequential(first, self.attention(width), second)


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
        quantizer: ``vq`` takes the nearest code; ``ibq`` (arXiv 2412.02692) the one of the greatest product with the latents,
            and training reaches every code through the softmax over these products.
        commitment_weight: weight of the encoder's pull towards its codes when the tokenizer is trained.
        spatial_norms: whether the decoder's norms see the codes (MoVQ, arXiv 2209.09002), see :class:`SpatialNorm`.
        entropy_weight: in training with ``ibq``, weight of the term that makes each choice sure and all codes equally frequent.
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
    quantizer: str = "vq"
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0
    spatial_norms: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        """Refuse values that are out of range."""
        super().__post_init__(**kwargs)
        check_fields(self, _FIELDS)
        if self.quantizer == "ibq" and self.normalize_codes:
            raise ValueError(
                "normalize_codes: true with the quantizer 'ibq', which compares plain codes; set it to false."
            )

    @property
    def design(self) -> Design:
        """What the encoder and the decoder are built of: every level but the last halves the sides."""
        last = len(self.multipliers) - 1
        return Design(
            3, self.channels, self.multipliers, self.residual_blocks, self.attention_levels, self.latent_channels,
            halving_levels=range(last), doubling_levels=range(1, last + 1),
        )  # fmt: skip


class SpatialNorm(nn.Module):
    """A norm whose result is scaled and shifted at every position by the vector of the code that the position lies in."""

    def __init__(self, norm: nn.GroupNorm, code_dim: int):
        super().__init__()
        self.norm_layer = norm
        self.conv_y, self.conv_b = (nn.Conv2d(code_dim, norm.num_channels, 1) for _ in range(2))

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        """``x (B, C, H, W)``, ``vectors (B, code_dim, h, w)`` of the codes; shape of ``x``."""
        vectors = F.interpolate(vectors, x.shape[-2:])
        return self.norm_layer(x) * self.conv_y(vectors) + self.conv_b(vectors)


# In the blocks below ``vectors`` are those of the codes, where the norms see them, and nothing elsewhere.


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a skip; ``(B, C_in, H, W)`` to ``(B, C_out, H, W)``."""

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, *vectors: Tensor) -> Tensor:  # noqa: D102
        inner = self.conv1(F.silu(self.norm1(x, *vectors)))
        inner = self.conv2(F.silu(self.norm2(inner, *vectors)))
        return inner + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions beside a skip; shape is kept."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, *vectors: Tensor) -> Tensor:  # noqa: D102
        normed = self.norm(x, *vectors)
        q, k, v = (project(normed).flatten(2).transpose(1, 2)[:, None] for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class Mix(nn.Module):
    """A normalised 1x1 convolution beside a skip: what attention over time does to a single frame."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm = norm(channels)
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.conv(self.norm(x))


class Downsample(nn.Module):
    """Halve both sides; the image is padded at its right and lower edge only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides, after a 1x1 convolution if ``mixed``."""

    def __init__(self, channels: int, mixed: bool = False):
        super().__init__()
        if mixed:
            self.mix = nn.Conv2d(channels, channels, 1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.mix(x) if hasattr(self, "mix") else x
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if the design says so, then a change of resolution."""

    def __init__(self, design: Design, level: int, inputs: int, blocks: int, down: bool):
        super().__init__()
        outputs, attends = design.widths[level], level in design.attention_levels
        self.res = nn.ModuleList(
            ResidualBlock(inputs if i == 0 else outputs, outputs, design.norm) for i in range(blocks)
        )
        self.attn = nn.ModuleList(design.attention(outputs) for _ in range(blocks if attends else 0))
        if down and level in design.halving_levels:
            self.downsample = Downsample(outputs)
        elif not down and level in design.doubling_levels:
            self.upsample = Upsample(outputs, design.mixed)

    def forward(self, x: Tensor, *vectors: Tensor) -> Tensor:  # noqa: D102
        for index, block in enumerate(self.res):
            x = block(x, *vectors)
            if self.attn:
                x = self.attn[index](x, *vectors)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """``(B, pixels, H, W)`` to latents ``(B, latent_channels, H / stride, W / stride)``."""

    def __init__(self, design: Design):
        super().__init__()
        widths = design.widths
        self.conv_in = nn.Conv2d(design.pixels, design.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(design, level, before, design.residual_blocks, down=True)
            for level, before in enumerate([design.channels, *widths[:-1]])
        )
        self.mid = design.middle()
        self.norm_out = design.norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], design.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        x = self.conv_in(images)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents ``(B, latent_channels, h, w)`` to images; its levels are stored in the order in which they run."""

    def __init__(self, design: Design):
        super().__init__()
        widths = design.widths
        self.conv_in = nn.Conv2d(design.latent_channels, widths[-1], 3, padding=1)
        self.mid = design.middle()
        self.conv_blocks = nn.ModuleList(
            Level(design, level, widths[min(level + 1, len(widths) - 1)], design.residual_blocks + 1, down=False)
            for level in reversed(range(len(widths)))
        )
        self.norm_out = design.norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], design.pixels, 3, padding=1)

    def forward(self, latents: Tensor, *vectors: Tensor) -> Tensor:  # noqa: D102
        x = self.conv_in(latents)
        for part in (*self.mid, *self.conv_blocks):
            x = part(x, *vectors)
        return self.conv_out(F.silu(self.norm_out(x, *vectors)))


class Codebook(nn.Module):
    """``codebook_size`` vectors of ``code_dim`` numbers."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.normalize, self.by_product = config.normalize_codes, config.quantizer == "ibq"
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)

    @property
    def vectors(self) -> Tensor:
        """The codes' vectors ``(K, D)`` as they are compared and decoded."""
        return F.normalize(self.embedding.weight, dim=-1) if self.normalize else self.embedding.weight

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest code for each row of ``(N, D)``, or that of the greatest product; compared in float32."""
        vectors = self.vectors.float()
        # Least distance is the greatest x.c - |c|^2 / 2.
        offset = 0 if self.by_product else vectors.square().sum(-1) / 2
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
        self.encoder = Encoder(config.design)
        self.decoder = Decoder(replace(config.design, code_dim=config.code_dim if config.spatial_norms else None))
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's own initialisation."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct ``(B, 3, H, W)`` in [-1, 1]; returns the reconstruction, the codes ``(B, h, w)`` and the loss that
        pulls codes to latents and, weighted, latents to codes.
        """
        latents = self._latents(images)
        if self.config.quantizer == "ibq":
            return self._through_indices(latents)
        codes = self._codes(latents)
        chosen = self._vectors(codes)
        pull = F.mse_loss(chosen, latents.detach()) + self.config.commitment_weight * F.mse_loss(
            latents, chosen.detach()
        )
        straight_through = latents + (chosen - latents).detach()
        return self._decoded(straight_through), codes, pull

    def _through_indices(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, dim, height, width = latents.shape
        rows = latents.permute(0, 2, 3, 1).reshape(-1, dim)
        quantized, codes, pull = index_backpropagation(rows, self.quantize.vectors, self.config.entropy_weight)
        pull = pull + self.config.commitment_weight * F.mse_loss(self.quantize.vectors[codes], rows.detach())
        grid = quantized.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
        return self._decoded(grid), codes.reshape(batch, height, width), pull

    def _latents(self, images: Tensor) -> Tensor:
        latents = self.quant_conv(self.encoder(images))
        return F.normalize(latents, dim=1) if self.config.normalize_codes else latents

    def _codes(self, latents: Tensor) -> Tensor:
        batch, dim, height, width = latents.shape
        return self.quantize.nearest(latents.permute(0, 2, 3, 1).reshape(-1, dim)).reshape(batch, height, width)

    def _vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.quantize.vectors).permute(0, 3, 1, 2)

    def _decoded(self, vectors: Tensor) -> Tensor:
        seen = (vectors,) if self.config.spatial_norms else ()
        return self.decoder(self.post_quant_conv(vectors), *seen)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.encode`. Raises ValueError on a wrong shape or a size the stride does not divide."""
        check_images(images, self.downsample)
        with full_precision(self.device, self.dtype):
            return self._codes(self._latents(images.to(self.device, self.dtype)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.decode`. Raises ValueError on codes outside the codebook."""
        check_codes(codes, self.codebook_size)
        return self._decoded(self._vectors(codes.to(self.device))).clamp(-1, 1)

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
        described: dict[str, object] = {
            name: list(getattr(self.config, name)) for name in ("multipliers", "attention_levels")
        }
        described |= {"normalize_codes": self.config.normalize_codes}
        if self.config.quantizer != "vq":  # fingerprints of earlier files stay what they were
            described["quantizer"] = self.config.quantizer
        if self.config.spatial_norms:
            described["spatial_norms"] = True
        return fingerprint_of(self.state_dict(), described)
