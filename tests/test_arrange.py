"""Sequences as positions: patches, coordinates, packing, collation; and a forward pass that depends on no values."""

import copy

import pytest
import torch
from conftest import inputs_of, tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from unified.data.batches import make_batch
from unified.prediction.arrange import arrange, collate, pack
from unified.prediction.coordinates import span_offsets
from unified.prediction.merge import ONE, Merge, patches
from unified.sequence import ImageSegment, TextSegment, TokenSequence, build_sequence

CONFIG = tiny_config()
VOCABULARY = CONFIG.vocabulary


def image(height=4, width=4, seed=0):
    return ImageSegment(torch.randint(0, 20, (height, width), generator=torch.Generator().manual_seed(seed)))


def sequence(*segments):
    return build_sequence(segments, VOCABULARY)


def arranged(made, merge=ONE):
    return arrange(made, VOCABULARY, CONFIG.coordinates, merge=merge)


def sequences():
    return [
        sequence(TextSegment([5, 6, 7]), image(4, 4), TextSegment([8, 9])),
        sequence(TextSegment([5]), image(2, 4, 1), TextSegment([6]), image(4, 4, 2)),
        sequence(TextSegment([10, 11, 12])),
    ]


def test_one_position_a_code():
    made = sequence(TextSegment([7], loss=False), ImageSegment(torch.tensor([[0, 1], [2, 19]])))
    row = arranged(made)
    assert row.input_ids[:, 0].tolist() == [1, 7, 3, 50, 51, 52, 69, 4]
    assert row.labels[:, 0].tolist() == [-100, -100, -100, 50, 51, 52, 69, 4]
    assert row.is_image.tolist() == [False] * 3 + [True] * 4 + [False]
    assert row.positions[3:].tolist() == [[3, 3], [3, 4], [4, 3], [4, 4], [5, 5]]


def test_a_position_takes_a_window():
    """Text stays in column 0; windows of 2 x 2 in raster order, each with its four codes."""
    codes = torch.arange(16).reshape(4, 4)
    row = arranged(sequence(TextSegment([7]), ImageSegment(codes)), merge=patches(2))
    assert row.input_ids.tolist() == [
        *([[id, -100, -100, -100] for id in (1, 7, 3)]),
        *([[50 + c, 51 + c, 54 + c, 55 + c] for c in (0, 2, 8, 10)]),
        [4, -100, -100, -100],
    ]
    assert row.labels[0].tolist() == [-100] * 4 and torch.equal(row.labels[1:], row.input_ids[1:])


def test_a_window_is_supervised_with_all_of_its_codes():
    made = sequence(ImageSegment(torch.arange(16).reshape(4, 4)))
    made.labels[2] = -100  # the first code
    row = arranged(made, merge=patches(2))
    assert row.labels[row.is_image].tolist() == [[-100] * 4, [52, 53, 56, 57], [58, 59, 62, 63], [60, 61, 64, 65]]


def test_different_merges_in_one_batch():
    """The loss of a batch of two patch sizes is made of the losses of its parts."""
    model = tiny_model()
    first, second, _ = sequences()
    rows = [arranged(first, merge=patches(2)), arranged(second)]
    parts = [collate([row], CONFIG) for row in rows]
    expected = sum(part.counts.weight * model(**part.inputs).loss for part in parts)
    for together in (rows, pack(rows, 1000)):
        whole = collate(together, CONFIG)
        torch.testing.assert_close(model(**whole.inputs).loss * whole.counts.weight, expected)


@pytest.mark.parametrize("p", [1, 2])
def test_counts(p):
    counts = make_batch(sequences(), CONFIG, patches(p)).counts
    codes = (16 + 8 + 16) // p**2
    assert (counts.images, counts.positions) == (3, 8 + 7 + 4 + codes)
    assert (counts.text_targets, counts.image_targets, counts.weight) == (7 + 6 + 3, codes, 16 + codes)
    weighted = tiny_config(loss_normalization="token", text_loss_weight=0.5, image_loss_weight=2.0)
    assert make_batch(sequences(), weighted, patches(p)).counts.weight == 0.5 * 16 + 2 * 40


