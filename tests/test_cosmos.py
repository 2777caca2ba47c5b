"""NVIDIA's Cosmos tokenizers: codes and images equal those of plain functions over the published layout, in TorchScript files."""

import itertools
import math
import os
import pickle
import re
import warnings
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unified_tokenizers import AutoImageTokenizer, CosmosTokenizer, ImageTokenizer, cosmos_from_weights, read_weights

pytestmark = pytest.mark.process

LEVELS, BLOCKS, LATENT, DEPTH = (8, 8, 8, 5, 5, 5), 1, 5, 3
VIDEO = {"DV8x16x16": (16, 8), "DV8x8x8": (8, 8), "DV4x8x8": (8, 4)}
IMAGE = {"DI16x16": (16, None), "DI8x8": (8, None)}
KINDS = IMAGE | VIDEO


def widths(kind):
    return (32, 32, 64) if kind in IMAGE else (4, 4, 8)


# Weights in the published layout
def make_layout(kind, seed=0):
    generator, state, video = torch.Generator().manual_seed(seed), {}, kind in VIDEO

    def put(name, *shape):
        scale = 1.3 / math.prod(shape[1:]) ** 0.5
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.2

    def conv(name, after, before, side=3):
        put(f"{name}.conv3d" if video else name, after, before, *((1,) if video else ()), side, side)

    def pair(name, after, before):
        """A 3x3 convolution; of videos, one in space and one in time."""
        if not video:
            return conv(name, after, before)
        put(f"{name}.0.conv3d", after, before, 1, 3, 3)
        put(f"{name}.1.conv3d", after, after, 3, 1, 1)

    def norm(name, width):
        name = f"{name}.norm" if video else name
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def block(name, before, after):
        norm(f"{name}.norm1", before)
        pair(f"{name}.conv1", after, before)
        norm(f"{name}.norm2", after)
        pair(f"{name}.conv2", after, after)
        if before != after:
            conv(f"{name}.nin_shortcut", after, before, 1)

    def attention(name, width):
        for each in (f"{name}.0", f"{name}.1") if video else (name,):
            norm(f"{each}.norm", width)
            for part in ("q", "k", "v", "proj_out"):
                conv(f"{each}.{part}", width, width, 1)

    def resample(name, width, up):
        if not video:
            return conv(f"{name}.conv", width, width)
        for part, shape in (("conv1", (1, 3, 3)), ("conv2", (3, 1, 1)), ("conv3", (1, 1, 1))):
            place = {"conv1": "conv2", "conv2": "conv1"}.get(part, part) if up else part
            put(f"{name}.{place}.conv3d", width, width, *shape)

    pixels, wide = 3 * (64 if video else 16), widths(kind)
    for side, count in (("encoder", BLOCKS), ("decoder", BLOCKS + 1)):
        down = side == "encoder"
        before = wide[0] if down else wide[-1]
        pair(f"{side}.conv_in", before, pixels if down else LATENT)
        for level in range(DEPTH) if down else reversed(range(DEPTH)):
            place = f"{side}.{'down' if down else 'up'}.{level}"
            for j in range(count):
                block(f"{place}.block.{j}", before, wide[level])
                before = wide[level]
                if level == DEPTH - 1:
                    attention(f"{place}.attn.{j}", before)
            halves = int(math.log2(KINDS[kind][0])) - 2
            inner = level < DEPTH - 1 if down else level > 0
            if inner and (video or (level < halves if down else level >= DEPTH - halves)):
                resample(f"{place}.{'down' if down else 'up'}sample", before, not down)
        block(f"{side}.mid.block_1", wide[-1], wide[-1])
        attention(f"{side}.mid.attn_1", wide[-1])
        block(f"{side}.mid.block_2", wide[-1], wide[-1])
        norm(f"{side}.norm_out", before)
        pair(f"{side}.conv_out", LATENT if down else pixels, before)
    conv("quant_conv", 6, LATENT, 1)
    conv("post_quant_conv", LATENT, 6, 1)
    return state


# An independent reference: of videos, over all frames of a clip that has one
def conv(state, name, x, padding=0, stride=1, time_stride=1):
    if f"{name}.0.conv3d.weight" in state:
        return conv(state, f"{name}.1", conv(state, f"{name}.0", x, padding))
    video = f"{name}.conv3d.weight" in state
    weight, bias = (state[f"{name}{'.conv3d' if video else ''}.{part}"] for part in ("weight", "bias"))
    if not video:
        return F.conv2d(x, weight, bias, padding=padding, stride=stride)
    earlier = weight.shape[2] - time_stride  # the first frame again, so that no frame sees a later one
    x = torch.cat([x[:, :, :1]] * earlier + [x], dim=2)
    return F.conv3d(F.pad(x, (padding,) * 4), weight, bias, stride=(time_stride, stride, stride))


