"""Attention of new positions over a cache of keys and values."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of ``(B, heads, T, d)`` over ``(B, kv_heads, C, d)``; returns ``(B, T, heads, d)``.

    Query heads that share a key head become further queries of it, so keys and values are never repeated.

    Args:
        query: of the new positions.
        keys: of all columns, those of the new positions included.
        values: beside the keys.
        bias: added to the scores, ``(B or 1, 1, T or 1, C)``.
    """
    batch, heads, width, dim = query.shape
    shared = heads // keys.shape[1]
    query = query.reshape(batch, keys.shape[1], shared * width, dim)
    if width == 1 and _waits_for_memory(query):
        attended = _attend_by_rows(query, keys, values, bias)
    else:
        if shared > 1 and bias is not None and bias.shape[2] > 1:
            bias = bias.repeat(1, 1, shared, 1)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
    return attended.reshape(batch, heads, width, dim).transpose(1, 2)


def _waits_for_memory(query: Tensor) -> bool:
    """Whether one thread of a CPU does all the work. With more, each of the three steps by rows waits for all threads."""
    one_thread = not torch.compiler.is_compiling() and torch.get_num_threads() == 1
    return one_thread and query.device.type == "cpu" and query.dtype == torch.float32


def _attend_by_rows(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """What SDPA computes, with the rows of keys and values read in order: for many images in two thirds of its time.

    A dot product for each key; then a bag of embeddings for each query, which is the sum of its values by their weights.
    """
    batch, kv_heads, columns, dim = keys.shape
    scores = torch.from_numpy(np.vecdot((query * dim**-0.5).unsqueeze(3).numpy(), keys.unsqueeze(2).numpy()))
    if bias is not None:
        scores += bias
    strides = [stride // dim for stride in values.stride()[:2]]
    rows, bags, count = _places(batch, kv_heads, query.shape[2], columns, *strides)
    table = values.as_strided((count, dim), (dim, 1))
    return torch.embedding_bag(table, rows, bags, False, 0, False, scores.softmax(dim=-1).flatten())[0]


@lru_cache(maxsize=1)  # the same for all layers of a pass
def _places(
    batch: int, kv_heads: int, queries: int, columns: int, batch_stride: int, head_stride: int
) -> tuple[Tensor, Tensor, int]:
    """Rows of memory that hold the values of each query, where those of each query begin in that list, rows in all."""
    first = torch.arange(batch)[:, None] * batch_stride + torch.arange(kv_heads) * head_stride
    rows = first.flatten().repeat_interleave(queries)[:, None] + torch.arange(columns)
    return rows.int().flatten(), torch.arange(0, rows.numel(), columns).int(), int(rows[-1, -1]) + 1
