"""Drawing codes from logits: guidance, temperature, top-k, top-p, and Gumbel-max with one noise stream per image."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MOST = 1e4  # of a guidance scale, and of what a temperature multiplies logits by


@dataclass(frozen=True)
class Sampling:
    """How a code is drawn.

    Args:
        guidance_scale: classifier-free guidance ``u + s * (c - u)`` on the logits; 1 switches it off.
        guidance_schedule: the scale over an image: ``constant``; ``linear`` or ``cosine``, rising from 1 at the first code
            to ``guidance_scale`` at the last; or a function of the share of the codes sampled, in [0, 1], to a scale.
        temperature: divides the logits; below 1 sharpens.
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: keep the smallest set of codes with at least this probability; 1 keeps all.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_schedule: str | Callable[[float], float] = "constant"

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "temperature", "top_k", "top_p"):
            _check_number(name, getattr(self, name))
        if self.guidance_scale < 1:
            raise ValueError(f"guidance_scale: {self.guidance_scale} must be at least 1; 1 switches guidance off.")
        if self.guidance_scale > _MOST:
            raise ValueError(f"guidance_scale: {self.guidance_scale} must be at most {_MOST:g}.")
        if self.temperature < 1 / _MOST:  # logits have to stay finite
            least = "above 0" if self.temperature <= 0 else f"at least {1 / _MOST:g}"
            raise ValueError(f"temperature: {self.temperature} must be {least}; use top_k=1 for the most likely code.")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise ValueError(f"top_k: {self.top_k} must be a whole number, 0 to keep all codes.")
        object.__setattr__(self, "top_k", int(self.top_k))
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} must lie in (0, 1]; 1 keeps all codes.")
        if not callable(self.guidance_schedule) and self.guidance_schedule not in _SCHEDULES:
            raise ValueError(
                f"guidance_schedule: {self.guidance_schedule!r} is unknown; use one of {tuple(_SCHEDULES)} or a function."
            )

    def scales(self, steps: int) -> list[float]:
        """Guidance scale of each of ``steps`` codes.

        Raises:
            ValueError: if a schedule of one's own falls below 1, or gives anything but finite numbers.
        """
        shares = [step / max(steps - 1, 1) for step in range(steps)]
        if callable(self.guidance_schedule):
            scales = [self.guidance_schedule(share) for share in shares]
            for scale in scales:
                _check_number("guidance_schedule", scale)
            if min(scales) < 1:
                raise ValueError(f"guidance_schedule: falls to {min(scales)}; a scale must be at least 1.")
            if max(scales) > _MOST:
                raise ValueError(f"guidance_schedule: rises to {max(scales)}; a scale must be at most {_MOST:g}.")
            return scales
        rise = _SCHEDULES[self.guidance_schedule]
        return [1 + (self.guidance_scale - 1) * rise(share) for share in shares]

    @property
    def guided(self) -> bool:
        """Whether an unconditional row is needed."""
        return self.guidance_scale > 1 or callable(self.guidance_schedule)


_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: {value!r} is not a finite number.")


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) on logits ``(B, K)``, or on the final hidden states ``(B, D)``.

    The image head is linear and has no bias, so both give the same logits; the second way runs it once, not twice.
    Computed in float32, returned in the dtype of ``conditional``.
    """
    base = unconditional.float()
    return (base + scale * (conditional.float() - base)).to(conditional.dtype)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Apply temperature, then top-k, then top-p to ``(..., K)``; removed codes become -inf, NaN stays NaN."""
    logits = _tempered(logits, sampling)
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        beyond = probability.cumsum(dim=-1) - probability >= sampling.top_p  # mass before a code reaches top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return logits


def _tempered(logits: Tensor, sampling: Sampling) -> Tensor:
    logits = logits.float()
    return logits if sampling.temperature == 1 else logits / sampling.temperature


def draw(logits: Tensor, noise: Tensor) -> Tensor:
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


def draw_filtered(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """``draw(filter_logits(logits, sampling), noise)`` of ``(B, K)``; on a CPU a large top-k without its threshold.

    The best code of all, noise included, is that of the top-k if fewer than k codes are likelier. Otherwise it and every
    code that is not likelier are out, and the best of the others is looked at: a few passes over a row, no selection.
    """
    size, top_k = logits.shape[-1], int(sampling.top_k)
    if logits.device.type != "cpu" or sampling.top_p < 1 or not size // 16 < top_k < size:
        return draw(filter_logits(logits, sampling), noise)
    logits = _tempered(logits, sampling)
    codes = draw(logits, noise)
    for i, (row, own_noise) in enumerate(zip(logits.numpy(), noise.numpy(), strict=True)):
        while np.count_nonzero(likelier := row > row[codes[i]]) >= top_k:
            codes[i] = int(np.where(likelier, row + own_noise, -np.inf).argmax())
    return codes


def gumbel_noise(generators: Sequence[torch.Generator], size: int, device: torch.device) -> Tensor:
    """``(B, size)`` standard Gumbel noise; row i comes from generator i alone, on the generator's device.

    Adding it to logits and taking the argmax generates from their softmax, and a row does not depend on its batch.
    """
    uniform = torch.empty(len(generators), size, device=device, dtype=torch.float64)
    for row, generator in zip(uniform, generators, strict=True):
        if generator.device == device:
            row.uniform_(generator=generator)  # the numbers of torch.rand, without a copy
        else:
            row.copy_(torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64))
    uniform.clamp_min_(torch.finfo(torch.float64).tiny)
    # The first logarithm needs float64 near 1; its result has the range of float32, where the second costs half.
    return uniform.log_().float().neg_().log_().neg_()


class PositionNoise:
    """Gumbel noise that belongs to a place: the same generator, position and code always meet the same number.

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
