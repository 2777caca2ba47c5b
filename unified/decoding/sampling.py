"""From logits to codes: guidance, filters, and Gumbel-max with one stream of noise per image."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unified.decoding.config import Sampling


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) on logits ``(B, K)``, or on what the image head scores, ``(B, D)``.

    The head is a matrix, so both give the same logits; the second way runs it once, not twice.
    Computed in float32, returned in the dtype of ``conditional``.
    """
    base = unconditional.float()
    return (base + scale * (conditional.float() - base)).to(conditional.dtype)


NO_FLOAT64 = {"mps"}  # types of devices


class LogitFilter(NamedTuple):
    """A step between logits and sampling.

    Attributes:
        apply: turns float32 logits ``(..., K)`` into filtered ones; removed codes become -inf, NaN stays NaN.
        active: whether the settings ask for it.
    """

    apply: Callable[[Tensor, Sampling], Tensor]
    active: Callable[[Sampling], bool]


def _divide_by_temperature(logits: Tensor, sampling: Sampling) -> Tensor:
    return logits / sampling.temperature


def _keep_top_k(logits: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(sampling.top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return logits.masked_fill(logits < threshold, float("-inf"))


def _keep_top_p(logits: Tensor, sampling: Sampling) -> Tensor:
    ordered, order = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    beyond = probability.cumsum(dim=-1) - probability >= sampling.top_p  # mass before a code reaches top_p
    beyond[..., 0] = False  # also where float32 rounds top_p to 0
    return logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))


TOP_K = LogitFilter(_keep_top_k, lambda sampling: sampling.top_k > 0)
# Applied in this order wherever a code or a text token is sampled.
FILTERS = [
    LogitFilter(_divide_by_temperature, lambda sampling: sampling.temperature != 1),
    TOP_K,
    LogitFilter(_keep_top_p, lambda sampling: sampling.top_p < 1),
]


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Apply the active :data:`FILTERS` to ``(..., K)``, in float32."""
    return _apply([each for each in FILTERS if each.active(sampling)], logits, sampling)


def _apply(filters: Sequence[LogitFilter], logits: Tensor, sampling: Sampling) -> Tensor:
    logits = logits.float()
    for each in filters:
        logits = each.apply(logits, sampling)
    return logits


def sample_codes(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Codes ``(B,)`` from logits ``(B, K)``: ``sample_gumbel(filter_logits(logits, sampling), noise)``.

    If top-k is the last active filter and k is large, a CPU samples without selecting the k largest logits.
    """
    active, size = [each for each in FILTERS if each.active(sampling)], logits.shape[-1]
    if active and active[-1] is TOP_K and logits.device.type == "cpu" and size // 16 < sampling.top_k < size:
        return _sample_top_k(_apply(active[:-1], logits, sampling), sampling.top_k, noise)
    return sample_gumbel(_apply(active, logits, sampling), noise)


def code_log_probs(logits: Tensor, codes: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities ``(...)`` of codes under the distribution that they are sampled from: logits ``(..., K)``, filtered."""
    return filter_logits(logits, sampling).log_softmax(dim=-1).gather(-1, codes[..., None]).squeeze(-1)


def sample_gumbel(logits: Tensor, noise: Tensor) -> Tensor:
    """Gumbel-max: sample from the softmax of filtered logits ``(..., K)`` with standard Gumbel noise of the same shape.

    Raises:
        ValueError: if the logits hold NaN or +inf, or a row has no finite one.
    """
    total = logits + noise
    # On a CPU NumPy finds the place of a maximum several times as fast.
    codes = torch.as_tensor(total.numpy().argmax(axis=-1)) if total.device.type == "cpu" else total.argmax(dim=-1)
    if not bool(torch.isfinite(total.amax(dim=-1)).all()):  # a maximum is NaN if any of its values is
        raise ValueError(
            "logits: NaN or infinite; the model's weights or activations overflow, load it in float32 or bfloat16."
        )
    return codes


def _sample_top_k(logits: Tensor, top_k: int, noise: Tensor) -> Tensor:
    """Top-k Gumbel-max without the k-th logit, on a CPU.

    Take the argmax of logits + noise; if its logit ranks in the top k we are done, else restrict to larger logits and
    repeat.
    """
    codes = sample_gumbel(logits, noise)
    for i, (row, own_noise) in enumerate(zip(logits.numpy(), noise.numpy(), strict=True)):
        while np.count_nonzero(larger := row > row[codes[i]]) >= top_k:
            codes[i] = int(np.where(larger, row + own_noise, -np.inf).argmax())
    return codes


def gumbel_noise(generators: Sequence[torch.Generator], size: int, device: torch.device) -> Tensor:
    """``(B, size)`` standard Gumbel noise; row i comes from generator i alone, on the generator's device.

    The argmax of logits plus noise is a sample of their softmax, and a row does not depend on its batch. A device without
    float64 gets the numbers that a CPU computes.
    """
    exact = torch.device("cpu") if device.type in NO_FLOAT64 else device
    uniform = torch.empty(len(generators), size, device=exact, dtype=torch.float64)
    for row, generator in zip(uniform, generators, strict=True):
        if generator.device.type in NO_FLOAT64:  # 24 bits at a time
            coarse, fine = torch.rand(2, size, generator=generator, device=generator.device).cpu().double()
            row.copy_(coarse + fine * 2.0**-24)
        elif generator.device == exact:
            row.uniform_(generator=generator)  # the numbers of torch.rand, without a copy
        else:
            row.copy_(torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64))
    uniform.clamp_min_(torch.finfo(torch.float64).tiny)
    # The first logarithm needs float64 near 1; its result has the range of float32, where the second costs half.
    return uniform.log_().float().neg_().log_().neg_().to(device)


class PositionNoise:
    """Gumbel noise that belongs to a position: the same generator, position and code always meet the same number.

    Whatever else is decoded beside an image, in which order, and how many codes at a time, its noise stays. Positions
    are read in windows that move forward only; what lies behind is forgotten.

    Args:
        generators: one per image.
        size: number of codes K.
        device: where the noise is used.
    """

    def __init__(self, generators: Sequence[torch.Generator], size: int, device: torch.device):
        self.generators, self.size, self.device = generators, size, device
        self._block = max(1, 8192 // size)  # positions sampled at once
        self._start = 0
        self._rows = torch.empty(len(generators), 0, size, device=device)

    def at(self, position: int, count: int = 1) -> Tensor:
        """Noise ``(B, count, K)`` of ``count`` positions from ``position`` on."""
        if position < self._start:
            raise ValueError(f"position: the noise of {position} is gone, the window starts at {self._start}.")
        while self._start + self._rows.shape[1] < position + count:
            fresh = gumbel_noise(self.generators, self._block * self.size, self.device)
            fresh = fresh.reshape(len(self.generators), self._block, self.size)
            behind = min(position - self._start, self._rows.shape[1])
            ahead = self._rows[:, behind:]
            self._rows = torch.cat([ahead, fresh], dim=1) if ahead.shape[1] else fresh
            self._start += behind
        return self._rows[:, position - self._start : position - self._start + count]
