"""The pipeline keeps its decoder between calls, notices when it is out of date, and may be told to make a faster one."""

import pytest
import torch
from conftest import generators
from peft.tuners.lora import LoraLayer
from test_lora import noisy_adapter

from unified.decoding import make_decoder
from unified.lora.adapters import attach_lora, base_of

PROMPTS = ["red apple", "a cat and a dog"]


def test_the_decoder_is_kept_until_weights_or_adapters_change(pipeline):
    def draw():
        return pipeline("red apple", output_type="codes", generator=generators(0)).codes

    def renewed(change) -> bool:
        """Whether a change renews the decoder; what is sampled is what a fresh one samples, before and after."""
        draw()
        before = pipeline._kept
        change()
        after = draw()
        kept, pipeline._kept = pipeline._kept, None
        assert torch.equal(draw(), after)
        return kept is not before

    weight = pipeline.model.backbone.model.layers[0].mlp.up_proj.weight
    assert not renewed(lambda: None)
    with torch.no_grad():
        assert renewed(lambda: weight.add_(0.5 * torch.randn_like(weight)))
    base = draw()
    pipeline.model = attach_lora(pipeline.model, rank=4, train_image_tables=True).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in pipeline.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    attached = draw()
    assert not torch.equal(attached, base) and not renewed(lambda: None)
    layers = [module for module in pipeline.model.modules() if isinstance(module, LoraLayer)]
    assert renewed(pipeline.model.base_model.merge_adapter)
    assert renewed(pipeline.model.base_model.unmerge_adapter)
    assert renewed(lambda: [layer.set_scale("default", 0.1) for layer in layers])
    assert renewed(pipeline.model.base_model.disable_adapter_layers) and torch.equal(draw(), base)
    pipeline.disable_fast_decoding()
    assert pipeline._kept is None


def test_fast_decoding_follows_adapters(pipeline, tmp_path):
    draw = lambda: pipeline(PROMPTS, generator=generators(1, 2), guidance_scale=2.0).codes  # noqa: E731
    base = draw()
    pipeline.model = noisy_adapter(pipeline.model, tmp_path, 1)
    pipeline.enable_fast_decoding()
    assert torch.equal(draw(), base)
    kept = pipeline._decoder()
    assert pipeline._decoder() is kept
    pipeline.load_lora_weights(tmp_path, "a")
    fast = draw()
    pipeline.disable_fast_decoding()
    assert torch.equal(draw(), fast) and not torch.equal(fast, base)
    with pytest.raises(ValueError, match="compile, int8: "):
        pipeline.enable_fast_decoding(compile=True, int8=True)
    assert torch.equal(draw(), fast)  # a refusal changes nothing
    pipeline.enable_fast_decoding(int8=True)
    rounded = make_decoder(base_of(pipeline.model), int8=True)
    state = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipeline._decoder().image_logits(state), rounded.image_logits(state))
    pipeline.disable_fast_decoding()
    assert not torch.equal(pipeline._decoder().image_logits(state), rounded.image_logits(state))
    pipeline.fuse_lora()
    assert torch.equal(draw(), fast)
    pipeline.enable_fast_decoding()
    assert torch.equal(draw(), fast)
    pipeline.unfuse_lora()
    pipeline.disable_lora()
    assert torch.equal(draw(), base)


def test_compiled_decoding_is_what_draws(pipeline, monkeypatch):
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
