"""Adapters: what they train, how they reload, that the base stays what it was."""

import pytest
import torch
from conftest import generators, tiny_model

from unified.lora import attach_lora, check_layout, load_lora, save_lora, unload_lora
from unified.sequence import ImageSegment, TextSegment, build_sequence, collate

PROMPTS = ["red apple", "blue car"]


def draw(pipe):
    return pipe(PROMPTS, generator=generators(1, 2), guidance_scale=2.0).codes


def noisy_adapter(model, folder, seed, **options):
    """Save an adapter with random weights; the model is left as it was."""
    adapted = attach_lora(model, rank=4, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.3)
    save_lora(adapted, folder)
    return unload_lora(adapted)


def test_pipeline_load_switch_weight_unload(pipeline, tmp_path):
    base = draw(pipeline)
    for name, seed in (("a", 1), ("b", 2)):
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, seed)
    assert torch.equal(draw(pipeline), base)
    results = {}
    for name in ("a", "b"):
        pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
        results[name] = draw(pipeline)
    assert not torch.equal(results["a"], base) and not torch.equal(results["a"], results["b"])
    pipeline.set_adapters("a")
    assert torch.equal(draw(pipeline), results["a"])
    pipeline.set_adapters(["a", "b"], [0.0, 1.0])
    assert torch.equal(draw(pipeline), results["b"])
    pipeline.set_adapters(["a", "b"], [0.0, 0.0])
    assert torch.equal(draw(pipeline), base)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), base)


def test_unloading_restores_every_weight_bitwise(pipeline, tmp_path):
    before = {name: value.clone() for name, value in pipeline.model.state_dict().items()}
    pipeline.model = noisy_adapter(pipeline.model, tmp_path, 1, train_image_tables=True)
    pipeline.load_lora_weights(tmp_path)
    pipeline.unload_lora_weights()
    after = pipeline.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("train_image_tables", [False, True])
def test_reloaded_adapter_is_identical(tmp_path, train_image_tables):
    model = tiny_model()
    layout = model.config.layout
    batch = collate([build_sequence([TextSegment([5]), ImageSegment(torch.arange(16).reshape(4, 4))], layout)], layout)
    adapted = attach_lora(model, rank=4, train_image_tables=train_image_tables)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("image_head" in name for name in trained) == train_image_tables
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    before = adapted(**batch).loss.item()
    for _ in range(5):
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    after = adapted(**batch).loss
    assert after.item() < before - 0.1
    save_lora(adapted, tmp_path)
    reloaded = load_lora(tiny_model(), tmp_path, "x").eval()
    assert torch.equal(reloaded(**batch).loss, after)


def test_adapter_of_another_model_is_refused(tmp_path):
    noisy_adapter(tiny_model(), tmp_path, 0)
    with pytest.raises(ValueError, match=r"codebook_size: adapter 20, model 30"):
        check_layout(tiny_model(codebook_size=30), tmp_path)
    with pytest.raises(ValueError, match=r"image_tokenizer_fingerprint: adapter None, model 'abc'"):
        check_layout(tiny_model(image_tokenizer_fingerprint="abc"), tmp_path)


def test_bad_names_are_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="no adapter is loaded"):
        pipeline.set_adapters("a")
    with pytest.raises(ValueError, match=r"holds no unified_layout.json"):
        pipeline.load_lora_weights(tmp_path / "nothing")
    pipeline.model = noisy_adapter(pipeline.model, tmp_path, 0)
    pipeline.load_lora_weights(tmp_path, "a")
    with pytest.raises(ValueError, match="adapter_name: 'a' is loaded already"):
        pipeline.load_lora_weights(tmp_path, "a")
    with pytest.raises(ValueError, match=r"\['b'\] are not loaded; loaded are \['a'\]"):
        pipeline.set_adapters("b")
    with pytest.raises(ValueError, match="weights: 2 weights for 1 adapters"):
        pipeline.set_adapters(["a"], [1.0, 2.0])
    with pytest.raises(ValueError, match="call unload_lora_weights"):
        pipeline.save_pretrained(tmp_path / "p")
