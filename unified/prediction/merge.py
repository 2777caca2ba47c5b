"""How finished image codes enter the backbone: one position each, or a window of s x s codes a position.

``one``
    A position for every code, in any order; training and sampling.
``mean``
    The mean of the embeddings of a window (next-patch prediction, arXiv 2412.15321): training only, because the codes of
    a window are predicted by one distribution.
``channel``
    A learned merge of a window, which has one distribution for each of its codes (Token-Shuffle, arXiv 2504.17789): training
    and sampling, with s^2 times fewer positions. The codes of a window are independent given what came before it, unless they
    are ``chained``: each is then predicted from those before it in the window too, by a small module behind the backbone.
"""

from dataclasses import dataclass

from torch import Tensor

from unified_tokenizers.fields import is_whole

Grid = tuple[int, int]
MERGES = ("one", "mean", "channel")


@dataclass(frozen=True)
class Merge:
    """A way to merge, the side s of its windows, and whether the codes of a window follow one another.

    Raises:
        ValueError: for an unknown way, or a side or a chain that it cannot have.
    """

    kind: str = "one"
    side: int = 1
    chained: bool = False

    def __post_init__(self) -> None:
        if self.kind not in MERGES:
            raise ValueError(f"merge: {self.kind!r} is unknown; use one of {MERGES}.")
        if (
            not is_whole(self.side)
            or (self.kind == "one" and self.side != 1)
            or (self.kind == "channel" and self.side < 2)
        ):
            raise ValueError(f"merge: {self.kind!r} cannot have windows of side {self.side!r}.")
        if not isinstance(self.chained, bool) or (self.chained and self.kind != "channel"):
            raise ValueError(
                f"chained: {self.chained!r} with merge {self.kind!r}; it is true or false, and true only with 'channel'."
            )


ONE = Merge()


def patches(patch_size: int) -> Merge:
    """The merge of next-patch prediction at patch side p; p = 1 is next-token prediction."""
    return ONE if patch_size == 1 else Merge("mean", patch_size)


def merged_grid(grid: Grid, side: int) -> Grid:
    """Grid of windows for a grid of codes.

    Raises:
        ValueError: if ``side`` does not divide both sides of the grid.
    """
    height, width = grid
    if side < 1 or height % side or width % side:
        raise ValueError(
            f"patch_size, prediction.window: {side} does not divide the code grid {height}x{width}; use a divisor of both sides."
        )
    return height // side, width // side


def windows(values: Tensor, grid: Grid, side: int) -> Tensor:
    """``(B, h*w, ...)`` in raster order to ``(B, h*w/s^2, s^2, ...)``, windows and their contents in raster order.

    Raises:
        ValueError: if ``side`` does not divide the grid, or the grid does not match the number of codes.
    """
    rows, columns = merged_grid(grid, side)
    if values.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"grid: {grid[0]}x{grid[1]} needs {grid[0] * grid[1]} codes, got {values.shape[1]}.")
    rest = values.shape[2:]
    split = values.reshape(-1, rows, side, columns, side, *rest)
    return split.transpose(2, 3).reshape(-1, rows * columns, side * side, *rest)
