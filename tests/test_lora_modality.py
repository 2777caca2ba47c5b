"""Adapters that act on positions of one modality only."""

import pytest
import torch
from conftest import (
    FAMILIES,
    SIZES,
    full_forward,
    generators,
    inputs_of,
    logits,
    naive_codes,
    noisy_adapter,
    tiny_model,
)

from unified.decoding import Prompt, Sampling, generate_codes, make_decoder
from unified.decoding.decoder import BackboneDecoder
from unified.decoding.fused_llama import LeanDecoder
from unified.decoding.prefill import prefill
from unified.decoding.speculative import speculate_codes
from unified.lora.adapters import attach_lora, load_lora, unload_lora
from unified.lora.base import base_of
from unified.lora.saving import save_lora
from unified.lora.switching import delete_adapters, fuse_lora, set_adapters
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified_tokenizers.images import to_tensor

pytestmark = pytest.mark.process

TEXT = torch.tensor([[1, 5, 6, 7, 8, 3]])


def partial_model(folder, modality, text=None, **options):
    text = text or {}
    noisy_adapter(tiny_model(text=text), folder, 0, modality=modality, **options)
    return load_lora(tiny_model(text=text), folder, "x").eval()


def rows(vocabulary):
    """Text, an image, text; and a longer text before the image, so that there is padding."""
    codes = torch.arange(16).reshape(4, 4)
    made = [
        build_sequence([TextSegment(words), ImageSegment(codes), TextSegment([7, 8])], vocabulary)
        for words in ([5, 6], [5, 6, 9, 9])
    ]
    return made


@torch.no_grad()
def test_image_adapter_leaves_text_alone(tmp_path):
    base, model = tiny_model(), partial_model(tmp_path, "image")
    assert torch.equal(base_of(model)(TEXT).logits, base(TEXT).logits)
    changed, original = logits(model), logits(base)
    start = 4  # <bos>, two words, <boi>; what comes before the image is text and sees no image
    assert torch.equal(changed[:, :start], original[:, :start])
    assert ((changed - original)[:, start : start + 16].abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_text_adapter_leaves_the_projections_of_codes_alone(tmp_path):
    """In the first layer the inputs are those of the base: queries of codes stay, queries of words change."""
    base, model = tiny_model(), base_of(partial_model(tmp_path, "text"))
    seen = []
    for each in (base, model):
        each.backbone.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, output: seen.append(output))
        logits(each)
    same = (seen[0] == seen[1]).all(-1)[0]
    assert same.tolist() == [False] * 4 + [True] * 16 + [False] * (len(same) - 20)
    assert not torch.equal(model(TEXT).logits, base(TEXT).logits)


@torch.no_grad()
def test_both_modalities_together_are_the_whole_adapter(tmp_path):
    """The same weights as a text and as an image adapter add up to the adapter that acts everywhere."""
    for modality in ("all", "text", "image"):
        noisy_adapter(tiny_model(), tmp_path / modality, 0, modality=modality)
    whole = logits(load_lora(tiny_model(), tmp_path / "all", "x").eval())
    model = load_lora(load_lora(tiny_model(), tmp_path / "text", "t"), tmp_path / "image", "i").eval()
    set_adapters(model, ["t", "i"], [1.0, 1.0])
    torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-4)
    set_adapters(model, ["i"], [1.0])
    assert torch.equal(base_of(model)(TEXT).logits, tiny_model()(TEXT).logits)


@torch.no_grad()
def test_reload_and_removal(tmp_path):
    model = partial_model(tmp_path / "a", "image", train_image_tables=True)
    wanted = logits(model)
    save_lora(model, tmp_path / "b")
    again = load_lora(tiny_model(), tmp_path / "b" / "x", "y").eval()
    assert torch.equal(logits(again), wanted) and not torch.equal(wanted, logits(tiny_model()))
    noisy_adapter(tiny_model(), tmp_path / "c", 1)
    again = load_lora(again, tmp_path / "c", "c")
    alone = logits(again)
    delete_adapters(again, ["y"])
    assert base_of(again).modality_gate is None and torch.equal(logits(again), alone)
    plain = unload_lora(model)
    assert plain.modality_gate is None and torch.equal(logits(plain), logits(tiny_model()))
    assert isinstance(make_decoder(plain), LeanDecoder)


