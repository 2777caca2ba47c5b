"""The forward passes of an image: a plan in tensors, for one image or for several whose plans differ in their cells."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from unified.config import Coordinates
from unified.model.modeling import UnifiedForCausalLM
from unified.prediction.arrange import cell_codes
from unified.prediction.merge import Grid, merged_grid
from unified.prediction.order import NONE, START
from unified.prediction.plan import NEVER, Plan, Prediction, plan_offsets


@dataclass(frozen=True)
class Group:
    """Cells that are sampled together, and the positions that run before.

    Attributes:
        entering, asking: positions ``[start, stop)`` of codes and of queries that run in its pass.
        sources: ``(n * m,)``, the positions that predict its n cells, counted from the first of its pass.
        shape: n and m.
        missing: ``(n, m)``, True for sources that a cell does not have; None if m = 1.
        codes: ``(B or 1, n * P)``, the codes of its cells, counted row by row in the image.
        ranks: ``(n * P,)``, when they come, counted in codes.
        reach: 1 + the last of its codes.
    """

    entering: tuple[int, int]
    asking: tuple[int, int]
    sources: Tensor
    shape: tuple[int, int]
    missing: Tensor | None
    codes: Tensor
    ranks: Tensor
    reach: int


@dataclass(frozen=True)
class Passes:
    """What decoding runs, for B images or alike for all (1).

    Attributes:
        groups: in the order of sampling; none if all cells are given.
        entered: ``(B or 1, L, P)``, which codes enter each position, counted row by row in the image; 0 for a query.
        offsets: ``(B or 1, L, 2)`` coordinates.
        seen, sees: ``(L,)`` of :class:`unified.prediction.plan.Plan`.
        tokens: ``(L,)``, the text tokens that enter positions, -1 for all others; None without any.
        advance: how far the running index of the text goes on.
        columns: of the cache that an image fills; none for queries.
        room: columns that a pass may need for its queries, too.
    """

    groups: list[Group]
    entered: Tensor
    offsets: Tensor
    seen: Tensor
    sees: Tensor
    tokens: Tensor | None
    advance: float
    columns: int
    room: int

    def offsets_of(self, rows: int) -> Tensor:
        """``(rows, L, 2)`` for the rows of a batch, whose unconditional sides follow the conditional ones."""
        return self.offsets.repeat(rows // len(self.offsets), 1, 1)

    def coordinates_after(self, position: Tensor) -> Tensor:
        """``(R, L, 2)`` of all positions, for rows whose text ends at ``position (R,)``."""
        return position[:, None, None] + self.offsets_of(len(position))

    def is_image(self, positions: Tensor) -> Tensor:
        """``(1, T)`` or ``(1, 1)`` for all alike, which of the positions are the image's own and not text of its frame."""
        if self.tokens is None:
            return torch.ones(1, 1, dtype=torch.bool, device=positions.device)
        return (self.tokens[positions] < 0)[None]

    def visible(self, positions: Tensor) -> Tensor | None:
        """``(T, T)``, which of the positions that run together see which; None if all see all."""
        if len(positions) == 1:
            return None
        mask = self.seen[positions] <= self.sees[positions, None]
        mask |= torch.eye(len(positions), dtype=torch.bool, device=mask.device)
        return None if bool(mask.all()) else mask


def image_passes(
    model: UnifiedForCausalLM,
    grid: Grid,
    generators: Sequence[torch.Generator],
    known: Tensor,
    prediction: Prediction | None = None,
) -> Passes:
    """The passes of images of a grid of codes; ``known (B, h*w)`` is not negative for given codes, alike in all rows.

    ``prediction`` is the model's own, unless its order is to be sampled in groups of other sizes.

    Raises:
        ValueError: if the order does not fit the grid.
    """
    prediction, coordinates = prediction or model.prediction, model.config.coordinates
    given = None
    if prediction.known_first and bool((known[0] >= 0).any()):
        index = torch.from_numpy(cell_codes(grid, prediction.merge.side))
        given = (known[0].cpu() >= 0)[index].all(dim=1).numpy()
    if given is None and not prediction.way.any_order:
        return _alike(prediction, grid, coordinates, str(model.device))
    cells = merged_grid(grid, prediction.merge.side)
    seeds = [order_seed(generator) for generator in generators] if prediction.way.any_order else [None]
    plans = [prediction.plan(cells, seed, given) for seed in seeds]
    return _passes(plans, prediction.merge.side, grid, coordinates, model.device)


