"""Small learned modules between image codes and the backbone: a window of codes to one position and back, and a join of sources.

The merge of s x s codes is Token-Shuffle's (arXiv 2504.17789, section 3.2), whose codes of a window are independent of one another.
The chain behind it makes them follow one another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization


class _Residual(nn.Module):
    """A gated MLP of the width, added to its input."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class WindowMerge(nn.Module):
    """Embeddings of the codes of a window to one: each to D / s^2 numbers, side by side, through an MLP.

    Raises:
        ValueError: if s^2 does not divide the width.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        if width % side**2:
            raise ValueError(f"prediction.window: {side}^2 does not divide the width of {width}; use a smaller window.")
        self.narrow = nn.Linear(width, width // side**2, bias=False)
        self.mlp = _Residual(width)

    def forward(self, embeds: Tensor) -> Tensor:
        """``(..., s^2, D)`` to ``(..., D)``."""
        return self.mlp(self.narrow(embeds.to(self.narrow.weight.dtype)).flatten(-2))


class WindowSplit(nn.Module):
    """One final state to one for each code of the window that it predicts: an MLP, then a matrix for each code."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.codes = side**2
        self.mlp = _Residual(width)
        self.widen = nn.Linear(width, self.codes * width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., s^2, D)``."""
        return self.widen(self.mlp(hidden.to(self.widen.weight.dtype))).unflatten(-1, (self.codes, -1))


class WindowChain(nn.Module):
    """Adds to the state of each code of a window what the codes before it in the window say, then an MLP.

    So the head's distributions multiply to the likelihood of a window whose codes depend on one another. The work of the
    backbone stays that of one position a window; a larger network for the same purpose is MEGABYTE's local model (arXiv
    2305.07185). Embeddings are narrowed to D / s^2 numbers and laid side by side, as they are merged, and a matrix reads of
    them what stands before each code.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        self.codes = side**2
        self.narrow = nn.Linear(width, width // self.codes, bias=False)
        self.before = nn.Linear(width, self.codes * width, bias=False)
        self.mlp = _Residual(width)

    def forward(self, states: Tensor, embeds: Tensor, place: int | None = None) -> Tensor:
        """States ``(..., s^2, D)`` and the embeddings of the window's codes, alike, to ``(..., s^2, D)``.

        With ``place`` it is the state of that code alone, ``(..., D)``; the embeddings from it on are not read.
        """
        width, share = self.narrow.in_features, self.narrow.out_features
        entering = self.narrow(embeds.to(self.narrow.weight.dtype)).flatten(-2)
        if place is not None:
            rows = self.before.weight[place * width : (place + 1) * width, : place * share]
            return self.mlp(states[..., place, :] + F.linear(entering[..., : place * share], rows))
        earlier = torch.ones(self.codes, self.codes, dtype=torch.bool, device=states.device).tril(-1)
        shown = earlier.repeat_interleave(width, dim=0).repeat_interleave(share, dim=1)
        return self.mlp(states + F.linear(entering, self.before.weight * shown).unflatten(-1, (self.codes, width)))


class SourceJoin(nn.Module):
    """Joins the final states of a cell's sources into one: a matrix for each source, then an MLP.

    A position then need not say in one state what follows on its right and what follows below it. The published way, a head
    for each source and the mean of their logits (arXiv 2503.10696), scores all codes once for each source.
    """

    def __init__(self, width: int, sources: int):
        super().__init__()
        self.narrow = nn.Linear(sources * width, width, bias=False)
        self.mlp = _Residual(width)

    def forward(self, hidden: Tensor, missing: Tensor) -> Tensor:
        """``(..., m, D)`` to ``(..., D)``; ``missing (..., m)`` is True for sources that a cell does not have."""
        there = (~missing).to(self.narrow.weight.dtype)
        shares = there / there.sum(dim=-1, keepdim=True).clamp_min(1)
        return self.mlp(self.narrow((hidden.to(shares.dtype) * shares[..., None]).flatten(-2)))


@torch.no_grad()
def initialize_image_module(module: nn.Module) -> bool:
    """Give a module of this file its first weights, which keep the size of what passes; False for any other module."""
    if isinstance(module, WindowMerge):
        initialization.orthogonal_(module.narrow.weight)
    elif isinstance(module, WindowSplit):
        initialization.normal_(module.widen.weight, 0.0, module.widen.in_features**-0.5)
    elif isinstance(module, WindowChain):
        initialization.orthogonal_(module.narrow.weight)
        initialization.zeros_(module.before.weight)  # independent codes
    elif isinstance(module, SourceJoin):  # the mean of the sources
        width = module.narrow.out_features
        initialization.copy_(module.narrow.weight, torch.eye(width).repeat(1, module.narrow.in_features // width))
    elif isinstance(module, _Residual):
        initialization.ones_(module.norm.weight)
        initialization.normal_(module.gate_up.weight, 0.0, module.gate_up.in_features**-0.5)
        initialization.zeros_(module.down.weight)
    else:
        return False
    return True
