"""Next-patch prediction (arXiv 2412.15321) as pure functions.

A grid of image codes is cut into p x p windows. A window enters the backbone as the mean of its code embeddings, and
one output distribution is scored against all of its codes. Training goes from large patches to p = 1, which is plain
next-token prediction; sampling is always p = 1.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from unified.prediction.merge import Grid, windows
from unified.sequence import IGNORE


def group_embeddings(embeds: Tensor, grid: Grid, patch_size: int) -> Tensor:
    """Mean embedding of every patch: ``(B, h*w, D)`` to ``(B, h*w/p^2, D)``, patches in raster order.

    Raises:
        ValueError: if ``patch_size`` does not divide the grid, or the grid does not match the number of codes.
    """
    grouped = windows(embeds, grid, patch_size)
    return grouped.squeeze(2) if patch_size == 1 else grouped.mean(dim=2)


def group_targets(codes: Tensor, grid: Grid, patch_size: int) -> Tensor:
    """Codes of every patch: ``(B, h*w)`` to ``(B, h*w/p^2, p^2)``; integer in, the same integers out.

    Raises:
        ValueError: if ``patch_size`` does not divide the grid, or the grid does not match the number of codes.
    """
    return windows(codes, grid, patch_size)


def mean_embedding(embed: Callable[[Tensor], Tensor], codes: Tensor) -> Tensor:
    """Mean embedding of the codes of each window: ``(N, P)`` to ``(N, D)``; negative codes are unused columns."""
    if codes.shape[1] == 1:
        return embed(codes[:, 0])
    used = (codes >= 0)[..., None]
    return (embed(codes.clamp_min(0)) * used).sum(dim=1) / used.sum(dim=1)


def patch_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of a patch's codes under its one distribution.

    Args:
        logits: ``(..., K)``, one distribution per patch.
        targets: ``(..., P)`` codes of the patch; -100 in unused columns.

    Returns:
        ``(...)`` loss per patch in nats: ``logsumexp(z) - mean_k z[t_k]``, which equals the mean of P cross-entropies
        without a P-fold copy of the logits. At P = 1 it is ``F.cross_entropy``. 0 for a patch without codes.
    """
    if targets.shape[-1] == 1:
        flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), reduction="none")
        return flat.reshape(targets.shape[:-1])
    logits, used = logits.float(), targets != IGNORE
    count = used.sum(dim=-1)
    of_targets = (logits.gather(-1, targets.clamp_min(0)) * used).sum(dim=-1) / count.clamp_min(1)
    return (logits.logsumexp(dim=-1) - of_targets) * (count > 0)
