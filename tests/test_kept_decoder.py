"""The pipeline keeps its decoder between calls and notices when it is out of date."""

import torch
from conftest import generators
from peft.tuners.lora import LoraLayer

from unified.lora import attach_lora


def test_the_decoder_is_kept_until_weights_or_adapters_change(pipeline):
    def draw():
        return pipeline("red apple", output_type="codes", generator=generators(0)).codes

    def renewed(change) -> bool:
        """Whether a change renews the decoder; what is drawn is what a fresh one draws, before and after."""
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
