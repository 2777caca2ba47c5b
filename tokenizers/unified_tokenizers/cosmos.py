"""NVIDIA's discrete Cosmos tokenizers (arXiv 2501.03575): a Haar wavelet, convolutions, and finite scalar quantization.

DI8x8 and DI16x16 are made for images. DV4x8x8, DV8x8x8 and DV8x16x16 are made for video, and here read single images, as
SimpleAR uses them: over one frame, which a causal convolution in time sees as many times as its kernel is long, every layer in
time becomes a 1x1 convolution, and the weights are folded accordingly when they are read. So both are one network of two
dimensions. Published files are TorchScript, whose tensors are read and whose code does not run.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from unified_tokenizers.base import check_codes, check_images, fingerprint_of, full_precision
from unified_tokenizers.checkpoint import WholeModel
from unified_tokenizers.fields import YES_OR_NO, Rule, check_fields, sizes, whole
from unified_tokenizers.vqgan import Decoder, Design, Encoder
from unified_tokenizers.weights import load_exactly, read_weights, shape_of

LEVELS = (8, 8, 8, 5, 5, 5)  # of all published ones: 64,000 codes
_MOST_LEVELS = 16
_FIELDS: dict[str, Rule] = {
    "wavelets": whole(0),
    "channels": whole(),
    "multipliers": (f"{sizes()[0]}, one or more", lambda value: sizes()[1](value) and len(value) > 0),
    "residual_blocks": whole(),
    "attention_levels": sizes(0),
    "latent_channels": whole(),
    "halving_levels": sizes(0),
    "doubling_levels": sizes(0),
    "groups": whole(),
    "video": YES_OR_NO,
    "fsq_levels": (f"{sizes(3)[0]}, one or more", lambda value: sizes(3)[1](value) and len(value) > 0),
}
# How much each of the four pixels of a square, row by row, adds to its mean and to its differences down, across, and both.
_HAAR = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))


class CosmosConfig(PreTrainedConfig):
    """Architecture of a :class:`CosmosTokenizer`.

    Args:
        wavelets: how many times the image is halved by a Haar wavelet before the first convolution.
        channels, multipliers, residual_blocks, attention_levels, latent_channels: as in
            :class:`unified_tokenizers.VQGANConfig`.
        halving_levels, doubling_levels: levels that halve the sides in the encoder and double them in the decoder.
        groups: of channels that are normalised together.
        video: whether it was made for video.
        fsq_levels: levels of each dimension of a code.
    """

    model_type = "unified_cosmos"

    wavelets: int = 2
    channels: int = 128
    multipliers: list[int] | tuple[int, ...] = (2, 4, 4)
    residual_blocks: int = 2
    attention_levels: list[int] | tuple[int, ...] = ()
    latent_channels: int = 256
    halving_levels: list[int] | tuple[int, ...] = (0, 1)
    doubling_levels: list[int] | tuple[int, ...] = (1, 2)
    groups: int = 32
    video: bool = False
    fsq_levels: list[int] | tuple[int, ...] = LEVELS

    def __post_init__(self, **kwargs: object) -> None:
        """Refuse values that are out of range."""
        super().__post_init__(**kwargs)
        check_fields(self, _FIELDS)
        if self.channels % self.groups:
            raise ValueError(f"channels: {self.channels} must be a multiple of groups {self.groups}.")
        if len(self.halving_levels) != len(self.doubling_levels):
            raise ValueError(
                f"doubling_levels: {len(self.doubling_levels)} for {len(self.halving_levels)} halving_levels; give as many."
            )

    @property
    def design(self) -> Design:
        """What the encoder and the decoder are built of."""
        return Design(
            3 * 4**self.wavelets, self.channels, self.multipliers, self.residual_blocks, self.attention_levels,
            self.latent_channels, self.halving_levels, self.doubling_levels, self.groups, mixed=self.video,
        )  # fmt: skip


def haar(images: Tensor, times: int) -> Tensor:
    """Means and differences of squares of pixels: ``(B, C, H, W)`` to ``(B, 4C, H / 2, W / 2)``, so many times."""
    for _ in range(times):
        squares = F.pixel_unshuffle(images, 2).unflatten(1, (-1, 4))
        images = torch.einsum("kp,bcphw->bkchw", squares.new_tensor(_HAAR) / 4, squares).flatten(1, 2)
    return images


def unhaar(images: Tensor, times: int) -> Tensor:
    """The inverse of :func:`haar`."""
    for _ in range(times):
        squares = torch.einsum("kp,bkchw->bcphw", images.new_tensor(_HAAR), images.unflatten(1, (4, -1)))
        images = F.pixel_shuffle(squares.flatten(1, 2), 2)
    return images


class CosmosTokenizer(WholeModel):
    """Wavelet, encoder, FSQ, decoder, wavelet; implements :class:`unified_tokenizers.base.ImageTokenizer`."""

    config: CosmosConfig
    config_class = CosmosConfig
    main_input_name = "images"

    def __init__(self, config: CosmosConfig):
        super().__init__(config)
        if len(config.multipliers) > _MOST_LEVELS or config.wavelets > _MOST_LEVELS:
            raise ValueError(f"multipliers, wavelets: more than {_MOST_LEVELS} levels; correct them.")
        self.encoder = Encoder(config.design)
        self.decoder = Decoder(config.design)
        self.quant_conv = nn.Conv2d(config.latent_channels, len(config.fsq_levels), 1)
        self.post_quant_conv = nn.Conv2d(len(config.fsq_levels), config.latent_channels, 1)
        self.quantizer = _fsq(config.fsq_levels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's own initialisation; only constants of FSQ, which files do not hold, are made again."""
        from vector_quantize_pytorch import FSQ

        if isinstance(module, FSQ):
            constants = dict(_fsq(self.config.fsq_levels).named_buffers())
            for name, buffer in module.named_buffers():
                buffer.copy_(constants[name])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct ``(B, 3, H, W)`` in [-1, 1]; returns the reconstruction, the codes ``(B, h, w)`` and a loss of 0: FSQ
        needs none, the gradient passes through the rounding.
        """
        latents = self.quant_conv(self.encoder(haar(images, self.config.wavelets)))
        quantized, codes = self.quantizer(latents)
        return self._pixels(quantized.to(latents.dtype)), codes.long(), latents.new_zeros(())

    def _pixels(self, vectors: Tensor) -> Tensor:
        return unhaar(self.decoder(self.post_quant_conv(vectors)), self.config.wavelets)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.encode`. Raises ValueError on a wrong shape or a size the stride does not divide."""
        check_images(images, self.downsample)
        with full_precision(self.device, self.dtype):
            pixels = haar(images.to(self.device, self.dtype), self.config.wavelets)
            return self.quantizer(self.quant_conv(self.encoder(pixels)))[1].long()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.decode`. Raises ValueError on codes outside the codebook."""
        check_codes(codes, self.codebook_size)
        return self._pixels(self.quantizer.indices_to_codes(codes.to(self.device)).to(self.dtype)).clamp(-1, 1)

    @torch.no_grad()
    def codebook_vectors(self) -> Tensor:
        """Vectors ``(K, d)`` of the codes as the decoder gets them: their levels."""
        return self.quantizer.indices_to_codes(torch.arange(self.codebook_size, device=self.device)[None])[0]

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last convolution, where the adversarial weight is measured."""
        return self.decoder.conv_out.weight

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return math.prod(self.config.fsq_levels)

    @property
    def downsample(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (self.config.wavelets + len(self.config.halving_levels))

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of what gives them meaning."""
        lists = ("attention_levels", "halving_levels", "doubling_levels", "fsq_levels")
        described: dict[str, object] = {name: list(getattr(self.config, name)) for name in lists}
        return fingerprint_of(self.state_dict(), described | {"groups": self.config.groups})


def _fsq(levels: Sequence[int]) -> Any:
    from vector_quantize_pytorch import FSQ  # imported here: it loads torch's compiler, which takes seconds

    with torch.device("cpu"):  # FSQ reads values while it is built, which the meta device of from_pretrained lacks
        return FSQ(levels=list(levels))


# Published files


def cosmos_from_files(path: Path) -> CosmosTokenizer:
    """Read a published tokenizer: a folder with ``encoder.jit`` and ``decoder.jit``, or the file ``autoencoder.jit``.

    Raises:
        ValueError: if the files do not hold both halves, or as :func:`cosmos_from_weights`.
    """
    if path.is_dir():
        halves = [path / name for name in ("encoder.jit", "decoder.jit")]
        files = halves if all(file.is_file() for file in halves) else [path / "autoencoder.jit"]
        if not files[0].is_file():
            raise ValueError(
                f"weights: {str(path)!r} has neither encoder.jit with decoder.jit nor autoencoder.jit; get it again."
            )
    else:
        files = [path]
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_weights(file)
    return cosmos_from_weights(state, str(path))


def cosmos_from_weights(state: dict[str, Tensor], source: str) -> CosmosTokenizer:
    """Build the tokenizer that published weights describe; sizes are read from their shapes.

    Args:
        state: tensors of encoder and decoder by name.
        source: where they are from, for errors; for a video tokenizer that holds layers it does not use, as one does that was
            saved from NVIDIA's classes, also the place where its name (``DV8x16x16``) stands.

    Raises:
        ValueError: if the layout is another one, or a tensor is missing, not expected or of another shape.
    """
    levels = next((value.tolist() for name, value in state.items() if name.endswith("quantizer._levels")), list(LEVELS))
    state = {name: value.float() for name, value in state.items() if not _CONSTANT.search(name)}
    video = "encoder.conv_in.0.conv3d.weight" in state
    if not video and "encoder.down.0.block.0.conv1.weight" not in state:
        raise ValueError(
            f"weights: {source!r} is no discrete Cosmos tokenizer (DI or DV); its tensors are {', '.join(sorted(state)[:4])}, ..."
        )
    if "decoder.conv_out.weight" not in state and "decoder.conv_out.0.conv3d.weight" not in state:
        raise ValueError(
            f"weights: {source!r} holds an encoder alone; give a folder with decoder.jit too, or autoencoder.jit."
        )
    if video:
        state = _of_one_frame(state, source)
    state = _renamed(state)
    model = CosmosTokenizer(_config_of(state, video, levels, source))
    load_exactly(model, state, source)
    return model.eval()


# What TorchScript stores beside the weights: wavelets, and the constants of FSQ.
_CONSTANT = re.compile(r"patcher(3d)?\.|quantizer\.|inv_quant\.")
_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """NVIDIA's names, where ``up.0`` runs last, to those of :class:`CosmosTokenizer`."""
    last = max((int(found[1]) for name in state if (found := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)

    def rename(name: str) -> str:
        name = re.sub(r"^(encoder|decoder)\.mid\.(\w+)\.", lambda m: f"{m[1]}.mid.{_MIDDLE.get(m[2], m[2])}.", name)
        name = re.sub(r"^encoder\.down\.", "encoder.conv_blocks.", name)
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.conv_blocks.{last - int(m[1])}.", name)
        return re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)

    return {rename(name): value for name, value in state.items()}


def _config_of(state: dict[str, Tensor], video: bool, levels: list[int], source: str) -> CosmosConfig:
    channels, pixels = shape_of(state, "encoder.conv_in.weight", source)[:2]
    blocks = {
        (int(m[1]), int(m[2])) for name in state if (m := re.match(r"encoder\.conv_blocks\.(\d+)\.res\.(\d+)\.", name))
    }
    depth = max(level for level, _ in blocks) + 1
    widths = [shape_of(state, f"encoder.conv_blocks.{i}.res.0.conv1.weight", source)[0] for i in range(depth)]

    def holding(part: str) -> list[int]:
        return [i for i in range(depth) if part.format(i, depth - 1 - i) in state]

    return CosmosConfig(
        wavelets=max(0, round(math.log(pixels / 3, 4))),
        channels=channels,
        multipliers=[width // channels for width in widths],
        residual_blocks=max(block for _, block in blocks) + 1,
        attention_levels=holding("encoder.conv_blocks.{0}.attn.0." + ("0.q.weight" if video else "q.weight")),
        latent_channels=shape_of(state, "encoder.conv_out.weight", source)[0],
        halving_levels=holding("encoder.conv_blocks.{0}.downsample.conv.weight"),
        doubling_levels=holding("decoder.conv_blocks.{1}.upsample.conv.weight"),
        groups=1 if video else 32,
        video=video,
        fsq_levels=levels,
    )


# Video over one frame: what is linear and follows one another becomes one convolution.


def _of_one_frame(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights of a video tokenizer as those of a network over single images; exact but for rounding."""
    # Over equal frames a kernel in time acts as its sum.
    state = {
        name.replace(".conv3d.", ".").replace(".norm.norm.", ".norm.").replace("norm1.norm.", "norm1.")
        .replace("norm2.norm.", "norm2.").replace("norm_out.norm.", "norm_out."): value.sum(2) if value.ndim == 5 else value
        for name, value in state.items()
    }  # fmt: skip
    space, time = _resampled(state, source)
    result: dict[str, Tensor] = {}
    for prefix in sorted({name.rpartition(".")[0] for name in state}):
        layer, _, part = prefix.rpartition(".")
        if re.search(r"\.(conv_in|conv_out|conv1|conv2)\.0$", prefix):  # a convolution in space, then one in time
            _put(result, layer, _after(_layer(state, f"{layer}.1"), _layer(state, prefix)))
        elif re.search(r"\.(conv_in|conv_out|conv1|conv2)\.1$", prefix):
            continue
        elif re.search(r"(attn\.\d+|attn_1)\.1$", layer):  # attention over the only frame: its value
            if part == "v":
                _put(result, f"{layer}.conv", _after(_layer(state, f"{layer}.proj_out"), _layer(state, prefix)))
            elif part == "norm":
                _put(result, prefix, _layer(state, prefix))
        elif layer.endswith("sample"):
            if part == "conv3" and layer in space:
                _put_resampling(result, state, layer, layer in time)
        else:
            _put(result, prefix, _layer(state, prefix))
    for name in ("weight", "bias"):
        result[f"decoder.conv_out.{name}"] = _last_frame(result[f"decoder.conv_out.{name}"])
    result["encoder.conv_in.weight"] = _equal_frames(result["encoder.conv_in.weight"].transpose(0, 1)).transpose(0, 1)
    return result


def _layer(state: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    missing = [part for part in ("weight", "bias") if f"{name}.{part}" not in state]
    if missing:
        raise ValueError(f"weights: {name}.{missing[0]} is missing.")
    return state[f"{name}.weight"], state[f"{name}.bias"]


def _put(result: dict[str, Tensor], name: str, layer: tuple[Tensor, Tensor]) -> None:
    result[f"{name}.weight"], result[f"{name}.bias"] = layer


def _after(second: tuple[Tensor, Tensor], first: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A convolution and a 1x1 convolution of its output, as one."""
    matrix = second[0].flatten(1).double()
    weight = torch.einsum("oi,ijhw->ojhw", matrix, first[0].double())
    return weight.float(), (matrix @ first[1].double() + second[1].double()).float()


def _plus(layer: tuple[Tensor, Tensor], taps: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution beside a skip, which weighs the same places by ``taps (h, w)``, as one."""
    return layer[0] + torch.eye(len(layer[0]))[:, :, None, None] * taps, layer[1]


def _put_resampling(result: dict[str, Tensor], state: dict[str, Tensor], layer: str, in_time: bool) -> None:
    """A hybrid of convolutions and skips in space and time, then a 1x1 convolution.

    Down, all of it is one convolution. Up, what acts in time comes before the padding, where its bias is not, and stays apart.
    """
    conv1, conv3 = (
        _layer(state, f"{layer}.conv1") if in_time or "down" in layer else None,
        _layer(state, f"{layer}.conv3"),
    )
    one = torch.ones(1, 1)
    if layer.endswith("downsample"):
        assert conv1 is not None
        in_space = _plus(conv1, F.pad(torch.full((2, 2), 0.25), (0, 1, 0, 1)))
        inner = _after(_plus(_layer(state, f"{layer}.conv2"), one), in_space) if in_time else in_space
        _put(result, f"{layer}.conv", _after(conv3, inner))
        return
    in_space = _plus(_layer(state, f"{layer}.conv2"), F.pad(one, (1, 1, 1, 1)))
    width = len(conv3[0])
    nothing = torch.zeros(width, width, 1, 1), torch.zeros(width)
    _put(result, f"{layer}.mix", _plus(nothing if conv1 is None else conv1, one))
    _put(result, f"{layer}.conv", _after(conv3, in_space))


def _resampled(state: dict[str, Tensor], source: str) -> tuple[set[str], set[str]]:
    """Layers that change the resolution in space, and in time.

    TorchScript holds no layer that is not used. Where all are there, the name of the tokenizer says which are.
    """
    last = max(int(found[1]) for name in state if (found := re.match(r"encoder\.down\.(\d+)\.", name)))
    halving = {f"encoder.down.{level}.downsample" for level in range(last)}
    doubling = {f"decoder.up.{level}.upsample" for level in range(1, last + 1)}

    def holding(down: str, up: str) -> set[str]:
        found = {layer for layer in halving if f"{layer}.{down}.weight" in state}
        return found | {layer for layer in doubling if f"{layer}.{up}.weight" in state}

    space, time, everything = holding("conv1", "conv2"), holding("conv2", "conv1"), halving | doubling
    if space != everything or time != everything:
        return space, time
    named = re.findall(r"DV(\d+)x(\d+)x\2(?!\d)", source)
    if not named:
        raise ValueError(
            f"weights: {source!r} holds layers for every compression; keep the published name, such as DV8x16x16, in its path."
        )
    first = math.ceil(math.log(shape_of(state, "encoder.conv_in.0.weight", source)[1] / 3, 8))
    in_time, in_space = (round(math.log2(int(each))) - first for each in named[-1])

    def used(layer: str) -> tuple[bool, bool]:
        level = int(layer.split(".")[2])
        if layer in halving:
            return level < in_space, level < in_time
        order = last - level  # in which they run
        doubles_time = 0 < order < in_time + 1
        return doubles_time or (order < in_space and in_space > in_time), doubles_time

    return {each for each in everything if used(each)[0]}, {each for each in everything if used(each)[1]}


def _bands(tensor: Tensor) -> Tensor:
    """Channels of wavelets in time and space as ``(..., 3, *rest)``: for each wavelet 2 in time and 4 in space, as here.

    NVIDIA's wavelets of videos have the differences across before those down, those of images the other way round.
    """
    times = round(math.log(len(tensor) / 3, 8))
    split = tensor.unflatten(0, (*(2, 4) * times, 3))
    for each in range(times):
        split = split.index_select(2 * each + 1, torch.tensor([0, 2, 1, 3]))
    return split


def _equal_frames(tensor: Tensor) -> Tensor:
    """Of the channels that wavelets make from equal frames, those that are not zero: the means in time."""
    split, times = _bands(tensor), round(math.log(len(tensor) / 3, 8))
    for each in reversed(range(times)):
        split = split.select(2 * each, 0)
    return split.flatten(0, times)


def _last_frame(tensor: Tensor) -> Tensor:
    """The channels from which wavelets in space make what those in time and space make as the last frame."""
    split, times = _bands(tensor), round(math.log(len(tensor) / 3, 8))
    for each in reversed(range(times)):
        split = split.select(2 * each, 0) - split.select(2 * each, 1)
    return split.flatten(0, times)
