"""Segments to sequences and back; batches; packing."""

import pytest
import torch
from conftest import tiny_config

from unified.sequence import ImageSegment, TextSegment, build_sequence, collate, pack, split_sequence

VOCABULARY = tiny_config().vocabulary


def codes(height, width, seed=0):
    return torch.randint(0, 20, (height, width), generator=torch.Generator().manual_seed(seed))


def test_layout_of_a_sequence():
    sequence = build_sequence(
        [TextSegment([7, 8], loss=False), ImageSegment(torch.tensor([[0, 1], [2, 19]]))], VOCABULARY
    )
    assert sequence.input_ids.tolist() == [1, 7, 8, 3, 50, 51, 52, 69, 4]
    assert sequence.labels.tolist() == [-100, -100, -100, -100, 50, 51, 52, 69, 4]
    assert sequence.image_grids == [(2, 2)]


def test_boi_is_learned_with_its_text_and_eos_at_the_end():
    sequence = build_sequence([TextSegment([7]), ImageSegment(torch.tensor([[5]]))], VOCABULARY, end=True)
    assert sequence.labels.tolist() == [-100, 7, 3, 55, 4, 2]


def test_round_trip():
    segments = [TextSegment([5, 6]), ImageSegment(codes(2, 3)), ImageSegment(codes(4, 1, 1)), TextSegment([9])]
    sequence = build_sequence(segments, VOCABULARY)
    back = split_sequence(sequence.input_ids, sequence.image_grids, VOCABULARY)
    assert [type(s) for s in back] == [type(s) for s in segments]
    assert back[0].ids == [5, 6] and back[3].ids == [9]
    assert torch.equal(back[1].codes, segments[1].codes) and torch.equal(back[2].codes, segments[2].codes)


def test_collate_pads_on_the_right():
    short = build_sequence([TextSegment([7])], VOCABULARY)
    long = build_sequence([TextSegment([7]), ImageSegment(codes(2, 2))], VOCABULARY)
    batch = collate([short, long], VOCABULARY)
    assert batch["input_ids"][0].tolist() == [1, 7, 0, 0, 0, 0, 0, 0]
    assert batch["labels"][0].tolist() == [-100, 7, *[-100] * 6]
    assert batch["attention_mask"].sum(1).tolist() == [2, 8]
    assert batch["image_grids"].tolist() == [[2, 2]]


def test_pack_keeps_documents_apart():
    sequences = [build_sequence([TextSegment([7 + n] * n)], VOCABULARY) for n in (3, 4, 5)]
    rows = pack(sequences, max_length=10)
    assert [row.input_ids.tolist() for row in rows] == [[1, 10, 10, 10, 1, 12, 12, 12, 12, 12], [1, 11, 11, 11, 11]]
    assert rows[0].document_ids.tolist() == [0] * 4 + [1] * 6
    assert rows[0].labels[4] == -100


def test_pack_puts_each_sequence_into_the_fullest_row():
    """Three full rows; row by row in the order given it would take four."""
    sequences = [build_sequence([TextSegment([7] * (n - 1))], VOCABULARY) for n in (3, 6, 5, 2, 7, 4, 3)]
    rows = pack(sequences, max_length=10)
    lengths = [torch.bincount(row.document_ids).tolist() for row in rows]
    assert lengths == [[3, 7], [6, 4], [5, 2, 3]]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([TextSegment([50])], r"text ids: values 50..50 leave \[0, 50\)"),
        ([ImageSegment(torch.tensor([[20]]))], r"codes: values 20..20 leave \[0, 20\)"),
        ([ImageSegment(torch.tensor([1, 2]))], r"codes: need integers of shape \(h, w\)"),
        ([ImageSegment(torch.zeros(2, 2))], r"codes: need integers"),
    ],
)
def test_bad_segments_are_named(segments, message):
    with pytest.raises(ValueError, match=message):
        build_sequence(segments, VOCABULARY)


def test_too_long_for_packing():
    with pytest.raises(ValueError, match="max_length: 3 is shorter than a sequence of 6"):
        pack([build_sequence([TextSegment([7] * 5)], VOCABULARY)], max_length=3)
