"""Row and column positions in a backbone's rotary embedding."""

import pytest
import torch
from conftest import tiny_model

from unified.model.rotary import GridRotary


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
