"""Orders of a grid: for each cell, when it is predicted.

An order is a function ``grid -> groups``: an integer for each of the h * w cells, in raster order of the cells. Cells are
predicted by rising group. Add a function here and its line in :data:`ORDERS`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unified.prediction.merge import Grid


def raster(grid: Grid) -> Tensor:
    """Cell by cell, row by row: next-token prediction."""
    return torch.arange(grid[0] * grid[1])


ORDERS: dict[str, Callable[[Grid], Tensor]] = {"raster": raster}