def test_collate_pads_on_the_right():
    rows = [arranged(s) for s in (sequence(TextSegment([7])), sequence(TextSegment([7]), image(2, 2)))]
    batch = collate(rows, CONFIG).inputs
    assert batch["input_ids"][0].tolist() == [1, 7, 0, 0, 0, 0, 0, 0]
    assert batch["labels"][0].tolist() == [-100, 7, *[-100] * 6]
    assert batch["image_inputs"].tolist() == batch["image_targets"].tolist() == [11, 12, 13, 14]
    assert batch["text_targets"].tolist() == [1, 9, 10, 15]


def test_few_shapes_for_a_compiler():
    """Lengths and lists of indices are padded to a multiple; the loss and its gradients stay what they are."""
    model = tiny_model().train()
    rows = [arranged(s, merge=patches(2)) for s in sequences()]
    gradients = []
    for multiple in (1, 16):
        batch = collate(rows, CONFIG, multiple).inputs
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: q.grad.clone() for name, q in model.named_parameters()})
    assert batch["input_ids"].shape[1] == len(batch["text_targets"]) == len(batch["image_inputs"]) == 16
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_pack_keeps_documents_apart():
    rows = pack([arranged(sequence(TextSegment([7 + n] * n))) for n in (3, 4, 5)], max_length=10)
    assert [row.input_ids[:, 0].tolist() for row in rows] == [
        [1, 10, 10, 10, 1, 12, 12, 12, 12, 12],
        [1, 11, 11, 11, 11],
    ]
    assert rows[0].document_ids.tolist() == [0] * 4 + [1] * 6
    assert rows[0].labels[4] == -100


def test_pack_puts_each_sequence_into_the_fullest_row():
    """Three full rows; row by row in the order given it would take four."""
    rows = pack([arranged(sequence(TextSegment([7] * (n - 1)))) for n in (3, 6, 5, 2, 7, 4, 3)], max_length=10)
    assert [torch.bincount(row.document_ids).tolist() for row in rows] == [[3, 7], [6, 4], [5, 2, 3]]


def test_pack_fills_rows_at_every_patch_size():
    """Eight images of 64 codes: at p = 2 each takes 16 + 4 positions, and three stand in a row of 64."""
    images = [sequence(TextSegment([5]), image(8, 8, seed)) for seed in range(8)]
    rows = pack([arranged(s, merge=patches(2)) for s in images], max_length=64)
    assert [len(row) for row in rows] == [60, 60, 40]


def test_text_after_an_image_and_packed_documents():
    row = arranged(sequence(TextSegment([5]), image(2, 4), TextSegment([6])))
    packed = collate(pack([row, row], 100), CONFIG).inputs
    one = [(0, 0), (1, 1), (2, 2), *[(3 + r, 3 + c) for r in range(2) for c in range(4)], (7, 7), (8, 8)]
    assert packed["positions"][0].tolist() == [list(map(float, pair)) for pair in one + one]


@pytest.mark.parametrize(
    ("positions", "coarse", "expected", "advance"),
    [
        ("2d", "unit", [(0, 0), (0, 1), (1, 0), (1, 1)], 2),
        ("2d", "center", [(0.5, 0.5), (0.5, 2.5), (2.5, 0.5), (2.5, 2.5)], 4),
        ("2d", "normalized", [(0, 0), (0, 12), (12, 0), (12, 12)], 13),
        ("1d", "unit", [0, 1, 2, 3], 4),
        ("1d", "center", [2.5, 4.5, 10.5, 12.5], 16),
    ],
)
def test_offsets_of_a_coarse_grid(positions, coarse, expected, advance):
    offsets, moved = span_offsets((4, 4), 2, positions, coarse, extent=12.0)
    rows_and_columns = [value if isinstance(value, tuple) else (value, value) for value in expected]
    assert offsets.tolist() == [list(map(float, pair)) for pair in rows_and_columns]
    assert moved == advance


