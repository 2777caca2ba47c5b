"""Text tokens inside an image, as Emu3 and Lumina-mGPT have them: in front of its codes, behind each row, and behind all.

They are given, not sampled, and not in the loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from unified.config import UnifiedConfig
from unified.prediction.merge import Grid
from unified_tokenizers.fields import is_whole


@dataclass(frozen=True)
class Frame:
    """Between ``<boi>`` and ``<eoi>``: ``before row_0 row_end row_1 row_end ... after``, or the same with ``between_rows``.

    Args:
        before: ids in front of the codes, for each code grid; grids that are not named cannot be sampled. Empty for none.
        row_end: id behind every row; None for none.
        between_rows: id behind every row but the last; None for none.
        after: ids behind the last row.
    """

    before: tuple[tuple[Grid, tuple[int, ...]], ...] = ()
    row_end: int | None = None
    between_rows: int | None = None
    after: tuple[int, ...] = ()

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "Frame":
        """From ``UnifiedConfig.image_frame``, where ``before`` has the ids by names of grids such as ``90x90``.

        Raises:
            ValueError: for unknown keys, two ids behind rows, or what is no id or no grid.
        """
        unknown = sorted(map(str, set(given) - {"before", "row_end", "between_rows", "after"}))
        if unknown:
            raise ValueError(f"image_frame: {unknown} unknown; use before, row_end or between_rows, and after.")
        before, after = given.get("before") or {}, given.get("after") or []
        behind = {name: given.get(name) for name in ("row_end", "between_rows")}
        if not isinstance(before, Mapping):
            raise ValueError(
                f"image_frame.before: {before!r} must be a mapping of grids such as 90x90 to lists of ids."
            )
        for name, token in behind.items():
            if token is not None and not is_whole(token, least=0):
                raise ValueError(f"image_frame.{name}: {token!r} is no token id.")
        if None not in behind.values():
            raise ValueError(f"image_frame: {behind} stand both behind a row; give one of the two.")
        grids = tuple((_as_grid(name), _as_ids(ids, "before")) for name, ids in before.items())
        return cls(grids, **behind, after=_as_ids(after, "after"))

    def check(self, vocab_size: int) -> None:
        """Raises ValueError if a token is not in the text vocabulary."""
        ends = [token for token in (self.row_end, self.between_rows) if token is not None]
        for token in (*(each for _, ids in self.before for each in ids), *ends, *self.after):
            if token >= vocab_size:
                raise ValueError(f"image_frame: {token} is outside the backbone's vocabulary of {vocab_size}.")

    def tokens(self, grid: Grid) -> np.ndarray:
        """Ids ``(L,)`` of all positions of an image, -1 where a code stands. Raises ValueError for a grid without ids."""
        before = dict(self.before)
        if before and grid not in before:
            known = ", ".join(f"{height}x{width}" for height, width in before)
            raise ValueError(
                f"image_frame.before: no tokens for a grid of {grid[0]}x{grid[1]} codes; the model has {known}."
            )
        row = [-1] * grid[1] + [token for token in (self.row_end, self.between_rows) if token is not None]
        rows = row * grid[0]
        return np.array([*before.get(grid, ()), *(rows if self.between_rows is None else rows[:-1]), *self.after])


def image_length(config: UnifiedConfig, grid: Grid) -> int:
    """Tokens of an image between ``<boi>`` and ``<eoi>``: its codes, and those of the model's frame."""
    if config.image_frame is None:
        return grid[0] * grid[1]
    return len(Frame.from_mapping(config.image_frame).tokens(grid))


def _as_grid(name: Any) -> Grid:
    height, cross, width = str(name).partition("x")
    if not (cross and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise ValueError(f"image_frame.before: {name!r} is no grid; name one such as 90x90.")
    return int(height), int(width)


def _as_ids(ids: Any, name: str) -> tuple[int, ...]:
    if not isinstance(ids, list | tuple) or not all(is_whole(each, least=0) for each in ids):
        raise ValueError(f"image_frame.{name}: {ids!r} is no list of token ids.")
    return tuple(ids)
