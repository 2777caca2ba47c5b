"""Positions of positions and the rotary wrapper."""

import pytest
import torch
from conftest import tiny_config, tiny_model

from unified.model.rotary import GridRotary, span_offsets
from unified.prediction.slots import plan_slots
from unified.sequence import ImageSegment, TextSegment, build_sequence, collate, pack


def test_equal_row_and_column_is_the_original_bitwise():
    wrapper = tiny_model().backbone.base_model.rotary_emb
    assert isinstance(wrapper, GridRotary)
    x, ids = torch.zeros(2, 6, 32), torch.arange(6).expand(2, -1)
    plain = wrapper.rotary(x, ids)
    wrapper.coordinates = ids[..., None].float().expand(-1, -1, 2)
    for ours, theirs in zip(wrapper(x, ids), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_stay_in_float32(dtype):
    model = tiny_model()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert before and any(not torch.equal(b, b.to(dtype).float()) for b in before.values())  # they would be rounded
    model.to(dtype)
    assert next(model.parameters()).dtype == dtype
    for moved in (model, model.to(torch.float32)):
        after = dict(moved.named_buffers())
        assert all(torch.equal(after[name], buffer) for name, buffer in before.items())
        assert not any("inv_freq" in name for name in moved.state_dict())


def test_frequencies_alternate_between_row_and_column():
    wrapper = tiny_model().backbone.base_model.rotary_emb  # head_dim 8: four frequencies, twice
    wrapper.coordinates = torch.tensor([[[2.0, 5.0]]])
    cos, sin = wrapper(torch.zeros(1, 1, 32), torch.zeros(1, 1))
    angle = torch.tensor([2.0, 5.0, 2.0, 5.0]) * wrapper.rotary.inv_freq
    torch.testing.assert_close(cos[0, 0], torch.cat([angle, angle]).cos())
    torch.testing.assert_close(sin[0, 0], torch.cat([angle, angle]).sin())


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


def test_text_after_a_image_and_packed_documents():
    config = tiny_config(positions="2d")
    sequence = build_sequence(
        [TextSegment([5]), ImageSegment(torch.zeros(2, 4, dtype=torch.long)), TextSegment([6])], config.vocabulary
    )
    packed = collate(pack([sequence, sequence], 100), config.vocabulary)
    plan = plan_slots(packed["input_ids"], packed["image_grids"], None, packed["document_ids"], 1, config)
    one = [(0, 0), (1, 1), (2, 2), *[(3 + r, 3 + c) for r in range(2) for c in range(4)], (7, 7), (8, 8)]
    assert plan.coordinates[0].tolist() == [list(map(float, pair)) for pair in one + one]


def test_normalized_needs_2d():
    with pytest.raises(ValueError, match="'normalized' is defined for '2d'"):
        span_offsets((4, 4), 2, "1d", "normalized", 16.0)
