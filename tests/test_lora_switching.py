"""Which adapters are active: weights, tables, disabling, deleting, fusing; the base comes back bit for bit."""

import pytest
import torch
from conftest import bits, logits, noisy_adapter, tiny_model
from huggingface_hub import ModelCard
from peft import PeftModel

from unified import UnifiedForCausalLM, UnifiedPipeline
from unified.lora.adapters import attach_lora, load_lora, unload_lora
from unified.lora.base import base_of
from unified.lora.saving import save_lora
from unified.lora.switching import adapter_state, fuse_lora, plain_state, set_adapters, unfuse_lora

KINDS = [{}, {"use_rslora": True}, {"use_dora": True}, {"train_image_tables": True}]


def with_adapters(tmp_path, *kinds):
    """The tiny model with one noisy adapter of each kind loaded: a, b, ..."""
    for seed, kind in enumerate(kinds):
        noisy_adapter(tiny_model(), tmp_path / "abc"[seed], seed, **kind)
    model = tiny_model()
    for name in "abc"[: len(kinds)]:
        model = load_lora(model, tmp_path / name, name)
    return model.eval()


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_reload_and_fuse(kind, tmp_path):
    base, before = logits(tiny_model()), bits(tiny_model())
    adapted = attach_lora(tiny_model(), rank=4, alpha=6, **kind).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += torch.randn_like(weight) * 0.3
    trained = logits(adapted)
    save_lora(adapted, tmp_path)
    model = load_lora(tiny_model(), tmp_path, "x").eval()
    assert torch.equal(logits(model), trained) and (trained - base).abs().max() > 0.1
    fuse_lora(model)
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)
    plain = tiny_model(seed=1)
    plain.load_state_dict(plain_state(model))
    assert torch.equal(logits(plain), logits(model))
    unfuse_lora(model)
    assert torch.equal(logits(model), trained)
    fuse_lora(model, 0.5)
    half = logits(model)
    unfuse_lora(model)
    set_adapters(model, ["x"], [0.5])
    torch.testing.assert_close(logits(model), half, rtol=1e-4, atol=1e-4)
    assert (half - trained).abs().max() > 0.1 and (half - base).abs().max() > 0.1
    set_adapters(model, ["x"], [0.0])
    assert torch.equal(logits(model), base)
    set_adapters(model, ["x"], [1.0])
    assert torch.equal(logits(model), trained)
    fuse_lora(model)
    after = bits(unload_lora(model))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_scaling_of_rslora_is_alpha_over_root_of_rank(tmp_path):
    for use_rslora, scale in ((False, 6 / 4), (True, 6 / 2)):
        adapted = attach_lora(tiny_model(), rank=4, alpha=6, use_rslora=use_rslora)
        layer = base_of(adapted).backbone.model.layers[1].mlp.up_proj
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        x = torch.randn(3, 32)
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + scale * update).T, rtol=1e-4, atol=1e-4)


@pytest.mark.process
def test_tables_of_several_adapters_are_summed_like_updates(tmp_path):
    """With low-rank updates at zero, two adapters with tables are the base with summed tables."""
    tables = {"train_image_tables": True}
    model = with_adapters(tmp_path, tables, tables, {})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    base = tiny_model()
    wanted = {}
    for table in ("image_embed", "image_head"):
        original = getattr(base, table).weight.detach().clone()
        copies = [getattr(base_of(model), table).modules_to_save[name].weight.detach() for name in "ab"]
        wanted[table] = original + 0.25 * (copies[0] - original) + 2.0 * (copies[1] - original)
    with torch.no_grad():
        for table, value in wanted.items():
            getattr(base, table).weight.copy_(value)
    set_adapters(model, ["a", "b", "c"], [0.25, 2.0, 1.0])
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-4, atol=1e-4)
    # One copy at weight 1 is taken as it is, whatever else is active; without any, the base's tables are.
    set_adapters(model, ["a", "b", "c"], [0.0, 1.0, 0.5])
    assert torch.equal(base_of(model).image_head.weight, copies[1])
    set_adapters(model, ["c"], [1.0])
    assert torch.equal(logits(model), logits(tiny_model()))


@pytest.mark.process
def test_fused_adapters_with_tables_are_saved_as_a_plain_pipeline(pipeline, tmp_path):
    for seed, name in enumerate("ab"):
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, seed, train_image_tables=True)
    for name in "ab":
        pipeline.load_lora_weights(tmp_path / name, name)
    pipeline.set_adapters(["a", "b"], [0.7, 0.4])
    pipeline.fuse_lora()
    fused = pipeline("red apple", generator=torch.Generator().manual_seed(0)).codes
    pipeline.save_pretrained(tmp_path / "p")
    saved = UnifiedPipeline.from_pretrained(tmp_path / "p")
    saved.set_progress_bar_config(disable=True)
    assert isinstance(saved.model, UnifiedForCausalLM)
    assert torch.equal(saved("red apple", generator=torch.Generator().manual_seed(0)).codes, fused)
    assert saved.model.state_dict().keys() == unload_lora(pipeline.model).state_dict().keys()


