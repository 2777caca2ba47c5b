"""Every decoder family through ``from_backbone``: its text stays what it was, and image spans can be trained."""

import pytest
import torch
from conftest import FAMILIES, SIZES, full_forward, inputs_of, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, JanusForConditionalGeneration

from unified import UnifiedConfig, UnifiedForCausalLM
from unified.data.batches import make_batch
from unified.decoding import Sampling, generate_codes
from unified.lora.adapters import attach_lora
from unified.model.backbone import decoder_layers
from unified.model.family import check_packing
from unified.prediction.arrange import arrange, collate, pack
from unified.prediction.merge import patches
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.training.config import load_config
from unified.training.setup import build_parts

QUICK = ("llama", "qwen2", "gemma3")  # untied and tied tables, sliding windows; the others take their time


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.process) for name in FAMILIES],
)
def backbone(request, tmp_path_factory):
    """The plain model of a family and the folder it is saved in."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SIZES, **FAMILIES[request.param]})).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, str(folder)


def unified(folder, **config):
    torch.manual_seed(1)
    return UnifiedForCausalLM.from_backbone(folder, 20, boi_token_id=3, eoi_token_id=4, **config).eval()


def sequence_with_an_image(vocabulary, seed=0):
    codes = torch.randint(0, 20, (4, 4), generator=torch.Generator().manual_seed(seed))
    return build_sequence([TextSegment([5, 6, 7]), ImageSegment(codes), TextSegment([8])], vocabulary)


@pytest.mark.parametrize("positions", ["1d", "2d"])
def test_text_is_untouched(backbone, positions):
    plain, folder = backbone
    model = unified(folder, positions=positions)
    ids = torch.randint(5, 50, (2, 15), generator=torch.Generator().manual_seed(2))  # longer than the windows
    assert torch.equal(model(ids).logits, plain(ids).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_custom_rotary_embeddings_and_logits(tmp_path, monkeypatch):
    """An interleaved rotary embedding goes with 1D positions only; text logits that are computed in another way are refused."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", **SIZES, logit_scale=0.25)).eval()
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="positions: '2d' needs a rotary embedding in two halves, and that of Cohere"):
        unified(tmp_path)
    ids = torch.randint(5, 50, (2, 9), generator=torch.Generator().manual_seed(2))
    assert torch.equal(unified(tmp_path, positions="1d")(ids).logits, plain(ids).logits)
    monkeypatch.setattr("unified.model.modeling.LOGIT_SCALES", ("none", "none", "none"))
    with pytest.raises(ValueError, match="backbone: CohereForCausalLM computes its text logits in a custom way"):
        unified(tmp_path, positions="1d")


