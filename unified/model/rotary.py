"""Row and column positions on any backbone's rotary embedding."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class GridRotary(nn.Module):
    """Wraps a backbone's rotary embedding so that alternate frequencies take the row and the column angle.

    Decoders in transformers call ``rotary_emb(x, position_ids, ...)`` once and hand cos and sin to every layer, so this
    one module gives them 2D positions. Where row and column are equal, the result equals the original bitwise.
    Set ``coordinates`` to ``(B, T, 2)`` before a forward pass, or to None for the backbone's own positions.

    With ``llamagen``, the layout of LlamaGen (arXiv 2406.06525): every second frequency is used, first all of them for the
    row, then all of them for the column. Positions with a negative coordinate (the condition) have cos = sin = 0: their
    queries and keys vanish, as in its published models.
    """

    def __init__(self, rotary: nn.Module, llamagen: bool = False):
        super().__init__()
        self.rotary = rotary
        self.llamagen = llamagen
        self.coordinates: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GridRotary":
        """Move to a device or dtype; frequencies never go to 16 bits, which would round away positions."""
        before = dict(self.rotary.named_buffers())
        super()._apply(fn, recurse)
        for name, moved in dict(self.rotary.named_buffers()).items():
            if moved.dtype in (torch.bfloat16, torch.float16):
                self.rotary.register_buffer(name, before[name].to(moved.device), persistent=False)
        return self

    def forward(self, x: Tensor, position_ids: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Cos and sin, each ``(B, T, head_dim)``."""
        if self.coordinates is None:
            return self.rotary(x, position_ids, *args, **kwargs)
        by_row = self.rotary(x, self.coordinates[..., 0], *args, **kwargs)
        by_column = self.rotary(x, self.coordinates[..., 1], *args, **kwargs)
        # Halves of the head dimension hold the same frequencies, so alternate within each half.
        half = by_row[0].shape[-1] // 2
        if self.llamagen:
            placed = (self.coordinates >= 0).all(dim=-1, keepdim=True)
            halves = [torch.cat([r[..., :half:2], c[..., :half:2]], -1) for r, c in zip(by_row, by_column, strict=True)]
            cos, sin = (torch.cat([values, values], dim=-1) * placed for values in halves)
            return cos, sin
        takes_row = (torch.arange(2 * half, device=x.device) % half) % 2 == 0
        cos, sin = (torch.where(takes_row, r, c) for r, c in zip(by_row, by_column, strict=True))
        return cos, sin
