"""What holds for the codes of every image tokenizer: company, autocast and half precision change none of them."""

import pytest
import torch
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from unified_tokenizers import VQGAN, CosmosConfig, CosmosTokenizer, Emu3Tokenizer, VQConfig, VQGANConfig, VQModel

VQGAN_SIZES = {
    "channels": 32,
    "multipliers": [1, 2],
    "attention_levels": [1],
    "residual_blocks": 1,
    "latent_channels": 16,
}
COSMOS_SIZES = {"wavelets": 1, "channels": 32, "multipliers": [1, 2], "halving_levels": [0], "doubling_levels": [1],
                "residual_blocks": 1, "latent_channels": 16}  # fmt: skip


EMU3 = {"codebook_size": 64, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 2],
        "num_res_blocks": 1, "attn_resolutions": [1], "hidden_size": 64, "temporal_downsample_factor": 2}  # fmt: skip


def vq(**changes):
    return VQModel(VQConfig(channels=16, encoder_blocks=2, decoder_blocks=1, **{"codebook_size": 64, **changes}))


def vqgan(**changes):
    return VQGAN(VQGANConfig(**VQGAN_SIZES, codebook_size=64, code_dim=8, **changes))


def emu3():
    return Emu3Tokenizer(Emu3VQVAE(Emu3VQVAEConfig(**EMU3)))


TOKENIZERS = {
    "vq": vq,
    "ibq": lambda: vq(quantizer="ibq"),
    "fsq": lambda: vq(quantizer="fsq", fsq_levels=[8, 8, 5], codebook_size=320),
    "lfq": lambda: vq(quantizer="lfq"),
    "bsq": lambda: vq(quantizer="bsq"),
    "vqgan": vqgan,
    "vqgan ibq": lambda: vqgan(quantizer="ibq", normalize_codes=False),
    "cosmos": lambda: CosmosTokenizer(CosmosConfig(**COSMOS_SIZES)),
    "cosmos video": lambda: CosmosTokenizer(CosmosConfig(**COSMOS_SIZES, groups=1, video=True)),
    "emu3": emu3,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    torch.manual_seed(0)
    model = TOKENIZERS[request.param]()
    for name, value in model.named_parameters():  # so that many codes are used, not those near zero
        value.data = torch.randn_like(value) * (0.2 if value.ndim < 2 else 1.5 / value[0].numel() ** 0.5)
        value.data += float("norm" in name and name.endswith("weight"))
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_codes_do_not_depend_on_the_batch(tokenizer, images):
    codes = tokenizer.encode(images)
    assert len(codes.unique()) > 10
    assert torch.equal(torch.cat([tokenizer.encode(image[None]) for image in images]), codes)
    assert torch.equal(tokenizer.encode(images.flip(0)), codes.flip(0))


def test_codes_are_computed_in_float32(tokenizer, images):
    codes = tokenizer.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), codes)
        assert torch.is_autocast_enabled("cpu")
    convolutions = torch.backends.cudnn.conv.fp32_precision
    tokenizer.to(torch.bfloat16)
    try:
        with pytest.raises(ValueError, match="its weights are in bfloat16, which turns some codes into others"):
            tokenizer.encode(images)
        assert tokenizer.decode(codes).shape == images.shape
    finally:
        tokenizer.to(torch.float32)
    assert torch.backends.cudnn.conv.fp32_precision == convolutions