@pytest.mark.parametrize("modality", ["text", "image"])
@torch.no_grad()
def test_decoding_equals_full_forward_passes(modality, tmp_path):
    model = base_of(partial_model(tmp_path, modality))
    assert isinstance(make_decoder(model), BackboneDecoder)
    with pytest.raises(ValueError, match="int8: not for this backbone, adapters that act on one modality are loaded"):
        make_decoder(model, int8=True)
    prompts, negatives, sampling = [[1, 5, 6, 7, 3], [1, 8, 3]], [[1, 3]] * 2, Sampling(guidance_scale=2.0)
    codes = generate_codes(model, prompts, negatives, (2, 4), sampling, generators(0, 1))
    for row in range(2):
        expected = naive_codes(model, prompts[row], negatives[row], (2, 4), sampling, *generators(row))
        assert codes[row].flatten().tolist() == expected
    *_, fast = speculate_codes(
        make_decoder(model), prompts, negatives, (2, 4), sampling, generators(0, 1), mode="jacobi"
    )
    assert torch.equal(fast.reshape(codes.shape), codes)
    assert not torch.equal(codes, generate_codes(tiny_model(), prompts, negatives, (2, 4), sampling, generators(0, 1)))


@torch.no_grad()
def test_images_in_a_prompt_are_image_positions(tmp_path):
    model = base_of(partial_model(tmp_path, "image"))
    ids = rows(model.config.vocabulary)[1].input_ids.tolist()
    state = prefill(make_decoder(model), [Prompt(tuple(ids), ((4, 4),))], 0)
    full = full_forward(model, ids, [(4, 4)])
    torch.testing.assert_close(model.image_head(state.hidden), full.image_logits[:, -1], rtol=1e-4, atol=1e-4)


def test_conversations_mix_both_modalities(pipeline, tmp_path):
    """The likeliest words after an image, by full forward passes."""
    noisy_adapter(pipeline.model, tmp_path, 0, modality="image")
    pipeline.load_lora_weights(tmp_path)
    photo = pipeline("red apple", generator=generators(0)).images[0]
    codes = pipeline.image_tokenizer.encode(to_tensor([photo]))[0]
    model, vocabulary = base_of(pipeline.model), base_of(pipeline.model).config.vocabulary
    ids = [
        vocabulary.bos_token_id,
        vocabulary.boi_token_id,
        *(codes.flatten() + vocabulary.text_vocab_size).tolist(),
        vocabulary.eoi_token_id,
    ]
    banned = [vocabulary.boi_token_id, vocabulary.eoi_token_id, vocabulary.bos_token_id, vocabulary.pad_token_id]
    written = []
    while len(written) < 4:
        with torch.no_grad():
            scores = full_forward(model, ids, [(4, 4)]).logits[0, -1]
        scores[banned] = float("-inf")
        if int(scores.argmax()) == vocabulary.eos_token_id:
            break
        written.append(int(scores.argmax()))
        ids.append(written[-1])
    assert written and pipeline.caption(photo, max_new_tokens=4, top_k=1)[0] == pipeline.text_tokenizer.decode(written)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_see_the_positions_of_their_own_batch(family):
    """Two batches forward, then backward, with and without gradient checkpointing; on every family."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(text={**SIZES, **FAMILIES[family]})
        if checkpointing:
            model.gradient_checkpointing_enable()
        adapted = attach_lora(model, rank=2, modality="image").train()
        torch.manual_seed(0)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, 0, 0.3)
        made = rows(model.config.vocabulary)
        losses = [adapted(**inputs_of(model.config, *made, p=p)).loss for p in (2, 1)]
        torch.stack(losses).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapted.parameters() if p.grad is not None]))
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_impossible_combinations_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"modality: 'images' is unknown; use one of \('all', 'text', 'image'\)"):
        attach_lora(tiny_model(), modality="images")
    with pytest.raises(ValueError, match="modality: 'image' is not possible with use_dora"):
        attach_lora(tiny_model(), modality="image", use_dora=True)
    with pytest.raises(
        ValueError, match=r"modality: 'text' works inside decoder layers .* not for \['backbone.lm_head'\]"
    ):
        attach_lora(tiny_model(), modality="text", target_modules=["lm_head", "q_proj"])
    model = partial_model(tmp_path, "image")
    with pytest.raises(ValueError, match="fuse_lora: adapter 'x' acts on image positions only"):
        fuse_lora(model)
    with pytest.raises(ValueError, match="modality: LlamaAttention does not get image_positions"):
        base_of(model).run_backbone(torch.zeros(1, 2, 32), None)
