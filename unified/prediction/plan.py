"""From an order to the positions of an image: what enters each, what it sees, when it runs, and what predicts each cell."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from unified.config import Coordinates, UnifiedConfig
from unified.prediction.coordinates import span_offsets
from unified.prediction.frame import Frame
from unified.prediction.merge import ONE, Grid, Merge
from unified.prediction.order import NONE, ORDERS, QUERY, START, Cells, Order
from unified_tokenizers.fields import is_whole

NEVER = 2**30  # a step that no position reaches


class Plan(NamedTuple):
    """Positions of one image over the n cells of a grid, in the order in which they run.

    Attributes:
        cells: ``(L,)``, the cell whose codes enter a position; -1 for a query, which none enters, and for text.
        places: ``(L,)``, the cell that lends a position its coordinates; in a frame the position itself.
        seen, sees: ``(L,)``, position i sees j if ``seen[j] <= sees[i]``, and itself. Steps count from 0; nobody sees a query.
        passes: ``(L,)``, the forward pass of sampling in which a position runs; pass g predicts group g.
        sources: ``(n, m)``, the positions that predict each cell; ``START`` or ``NONE``.
        groups: ``(n,)``, the group of each cell; -1 if it is known from the start.
        ranks: ``(n,)``, when each cell comes, counted in cells; the same whether some are known or not.
        tokens: ``(L,)``, the text tokens of a frame that enter positions; -1 for all others. None without any.
    """

    cells: Cells
    places: Cells
    seen: Cells
    sees: Cells
    passes: Cells
    sources: Cells
    groups: Cells
    ranks: Cells
    tokens: Cells | None = None


@dataclass(frozen=True)
class Prediction:
    """How a model predicts images: the order of cells, and how the codes of a cell enter.

    Args:
        order: a name of :data:`unified.prediction.order.ORDERS`.
        size: the number that some orders take: cells a side, regions a side or passes; 0 for the order's default.
        merge: of the last stage; ``channel`` makes cells of s x s codes.
        frame: text tokens inside images, of next-token prediction alone.

    Raises:
        ValueError: for an unknown order, a size that it does not take, or a merge that cannot be sampled.
    """

    order: str = "raster"
    size: int = 0
    merge: Merge = ONE
    frame: Frame | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.order, str) or self.order not in ORDERS:
            raise ValueError(f"prediction.order: {self.order!r} is unknown; use one of {tuple(ORDERS)}.")
        if not is_whole(self.size, least=0):
            raise ValueError(f"prediction.size: {self.size!r} must be a whole number of at least 0.")
        if self.size and self.way.size is None:
            raise ValueError(f"prediction.size: {self.order!r} takes none; leave it out.")
        if self.merge.kind == "mean":
            raise ValueError(
                "prediction.merge: 'mean' is for training stages (schedule.patch_sizes); use 'one' or 'channel'."
            )
        if self.frame is not None and not (self.is_raster and self.merge == ONE):
            raise ValueError(
                f"prediction: {self.order!r} with merge {self.merge.kind!r} does not go with tokens between codes (image_frame), "
                "which stand in raster order; leave it out."
            )

    @classmethod
    def of(cls, config: UnifiedConfig) -> "Prediction":
        """What ``UnifiedConfig.prediction`` says; next-token prediction for None."""
        made = cls.from_mapping({} if config.prediction is None else config.prediction)
        return made if config.image_frame is None else replace(made, frame=Frame.from_mapping(config.image_frame))

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "Prediction":
        """From a mapping with ``order``, ``size``, ``merge``, ``window`` and ``chained``, each with a default.

        Raises:
            ValueError: for unknown keys, and as the class.
        """
        if not isinstance(given, Mapping):
            raise ValueError(
                f"prediction: {given!r} must be a mapping with order, size, merge, window and chained, each optional."
            )
        unknown = sorted(map(str, set(given) - {"order", "size", "merge", "window", "chained"}))
        if unknown:
            raise ValueError(f"prediction: {unknown} unknown; use order, size, merge, window and chained.")
        kind = given.get("merge", "one")
        window = given.get("window", 2 if kind == "channel" else 1)
        try:
            merge = Merge(kind, window, given.get("chained", False))
        except ValueError as error:
            raise ValueError(f"prediction.{error}") from error
        return cls(given.get("order", "raster"), given.get("size", 0), merge)

    @property
    def way(self) -> Order:
        """The order itself."""
        return ORDERS[self.order]

    @property
    def is_raster(self) -> bool:
        """Whether cells come one by one in raster order, as in a causal language model."""
        return self.order == "raster"

    @property
    def has_queries(self) -> bool:
        """Whether some cell is predicted by a query."""
        return bool((self.way.sources((2, 2), 1) == QUERY).any())

    @property
    def known_first(self) -> bool:
        """Whether known codes are given before all others, wherever they are: training has met any of them first."""
        return self.way.any_order

    def plan(self, grid: Grid, seed: int | None = None, known: Cells | None = None) -> Plan:
        """The plan of a grid of cells for sampling, or for its likelihood.

        Args:
            grid: cells ``(h, w)``, those of merged codes.
            seed: of the permutation, for an order that has one in every image.
            known: ``(h*w,)``, True for cells that are given before all others; only with :attr:`known_first`.

        Raises:
            ValueError: if the order does not fit the grid.
        """
        if self.frame is not None:
            return _framed(self.frame, grid)
        if seed is None and known is None:
            return _plan(self.order, self.size, grid)
        return _make(self.way, self.size, grid, seed, known)

    def training_plan(self, grid: Grid, seed: int) -> Plan:
        """The plan of a grid for training: that of sampling, but cell by cell for an order with ``any_order``, whose
        permutation ``seed`` chooses.
        """
        if not self.way.any_order:
            return self.plan(grid)
        return _make(self.way, grid[0] * grid[1], grid, seed, None)


@lru_cache(maxsize=256)
def _plan(order: str, size: int, grid: Grid) -> Plan:
    return _make(ORDERS[order], size, grid, None, None)


@lru_cache(maxsize=64)
def _framed(frame: Frame, grid: Grid) -> Plan:
    """Cells one by one in raster order, with the tokens of a frame in their places."""
    tokens = frame.tokens(grid)
    is_code, index = tokens < 0, np.arange(len(tokens))
    position, cells = np.flatnonzero(is_code), np.where(is_code, is_code.cumsum() - 1, -1)
    sources, order = np.where(position == 0, START, position - 1)[:, None], np.arange(len(position))
    return Plan(cells, index, index, index, is_code.cumsum(), sources, order, order, tokens)


def plan_offsets(plan: Plan, grid: Grid, side: int, coordinates: Coordinates) -> tuple[np.ndarray, float]:
    """Rotary coordinates ``(L, 2)`` of the positions of an image, relative to the one right after ``<boi>``, and how far the
    running index advances over it; ``grid`` is that of its codes, in cells of ``side`` x ``side``.
    """
    if plan.tokens is not None:
        return np.stack([plan.places, plan.places], axis=-1).astype(np.float32), float(len(plan.places))
    offsets, advance = span_offsets(grid, side, *coordinates)
    return offsets.numpy()[plan.places], advance


def _make(order: Order, size: int, grid: Grid, seed: int | None, known: Cells | None) -> Plan:
    size = size or order.size or 0
    groups, sources = np.unique(order.groups(grid, size), return_inverse=True)[1], order.sources(grid, size)
    if order.any_order:
        permutation = np.random.default_rng(seed or 0).permutation(len(groups))
        groups = groups[permutation.argsort()] if seed is not None else groups
        ranks = permutation.argsort() if seed is not None else np.arange(len(groups))
    else:
        ranks = np.lexsort((np.arange(len(groups)), groups)).argsort()
    if known is not None:
        if not (sources == QUERY).all():
            raise ValueError("known: only cells that queries predict can be given first.")
        rest = np.unique(groups[~known])
        groups = np.where(known, -1, np.searchsorted(rest, groups))
    return arrange_positions(groups, sources, ranks, order.any_order)


def arrange_positions(groups: Cells, sources: Cells, ranks: Cells, one_by_one: bool = False) -> Plan:
    """Positions that predict ``groups`` from ``sources``, in the order in which they run.

    Pass g holds the codes of group g - 1, the sources of group g that entered in an earlier pass and enter again, and the
    queries of group g.

    Args:
        groups: ``(n,)``, -1 for cells that are given first.
        sources: ``(n, m)`` of :mod:`unified.prediction.order`.
        ranks: ``(n,)`` order of the cells.
        one_by_one: codes see those of a lower rank, instead of all of their group and those before.
    """
    cells = np.lexsort((ranks, groups))
    step = np.empty_like(groups)
    step[cells] = np.arange(len(cells)) if one_by_one else groups[cells] - groups.min()
    # The step of the last code before each group; codes given first are before all.
    before = np.array([step[groups < g].max(initial=-1) for g in range(groups.max() + 1)])
    entering = [(groups[c] + 1, 0, c, c, step[c], step[c]) for c in cells]
    late: dict[tuple[int, int], int] = {}
    for cell in cells:
        for source in sources[cell]:
            if source >= 0 and groups[source] < groups[cell] - 1:
                late[int(source), int(groups[cell])] = 0
    entering += [(g, 1, c, c, before[g], before[g]) for c, g in late]
    asked = [c for c in cells if groups[c] >= 0 and (sources[c] == QUERY).any()]
    entering += [(groups[c], 2, -1, c, NEVER, before[groups[c]]) for c in asked]
    table = np.array(entering)
    table = table[np.lexsort((np.arange(len(table)), table[:, 1], table[:, 0]))]
    passes, kinds, entered, places, seen, sees = table.T
    own, again, query = (np.flatnonzero(kinds == kind) for kind in range(3))
    position, asking = np.full(len(groups), NONE), np.full(len(groups), NONE)
    position[entered[own]], asking[places[query]] = own, query
    repeated = {(int(entered[i]), int(passes[i])): i for i in again}
    found = np.full(sources.shape, NONE)
    for cell in cells:
        if groups[cell] < 0:
            continue
        for column, source in enumerate(sources[cell]):
            if source == QUERY:
                found[cell, column] = asking[cell]
            elif source >= 0:
                found[cell, column] = repeated.get((int(source), int(groups[cell])), position[source])
            else:
                found[cell, column] = source
    return Plan(entered, places, seen, sees, passes, found, groups, ranks)


RASTER = Prediction()