def test_fused_tied_model_stays_tied(tmp_path):
    tied = {"text": {"tie_word_embeddings": True}}
    noisy_adapter(tiny_model(**tied), tmp_path / "a", 0)
    model = load_lora(tiny_model(**tied), tmp_path / "a", "a").eval()
    fuse_lora(model)
    base_of(model).save_pretrained(tmp_path / "plain", state_dict=plain_state(model))
    loaded = UnifiedForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert torch.equal(logits(loaded), logits(model))


def test_a_broken_adapter_is_not_fused(tmp_path):
    model = with_adapters(tmp_path, {})
    before = bits(tiny_model())
    with torch.no_grad():
        base_of(model).backbone.model.layers[1].mlp.up_proj.lora_A["a"].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="adapter a seems to be broken"):
        fuse_lora(model)
    after = bits(unload_lora(model))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.process
def test_disabling_ends_with_the_next_load(pipeline, tmp_path):
    for seed, name in enumerate("ab"):
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, seed, train_image_tables=name == "a")
    base = logits(pipeline.model)
    pipeline.load_lora_weights(tmp_path / "b", "b")
    alone = logits(pipeline.model)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path / "a", "a")
    pipeline.disable_lora()
    assert torch.equal(logits(pipeline.model), base)
    with pytest.raises(ValueError, match="fuse_lora: adapters are disabled; call enable_lora first"):
        pipeline.fuse_lora()
    pipeline.load_lora_weights(tmp_path / "b", "b")
    assert torch.equal(logits(pipeline.model), alone)
    pipeline.disable_lora()
    pipeline.set_adapters("b")
    assert torch.equal(logits(pipeline.model), alone)
    pipeline.disable_lora()
    pipeline.enable_lora()
    assert torch.equal(logits(pipeline.model), alone)
    pipeline.set_adapters(["a", "b"], [0.5, 0.5])
    assert not any(weight.requires_grad for weight in pipeline.model.parameters())


def test_only_what_is_loaded_to_train_requires_gradients(tmp_path):
    noisy_adapter(tiny_model(), tmp_path, 0, train_image_tables=True)
    wants = lambda model: {n for n, w in model.named_parameters() if w.requires_grad}  # noqa: E731
    frozen, training = (load_lora(tiny_model(), tmp_path, "x", trainable) for trainable in (False, True))
    added = {n for n in dict(frozen.named_parameters()) if "lora_" in n or "modules_to_save" in n}
    assert not wants(frozen) and wants(training) == added


@pytest.mark.process
def test_deleting_leaves_the_others(pipeline, tmp_path):
    for seed, name in enumerate("abc"):
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, seed, train_image_tables=name != "b")
    base = logits(pipeline.model)
    for name in "abc":
        pipeline.load_lora_weights(tmp_path / name, name)
    pipeline.set_adapters(["a", "b"], [0.5, 0.8])
    wanted = logits(pipeline.model)
    assert pipeline.get_active_adapters() == ["a", "b"]
    pipeline.delete_adapters("c")
    assert torch.equal(logits(pipeline.model), wanted)
    pipeline.set_adapters("b", 0.8)
    alone = logits(pipeline.model)
    pipeline.set_adapters(["a", "b"], [0.5, 0.8])
    pipeline.delete_adapters(["a"])
    assert pipeline.get_active_adapters() == ["b"] and torch.equal(logits(pipeline.model), alone)
    pipeline.load_lora_weights(tmp_path / "c", "c")  # the name is free again
    pipeline.delete_adapters("c")
    assert pipeline.get_active_adapters() == [] and torch.equal(logits(pipeline.model), base)
    pipeline.delete_adapters("b")
    assert isinstance(pipeline.model, UnifiedForCausalLM)