def coarse_passes(model: UnifiedForCausalLM, grid: Grid, side: int, shift: int = 0) -> Passes:
    """The passes of the windows of side x side codes of a grid, in the order of the model, as in training on patches.

    ``shift`` is the number of rows of codes above the first window; rows below the last whole window are left out, too.

    Raises:
        ValueError: if the windows do not divide the grid, or the order does not fit them.
    """
    height, width = grid
    merged_grid(grid, side)
    part, coordinates = ((height - shift) // side * side, width), model.config.coordinates
    plan = model.prediction.plan(merged_grid(part, side))
    passes = _passes([plan], side, part, coordinates, model.device)
    if not shift:
        return passes
    before = shift * width
    groups = [replace(group, codes=group.codes + before, reach=group.reach + before) for group in passes.groups]
    offsets = passes.offsets.clone()
    if coordinates.coarse_positions == "center":  # the others count windows
        offsets += torch.tensor(
            [before, before] if coordinates.positions == "1d" else [shift, 0], device=offsets.device
        )
    return replace(passes, groups=groups, entered=passes.entered + before, offsets=offsets)


def image_columns(model: UnifiedForCausalLM, grid: Grid) -> int:
    """Columns of the cache that an image of a grid of codes fills, ``<boi>`` and ``<eoi>`` included."""
    prediction = model.prediction
    plan = prediction.plan(merged_grid(grid, prediction.merge.side))
    return int((plan.seen < NEVER).sum()) + 2


def order_seed(generator: torch.Generator) -> int:
    """Seed of the permutation of an image, for an order that has one: the third number of its generator.

    The generator's state stays; decoding and edits seed their own choices with the first two.
    """
    return int(torch.randint(2**63 - 1, (3,), generator=generator.clone_state(), device=generator.device)[2])


@lru_cache(maxsize=64)
def _alike(prediction: Prediction, grid: Grid, coordinates: Coordinates, device: str) -> Passes:
    plan = prediction.plan(merged_grid(grid, prediction.merge.side))
    return _passes([plan], prediction.merge.side, grid, coordinates, torch.device(device))


def _passes(plans: list[Plan], side: int, grid: Grid, coordinates: Coordinates, device: torch.device) -> Passes:
    first = plans[0]
    placed = [plan_offsets(plan, grid, side, coordinates) for plan in plans]
    index, per_cell = cell_codes(grid, side), side**2
    is_query = first.seen >= NEVER
    groups, width = [], 0
    for number in range(int(first.groups.max()) + 1):
        here = np.flatnonzero(first.passes == number)
        start = int(here[0]) if len(here) else int((first.passes < number).sum())
        stop = start + len(here)
        middle = start + int((~is_query[here]).sum())
        # The cells of a group by their rank, which is the order of their queries too.
        cells = [np.flatnonzero(plan.groups == number) for plan in plans]
        cells = [found[plan.ranks[found].argsort()] for found, plan in zip(cells, plans, strict=True)]
        sources = first.sources[cells[0]]
        relative = np.where((sources == START) | (sources == NONE), 0, sources - start)
        ranks = first.ranks[cells[0]][:, None] * per_cell + np.arange(per_cell)
        codes = np.stack([index[found].reshape(-1) for found in cells])
        groups.append(
            Group(
                (start, middle),
                (middle, stop),
                torch.from_numpy(relative.reshape(-1)).to(device),
                sources.shape,
                torch.from_numpy(sources == NONE).to(device) if sources.shape[1] > 1 else None,
                torch.from_numpy(codes).to(device),
                torch.from_numpy(ranks.reshape(-1)),
                int(codes.max()) + 1,
            )
        )
        width = max(width, stop - middle)
    if groups:
        groups[-1] = replace(groups[-1], reach=index.size)  # known ones behind the last included
    entered = np.stack([np.where((plan.cells >= 0)[:, None], index[plan.cells.clip(0)], 0) for plan in plans])
    offsets = torch.from_numpy(np.stack([own for own, _ in placed])).to(device)
    tokens = None if first.tokens is None else torch.from_numpy(first.tokens).to(device)
    seen, sees = (torch.from_numpy(np.ascontiguousarray(steps)).to(device) for steps in (first.seen, first.sees))
    columns = int((~is_query).sum())
    entering = torch.from_numpy(entered).to(device)
    return Passes(groups, entering, offsets, seen, sees, tokens, placed[0][1], columns, columns + width)
