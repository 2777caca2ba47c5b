"""A configuration that describes another model than its files hold is refused before anything is built for it."""

import json
import resource
from time import monotonic

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Emu3VQVAE, Emu3VQVAEConfig

from unified import UnifiedConfig, UnifiedForCausalLM, UnifiedPipeline
from unified.lora.adapters import attach_lora, load_lora
from unified.lora.saving import save_lora
from unified.training.model_config import ModelConfig
from unified_tokenizers import AutoImageTokenizer, VQConfig, VQModel
from unified_tokenizers.vqgan import VQGAN, VQGANConfig

MILLION, BILLION, TRILLION = 10**6, 10**9, 10**12
SMALL = {"channels": 8, "encoder_blocks": 1, "decoder_blocks": 1}


def rewrite(file, changes):
    content = json.loads(file.read_text())
    for name, value in changes.items():
        *parts, last = name.split(".")
        place = content
        for part in parts:
            place = place[part]
        place[last] = value
    file.write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def quickly_and_in_little_memory():
    start, before = monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", MILLION, "num_hidden_layers 1000000 of '.*' is more than the 2[13] tensors in its files"),
        ("num_hidden_layers", TRILLION, "num_hidden_layers 1000000000000 of '.*' is more than"),
        ("num_hidden_layers", 9, r"describes a model of 9\.\d+e\+04 weights, and its files hold 2\.\d+e\+04"),
        ("hidden_size", BILLION, "hidden_size: 1000000000 is beyond 16777216|of 7.45e.11 weights"),
        ("hidden_size", 10 * MILLION, "describes a model of 7.*e.09 weights"),
        ("vocab_size", TRILLION, "vocab_size: 1000000000000 is beyond 16777216|of 6.4e.13 weights"),
        ("head_dim", MILLION, "describes a model of 1.02e.09 weights"),
        ("num_attention_heads", BILLION, "num_attention_heads|attention heads"),
    ],
)
def test_layers_and_widths_of_a_model_and_of_a_backbone(name, value, message, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    model.backbone.save_pretrained(tmp_path / "backbone")
    rewrite(tmp_path / "model" / "config.json", {f"text_config.{name}": value})
    rewrite(tmp_path / "backbone" / "config.json", {name: value})
    for load in (UnifiedForCausalLM.from_pretrained, lambda path: AutoModelForCausalLM.from_pretrained(path)):
        with pytest.raises(ValueError, match=f"{message}|beyond"):
            load(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        UnifiedForCausalLM.from_backbone(str(tmp_path / "backbone"), 20, 3, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"codebook_size": TRILLION},
        {"codebook_size": 10 * MILLION},
        {"conditioning": {"kind": "class", "classes": TRILLION}},
        {"conditioning": {"kind": "class", "classes": 10 * MILLION}},
        {"conditioning": {"kind": "features", "length": BILLION, "features": BILLION}},
    ],
)
def test_tables_and_conditions_of_a_pipeline(changes, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    rewrite(tmp_path / "model" / "config.json", changes)
    with pytest.raises(ValueError, match=r"(codebook_size|classes|length): 1\d+ must |describes a model of .* weights"):
        UnifiedPipeline.from_pretrained(tmp_path)


VQ = {"codebook_size": 20, "code_dim": 4}
TOKENIZERS = {
    "vq": lambda: VQModel(VQConfig(**SMALL, **VQ)),
    "fsq": lambda: VQModel(VQConfig(**SMALL, quantizer="fsq", codebook_size=25, fsq_levels=[5, 5])),
    "lfq": lambda: VQModel(VQConfig(**SMALL, quantizer="lfq", codebook_size=16)),
    "vqgan": lambda: VQGAN(
        VQGANConfig(channels=32, multipliers=[1, 1], residual_blocks=1, attention_levels=[1], codebook_size=16)
    ),
    "emu3": lambda: Emu3VQVAE(
        Emu3VQVAEConfig(codebook_size=16, embed_dim=4, z_channels=4, base_channels=32, channel_multiplier=[1, 1],
                        num_res_blocks=1, attn_resolutions=[0], temporal_downsample_factor=4)
    ),
}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("vq", {"channels": 800_000}),
        ("vq", {"channels": BILLION}),
        ("vq", {"encoder_blocks": MILLION}),
        ("vq", {"decoder_blocks": TRILLION}),
        ("vq", {"codebook_size": TRILLION}),
        ("vq", {"code_dim": BILLION}),
        ("vq", {"downsample": MILLION}),
        ("fsq", {"fsq_levels": [MILLION, MILLION], "codebook_size": TRILLION}),
        ("fsq", {"fsq_levels": [8] * 30}),
        ("lfq", {"codebook_size": 2**40}),
        ("vqgan", {"channels": 3_200_000}),
        ("vqgan", {"residual_blocks": MILLION}),
        ("vqgan", {"multipliers": [1] * 100_000}),
        ("vqgan", {"multipliers": [1, BILLION]}),
        ("vqgan", {"codebook_size": TRILLION}),
        ("emu3", {"num_res_blocks": MILLION}),
        ("emu3", {"base_channels": 32 * MILLION}),
        ("emu3", {"codebook_size": TRILLION}),
    ],
)
def test_image_tokenizers(kind, changes, tmp_path):
    TOKENIZERS[kind]().save_pretrained(tmp_path)
    if kind == "emu3":
        rewrite(tmp_path / "config.json", {"model_type": "emu3_vqgan"})
    assert AutoImageTokenizer.from_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", changes)
    with pytest.raises(ValueError, match=r"^config: |^codebook_size: |^multipliers: "):
        AutoImageTokenizer.from_pretrained(tmp_path)


def test_numbers_of_levels_and_blocks_in_the_names_of_a_weights_file(tmp_path):
    TOKENIZERS["vqgan"]().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in ("encoder.conv_blocks.0.res.1000000000.conv1.bias", "encoder.conv_blocks.1000000000.res.0.conv1.bias"):
        save_file({**state, name: torch.zeros(1)}, tmp_path / "weights.safetensors")
        with pytest.raises(ValueError, match=r"weights: '.*' lacks some of the"):
            AutoImageTokenizer.from_pretrained(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", MILLION),
        ("num_hidden_layers", TRILLION),
        ("hidden_size", BILLION),
        ("vocab_size", TRILLION),
    ],
)
def test_ranges_of_a_new_model(name, value):
    architecture = {"model_type": "llama", name: value}
    with pytest.raises(ValueError, match=rf"text_config\.{name}: {value} is beyond"):
        UnifiedConfig(text_config=architecture)
    with pytest.raises(ValueError, match=rf"model\.architecture\.{name}: {value} is beyond"):
        ModelConfig(architecture=architecture, image_tokenizer="a", text_tokenizer="b").check()


@pytest.mark.parametrize("rank", [BILLION, 60_000])
def test_rank_of_an_adapter(rank, tmp_path):
    save_lora(attach_lora(tiny_model(), rank=4), tmp_path)
    rewrite(tmp_path / "adapter_config.json", {"r": rank})
    with pytest.raises(ValueError, match=r"lora: r 1000000000 is not possible|of another shape: .* instead of"):
        load_lora(tiny_model(), tmp_path, "x")
