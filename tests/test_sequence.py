"""Segments to sequences and back."""

import pytest
import torch
from conftest import split_sequence, tiny_config

from unified.sequence import ImageSegment, TextSegment, build_sequence

VOCABULARY = tiny_config().vocabulary


def codes(height, width, seed=0):
    return torch.randint(0, 20, (height, width), generator=torch.Generator().manual_seed(seed))


def test_frame_of_a_sequence():
    sequence = build_sequence(
        [TextSegment([7, 8], loss=False), ImageSegment(torch.tensor([[0, 1], [2, 19]]))], VOCABULARY
    )
    assert sequence.input_ids.tolist() == [1, 7, 8, 3, 50, 51, 52, 69, 4]
    assert sequence.labels.tolist() == [-100, -100, -100, -100, 50, 51, 52, 69, 4]
    assert sequence.image_grids == [(2, 2)]


def test_boi_is_supervised_with_its_text_and_eos_at_the_end():
    sequence = build_sequence([TextSegment([7]), ImageSegment(torch.tensor([[5]]))], VOCABULARY, end=True)
    assert sequence.labels.tolist() == [-100, 7, 3, 55, 4, 2]


def test_round_trip():
    segments = [TextSegment([5, 6]), ImageSegment(codes(2, 3)), ImageSegment(codes(4, 1, 1)), TextSegment([9])]
    sequence = build_sequence(segments, VOCABULARY)
    back = split_sequence(sequence.input_ids, sequence.image_grids, VOCABULARY)
    assert [type(s) for s in back] == [type(s) for s in segments]
    assert back[0].ids == [5, 6] and back[3].ids == [9]
    assert torch.equal(back[1].codes, segments[1].codes) and torch.equal(back[2].codes, segments[2].codes)


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
