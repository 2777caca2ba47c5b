"""Orders of a grid: which cells are predicted together, and from where.

An order is two functions of a grid ``(h, w)``, whose cells are numbered row by row:

``groups``
    ``(h*w,)``, when each cell is predicted; cells of a group are predicted together.
``sources``
    ``(h*w, m)``, whose positions predict each cell: a cell of an earlier group, ``START`` (the position before the image),
    ``QUERY`` (a position for this purpose, which holds no code) or ``NONE``. Where m > 1, the model joins their states.

Everything else follows (see :mod:`unified.prediction.plan`). Add two functions here and a line in :data:`ORDERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from unified.prediction.merge import Grid

Cells = np.ndarray
START, QUERY, NONE = -1, -2, -3


@dataclass(frozen=True)
class Order:
    """A way to go through a grid.

    Attributes:
        groups: of a grid and ``size``.
        sources: of a grid and ``size``.
        size: default of the number that the order takes, 0 to choose it by the grid; None for an order that takes none.
        most_sources: m, of a cell.
        any_order: groups are only the default of sampling: cells come in another order in every image, training predicts
            them one by one, and groups of any size may be sampled.
    """

    groups: Callable[[Grid, int], Cells]
    sources: Callable[[Grid, int], Cells]
    size: int | None = None
    most_sources: int = 1
    any_order: bool = False


def _numbers(grid: Grid) -> tuple[Cells, Cells, Cells]:
    """Number, row and column of every cell."""
    cells = np.arange(grid[0] * grid[1])
    return cells, cells // grid[1], cells % grid[1]


def _by_query(grid: Grid, size: int) -> Cells:
    return np.full((grid[0] * grid[1], 1), QUERY)


# raster: cell by cell, row by row; next-token prediction


def _raster(grid: Grid, size: int) -> Cells:
    return _numbers(grid)[0]


def _previous(grid: Grid, size: int) -> Cells:
    return _numbers(grid)[0][:, None] - 1  # START for the first


# rows: each row at once from the row above (next-block prediction); the first cell by cell, or at once from queries


def _rows(grid: Grid, size: int) -> Cells:
    cells, row, _ = _numbers(grid)
    return np.where(row == 0, cells, grid[1] - 1 + row)


def _previous_or_above(grid: Grid, size: int) -> Cells:
    cells, row, _ = _numbers(grid)
    return np.where(row == 0, cells - 1, cells - grid[1])[:, None]


def _rows_at_once(grid: Grid, size: int) -> Cells:
    return _numbers(grid)[1]


def _query_or_above(grid: Grid, size: int) -> Cells:
    cells, row, _ = _numbers(grid)
    return np.where(row == 0, QUERY, cells - grid[1])[:, None]


# diagonals: anti-diagonals, each cell from its left and its upper neighbour (NAR, arXiv 2503.10696)


def _diagonals(grid: Grid, size: int) -> Cells:
    _, row, column = _numbers(grid)
    return row + column


def _left_and_above(grid: Grid, size: int) -> Cells:
    cells, row, column = _numbers(grid)
    left, above = np.where(column > 0, cells - 1, NONE), np.where(row > 0, cells - grid[1], NONE)
    left[0] = START
    return np.stack([left, above], axis=1)


# regions: size x size regions side by side, each in raster order; their first cells one by one (PAR, arXiv 2412.15119)


def _in_regions(grid: Grid, size: int) -> tuple[Cells, Cells, tuple[int, int]]:
    """Region of each cell, its number inside of the region, and the shape of a region."""
    if grid[0] % size or grid[1] % size:
        raise ValueError(f"prediction.size: {size} regions a side do not divide a grid of {grid[0]}x{grid[1]} cells.")
    _, row, column = _numbers(grid)
    height, width = grid[0] // size, grid[1] // size
    return row // height * size + column // width, row % height * width + column % width, (height, width)


def _regions(grid: Grid, size: int) -> Cells:
    region, inside, _ = _in_regions(grid, size)
    return np.where(inside == 0, region, size**2 - 1 + inside)


def _previous_in_region(grid: Grid, size: int) -> Cells:
    region, inside, _ = _in_regions(grid, size)
    cell_of = np.empty((size**2, grid[0] * grid[1] // size**2), dtype=int)
    cell_of[region, inside] = np.arange(len(region))
    first = np.where(region == 0, START, cell_of[region - 1, 0])
    return np.where(inside == 0, first, cell_of[region, inside - 1])[:, None]


# cells: blocks of size x size in raster order; spread: one cell of each size x size window at a time (xAR, arXiv 2502.20388)


def _blocks(grid: Grid, size: int) -> Cells:
    _, row, column = _numbers(grid)
    return row // size * -(-grid[1] // size) + column // size


def _spread(grid: Grid, size: int) -> Cells:
    _, row, column = _numbers(grid)
    return row % size * size + column % size


# random: another permutation for every image (RandAR, arXiv 2412.01827); groups grow along a cosine


def rising_sizes(cells: int, passes: int) -> Cells:
    """Sizes of ``passes`` groups that rise along a cosine, as in MaskGIT (arXiv 2202.04200, section 3.3).

    Raises:
        ValueError: for more passes than cells.
    """
    if not 1 <= passes <= cells:
        raise ValueError(f"prediction.size: {passes} passes must lie in 1..{cells}, the cells of the grid.")
    known = cells * (1 - np.cos(np.pi / 2 * np.arange(1, passes + 1) / passes))
    ends = np.maximum(np.round(known).astype(int), np.arange(1, passes + 1))  # at least one cell a pass
    ends = np.minimum(ends, cells - np.arange(passes)[::-1])
    return np.diff(ends, prepend=0)


def _cosine(grid: Grid, size: int) -> Cells:
    cells = grid[0] * grid[1]
    sizes = rising_sizes(cells, size or -(-cells * 88 // 256))
    return np.repeat(np.arange(len(sizes)), sizes)


# locality: near to what is known, far from one another (LPD, arXiv 2507.01957)


def _locality(grid: Grid, size: int) -> Cells:
    cells, row, column = _numbers(grid)
    place = np.stack([row, column], axis=1).astype(float)
    sizes = rising_sizes(len(cells), size or min(len(cells), max(1, round(1.25 * len(cells) ** 0.5))))
    between = np.linalg.norm(place[:, None] - place[None], axis=2)
    groups, nearest = np.full(len(cells), -1), np.linalg.norm(place - (np.array(grid) - 1) / 2, axis=1)
    for number, count in enumerate(sizes):
        chosen: list[int] = []
        apart = np.full(len(cells), np.inf)  # from those chosen in this group
        while len(chosen) < count:
            free = groups < 0
            # Candidates are the cells that keep the greatest distance still possible; the nearest to known ones wins.
            far = free & (apart >= min(apart[free].max(), _SPACING))
            best = int(np.where(far, nearest, np.inf).argmin())
            groups[best] = number
            chosen.append(best)
            apart = np.minimum(apart, between[best])
        if number == 0:
            nearest = np.full(len(cells), np.inf)
        nearest = np.minimum(nearest, between[chosen].min(axis=0))
    return groups


_SPACING = 3.0  # cells; further apart than that, two cells hardly depend on one another

ORDERS: dict[str, Order] = {
    "raster": Order(_raster, _previous),
    "rows": Order(_rows, _previous_or_above),
    "rows_at_once": Order(_rows_at_once, _query_or_above),
    "diagonals": Order(_diagonals, _left_and_above, most_sources=2),
    "regions": Order(_regions, _previous_in_region, size=2),
    "cells": Order(_blocks, _by_query, size=4),
    "spread": Order(_spread, _by_query, size=4),
    "locality": Order(_locality, _by_query, size=0),
    "random": Order(_cosine, _by_query, size=0, any_order=True),
}
