"""Attention of both streams over one block table, where each hides tokens from the other."""

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

BIAS = 1e4  # far above any score, and a number in every dtype


class TwinAttention(nn.Module):
    """Takes the place of an attention layer, for the tokens of both streams, one behind the other.

    A kernel knows no masks but the causal one. So a head gets one more coordinate: in queries it is a constant, in keys 0, or so
    far below where a token is hidden that its share after the softmax is 0. Kernels have certain head sizes; the rest are zeros.
    """

    def __init__(self, inner: Attention, layers: int, context: dict[str, nn.Module]):
        super().__init__()
        self.heads, self.key_heads, self.size = inner.num_heads, inner.num_kv_heads, inner.head_size
        self.scale = float(inner.impl.scale)
        supported = inner.attn_backend.supports_head_size
        self.padded = next(size for size in range(8 * (self.size // 8) + 8, 1025, 8) if supported(size))
        del context[inner.layer_name]
        name, number = inner.layer_name, extract_layer_index(inner.layer_name)
        twin = name.replace(f".{number}.", f".{number + layers}.")
        self.conditional, self.unconditional = (
            Attention(self.heads, self.padded, self.scale, num_kv_heads=self.key_heads, prefix=each)
            for each in (name, twin)
        )
        self.hidden: Tensor | None = None  # (2T,), set before every forward pass

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``(2T, heads * size)`` from queries, keys and values of both streams."""
        assert self.hidden is not None
        queries, keys = self._widened(query, self.heads), self._widened(key, self.key_heads)
        values = self._widened(value, self.key_heads)
        queries[..., self.size] = 1 / self.scale
        keys[..., self.size] = torch.where(self.hidden, -BIAS, 0.0)[:, None].to(key.dtype)
        half = len(query) // 2
        outputs = [
            attention(*(each[part].flatten(1) for each in (queries, keys, values)))
            for attention, part in ((self.conditional, slice(half)), (self.unconditional, slice(half, None)))
        ]
        return torch.cat(outputs).view(-1, self.heads, self.padded)[..., : self.size].flatten(1)

    def _widened(self, states: Tensor, heads: int) -> Tensor:
        return nn.functional.pad(states.reshape(len(states), heads, self.size), (0, self.padded - self.size))