def norm(state, name, x):
    video = f"{name}.norm.weight" in state
    weight, bias = (state[f"{name}{'.norm' if video else ''}.{part}"] for part in ("weight", "bias"))
    if not video:
        return F.group_norm(x, 32, weight, bias, eps=1e-6)
    frames = [F.group_norm(x[:, :, t], 1, weight, bias, eps=1e-6) for t in range(x.shape[2])]
    return torch.stack(frames, dim=2)


def residual(state, name, x):
    inner = conv(state, f"{name}.conv1", F.silu(norm(state, f"{name}.norm1", x)), padding=1)
    inner = conv(state, f"{name}.conv2", F.silu(norm(state, f"{name}.norm2", inner)), padding=1)
    shortcut = any(key.startswith(f"{name}.nin_shortcut") for key in state)
    return inner + (conv(state, f"{name}.nin_shortcut", x) if shortcut else x)


def attend(state, name, x):
    if any(key.startswith(f"{name}.0.") for key in state):
        x = attend(state, f"{name}.0", x)
        normed = norm(state, f"{name}.1.norm", x)
        q, k, v = (conv(state, f"{name}.1.{part}", normed) for part in "qkv")
        scores = torch.einsum("bcthw,bcuhw->bhwtu", q, k) / x.shape[1] ** 0.5
        scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
        return x + conv(state, f"{name}.1.proj_out", torch.einsum("bhwtu,bcuhw->bcthw", scores.softmax(-1), v))
    normed = norm(state, f"{name}.norm", x)
    q, k, v = (conv(state, f"{name}.{part}", normed).flatten(-2) for part in "qkv")
    weights = (torch.einsum("bc...i,bc...j->b...ij", q, k) / x.shape[1] ** 0.5).softmax(-1)
    return x + conv(state, f"{name}.proj_out", torch.einsum("b...ij,bc...j->bc...i", weights, v).reshape(x.shape))


