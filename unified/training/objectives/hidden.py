"""Hidden states of the positions of a batch."""

from typing import Any

import torch
from torch import Tensor


def states_at(states: Tensor, positions: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The mean state ``(N, D)`` at the flat positions ``(N, m)`` of a batch, and whether ``(N,)`` there is one.

    ``states`` are ``(B, S - 1, D)``: a forward pass with labels leaves out the last position of every row.
    """
    rows, length = inputs["input_ids"].shape[:2]
    there = (positions >= 0) & (positions < rows * length) & (positions % length < length - 1)
    place = torch.where(there, positions - positions // length, 0)
    share = there.to(states.dtype) / there.sum(dim=1, keepdim=True).clamp_min(1)
    return (states.flatten(0, 1)[place] * share[..., None]).sum(dim=1), there.any(dim=1).float()