@pytest.mark.parametrize("p", [1, 2])
def test_image_span_equals_the_backbone_fed_by_hand(backbone, p):
    """1D positions: look up, pool and concatenate by hand, and hand that to the plain model."""
    plain, folder = backbone
    model = unified(folder, positions="1d", coarse_positions="unit")
    sequence = sequence_with_an_image(model.config.vocabulary)
    codes = sequence.input_ids[sequence.input_ids >= 50].reshape(4, 4) - 50
    patches = model.image_embed(codes).unfold(0, p, p).unfold(1, p, p).mean(dim=(-1, -2)).reshape(1, -1, 32)
    lookup = plain.get_input_embeddings()
    head, tail = lookup(torch.tensor([[1, 5, 6, 7, 3]])), lookup(torch.tensor([[4, 8]]))
    hidden = plain.base_model(inputs_embeds=torch.cat([head, patches, tail], 1)).last_hidden_state
    expected = hidden[0, 4 : 4 + patches.shape[1]] @ model.image_head.weight.T
    inputs = inputs_of(model.config, sequence, p=p)
    got = model(**{name: inputs[name] for name in ("input_ids", "positions", "image_inputs")}).image_logits
    torch.testing.assert_close(got[0, 4 : 4 + patches.shape[1]], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.process
def test_image_embedding_starts_like_what_the_backbone_feeds_itself(backbone):
    plain, folder = backbone
    looked_up = plain.get_input_embeddings()(torch.arange(50))
    model = UnifiedForCausalLM.from_backbone(folder, 4000, boi_token_id=3, eoi_token_id=4)
    torch.testing.assert_close(model.image_embed.weight.std(0), looked_up.std(0), rtol=0.1, atol=0)


@pytest.mark.process
def test_gradient_checkpointing_changes_nothing(backbone):
    _, folder = backbone
    gradients = []
    for checkpointing in (False, True):
        model = unified(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs_of(model.config, sequence_with_an_image(model.config.vocabulary), p=2)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_two_dimensional_positions_reach_the_layers(backbone):
    """1D and 2D agree up to the first code and part where a grid row begins."""
    _, folder = backbone
    ids = sequence_with_an_image(tiny_config().vocabulary).input_ids
    one, two = (full_forward(unified(folder, positions=p), ids, [(4, 4)]) for p in ("1d", "2d"))
    start = 5  # <bos>, three words, <boi>; the first code of an image sits where a word would
    assert torch.equal(one.image_logits[:, : start + 1], two.image_logits[:, : start + 1])
    assert (one.image_logits[:, start + 4] - two.image_logits[:, start + 4]).abs().max() > 1e-3


@pytest.mark.process
@pytest.mark.parametrize("p", [1, 2])
def test_packed_rows_keep_documents_apart(backbone, p):
    """Three rows, two of them padded, of documents longer than the windows: loss and gradients are those of the documents
    one by one.
    """
    _, folder = backbone

    def image(seed):
        return ImageSegment(torch.randint(0, 20, (4, 4), generator=torch.Generator().manual_seed(seed)))

    model = unified(folder)
    vocabulary = model.config.vocabulary
    documents = [
        build_sequence(segments, vocabulary)
        for segments in (
            [TextSegment([5, 6, 7]), image(0), TextSegment([8, 9])],
            [TextSegment([10]), image(1)],
            [image(2), TextSegment([11, 12, 13, 14])],
            [TextSegment(range(15, 30))],
            [TextSegment([30, 31]), image(3)],
            [TextSegment([32, 33])],
        )
    ]
    rows = [arrange(each, vocabulary, model.config.coordinates, merge=patches(p)) for each in documents]
    packed = collate(pack(rows, 50), model.config).inputs
    assert (packed["document_ids"] >= 0).sum(dim=1).tolist() == {1: [50, 41, 16], 2: [48, 11]}[p]
    total, weights, sums = 0.0, 0.0, {"text_loss": 0.0, "image_loss": 0.0}
    for document in documents:
        part = make_batch([document], model.config, patches(p))
        output, weight = model(**part.inputs), part.counts.weight
        total, weights = total + output.loss * weight, weights + weight
        images = part.counts.image_targets
        sums["image_loss"] += output.image_loss * images if images else 0
        sums["text_loss"] += output.text_loss * (weight - images)
    (total / weights).backward()
    expected = {name: q.grad.clone() for name, q in model.named_parameters()}
    model.zero_grad()
    output = model(**packed)
    output.loss.backward()
    torch.testing.assert_close(output.loss, total / weights, rtol=1e-5, atol=1e-6)
    images = 4 * 16 // p**2
    torch.testing.assert_close(output.image_loss, sums["image_loss"] / images, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.text_loss, sums["text_loss"] / (weights - images), rtol=1e-5, atol=1e-6)
    for name, q in model.named_parameters():
        torch.testing.assert_close(q.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    del packed["document_ids"]
    mixed = model(**packed)
    assert max(abs(mixed.text_loss - output.text_loss), abs(mixed.image_loss - output.image_loss)) > 5e-3


@pytest.mark.process
def test_saved_and_loaded(backbone, tmp_path):
    """Tied tables stay tied, untied ones apart; every weight and the attention come back."""
    plain, folder = backbone
    model = unified(folder)
    model.save_pretrained(tmp_path)
    loaded = UnifiedForCausalLM.from_pretrained(tmp_path).eval()
    tied = plain.config.tie_word_embeddings
    for each in (model, loaded):
        assert (each.get_input_embeddings().weight is each.get_output_embeddings().weight) == tied
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    sequence = sequence_with_an_image(model.config.vocabulary)
    ours, theirs = (full_forward(m, sequence.input_ids, [(4, 4)]) for m in (model, loaded))
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.image_logits, theirs.image_logits)


@pytest.mark.process
@pytest.mark.parametrize("modality", ["all", "image"])
def test_gradient_checkpointing_reaches_adapters_on_a_frozen_base(backbone, modality):
    _, folder = backbone
    gradients = []
    for checkpointing in (False, True):
        model = unified(folder)
        if checkpointing:
            model.gradient_checkpointing_enable()
        adapted = attach_lora(model, rank=2, modality=modality).train()
        torch.manual_seed(0)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, 0, 0.1)
        adapted(**inputs_of(model.config, sequence_with_an_image(model.config.vocabulary), p=2)).loss.backward()
        assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)
        gradients.append(torch.cat([p.grad.flatten() for p in adapted.parameters() if p.requires_grad]))
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.process
def test_the_loaded_module_is_taken_over(backbone, monkeypatch):
    _, folder = backbone
    loaded = []
    monkeypatch.setattr(
        "unified.model.modeling.load_language_model",
        lambda *options: loaded.append(plain_copy(folder, *options[1:])) or loaded[0],
    )
    model = unified(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.backbone is loaded[0]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.backbone.config._attn_implementation == model.config._attn_implementation == "eager"
    ids = torch.randint(5, 50, (2, 15))
    assert torch.equal(model(ids).logits, plain_copy(folder, torch.bfloat16, "eager")(ids).logits)


def plain_copy(folder, dtype, attn_implementation):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn_implementation).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_language_part_of_a_model_that_reads_images(tied, tmp_path):
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    text = {**SIZES, **FAMILIES["gemma3"], "tie_word_embeddings": tied}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=tied,
        image_token_id=10, boi_token_id=11, eoi_token_id=12,
    )  # fmt: skip
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    model = unified(str(tmp_path))
    assert model.config.text_config.model_type == "gemma3_text" and model.config.tie_word_embeddings == tied
    ids = torch.randint(13, 50, (2, 15), generator=torch.Generator().manual_seed(2))
    assert torch.equal(model(ids).logits, whole(ids).logits)
    assert not any("vision" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "unified")
    assert torch.equal(UnifiedForCausalLM.from_pretrained(tmp_path / "unified").eval()(ids).logits, whole(ids).logits)