def test_center_is_the_mean_of_the_fine_positions():
    fine, _ = span_offsets((4, 8), 1, "1d", "center", 0.0)
    coarse, _ = span_offsets((4, 8), 2, "1d", "center", 0.0)
    windows = fine[:, 0].reshape(2, 2, 4, 2).permute(0, 2, 1, 3).reshape(8, 4)
    torch.testing.assert_close(coarse[:, 0], windows.mean(1))


def test_normalized_needs_2d():
    with pytest.raises(ValueError, match="'normalized' is defined for '2d'"):
        span_offsets((4, 4), 2, "1d", "normalized", 16.0)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([(4, 4), (4, 4)], "image_grids: 2 grids for 1 image spans"),
        ([(4, 2)], "has 16 codes, its grid 4x2 needs 8"),
        ([], "image_grids: 0 grids for 1 image spans"),
    ],
)
def test_wrong_grids_are_named(grids, message):
    made = sequence(TextSegment([5]), image())
    with pytest.raises(ValueError, match=message):
        arranged(TokenSequence(made.input_ids, made.labels, grids))


def test_patches_that_do_not_divide_missing_boi_and_foreign_ids_are_named():
    made = sequence(TextSegment([5]), image())
    with pytest.raises(ValueError, match=r"patch_size, prediction\.window: 3 does not divide the code grid 4x4"):
        arranged(made, merge=patches(3))
    made.input_ids[2] = 5
    with pytest.raises(ValueError, match="not preceded by <boi>"):
        arranged(made)
    made.input_ids[3] = 70
    with pytest.raises(ValueError, match=r"input_ids: 70 is not in \[0, 70\), text vocabulary and codebook"):
        arranged(made)


def test_bad_merges_packing_and_mixed_rows_are_named():
    with pytest.raises(ValueError, match=r"merge: 'sum' is unknown; use one of \('one', 'mean', 'channel'\)"):
        Merge("sum", 2)
    with pytest.raises(ValueError, match="merge: 'one' cannot have windows of side 2"):
        Merge("one", 2)
    row = arranged(sequence(TextSegment([7] * 5)), merge=ONE)
    with pytest.raises(ValueError, match="max_length: 3 is shorter than a sequence of 6"):
        pack([row], max_length=3)
    with pytest.raises(ValueError, match="rows: 1 of 2 are packed"):
        collate([row, *pack([row], 9)], CONFIG)


class Reads(TorchDispatchMode):
    """Collects the operations that read values back from the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("local_scalar", "nonzero", "masked_select", "unique")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


FAMILIES = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 8, "num_key_value_heads": 2},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "head_dim": 8,
        "num_key_value_heads": 2,
    },
}


@pytest.mark.process
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("pack_length", [None, 40])
def test_forward_with_loss_depends_on_no_values(family, p, pack_length):
    """Nothing is read back from the device, and the whole of it runs on tensors that have no values at all."""
    model = tiny_model(text=FAMILIES[family]).train()
    batch = inputs_of(CONFIG, *sequences(), p=p, pack=pack_length)
    with Reads() as reads:
        model(**batch).loss.backward()
    assert reads.found == []
    mode, fake = FakeTensorMode(), copy.deepcopy(model)
    with mode:
        for module in fake.modules():
            for table, wrap in ((module._parameters, torch.nn.Parameter), (module._buffers, lambda t: t)):
                table.update({name: wrap(mode.from_tensor(t)) for name, t in table.items() if t is not None})
        loss = fake(**{name: mode.from_tensor(t) for name, t in batch.items()}).loss
        loss.backward()
    assert loss.shape == ()


@pytest.mark.process
@pytest.mark.parametrize(("p", "pack_length"), [(1, None), (2, None), (2, 40)])
def test_forward_with_loss_compiles_to_one_graph(p, pack_length):
    torch._dynamo.reset()
    model = tiny_model().train()
    batch = inputs_of(CONFIG, *sequences(), p=p, pack=pack_length)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss, rtol=1e-6, atol=1e-6)
