"""FlexAttention with masks of blocks computes what masked attention does."""

import pytest
import torch
from conftest import tiny_model
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations import flex_attention as of_transformers

from unified.data.batches import make_batch
from unified.model.masks import block_mask, visible_mask
from unified.prediction.merge import patches
from unified.sequence import ImageSegment, TextSegment, build_sequence


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiling its kernel for a CPU takes longer than all else here."""

    def attend(query, key, value, training=False, **options):
        return flex_attention(query, key, value, **options)

    monkeypatch.setattr(of_transformers, "compile_friendly_flex_attention", attend)


def documents(vocabulary):
    def image(seed):
        return ImageSegment(torch.randint(0, 20, (4, 4), generator=torch.Generator().manual_seed(seed)))

    return [
        build_sequence([TextSegment([5, 6, 7]), image(0), TextSegment([8, 9])], vocabulary),
        build_sequence([TextSegment([10]), image(1)], vocabulary),
        build_sequence([TextSegment(range(11, 25))], vocabulary),
    ]


@torch.no_grad()  # its backward pass needs a GPU
def computed(model, batch):
    output = model(**batch.inputs, output_hidden_states=True)
    return [output.loss, *output.hidden_states]


WINDOW = {"model_type": "mistral", "sliding_window": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("prediction", "pack", "p", "text"),
    [(None, 40, 1, {}), (None, 40, 2, {}), (None, 40, 1, WINDOW), ({"order": "diagonals"}, None, 1, {}),
     ({"order": "diagonals"}, 40, 1, {}), ({"order": "regions", "size": 2}, 40, 1, {}),
     ({"order": "spread", "size": 2}, 40, 1, {}), ({"order": "random", "size": 3}, None, 1, {}),
     ({"order": "rows_at_once", "merge": "channel"}, 40, 1, {})], ids=str,
)  # fmt: skip
def test_states_and_loss_are_those_of_masked_attention(prediction, pack, p, text):
    model = tiny_model(prediction=prediction, text=text).train()
    batch = make_batch(documents(model.config.vocabulary), model.config, patches(p) if p > 1 else None, pack)
    expected = computed(model, batch)
    model.set_attn_implementation("flex_attention")
    kinds = set()
    forward = model.backbone.base_model.forward
    model.backbone.base_model.forward = lambda **inputs: (
        kinds.add(type(inputs["attention_mask"]).__name__) or forward(**inputs)
    )
    for ours, theirs in zip(computed(model, batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert kinds <= {"BlockMask", "dict"} and kinds


def test_blocks_without_attention_are_skipped():
    """Of two documents of 300 positions each, four of the blocks of 128 that a causal mask has are empty."""
    ids = torch.arange(600)[None] // 300
    blocks = block_mask(None, ids, None)
    causal = block_mask(None, torch.zeros_like(ids), None)
    assert torch.equal(blocks.to_dense()[0, 0, :5, :5].bool(), dense_blocks(visible_mask(None, ids, None)))
    assert int(causal.kv_num_blocks.sum() + causal.full_kv_num_blocks.sum()) == 15
    assert int(blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum()) == 11


def dense_blocks(visible):
    """Which blocks of 128 x 128 hold a pair that attends."""
    padded = torch.zeros(640, 640, dtype=torch.bool)
    padded[:600, :600] = visible[0, 0]
    return padded.view(5, 128, 5, 128).any(dim=3).any(dim=1)
