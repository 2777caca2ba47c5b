"""Lean and general decoders of every family, code for code against a full forward pass without cache."""

import pytest
import torch
from conftest import generators, naive_codes, tiny_model

from unified.decoding import Sampling, generate_codes, make_decoder
from unified.decoding.cpu_kernels import LEVELS, Dense, Int8, Packed
from unified.decoding.decoder import BackboneDecoder
from unified.decoding.fused_llama import LeanDecoder
from unified.decoding.speculative import speculate_codes
from unified.lora.adapters import attach_lora
from unified.lora.base import base_of

FAMILIES = {
    "llama": {},
    "llama-gqa": {"num_key_value_heads": 2},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 6},
    "gemma": {"model_type": "gemma", "num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    "gemma3": {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 2},
    "smollm3": {"model_type": "smollm3", "num_key_value_heads": 2},
    "qwen2-window": {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6,
                     "max_window_layers": 1},
}  # fmt: skip
GENERAL = {"mistral-window", "gemma", "gemma2", "gemma3", "olmo2", "smollm3", "qwen2-window"}
PROMPTS, NEGATIVES = [[1, 5, 6, 7, 3], [1, 8, 3]], [[1, 3], [1, 9, 9, 9, 9, 9, 3]]


def randomize(model):
    """Norm weights and biases start at constants, which would hide a forgotten one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.process
@pytest.mark.parametrize("positions", ["1d", "2d"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_a_full_forward(family, positions):
    model = randomize(tiny_model(text=FAMILIES[family], positions=positions))
    decoder = make_decoder(model)
    assert isinstance(decoder, BackboneDecoder if family in GENERAL else LeanDecoder)
    sampling = Sampling(guidance_scale=2.0, top_k=9)
    codes = generate_codes(decoder, PROMPTS, NEGATIVES, (4, 2), sampling, generators(0, 1))
    for row in range(2):
        expected = naive_codes(model, PROMPTS[row], NEGATIVES[row], (4, 2), sampling, *generators(row))
        assert codes[row].flatten().tolist() == expected


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"train_image_tables": True}])
@torch.no_grad()
def test_adapters_count_attached_disabled_and_merged(options):
    sampling = Sampling()
    base = generate_codes(tiny_model(), PROMPTS, None, (2, 4), sampling, generators(0, 1))
    adapted = attach_lora(tiny_model(), rank=4, **options).eval()
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.normal_(0, 0.3)
    model = base_of(adapted)
    attached = generate_codes(model, PROMPTS, None, (2, 4), sampling, generators(0, 1))
    for row in range(2):
        expected = naive_codes(model, PROMPTS[row], PROMPTS[row], (2, 4), sampling, *generators(row))
        assert attached[row].flatten().tolist() == expected
    assert not torch.equal(attached, base)
    with adapted.disable_adapter():
        assert torch.equal(generate_codes(model, PROMPTS, None, (2, 4), sampling, generators(0, 1)), base)
    adapted.base_model.merge_adapter()
    assert torch.equal(generate_codes(model, PROMPTS, None, (2, 4), sampling, generators(0, 1)), attached)


def test_building_leaves_the_model_alone():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generate_codes(make_decoder(model, int8=True), PROMPTS, None, (2, 2), Sampling(), generators(0, 1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.process
def test_compiled_equals_eager(monkeypatch):
    """The step as the compiler traces it, in one graph and without a recompilation per column; code generation left out."""
    compiled, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, fullgraph=True, backend=backend, **options))
    model = tiny_model(text={"num_hidden_layers": 1})
    sampling = Sampling(guidance_scale=2.0)
    options = [PROMPTS, NEGATIVES, (4, 4), sampling]
    eager = generate_codes(make_decoder(model), *options, generators(0, 1))
    decoder = make_decoder(model, compile=True)
    assert torch.equal(generate_codes(decoder, *options, generators(0, 1)), eager)
    assert 1 <= len(graphs) <= 3
    one_by_one = len(graphs)
    for window in (3, 4):
        *_, codes = speculate_codes(decoder, *options, generators(0, 1), mode="jacobi", window=window)
        assert torch.equal(codes.reshape(2, 4, 4), eager)
    assert one_by_one < len(graphs) <= one_by_one + 5  # windows are compiled too, not once for each width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, torch.randn(40)])
def test_packed_weights_compute_what_dense_ones_do(dtype, bias):
    weight, bias = torch.randn(40, 64).to(dtype), None if bias is None else bias.to(dtype)
    if not Packed.takes(weight):
        pytest.skip("oneDNN has no quick products for this here")
    packed, dense = Packed(weight, bias), Dense(weight, bias)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    for shape in ((1,), (2,), (3,), (5,), (1, 1), (2, 3), ()):
        x = torch.randn(*shape, 64).to(dtype)
        torch.testing.assert_close(packed(x), dense(x), **tolerance)
    x, residual = torch.randn(33, 64).to(dtype), torch.randn(33, 40).to(dtype)
    kept = residual.clone()
    torch.testing.assert_close(packed.add_to(residual, x), dense.add_to(residual, x), **tolerance)
    assert torch.equal(residual, kept)
    tolerance = {"rtol": 0.0, "atol": 1e-5} if dtype == torch.float32 else tolerance
    for count in (1, 2, 3, 5, 16):  # whatever else is in the batch
        torch.testing.assert_close(packed(x[:count]), packed(x)[:count], **tolerance)


def test_int8_rounds_weights_per_output_and_inputs_per_row():
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 64) * torch.rand(40, 1), torch.randn(40)
    x = torch.randn(3, 64) * torch.tensor([[1.0], [100.0], [0.0]])
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight / scale).round() * scale
    exact, packed = Dense(rounded, bias), Int8(weight, bias)
    # What is left is the rounding of the inputs: half a step of their row's range on each of 64 products.
    step = x.abs().amax(dim=1, keepdim=True) / LEVELS
    bound = step / 2 * rounded.abs().sum(dim=1) + 1e-4
    assert ((packed(x) - exact(x)).abs() <= bound).all()
    assert (packed(x) - exact(x))[:2].abs().mean() < 0.02 * exact(x)[:2].abs().mean()
    for row in range(3):
        assert torch.equal(packed(x[row : row + 1])[0], packed(x)[row])  # whatever else is in the batch
    residual = torch.randn(3, 40)
    torch.testing.assert_close(packed.add_to(residual, x), residual + packed(x))
    torch.testing.assert_close(exact.add_to(residual, x), residual + exact(x))


def test_an_int8_image_does_not_depend_on_its_batch():
    decoder = make_decoder(tiny_model(), int8=True)
    options = {"grid": (4, 4), "sampling": Sampling(guidance_scale=2.0)}
    both = generate_codes(decoder, PROMPTS, NEGATIVES, generators=generators(0, 1), **options)
    for i in range(2):
        alone = generate_codes(decoder, PROMPTS[i : i + 1], NEGATIVES[i : i + 1], generators=generators(i), **options)
        assert torch.equal(alone[0], both[i])


@pytest.mark.parametrize("option", ["compile", "int8"])
def test_options_that_a_backbone_cannot_have_are_refused(option):
    model = tiny_model(text=FAMILIES["gemma"])
    with pytest.raises(ValueError, match=f"{option}: not for this backbone, GemmaModel is none of LlamaModel"):
        make_decoder(model, **{option: True})


def test_int8_needs_float32():
    with pytest.raises(ValueError, match=r"int8: needs float32 weights on the CPU, got torch.bfloat16"):
        make_decoder(tiny_model().bfloat16(), int8=True)


def test_attention_without_masks_is_refused():
    model = tiny_model(text=FAMILIES["gemma"])
    model.backbone.base_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation: decoding works with 'sdpa' and 'eager'"):
        make_decoder(model)
