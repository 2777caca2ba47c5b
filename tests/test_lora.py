"""Adapters: what they train, how they reload, that the base stays what it was."""

import json

import pytest
import torch
from conftest import CAPTIONS, generators, inputs_of, noisy_adapter, tiny_model

from unified import UnifiedPipeline
from unified.lora.adapters import attach_lora, load_lora
from unified.lora.base import BASE_FILE, base_of, check_base
from unified.lora.saving import save_lora
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified_tokenizers import train_sentencepiece

PROMPTS = ["red apple", "blue car"]


def sample(pipe):
    return pipe(PROMPTS, generator=generators(1, 2), guidance_scale=2.0).codes


def test_pipeline_load_switch_weight_unload(pipeline, tmp_path):
    base = sample(pipeline)
    for name, seed in (("a", 1), ("b", 2)):
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, seed)
    assert torch.equal(sample(pipeline), base)
    results = {}
    for name in ("a", "b"):
        pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
        results[name] = sample(pipeline)
    assert not torch.equal(results["a"], base) and not torch.equal(results["a"], results["b"])
    pipeline.set_adapters("a")
    assert torch.equal(sample(pipeline), results["a"])
    pipeline.set_adapters(["a", "b"], [0.0, 1.0])
    assert torch.equal(sample(pipeline), results["b"])
    pipeline.set_adapters(["a", "b"], [0.0, 0.0])
    assert torch.equal(sample(pipeline), base)
    pipeline.unload_lora_weights()
    assert torch.equal(sample(pipeline), base)


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
    vocabulary = model.config.vocabulary
    batch = inputs_of(
        model.config, build_sequence([TextSegment([5]), ImageSegment(torch.arange(16).reshape(4, 4))], vocabulary)
    )
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
        check_base(tiny_model(codebook_size=30), tmp_path)
    with pytest.raises(ValueError, match=r"image_tokenizer_fingerprint: adapter None, model 'abc'"):
        check_base(tiny_model(image_tokenizer_fingerprint="abc"), tmp_path)


@pytest.mark.process
@pytest.mark.parametrize(
    ("field", "other", "message"),
    [
        ("positions", {"positions": "1d"}, "positions: adapter '2d', model '1d'"),
        ("coarse_positions", {"coarse_positions": "unit"}, "coarse_positions: adapter 'center', model 'unit'"),
        ("boi_token_id", {"boi_token_id": 5}, "boi_token_id: adapter 3, model 5"),
        ("eoi_token_id", {"eoi_token_id": 5}, "eoi_token_id: adapter 4, model 5"),
        ("intermediate_size", {"text": {"intermediate_size": 96}}, "intermediate_size: adapter 64, model 96"),
        ("num_attention_heads", {"text": {"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 4}},
         "num_attention_heads: adapter 4, model 8"),
        ("text_tokenizer_fingerprint", {"text_tokenizer_fingerprint": "b"},
         "text_tokenizer_fingerprint: adapter 'a', model 'b'"),
    ],
)  # fmt: skip
def test_every_field_that_differs_is_named(field, other, message, tmp_path):
    noisy_adapter(tiny_model(text_tokenizer_fingerprint="a"), tmp_path, 0)
    changed = tiny_model(**{"text_tokenizer_fingerprint": "a", **other})
    with pytest.raises(ValueError, match=rf"made for another model \({message}\); load"):
        check_base(changed, tmp_path)
    description = json.loads((tmp_path / "unified_base.json").read_text())
    del description[field]  # as in folders from before the field was recorded
    (tmp_path / "unified_base.json").write_text(json.dumps(description))
    check_base(changed, tmp_path)


def test_text_tokenizer_of_equal_size_is_refused(pipeline, tmp_path):
    captions = [caption.upper() for caption in CAPTIONS]
    size = pipeline.text_tokenizer.vocab_size
    other = train_sentencepiece(captions, tmp_path / "text", vocab_size=size)
    assert pipeline.model.config.text_tokenizer_fingerprint == pipeline.text_tokenizer.fingerprint
    with pytest.raises(ValueError, match=f"text_tokenizer: fingerprint {other.fingerprint} is not the one"):
        UnifiedPipeline(pipeline.model, pipeline.image_tokenizer, other)
    noisy_adapter(pipeline.model, tmp_path / "a", 0)
    pipeline.model.config.text_tokenizer_fingerprint = other.fingerprint
    with pytest.raises(ValueError, match="text_tokenizer_fingerprint: adapter"):
        pipeline.load_lora_weights(tmp_path / "a")


def test_adapter_says_its_base(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "p")
    loaded = UnifiedPipeline.from_pretrained(tmp_path / "p")
    noisy_adapter(loaded.model, tmp_path / "a", 0)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "p")


def test_adapter_says_the_patches_that_it_was_trained_on(tmp_path):
    noisy_adapter(tiny_model(patch_sizes=[1, 2]), tmp_path / "a", 0)
    for known, after in (([1, 4], [1, 2, 4]), (None, None)):
        model = load_lora(tiny_model(patch_sizes=known), tmp_path / "a", "a")
        assert base_of(model).config.patch_sizes == after
    description = json.loads((tmp_path / "a" / BASE_FILE).read_text())
    (tmp_path / "a" / BASE_FILE).write_text(json.dumps(description | {"patch_sizes": ["2"]}))
    with pytest.raises(ValueError, match=r"lora: patch_sizes \['2'\] .* are no list of whole numbers"):
        load_lora(tiny_model(), tmp_path / "a", "a")


def test_adapters_of_other_names_reload_from_their_folders(tmp_path):
    noisy_adapter(tiny_model(), tmp_path / "a", 0)
    model = load_lora(tiny_model(), tmp_path / "a", "style", trainable=True)
    save_lora(model, tmp_path / "b")
    with pytest.raises(ValueError, match=r"holds no adapter_config.json"):
        load_lora(tiny_model(), tmp_path / "b", "x")
    again = load_lora(tiny_model(), tmp_path / "b" / "style", "x")
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(base_of(again)(ids).logits, base_of(model)(ids).logits)


@pytest.mark.parametrize(("new", "asked", "trained"), [(True, None, True), (False, None, False), (True, False, False)])
def test_new_tables_are_trained_by_default(new, asked, trained):
    adapted = attach_lora(tiny_model(new_image_tables=new), rank=4, train_image_tables=asked)
    assert any("image_head" in name for name, weight in adapted.named_parameters() if weight.requires_grad) == trained


def test_bad_names_are_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="no adapter is loaded"):
        pipeline.set_adapters("a")
    with pytest.raises(ValueError, match=r"lora: '.*nothing' does not exist"):
        pipeline.load_lora_weights(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no adapter_config.json"):
        pipeline.load_lora_weights(tmp_path)
    pipeline.model = noisy_adapter(pipeline.model, tmp_path, 0)
    pipeline.load_lora_weights(tmp_path, "a")
    with pytest.raises(ValueError, match="adapter_name: 'a' is loaded already"):
        pipeline.load_lora_weights(tmp_path, "a")
    with pytest.raises(ValueError, match=r"\['b'\] are not loaded; loaded are \['a'\]"):
        pipeline.set_adapters("b")
    with pytest.raises(ValueError, match="weights: 2 weights for 1 adapters"):
        pipeline.set_adapters(["a"], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"adapter_names: \['a', 'a'\] names an adapter twice"):
        pipeline.set_adapters(["a", "a"], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"weights: \[inf\] must be finite"):
        pipeline.set_adapters(["a"], [float("inf")])
    with pytest.raises(ValueError, match="call unload_lora_weights"):
        pipeline.save_pretrained(tmp_path / "p")