def down(state, name, x, in_space, in_time):
    if f"{name}.conv.weight" in state:
        return conv(state, f"{name}.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    if not (in_space or in_time):
        return x
    if in_space:
        padded = F.pad(x, (0, 1, 0, 1))
        x = conv(state, f"{name}.conv1", padded, stride=2) + F.avg_pool3d(padded, (1, 2, 2))
    if in_time:
        doubled = torch.cat([x[:, :, :1], x], dim=2)
        x = conv(state, f"{name}.conv2", doubled, time_stride=2) + F.avg_pool3d(doubled, (2, 1, 1))
    return conv(state, f"{name}.conv3", x)


def up(state, name, x, in_space, in_time):
    if f"{name}.conv.weight" in state:
        return conv(state, f"{name}.conv", x.repeat_interleave(2, -2).repeat_interleave(2, -1), padding=1)
    if not (in_space or in_time):
        return x
    x = x + conv(state, f"{name}.conv1", x) if in_time else x  # the first frame stays one
    if in_space:
        x = x.repeat_interleave(2, -2).repeat_interleave(2, -1)
        x = x + conv(state, f"{name}.conv2", x, padding=1)
    return conv(state, f"{name}.conv3", x)


def resampled(kind):
    """Which levels of the encoder, and which in running order of the decoder, change space and time."""
    if kind in IMAGE:
        return {}, {}
    halves, times = (int(math.log2(each)) - 2 for each in KINDS[kind])
    encoder = {level: (level < halves, level < times) for level in range(DEPTH)}
    decoder = {}
    for order in range(DEPTH):
        in_time = 0 < order < times + 1
        decoder[order] = (in_time or (order < halves and halves > times), in_time)
    return encoder, decoder


def split_in_two(x, dims, scale):
    """Every combination of means and differences of neighbours along ``dims``, the first of them outermost."""
    parts = []
    for signs in itertools.product((1, -1), repeat=len(dims)):
        part = x
        for dim, sign in zip(dims, signs, strict=True):
            even, odd = part.unfold(dim, 2, 2).unbind(-1)
            part = (even + sign * odd) / 2**0.5
        parts.append(part / scale)
    return torch.cat(parts, dim=1)


def join_two(x, dims, scale):
    parts = dict(zip(itertools.product((1, -1), repeat=len(dims)), x.chunk(2 ** len(dims), dim=1), strict=True))
    total = 0
    for signs, part in parts.items():
        for dim, sign in zip(dims, signs, strict=True):
            part = torch.stack([part, sign * part], dim=dim + 1).flatten(dim, dim + 1) / 2**0.5
        total = total + part
    return total * scale


def walk(state, side, kind, x):
    encoder, decoder = resampled(kind)
    x = conv(state, f"{side}.conv_in", x, padding=1)

    def middle(x):
        x = attend(state, f"{side}.mid.attn_1", residual(state, f"{side}.mid.block_1", x))
        return residual(state, f"{side}.mid.block_2", x)

    x = middle(x) if side == "decoder" else x
    for order in range(DEPTH):
        place = f"encoder.down.{order}" if side == "encoder" else f"decoder.up.{DEPTH - 1 - order}"
        for j in range(BLOCKS if side == "encoder" else BLOCKS + 1):
            x = residual(state, f"{place}.block.{j}", x)
            if any(key.startswith(f"{place}.attn.{j}.") for key in state):
                x = attend(state, f"{place}.attn.{j}", x)
        for part, run, how in (("downsample", down, encoder), ("upsample", up, decoder)):
            if any(key.startswith(f"{place}.{part}.") for key in state):
                x = run(state, f"{place}.{part}", x, *how.get(order, (True, False)))
    x = middle(x) if side == "encoder" else x
    return conv(state, f"{side}.conv_out", F.silu(norm(state, f"{side}.norm_out", x)), padding=1)


def reference_encode(state, kind, images):
    x, (dims, scale) = images, ((-1, -2), 2)
    if kind in VIDEO:
        x, (dims, scale) = torch.stack([images] * 4, dim=2), ((2, 3, 4), 8**0.5)
    for _ in range(2):
        x = split_in_two(x, [dim % x.ndim for dim in dims], scale)
    z = conv(state, "quant_conv", walk(state, "encoder", kind, x)).reshape(len(images), 6, *images_grid(kind, images))
    # arXiv 2309.15505, section 3.1 and appendix A.1
    levels = torch.tensor(LEVELS)[:, None, None]
    half = (levels - 1) * 1.001 / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    rounded = ((z + (offset / half).atanh()).tanh() * half - offset).round()
    steps = torch.tensor([1, *itertools.accumulate(LEVELS[:-1], int.__mul__)])[:, None, None]
    return ((rounded.long() + levels // 2) * steps).sum(1), z


def images_grid(kind, images):
    return tuple(side // KINDS[kind][0] for side in images.shape[-2:])


def reference_decode(state, kind, codes):
    digits, rest = [], codes
    for level in LEVELS:
        digits.append((rest % level - level // 2) / (level // 2))
        rest = rest // level
    x = torch.stack(digits, dim=1)
    x = walk(state, "decoder", kind, conv(state, "post_quant_conv", x[:, :, None] if kind in VIDEO else x))
    dims, scale = ((2, 3, 4), 8**0.5) if kind in VIDEO else ((3, 2), 2)
    for _ in range(2):
        x = join_two(x, dims, scale)
    return (x[:, :, 3] if kind in VIDEO else x).clamp(-1, 1)


def as_torchscript(state, file):
    """Save tensors by name as TorchScript does, in modules that know what they hold and not what to do."""

    class Holder(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    top = Holder()
    for name, value in state.items():
        module, (*path, last) = top, name.split(".")
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, Holder())
            module = module.get_submodule(part)
        module.register_buffer(last, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(top).save(file)


def used_only(state, kind):
    """Without what a tokenizer of this compression does not run, as TorchScript stores it."""
    encoder, decoder = resampled(kind)
    unused = []
    for level in range(DEPTH):
        in_space, in_time = encoder.get(level, (True, True))
        unused += [] if in_space else [rf"down\.{level}\.downsample\.conv1"]
        unused += [] if in_time else [rf"down\.{level}\.downsample\.conv2"]
        unused += [] if in_space or in_time else [rf"down\.{level}\.downsample"]
        in_space, in_time = decoder.get(DEPTH - 1 - level, (True, True))
        unused += [] if in_space else [rf"up\.{level}\.upsample\.conv2"]
        unused += [] if in_time else [rf"up\.{level}\.upsample\.conv1"]
        unused += [] if in_space or in_time else [rf"up\.{level}\.upsample"]
    return {name: value for name, value in state.items() if not any(re.search(each, name) for each in unused)}


def random_images(seed=0, height=32, width=48):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_images_equal_the_reference(kind, tmp_path):
    state = {name: value.bfloat16().float() for name, value in make_layout(kind).items()}  # as they are published
    kept = {name: value.bfloat16() for name, value in used_only(state, kind).items()}
    halves = [{}, {}]
    for name, value in kept.items():
        halves[name.startswith(("decoder", "post_quant_conv"))][name] = value
    halves[0]["quantizer._levels"] = torch.tensor(LEVELS, dtype=torch.int32)
    halves[1]["inv_quant.quantizer._levels"] = torch.tensor(LEVELS, dtype=torch.int32)
    halves[0]["encoder.patcher.wavelets"] = torch.ones(2)
    for half, name in zip(halves, ("encoder.jit", "decoder.jit"), strict=True):
        as_torchscript(half, tmp_path / name)
    tokenizer = AutoImageTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, CosmosTokenizer) and isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.downsample, tokenizer.codebook_size) == (KINDS[kind][0], 64000)
    codes = tokenizer.encode(random_images())
    expected, _ = reference_encode(state, kind, random_images())
    assert codes.dtype == torch.int64 and len(codes.unique()) > codes.numel() // 3
    assert torch.equal(codes, expected)
    torch.testing.assert_close(tokenizer.decode(codes), reference_decode(state, kind, codes), rtol=0, atol=1e-4)
    if kind in VIDEO:  # all layers, as NVIDIA's classes save them
        with pytest.raises(ValueError, match="keep the published name, such as DV8x16x16, in its path"):
            cosmos_from_weights(state, "somewhere")
        assert cosmos_from_weights(state, f"Cosmos-1.0-Tokenizer-{kind}/all.pt").fingerprint == tokenizer.fingerprint


def test_folder_round_trip(tmp_path):
    tokenizer = cosmos_from_weights(make_layout("DV8x16x16"), "DV8x16x16")
    tokenizer.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = AutoImageTokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    codes = loaded.encode(random_images())
    assert torch.equal(codes, tokenizer.encode(random_images()))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    vectors = loaded.codebook_vectors()
    decoded = loaded._pixels(vectors[codes].permute(0, 3, 1, 2)).clamp(-1, 1)
    torch.testing.assert_close(loaded.decode(codes), decoded, rtol=0, atol=1e-6)


def test_training_sees_what_is_decoded_and_its_gradient_passes_the_rounding():
    tokenizer = cosmos_from_weights(make_layout("DI8x8"), "DI8x8").train()
    decoded, codes, loss = tokenizer(random_images())
    assert torch.equal(codes, tokenizer.encode(random_images())) and loss == 0
    torch.testing.assert_close(decoded.clamp(-1, 1), tokenizer.decode(codes), rtol=0, atol=1e-5)
    decoded.square().mean().backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().max() > 0


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-weights-file",)


@pytest.mark.parametrize("damage", ["code", "short", "half", "no modules"])
def test_bad_files_are_named_and_nothing_runs(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "encoder.jit"
    as_torchscript({"encoder.weight": torch.ones(3)}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = {"code": pickle.dumps(Hostile(), protocol=2), "no modules": pickle.dumps([1], protocol=2)}
    message = {"code": r"it names (posix|nt)\.mkdir", "short": "storage 0 has 5 bytes for 3 numbers of torch.float32",
               "half": "no discrete Cosmos tokenizer", "no modules": "a list in place of a module"}[damage]  # fmt: skip
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            content = pickled.get(damage, content) if name.endswith("/data.pkl") else content
            archive.writestr(name, content[:5] if damage == "short" and "/data/" in name else content)
    with pytest.raises(ValueError, match=message):
        AutoImageTokenizer.from_pretrained(file)
    assert not (tmp_path / "made-by-a-weights-file").exists()


def test_a_half_is_not_a_tokenizer(tmp_path):
    state = make_layout("DI16x16")
    as_torchscript({k: v for k, v in state.items() if not k.startswith(("decoder", "post"))}, tmp_path / "encoder.jit")
    with pytest.raises(ValueError, match=r"has neither encoder.jit with decoder.jit nor autoencoder.jit"):
        AutoImageTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds an encoder alone; give a folder with decoder.jit too"):
        AutoImageTokenizer.from_pretrained(tmp_path / "encoder.jit")
    as_torchscript(state, tmp_path / "autoencoder.jit")
    assert read_weights(tmp_path / "autoencoder.jit").keys() == state.keys()
    (tmp_path / "encoder.jit").unlink()
    assert AutoImageTokenizer.from_pretrained(tmp_path).downsample == 16
