"""Cross-entropy over a large text vocabulary without the logits of a whole batch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unified.sequence import IGNORE

LOGITS_AT_ONCE = 2**24  # 64 MB in float32


def text_cross_entropy(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocab_size: int
) -> Tensor:
    """Summed cross-entropy in nats of ``hidden (N, D)`` against ``targets (N,)``; -100 adds nothing.

    Logits are float32 and made for a part of the positions at a time, in the backward pass once more: a batch of 8,192
    positions over 152,000 ids would take 5 GB for its logits alone, and as much for their gradient.
    """
    rows = max(1, LOGITS_AT_ONCE // vocab_size)

    def part(states: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(states).float(), ids, reduction="none", ignore_index=IGNORE)

    if len(hidden) <= rows:
        return part(hidden, targets).sum()
    losses = []
    for states, ids in zip(hidden.split(rows), targets.split(rows), strict=True):
        losses.append(
            checkpoint(part, states, ids, use_reentrant=False) if torch.is_grad_enabled() else part(states, ids)
        )
    return torch.cat(losses).sum()
