"""A key-value cache that is allocated once and written in place, for every kind of decoder."""

from typing import Any

from torch import Tensor
from transformers import Cache


class KeyValueCache(Cache):
    """Keys and values of every layer, ``(B, heads, length, head_dim)``; all rows share the column that is written next.

    Rows of different lengths end in the same column, so a row's first columns may be empty; the attention bias hides
    them. ``column`` may be set back to write again what speculation got wrong.

    Args:
        length: number of columns.
    """

    def __init__(self, length: int):
        super().__init__(layers=[])
        self.length = length
        self.column = 0
        self.end = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def open(self, width: int) -> None:
        """Make room for ``width`` columns from ``column`` on, before a forward pass."""
        if self.column + width > self.length:
            raise ValueError(f"cache: column {self.column + width} of {self.length}; allocate a longer cache.")
        self.end = max(self.end, self.column + width)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write ``(B, heads, T, head_dim)`` of one layer; returns all of its columns up to ``end``."""
        if layer_idx == len(self.keys):
            batch, heads, _, dim = key_states.shape
            # Zeros, because hidden columns are multiplied by 0 and must be finite.
            self.keys.append(key_states.new_zeros(batch, heads, self.length, dim))
            self.values.append(value_states.new_zeros(batch, heads, self.length, value_states.shape[-1]))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        stop = self.column + key_states.shape[2]
        keys[:, :, self.column : stop] = key_states
        values[:, :, self.column : stop] = value_states
        return keys[:, :, : self.end], values[:, :, : self.end]

    def rewind(self, column: int) -> None:
        """Forget ``column`` and everything after it."""
        self.column = self.end = column

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns before the one that is written next."""
        return self.column

    def expanded(self, rows: Tensor, length: int) -> "KeyValueCache":
        """A longer cache whose row i starts with the columns of ``rows[i]``; one prompt may serve many images."""
        other = KeyValueCache(length)
        other.column = other.end = self.end
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for tensor in mine:
                grown = tensor.new_zeros(len(rows), tensor.shape[1], length, tensor.shape[3])
                grown[:, :, : self.end] = tensor[rows, :, : self.end]
                theirs.append(grown)
        return other
