"""Coordinates of image codes and patches for the rotary embedding."""

import torch
from torch import Tensor

from unified.prediction.merge import Grid, merged_grid


def span_offsets(grid: Grid, patch_size: int, positions: str, coarse: str, extent: float) -> tuple[Tensor, float]:
    """Coordinates of the positions of one image span, relative to the position right after ``<boi>``.

    Args:
        grid: code grid ``(h, w)``.
        patch_size: side p of a patch.
        positions: ``1d``, ``2d`` or ``llamagen`` (rows and columns as for ``2d``).
        coarse: ``center``, ``unit`` or ``normalized`` (see :class:`unified.config.UnifiedConfig`).
        extent: range of the longer side for ``normalized``.

    Returns:
        ``(n, 2)`` float row and column of each of the n = h*w/p^2 positions (equal for ``1d``), and how far the running
        index advances over the span. At p = 1, ``center`` and ``unit`` coincide.
    """
    rows, columns = merged_grid(grid, patch_size)
    stride, shift = (patch_size, (patch_size - 1) / 2) if coarse == "center" else (1, 0.0)
    row = torch.arange(rows, dtype=torch.float32) * stride + shift
    column = torch.arange(columns, dtype=torch.float32) * stride + shift
    height, width = rows * stride, columns * stride
    if positions == "1d":
        if coarse == "normalized":
            raise ValueError(
                "coarse_positions: 'normalized' is defined for '2d' positions only; use 'center' or 'unit'."
            )
        index = (row[:, None] * width + column[None, :]).reshape(-1)
        return torch.stack([index, index], dim=-1), float(height * width)
    if coarse == "normalized":
        scale = extent / max(rows - 1, columns - 1, 1)
        row, column = row * scale, column * scale
        advance = extent + 1
    else:
        advance = max(height, width)
    return torch.cartesian_prod(row, column), float(advance)