def test_parts_that_are_left_out_are_named(tmp_path):
    """Janus holds a generation head, embeddings of codes and an image tokenizer as well."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
              "projection_dim": 32, "num_image_tokens": 16, "mlp_ratio": 1.0}  # fmt: skip
    vq = {"embed_dim": 4, "num_embeddings": 20, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1],
          "num_patches": 4, "projection_dim": 32, "image_token_embed_dim": 32}  # fmt: skip
    config = AutoConfig.for_model(
        "janus", text_config={**SIZES, **FAMILIES["llama"]}, vision_config=vision, vq_config=vq
    )
    JanusForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"is a 'janus' model; only its language part is used, without") as warned:
        unified(str(tmp_path))
    parts = "aligner generation_aligner generation_embeddings generation_head vision_model vqmodel"
    message = str(warned[0].message)
    assert message.endswith(f"without {[f'model.{part}' for part in parts.split()]}.")


HYBRIDS = {
    "qwen3_next": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                   "num_hidden_layers": 4, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                     "linear_value_head_dim": 8, "num_hidden_layers": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_chunk_size": 4},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4, "attn_layer_indices": [1]},
}  # fmt: skip


@pytest.mark.parametrize("family", HYBRIDS)
def test_families_that_carry_another_state_along_are_refused(family, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **HYBRIDS[family]})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"backbone: \w+ForCausalLM cannot decode with a cache of keys and values alone"
    ):
        unified(str(tmp_path), positions="1d")


@pytest.mark.process
def test_an_attention_that_differs_with_a_cache_is_refused(backbone, monkeypatch):
    """The check compares numbers: a layer that forgets the first token once it decodes."""
    plain, folder = backbone
    layer = type(decoder_layers(plain)[0].self_attn)
    forward = layer.forward

    def forgetful(self, *args, **kwargs):
        cache = kwargs.get("cache")
        if cache is None or self.layer_idx or not getattr(cache, "kept", None):
            return forward(self, *args, **kwargs)
        cache.kept[0] = tuple(torch.zeros_like(states) for states in cache.kept[0])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", forgetful)
    with pytest.raises(
        ValueError, match=r"cannot decode with a cache of keys and values alone \(a relative error of [01]"
    ):
        unified(folder)


@pytest.mark.process
def test_packing_is_tried_before_it_is_used(backbone, tmp_path, monkeypatch):
    """Also gpt-oss, whose own mask does not follow position ids that start again; a mask that leaks is noticed."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_oss", **SIZES, num_local_experts=4, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = unified(str(tmp_path), positions="1d")
    codes = generate_codes(model, [[1, 5, 3]], None, (2, 2), Sampling(top_k=1), [torch.Generator()])
    with torch.no_grad():
        scores = full_forward(model, [1, 5, 3, *(codes.flatten() + 50).tolist()], [(2, 2)]).image_logits
    assert torch.equal(scores[0, 2:6].argmax(-1), codes.flatten())
    models = [model.backbone, unified(backbone[1]).backbone]
    for each in models:
        check_packing(each)
    leaking = lambda ids, causal: torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()  # noqa: E731
    monkeypatch.setattr("unified.model.masks.document_mask", leaking)
    for each in models:
        with pytest.raises(ValueError, match=r"data\.pack: \w+ForCausalLM does not keep packed documents apart"):
            check_packing(each)


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("{model_type: lfm2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,"
         " num_key_value_heads: 2, layer_types: [conv, full_attention]}", [],
         "backbone: Lfm2ForCausalLM cannot decode with a cache of keys and values alone"),
    ],
)  # fmt: skip
def test_a_run_from_scratch_refuses_them_before_it_starts(architecture, overrides, message, config_file):
    settings = ["output_dir=unused", f"model.architecture={architecture}", "model.options={positions: 1d}", *overrides]
    with pytest.raises(ValueError, match=message):
        build_parts(load_config(config_file, settings))


def test_composite_models_without_a_language_model_are_named(tmp_path):
    AutoConfig.for_model("qwen2_vl").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a 'qwen2_vl' model, .* language part \('qwen2_vl_text'\)"):
        unified(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"text_config: 'gemma3' holds more than a language model; give .* 'gemma3_text'"
    ):
        UnifiedConfig(text_config={"model_type": "gemma3"})
