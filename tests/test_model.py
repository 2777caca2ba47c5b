"""The unified model against plain transformers and against ungrouped references."""

import pytest
import torch
import torch.nn.functional as F
from conftest import inputs_of, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from unified import UnifiedForCausalLM, group_embeddings
from unified.data.batches import make_batch
from unified.sequence import ImageSegment, TextSegment, build_sequence


def image(height=4, width=4, seed=0):
    return ImageSegment(torch.randint(0, 20, (height, width), generator=torch.Generator().manual_seed(seed)))


def mixed_sequences(vocabulary):
    return [
        build_sequence([TextSegment([5, 6, 7]), image(4, 4), TextSegment([8, 9])], vocabulary),
        build_sequence([TextSegment([5]), image(2, 4, 1), TextSegment([6]), image(4, 4, 2)], vocabulary),
        build_sequence([TextSegment([10, 11, 12])], vocabulary),
    ]


@pytest.fixture
def plain_llama():
    """A transformers Llama and a unified model around the same weights."""
    model = tiny_model(text={"tie_word_embeddings": False})
    llama = LlamaForCausalLM(LlamaConfig(**model.config.text_config.to_dict())).eval()
    state = {k.replace("rotary_emb.rotary.", "rotary_emb."): v for k, v in model.backbone.state_dict().items()}
    llama.load_state_dict(state)
    return llama, model


def test_text_parity_with_llama(plain_llama):
    llama, model = plain_llama
    ids = torch.randint(5, 50, (3, 11), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids).logits, llama(ids).logits)
    torch.testing.assert_close(model(ids, labels=ids).loss, llama(ids, labels=ids).loss, rtol=0, atol=1e-6)


def test_generate_equals_llama(plain_llama):
    llama, model = plain_llama
    ids = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), llama.generate(ids, **options))


