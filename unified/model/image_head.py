"""The image head: scores of codes, and the next-patch loss without ever holding all scores at once."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from unified.model.factored import FactoredHead
from unified.prediction.npp import patch_cross_entropy
from unified.sequence import IGNORE

_SCORES_AT_ONCE = 2**23  # 32 MB in float32: large enough for an efficient product, small enough to stay near the core


class ImageProjection(nn.Module):
    """A hidden layer with GELU in front of the image head, ``(..., D)`` to ``(..., hidden + 1)``.

    The last number is 1: the column of the head that meets it holds a bias. So the head stays a matrix, and guidance may be
    applied in front of it.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear = nn.Linear(width, hidden)

    def forward(self, states: Tensor) -> Tensor:  # noqa: D102
        states = F.gelu(self.linear(states.to(self.linear.weight.dtype)))
        return F.pad(states, (0, 1), value=1.0)


class ImageHead(nn.Linear):
    """Linear scores of K image codes; with targets, the loss of patches instead.

    Scores of a large codebook outweigh everything else in memory, and passing over them takes a large part of the time.
    So rows are taken in parts, and the gradient of a part is computed while its scores are at hand: only the gradients
    of the input and of the weight outlive the forward pass.
    """

    def __init__(self, width: int, codebook_size: int):
        super().__init__(width, codebook_size, bias=False)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Scores ``(..., K)`` of ``hidden (..., D)``; with targets ``(N, P)`` the loss of ``hidden (N, D)`` in nats.

        The loss is the sum over the N windows of :func:`unified.prediction.npp.patch_cross_entropy`, each times its weight
        ``(N,)``.
        """
        if targets is None:
            return super().forward(
                hidden.to(self.weight.dtype)
            )  # an adapter's copy is in float32 on a base in bfloat16
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if dtype == torch.float16:  # gradients as small as these vanish unless the loss was scaled before
            return weighted_sum(patch_cross_entropy(super().forward(hidden), targets), weights)
        return _PatchLoss.apply(hidden, self.weight, targets, weights, dtype, torch.is_grad_enabled())


def patch_losses(head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted sum of patch losses under any head: an adapter on it, or 8-bit weights, need its scores."""
    if isinstance(head, ImageHead | FactoredHead | ModulesToSaveWrapper):
        return head(hidden, targets, weights)
    return weighted_sum(patch_cross_entropy(head(hidden), targets), weights)


def code_log_probs(head: nn.Module, hidden: Tensor, codes: Tensor) -> Tensor:
    """Log-probabilities ``(N, P)`` of codes ``(N, P)``, those of a row under the distribution of its state ``hidden (N, D)``.

    Differentiable, float32, and 0 where a code is -100. Scores are made for a part of the rows at a time, and in the backward
    pass once more, so that no more than a part of them exists at once.
    """

    if isinstance(head, FactoredHead):
        return head.log_probs(hidden, codes)

    def part(states: Tensor, targets: Tensor) -> Tensor:
        scores = head(states).float()
        found = scores.gather(1, targets.clamp_min(0)) - scores.logsumexp(dim=1, keepdim=True)
        return torch.where(targets == IGNORE, 0.0, found)

    rows = max(1, _SCORES_AT_ONCE // head.out_features)  # type: ignore[operator]
    parts = [
        checkpoint(part, states, targets, use_reentrant=False) if torch.is_grad_enabled() else part(states, targets)
        for states, targets in zip(hidden.split(rows), codes.split(rows), strict=True)
    ]
    return torch.cat(parts)


def weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of losses ``(N,)``, each times its weight; None weighs all alike."""
    return losses.sum() if weights is None else (losses * weights).sum()


class _PatchLoss(torch.autograd.Function):
    """Weighted sum of patch losses, with its gradient made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        dtype: torch.dtype,
        learning: bool,
    ) -> Tensor:
        wants_hidden, wants_weight = (learning and wanted for wanted in ctx.needs_input_grad[:2])
        by_hidden = torch.empty_like(hidden) if wants_hidden else None
        by_weight = torch.zeros_like(weight) if wants_weight else None
        used = targets != IGNORE
        count = used.sum(dim=1, keepdim=True).clamp_min(1)
        factors = used.any(dim=1, keepdim=True).float()  # of each loss
        if weights is not None:
            factors = factors * weights[:, None]
        rows = max(1, _SCORES_AT_ONCE // weight.shape[0])
        buffer = hidden.new_empty(min(rows, len(hidden)), weight.shape[0], dtype=torch.float32)
        losses = [hidden.new_zeros(0, dtype=torch.float32)]
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(hidden), rows):
                span = slice(start, start + rows)
                part, codes, share = hidden[span].to(dtype), targets[span].clamp_min(0), used[span] / count[span]
                if dtype == torch.float32:
                    scores = torch.mm(part, matrix.T, out=buffer[: len(part)])
                else:
                    scores = buffer[: len(part)].copy_(part @ matrix.T)
                peak = scores.amax(dim=1, keepdim=True)
                of_targets = (scores.gather(1, codes) * share).sum(dim=1, keepdim=True)
                total = scores.sub_(peak).exp_().sum(dim=1, keepdim=True)
                losses.append(((peak + total.log() - of_targets) * factors[span]).squeeze(1))
                if not (wants_hidden or wants_weight):
                    continue
                # Probabilities less the targets' shares, times total: dividing the small factors saves a pass.
                gradient = scores.scatter_add_(1, codes, -total * share).to(dtype)
                scale = factors[span] / total
                if by_hidden is not None:
                    by_hidden[span] = (gradient @ matrix) * scale
                if by_weight is None:
                    continue
                shared = (part * scale).to(dtype)
                if by_weight.dtype == dtype:
                    by_weight.addmm_(gradient.T, shared)
                else:
                    by_weight += gradient.T @ shared
        ctx.save_for_backward(by_hidden, by_weight)
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:  # type: ignore[override]
        by_hidden, by_weight = (None if g is None else g * total.to(g.dtype) for g in ctx.saved_tensors)
        return by_hidden, by_weight, None, None, None, None
