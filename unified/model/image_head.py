"""The image head: scores of codes, and the next-patch loss without ever holding all scores at once."""

from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unified.prediction.npp import patch_cross_entropy

_SCORES_AT_ONCE = 2**23  # 32 MB in float32: large enough for an efficient product, small enough to stay near the core


class ImageHead(nn.Linear):
    """Linear scores of K image codes; with targets, the loss of patches instead.

    Scores of a large codebook outweigh everything else in memory, and passing over them takes a large part of the time.
    So rows are taken in parts, and the gradient of a part is computed while its scores are at hand: only the gradients
    of the input and of the weight outlive the forward pass.
    """

    def __init__(self, width: int, codebook_size: int):
        super().__init__(width, codebook_size, bias=False)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Scores ``(..., K)`` of ``hidden (..., D)``; with targets ``(N, P)`` the loss of ``hidden (N, D)`` in nats.

        The loss is the sum of :func:`unified.prediction.npp.patch_cross_entropy` over the N patches.
        """
        if targets is None:
            return super().forward(hidden)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if dtype == torch.float16:  # gradients as small as these vanish unless the loss was scaled before
            return patch_cross_entropy(super().forward(hidden), targets).sum()
        return _PatchLoss.apply(hidden, self.weight, targets, dtype, torch.is_grad_enabled())


def patch_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed patch loss under any head: an adapter on it, or 8-bit weights, need its scores."""
    if isinstance(head, ImageHead | ModulesToSaveWrapper):
        return head(hidden, targets)
    return patch_cross_entropy(head(hidden), targets).sum()


class _PatchLoss(torch.autograd.Function):
    """Sum of patch losses, with its gradient made on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, learning: bool
    ) -> Tensor:
        wants_hidden, wants_weight = (learning and wanted for wanted in ctx.needs_input_grad[:2])
        by_hidden = torch.empty_like(hidden) if wants_hidden else None
        by_weight = torch.zeros_like(weight) if wants_weight else None
        rows = max(1, _SCORES_AT_ONCE // weight.shape[0])
        buffer = hidden.new_empty(min(rows, len(hidden)), weight.shape[0], dtype=torch.float32)
        losses = [hidden.new_zeros(0, dtype=torch.float32)]
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(hidden), rows):
                part, codes = hidden[start : start + rows].to(dtype), targets[start : start + rows]
                if dtype == torch.float32:
                    scores = torch.mm(part, matrix.T, out=buffer[: len(part)])
                else:
                    scores = buffer[: len(part)].copy_(part @ matrix.T)
                peak = scores.amax(dim=1, keepdim=True)
                of_targets = scores.gather(1, codes).mean(dim=1, keepdim=True)
                total = scores.sub_(peak).exp_().sum(dim=1, keepdim=True)
                losses.append((peak + total.log() - of_targets).squeeze(1))
                if not (wants_hidden or wants_weight):
                    continue
                # Probabilities less the targets' share, times total: dividing the small factors saves a pass.
                gradient = scores.scatter_add_(1, codes, (-total / codes.shape[1]).expand(codes.shape)).to(dtype)
                if by_hidden is not None:
                    by_hidden[start : start + rows] = (gradient @ matrix) / total
                if by_weight is None:
                    continue
                shared = (part / total).to(dtype)
                if by_weight.dtype == dtype:
                    by_weight.addmm_(gradient.T, shared)
                else:
                    by_weight += gradient.T @ shared
        ctx.save_for_backward(by_hidden, by_weight)
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        by_hidden, by_weight = (None if g is None else g * total.to(g.dtype) for g in ctx.saved_tensors)
        return by_hidden, by_weight, None, None, None
