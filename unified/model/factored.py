"""Image tables of two factors, for codebooks too large for a row each: code c is the pair ``(c // B, c % B)``, with K = A * B.

A code enters as the sum of a row of each table and is predicted in two steps, its second factor after its first (arXiv
2409.04410). Where that work runs a small transformer between the two steps, the first factor adds a vector here: so guidance of
states is guidance of both factors' scores, and all K probabilities are at hand to be filtered and sampled as those of one step.
"""

import torch
from torch import Tensor, nn

from unified.sequence import IGNORE


class FactoredEmbedding(nn.Module):
    """Codes ``(...)`` to ``(..., D)``: the sum of the rows of their two factors."""

    def __init__(self, factors: tuple[int, int], width: int):
        super().__init__()
        self.first, self.second = (nn.Embedding(count, width) for count in factors)

    def forward(self, codes: Tensor) -> Tensor:  # noqa: D102
        count = self.second.num_embeddings
        return self.first(codes // count) + self.second(codes % count)


class FactoredHead(nn.Module):
    """Log-probabilities of K image codes, ``log p(a) + log p(b | a)``; with targets, the loss of patches instead."""

    def __init__(self, factors: tuple[int, int], width: int):
        super().__init__()
        self.in_features, self.out_features = width, factors[0] * factors[1]
        self.first, self.second = (nn.Linear(width, count, bias=False) for count in factors)
        self.given = nn.Embedding(
            factors[0], width
        )  # what a first factor adds to the state that the second is scored from

    def forward(self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Log-probabilities ``(..., K)`` of ``hidden (..., D)``; with targets ``(N, P)`` the loss of ``hidden (N, D)``.

        The loss is that of :class:`unified.model.image_head.ImageHead`, in nats.
        """
        if targets is not None:
            used = targets != IGNORE
            losses = -self.log_probs(hidden, targets).sum(dim=1) / used.sum(dim=1).clamp_min(1)
            return losses.sum() if weights is None else (losses * weights).sum()
        hidden = hidden.to(self.first.weight.dtype)
        second = self.second(hidden)[..., None, :] + self.second(self.given.weight)
        joint = self.first(hidden).float().log_softmax(-1)[..., None] + second.float().log_softmax(-1)
        return joint.flatten(-2)

    def log_probs(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Log-probabilities ``(N, P)`` of codes ``(N, P)`` of states ``(N, D)``, 0 where a code is -100.

        A + B scores are made for a state and a code, not K.
        """
        hidden, known = hidden.to(self.first.weight.dtype), codes.clamp_min(0)
        first, second = known // self.second.out_features, known % self.second.out_features
        of_first = self.first(hidden).float().log_softmax(-1).gather(1, first)
        scores = self.second(hidden[:, None] + self.given(first)).float().log_softmax(-1)
        found = of_first + scores.gather(2, second[..., None])[..., 0]
        return torch.where(codes == IGNORE, 0.0, found)


@torch.no_grad()
def fill_factors(embedding: FactoredEmbedding, head: FactoredHead, embed: Tensor, scores: Tensor) -> None:
    """Start both tables from A + B rows ``(A + B, D)`` each: rows of the embedding are means of two, so that sums have their mean.

    The second factor starts without a look at the first.
    """
    for part, table in ((embedding, embed / 2), (head, scores)):
        tables = (part.first.weight, part.second.weight)
        for weight, rows in zip(tables, table.split([len(each) for each in tables]), strict=True):
            weight.copy_(rows)
    head.given.weight.zero_()
