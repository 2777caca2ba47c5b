"""Attention over a cache against its formula, on one thread and on two, which go different ways on a CPU."""

import pytest
import torch

from unified.decoding.attention import attend


def formula(query, keys, values, bias):
    """Softmax attention in float64, one head at a time."""
    batch, heads, width, dim = query.shape
    shared = heads // keys.shape[1]
    result = torch.zeros(batch, width, heads, dim, dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            own_keys, own_values = keys[row, head // shared].double(), values[row, head // shared].double()
            scores = query[row, head].double() @ own_keys.T / dim**0.5
            if bias is not None:
                scores = scores + bias[row, 0].double()
            result[row, :, head] = scores.softmax(dim=-1) @ own_values
    return result


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("width", [1, 3])
@torch.inference_mode()
def test_equals_the_formula_inside_a_larger_cache(threads, hidden, heads, kv_heads, width):
    torch.manual_seed(0)
    query = torch.randn(3, width, heads, 8).transpose(1, 2)
    kept = torch.randn(2, 5, kv_heads, 20, 8)
    kept[:, :, :, 17:] = float("nan")  # columns that are not read
    keys, values = kept[:, :3, :, 4:17]
    bias = torch.zeros(3, 1, width, 13) if hidden else None
    if bias is not None:
        bias[1, ..., :5] = float("-inf")
    expected = formula(query, keys, values, bias)
    torch.testing.assert_close(attend(query, keys, values, bias).double(), expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_whatever_is_beside_it(threads):
    torch.manual_seed(0)
    query, keys, values = torch.randn(16, 4, 1, 64), torch.randn(16, 4, 50, 64), torch.randn(16, 4, 50, 64)
    together = attend(query, keys, values, None)
    for row in range(16):
        alone = slice(row, row + 1)
        assert torch.equal(attend(query[alone], keys[alone], values[alone], None)[0], together[row])