def test_p1_equals_a_plain_path_bitwise():
    """At p = 1 the model is: look up both tables, run the backbone, score every position. No grouping anywhere.

    Logits are equal to the bit; the image loss to rounding, because torch's kernels differ in the last bit of an exponential.
    """
    model = tiny_model(positions="1d")
    sequence = build_sequence([TextSegment([5, 6]), image(), TextSegment([7])], model.config.vocabulary)
    batch = inputs_of(model.config, sequence)
    ids, labels = batch["input_ids"], batch["labels"]
    is_image = ids >= 50
    embeds = model.get_input_embeddings()(ids.clamp_max(49))
    embeds[is_image] = model.image_embed(ids[is_image] - 50)
    hidden = model.backbone.base_model(
        inputs_embeds=embeds[:, :-1].contiguous()
    ).last_hidden_state  # the last predicts nothing
    target = labels[:, 1:]
    of_image, of_text = (target >= 50), (target >= 0) & (target < 50)
    image_loss = F.cross_entropy(model.image_head(hidden[of_image]), target[of_image] - 50, reduction="none")
    text_loss = F.cross_entropy(model.backbone.lm_head(hidden[of_text]), target[of_text], reduction="none")
    output = model(**batch)
    whole = model(**{name: value for name, value in batch.items() if name != "labels"})
    assert torch.equal(whole.image_logits[:, :-1][of_image], model.image_head(hidden[of_image]))
    assert torch.equal(output.text_loss, text_loss.mean())
    mean = (text_loss.sum() + image_loss.sum()) / (len(text_loss) + len(image_loss))
    torch.testing.assert_close(output.image_loss, image_loss.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(output.loss, mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("positions", ["1d", "2d"])
@pytest.mark.parametrize("p", [2, 4])
def test_grouped_loss_equals_slot_by_slot_reference(p, positions):
    """Text, <boi>, patches, <eoi>, text: each position's loss from an explicitly built sequence of embeddings."""
    model = tiny_model(positions=positions)
    picture = image()
    sequence = build_sequence([TextSegment([5, 6]), picture, TextSegment([7, 8])], model.config.vocabulary)
    flat = picture.codes.reshape(1, -1)
    patches = group_embeddings(model.image_embed(flat), (4, 4), p)
    text = model.get_input_embeddings()
    embeds = torch.cat([text(torch.tensor([[1, 5, 6, 3]])), patches, text(torch.tensor([[4, 7, 8]]))], dim=1)
    n = patches.shape[1]
    side = 4 // p
    if positions == "2d":
        corner = [(r * p + (p - 1) / 2, c * p + (p - 1) / 2) for r in range(side) for c in range(side)]
        span, after = [(4 + r, 4 + c) for r, c in corner], 4 + 4
    else:
        corner = [((r * p + (p - 1) / 2) * 4 + c * p + (p - 1) / 2) for r in range(side) for c in range(side)]
        span, after = [(4 + i, 4 + i) for i in corner], 4 + 16
    places = [(i, i) for i in range(4)] + span + [(after + i, after + i) for i in range(3)]
    hidden = model.run_backbone(embeds, torch.tensor(places).float()[None]).last_hidden_state[0]
    # Position 3 is <boi>; it predicts patch 0. The last patch predicts <eoi>.
    per_patch = []
    for j in range(n):
        r, c = divmod(j, side)
        members = picture.codes[r * p : r * p + p, c * p : c * p + p].reshape(-1)
        log_probability = model.image_head(hidden[3 + j]).log_softmax(-1)
        per_patch.append(-log_probability[members].mean())
    targets = [(0, 5), (1, 6), (2, 3), (3 + n, 4), (4 + n, 7), (5 + n, 8)]
    per_text = [-model.text_logits(hidden[position]).log_softmax(-1)[token] for position, token in targets]
    output = model(**inputs_of(model.config, sequence, p=p))
    torch.testing.assert_close(output.image_loss, torch.stack(per_patch).mean(), rtol=0, atol=1e-5)
    torch.testing.assert_close(output.text_loss, torch.stack(per_text).mean(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("arrange", ["pad", "pack"])
def test_batching_does_not_change_losses(p, arrange):
    """Padded or packed, every sequence is scored as if it were alone."""
    model = tiny_model()
    vocabulary = model.config.vocabulary
    sequences = mixed_sequences(vocabulary)
    alone = [model(**inputs_of(model.config, s, p=p)) for s in sequences]
    together = model(**inputs_of(model.config, *sequences, p=p, pack=1000 if arrange == "pack" else None))
    spans = [[16 // p**2], [8 // p**2, 16 // p**2], []]
    image_total = sum(o.image_loss * sum(n) for o, n in zip(alone, spans, strict=True) if n)
    torch.testing.assert_close(together.image_loss, image_total / sum(map(sum, spans)), rtol=0, atol=2e-6)
    text_counts = [7, 6, 3]
    text_total = sum(o.text_loss * n for o, n in zip(alone, text_counts, strict=True))
    torch.testing.assert_close(together.text_loss, text_total / sum(text_counts), rtol=0, atol=2e-6)


def test_nothing_predicts_the_first_token_of_a_document():
    """Even if it is labelled: the loss of packed documents is that of the documents one by one."""
    model = tiny_model()
    sequences = mixed_sequences(model.config.vocabulary)
    for sequence in sequences:
        sequence.labels = sequence.input_ids.clone()
    batch = make_batch(sequences, model.config, pack_length=1000)
    alone = [make_batch([sequence], model.config) for sequence in sequences]
    total = sum(part.counts.weight * model(**part.inputs).loss for part in alone)
    assert batch.counts.weight == sum(len(sequence.input_ids) - 1 for sequence in sequences)
    torch.testing.assert_close(model(**batch.inputs).loss, total / batch.counts.weight, rtol=0, atol=2e-6)


def test_packed_rows_are_refused_where_attention_would_mix_them():
    """The flash kernels of transformers read restarting positions in a batch of one row only."""
    model = tiny_model()
    batch = inputs_of(model.config, *mixed_sequences(model.config.vocabulary), pack=40)
    assert len(batch["input_ids"]) == 2
    model.backbone.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="document_ids: flash_attention_2 keeps documents apart in a batch of one row"):
        model(**batch)


def test_loss_does_not_depend_on_train_mode():
    model = tiny_model()
    batch = inputs_of(model.config, *mixed_sequences(model.config.vocabulary), p=2)
    assert torch.equal(model.train()(**batch).loss, model.eval()(**batch).loss)


def test_loss_normalization_and_weights():
    def sequence_of(m):
        return inputs_of(m.config, build_sequence([TextSegment([5, 6]), image()], m.config.vocabulary), p=2)

    position = tiny_model(text_loss_weight=0.5)
    output = position(**sequence_of(position))  # 4 text targets (5, 6, <boi>, <eoi>), 4 patches
    torch.testing.assert_close(output.loss, (0.5 * 4 * output.text_loss + 4 * output.image_loss) / (0.5 * 4 + 4))
    token = tiny_model(loss_normalization="token")
    output = token(**sequence_of(token))
    torch.testing.assert_close(output.loss, (4 * output.text_loss + 16 * output.image_loss) / (4 + 16))


def test_gradients_reach_both_tables_and_the_backbone():
    model = tiny_model()
    model(**inputs_of(model.config, *mixed_sequences(model.config.vocabulary), p=2)).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


@pytest.mark.parametrize("without", ["images", "text"])
def test_weights_that_a_batch_does_not_need_get_zeros(without):
    """DDP needs a gradient of every weight on every process; the loss and the other gradients stay what they are."""
    model = tiny_model(text={"tie_word_embeddings": False}).train()
    vocabulary = model.config.vocabulary
    sequence = build_sequence([TextSegment([5, 6, 7]) if without == "images" else image()], vocabulary)
    sequence.labels[sequence.labels == vocabulary.eoi_token_id] = -100
    batch = inputs_of(model.config, sequence)
    tables = {"images": (model.image_embed, model.image_head), "text": (model.get_output_embeddings(),)}[without]
    loss = model(**batch).loss
    assert torch.equal(loss, model.eval()(**batch).loss)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(table.weight.grad.count_nonzero() == 0 for table in tables)
    assert all(layer.self_attn.q_proj.weight.grad.abs().sum() > 0 for layer in model.backbone.model.layers)


@pytest.mark.parametrize("auto", [UnifiedForCausalLM, AutoModelForCausalLM])
def test_save_and_load(tmp_path, auto):
    model = tiny_model(positions="2d", coarse_positions="unit")
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    batch = inputs_of(model.config, *mixed_sequences(model.config.vocabulary), p=2)
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    assert loaded.config.coarse_positions == "unit" and loaded.config.vocabulary == model.config.vocabulary


def test_from_backbone_keeps_text_logits(tmp_path):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(tiny_config().text_config).eval()
    llama.save_pretrained(tmp_path)
    model = UnifiedForCausalLM.from_backbone(str(tmp_path), codebook_size=1000, boi_token_id=48, eoi_token_id=49).eval()
    ids = torch.randint(5, 50, (2, 9))
    assert torch.equal(model(ids).logits, llama(ids).logits)
    text, codes = llama.get_input_embeddings().weight, model.image_embed.weight
    torch.testing.assert_close(codes.mean(0), text.mean(0), rtol=0, atol=5 * text.std().item() / 1000**0.5)
    torch.testing.assert_close(codes.std(), text.std(), rtol=0.1, atol=0)


def test_nothing_supervised_is_named():
    model = tiny_model()
    sequence = build_sequence([TextSegment([5], loss=False)], model.config.vocabulary)
    with pytest.raises(ValueError, match="labels: no position of the batch is supervised"):
        model(**inputs_of(model.config, sequence))


@pytest.mark.parametrize(
    ("field", "value"),
    [("positions", "3d"), ("coarse_positions", "corner"), ("loss_normalization", "mean"), ("boi_token_id", 99)],
)
def test_bad_config_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: .*{value}"):
        tiny_config(**{field: value})


def test_codes_without_their_positions_are_named():
    model = tiny_model()
    with pytest.raises(ValueError, match="input_ids: ids beyond the 50 of the text vocabulary; image codes come with"):
        model(torch.tensor([[1, 3, 55, 56, 4]]))
