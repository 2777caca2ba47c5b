"""The pipeline keeps its decoder between calls, notices every change of the model, and may be told to make a faster one."""

import pytest
import torch
from conftest import generators, noisy_adapter
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from unified.decoding import make_decoder
from unified.lora.adapters import attach_lora
from unified.lora.base import base_of

pytestmark = pytest.mark.process

PROMPTS = ["red apple", "a cat and a dog"]


class Renewals:
    """Tells whether a change renews the kept decoder; what it samples has to be what a fresh one samples."""

    def __init__(self, pipe):
        self.pipe = pipe

    def sample(self):
        return self.pipe("red apple", output_type="codes", generator=generators(0)).codes

    def __call__(self, change):
        self.sample()
        before = self.pipe.decoder()
        change()
        after, kept = self.sample(), self.pipe.decoder()
        self.pipe.disable_fast_decoding()
        assert torch.equal(self.sample(), after)
        return kept is not before


@pytest.fixture
def renewed(pipeline):
    return Renewals(pipeline)


@torch.no_grad()
def test_weights_that_change_renew_the_decoder(pipeline, renewed):
    """In place, through .data, by casting and back: the last one may end at the same addresses."""
    weight = pipeline.model.backbone.model.layers[0].mlp.up_proj.weight
    assert not renewed(lambda: None)
    assert renewed(lambda: weight.add_(0.5 * torch.randn_like(weight)))
    assert renewed(lambda: weight.data.add_(0.5 * torch.randn_like(weight)))
    assert renewed(lambda: weight.data.mul_(-1))
    norm = pipeline.model.backbone.model.norm.weight
    assert renewed(lambda: norm.data[:1].mul_(3.0))  # a single value
    for cast in (pipeline.model, pipeline):
        assert renewed(lambda cast=cast: cast.to(torch.bfloat16))
        assert renewed(lambda cast=cast: cast.to(torch.float32))
    assert renewed(lambda: pipeline.model.to(torch.bfloat16).to(torch.float32))


def test_adapters_that_change_renew_the_decoder(pipeline, renewed):
    base = renewed.sample()
    pipeline.model = attach_lora(pipeline.model, rank=4, train_image_tables=True).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in pipeline.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    attached = renewed.sample()
    assert not torch.equal(attached, base) and not renewed(lambda: None)
    layers = [module for module in pipeline.model.modules() if isinstance(module, LoraLayer)]
    assert renewed(pipeline.model.base_model.merge_adapter)
    assert renewed(pipeline.model.base_model.unmerge_adapter)
    assert renewed(lambda: [layer.set_scale("default", 0.1) for layer in layers])
    assert renewed(pipeline.model.base_model.disable_adapter_layers) and torch.equal(renewed.sample(), base)


@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swapped_adapters_renew_the_decoder(pipeline, renewed, tmp_path, prepared):
    """peft writes them through .data, also a scale that it has made a tensor."""
    expected = {}
    for name, options in {"a": {}, "b": {}, "scaled": {"alpha": 12}}.items():
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, len(expected), **options)
        pipeline.load_lora_weights(tmp_path / name)
        expected[name] = renewed.sample()
        pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path / "a")
    if prepared:
        prepare_model_for_compiled_hotswap(pipeline.model, target_rank=4)
    for name in ("b", "scaled", "a"):
        assert renewed(lambda name=name: hotswap_adapter(pipeline.model, str(tmp_path / name), "default"))
        assert torch.equal(renewed.sample(), expected[name])
    assert len({tuple(codes.flatten().tolist()) for codes in expected.values()}) == 3


def test_methods_for_adapters_renew_the_decoder(pipeline, renewed, tmp_path):
    """And an adapter that takes the name and perhaps the memory of one that was deleted."""
    for name, seed in (("a", 1), ("b", 2)):
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, seed)
    assert renewed(lambda: pipeline.load_lora_weights(tmp_path / "a", "x"))
    assert renewed(lambda: pipeline.set_adapters("x", 0.5))
    assert renewed(pipeline.disable_lora) and renewed(pipeline.enable_lora)
    assert renewed(pipeline.fuse_lora) and renewed(pipeline.unfuse_lora)

    def replace():
        pipeline.delete_adapters("x")
        pipeline.load_lora_weights(tmp_path / "b", "x")

    assert renewed(replace)
    assert renewed(lambda: pipeline.load_lora_weights(tmp_path / "a", "y"))
    assert renewed(lambda: pipeline.delete_adapters("y"))
    assert renewed(pipeline.unload_lora_weights)


def test_fast_decoding_follows_adapters(pipeline, tmp_path):
    sample = lambda: pipeline(PROMPTS, generator=generators(1, 2), guidance_scale=2.0).codes  # noqa: E731
    base = sample()
    pipeline.model = noisy_adapter(pipeline.model, tmp_path, 1)
    pipeline.enable_fast_decoding()
    assert torch.equal(sample(), base)
    kept = pipeline.decoder()
    assert pipeline.decoder() is kept
    pipeline.load_lora_weights(tmp_path, "a")
    fast = sample()
    pipeline.disable_fast_decoding()
    assert torch.equal(sample(), fast) and not torch.equal(fast, base)
    with pytest.raises(ValueError, match="compile, int8: "):
        pipeline.enable_fast_decoding(compile=True, int8=True)
    assert torch.equal(sample(), fast)  # a refusal changes nothing
    pipeline.enable_fast_decoding(int8=True)
    rounded = make_decoder(base_of(pipeline.model), int8=True)
    state = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipeline.decoder().image_logits(state), rounded.image_logits(state))
    pipeline.set_adapters("a", 0.5)
    assert torch.equal(pipeline.decoder().image_logits(state), rounded.image_logits(state))  # 8 bits still
    pipeline.set_adapters("a")
    pipeline.disable_fast_decoding()
    assert not torch.equal(pipeline.decoder().image_logits(state), rounded.image_logits(state))
    pipeline.fuse_lora()
    assert torch.equal(sample(), fast)
    pipeline.enable_fast_decoding()
    assert torch.equal(sample(), fast)
    pipeline.unfuse_lora()
    pipeline.disable_lora()
    assert torch.equal(sample(), base)


def test_moving_frees_the_decoder_at_once(pipeline, monkeypatch):
    """Its copies of the weights must not stay on the old device until the next call."""
    pipeline.decoder()
    held = []
    monkeypatch.setattr(pipeline.model, "to", lambda *given: held.append(pipeline._decoders._decoder))
    pipeline.to("cpu")
    assert held == [None]


def test_compiled_decoding_is_what_samples(pipeline, monkeypatch):
    """The decoder's step goes through the compiler, and samples the same; code generation is left out."""
    compiled, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain = pipeline("red apple", generator=generators(0)).codes
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, backend=backend, **options))
    pipeline.enable_fast_decoding(compile=True)
    assert torch.equal(pipeline("red apple", generator=generators(0)).codes, plain) and graphs
    pipeline.disable_fast_decoding()
    graphs.clear()
    assert torch.equal(pipeline("red apple", generator=generators(0)).codes, plain) and not graphs
