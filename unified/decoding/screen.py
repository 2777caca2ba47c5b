"""Codes drawn without reading the whole image head: 8-bit logits with a bound tell which few codes can win.

One row of a decoding step spends its time reading the head. Its 8-bit copy is a quarter as large; with the noise added, a
code whose best case stays below another one's worst case cannot be drawn, and only the others need exact logits.
"""

import torch
from torch import Tensor

from unified.decoding.linear import LEVELS, Int8, round_rows
from unified.decoding.sampler import Sampling, check_finite

MOST = 512  # candidates beyond which the whole head is as quick


class Screen:
    """Draws codes by a head ``(K, D)`` in float32 on the CPU, exactly but for the rounding of float32 sums."""

    def __init__(self, weight: Tensor):
        self.weight, self._rounded = weight.detach(), Int8(weight)
        exact = self.weight.double()
        error = (exact - round_rows(self.weight).dequantize()).norm(dim=1)
        # Cauchy-Schwarz: the weights' rounding, that of the state in two steps, and the sums' own in float32.
        width = weight.shape[1]
        rounding = width**0.5 / (2 * LEVELS) ** 2 + width * 2**-23
        self._bound = (error + rounding * exact.norm(dim=1)).float()

    def bounded_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(K,)`` of a state ``(D,)`` from 8-bit weights, and how far the exact ones may be from them."""
        largest = hidden.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        scaled = hidden / largest
        coarse = (scaled * LEVELS).round() / LEVELS
        rest = (scaled - coarse) * (2 * LEVELS)  # what the first 8 bits missed, in 8 further ones
        one, other = self._rounded.scaled(torch.stack([coarse, rest]))
        return one.add_(other, alpha=1 / (2 * LEVELS)).mul_(largest), self._bound * hidden.norm()

    def draw(self, hidden: Tensor, sampling: Sampling, noise: Tensor) -> Tensor | None:
        """The code that the whole head draws from a state ``(D,)`` with noise ``(K,)``; None where only it can tell.

        Raises:
            ValueError: if the logits are not finite.
        """
        hidden = hidden / sampling.temperature
        logits, bound = self.bounded_logits(hidden)
        check_finite(logits.amax())
        low, high = logits - bound, logits + bound
        worst, best = low + noise, high + noise
        kept = sampling.top_k if 0 < sampling.top_k < len(logits) else len(logits)
        if kept < len(logits) // 32:  # most winners would be thrown away one by one
            least = low.topk(kept, sorted=False).values.amin()  # at most the k-th largest of the exact logits
            beyond = high < least
            worst.masked_fill_(beyond, float("-inf"))
            best.masked_fill_(beyond, float("-inf"))
        while True:
            candidates = ((best >= worst.amax()) & (best > float("-inf"))).nonzero().squeeze(1)
            if not 0 < len(candidates) <= MOST:
                return None
            exact = self.weight[candidates] @ hidden
            winner = (exact + noise[candidates]).argmax()
            if self._above(exact[winner], candidates[winner], hidden, low, high, kept) < kept:
                return candidates[winner]
            # Beyond the top-k, and with it every code that is not likelier; the next winner is among the rest.
            beyond = high <= exact[winner]
            beyond[candidates[exact <= exact[winner]]] = True
            worst.masked_fill_(beyond, float("-inf"))
            best.masked_fill_(beyond, float("-inf"))

    def _above(self, logit: Tensor, code: Tensor, hidden: Tensor, low: Tensor, high: Tensor, enough: int) -> int:
        """How many codes are likelier than ``code``; counted no further than the answer to "fewer than ``enough``?"."""
        if enough == len(low):
            return 0
        certain, possible = low > logit, high > logit
        count, most = torch.stack([certain.sum(), possible.sum()]).tolist()
        if count >= enough or most < enough:
            return count
        unsure = (possible ^ certain).nonzero().squeeze(1)
        unsure = unsure[unsure != code]
        return count + int((self.weight[unsure] @ hidden > logit).sum())