def test_fused_adapters_are_left_alone(pipeline, tmp_path):
    pipeline.model = noisy_adapter(pipeline.model, tmp_path / "a", 0)
    with pytest.raises(ValueError, match="unfuse_lora: no adapter is loaded"):
        pipeline.unfuse_lora()
    pipeline.load_lora_weights(tmp_path / "a", "a")
    with pytest.raises(ValueError, match="unfuse_lora: nothing is fused"):
        pipeline.unfuse_lora()
    with pytest.raises(ValueError, match="lora_scale: nan must be a finite number"):
        pipeline.fuse_lora(lora_scale=float("nan"))
    pipeline.fuse_lora()
    fused = logits(pipeline.model)
    for change in (
        pipeline.fuse_lora,
        pipeline.disable_lora,
        pipeline.enable_lora,
        lambda: pipeline.set_adapters("a", 0.5),
        lambda: pipeline.load_lora_weights(tmp_path / "a", "b"),
    ):
        with pytest.raises(ValueError, match="adapters are fused; call unfuse_lora first"):
            change()
    assert torch.equal(logits(pipeline.model), fused) and isinstance(pipeline.model, PeftModel)


def test_dropout_acts_in_training_only(tmp_path):
    adapted = attach_lora(tiny_model(), rank=4, dropout=0.5)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    save_lora(adapted, tmp_path)
    adapted.train()
    assert not torch.equal(logits(adapted), logits(adapted))
    adapted.eval()
    reloaded = load_lora(tiny_model(), tmp_path, "x").eval()
    assert torch.equal(logits(adapted), logits(adapted)) and torch.equal(logits(reloaded), logits(adapted))


def test_loading_as_in_diffusers(pipeline, tmp_path, monkeypatch):
    """Names by number, a weight of None, a repository of the Hub; wrong weights are named."""
    folder = str(tmp_path / "one")
    pipeline.model = noisy_adapter(pipeline.model, folder, 1)
    downloaded = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: downloaded.append(name) or folder)
    pipeline.load_lora_weights("owner/adapter")
    pipeline.load_lora_weights(folder)
    assert downloaded == ["owner/adapter"] and set(pipeline.model.peft_config) == {"default", "default_1"}
    assert pipeline.get_active_adapters() == ["default_1"]
    pipeline.set_adapters(["default", "default_1"], [None, 0.5])
    assert adapter_state(pipeline.model).weights == {"default": 1.0, "default_1": 0.5}
    pipeline.set_adapters("default", None)
    assert adapter_state(pipeline.model).weights == {"default": 1.0}
    for weights in (["x"], "x", [float("inf")]):
        with pytest.raises(ValueError, match=r"weights: .* must be finite numbers"):
            pipeline.set_adapters("default", weights)
    with pytest.raises(TypeError):
        pipeline.fuse_lora(0.5)
    assert pipeline.device.type == "cpu" and pipeline.dtype == torch.float32


@pytest.mark.process
def test_the_card_of_a_fused_pipeline_keeps_all_terms(pipeline, tmp_path):
    folder = tmp_path / "one"
    pipeline.model = noisy_adapter(pipeline.model, folder, 1)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\nattribution: Ada\n---\n# Outlines\n")
    pipeline.save_pretrained(tmp_path / "base", card="---\nlicense: mit\nattribution: Bob\n---\n# Emoji\n")
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "base")
    pipe.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == (tmp_path / "base" / "README.md").read_text()
    pipe.load_lora_weights(folder, "outline")
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    card = ModelCard.load(tmp_path / "fused" / "README.md")
    assert card.data.license == ["mit", "cc-by-4.0"] and card.data.to_dict()["attribution"] == ["Bob", "Ada"]
    assert "# Emoji" in card.text and "# Outlines" in card.text and "The adapter 'outline'" in card.text
    (folder / "README.md").unlink()
    pipe.unload_lora_weights()
    pipe.load_lora_weights(folder)
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "silent")
    assert ModelCard.load(tmp_path / "silent" / "README.md").data.license == "unknown"


@pytest.mark.process
@pytest.mark.parametrize("theirs", ["---\nlicense: unknown\n---\n# Outlines\n", None])
def test_a_part_of_unknown_terms_makes_the_sum_unknown(pipeline, tmp_path, theirs):
    """Of a card that says so, and of an adapter that came without a card, past load_lora_weights."""
    pipeline.model = noisy_adapter(pipeline.model, tmp_path / "one", 1)
    pipeline._card = "---\nlicense: mit\n---\n# Emoji\n"
    if theirs is None:
        pipeline.model = load_lora(pipeline.model, tmp_path / "one", "x").eval()
    else:
        (tmp_path / "one" / "README.md").write_text(theirs)
        pipeline.load_lora_weights(tmp_path / "one", "x")
    pipeline.fuse_lora()
    pipeline.save_pretrained(tmp_path / "fused")
    card = ModelCard.load(tmp_path / "fused" / "README.md")
    assert card.data.license == "unknown" and "# Emoji" in card.text and "The adapter 'x'" in card.text
