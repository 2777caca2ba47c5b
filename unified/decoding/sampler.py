"""Drawing codes from logits: guidance, temperature, top-k, top-p, and Gumbel-max with one noise stream per picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a code is drawn.

    Args:
        guidance_scale: classifier-free guidance ``u + s * (c - u)`` on the logits; 1 switches it off.
        temperature: divides the logits; below 1 sharpens.
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: keep the smallest set of codes with at least this probability; 1 keeps all.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.guidance_scale < 1:
            raise ValueError(f"guidance_scale: {self.guidance_scale} must be at least 1; 1 switches guidance off.")
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature} must be above 0; use top_k=1 for the most likely code.")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise ValueError(f"top_k: {self.top_k} must be a whole number, 0 to keep all codes.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} must lie in (0, 1]; 1 keeps all codes.")


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) on logits ``(B, K)``."""
    return unconditional + scale * (conditional - unconditional)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Apply temperature, then top-k, then top-p to ``(B, K)``; removed codes become -inf.

    Raises:
        ValueError: if the logits hold NaN.
    """
    if torch.isnan(logits).any():
        raise ValueError("logits: NaN; the model's weights or activations overflow, load it in float32 or bfloat16.")
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        beyond = probability.cumsum(dim=-1) - probability >= sampling.top_p  # mass before a code reaches top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return logits


def gumbel_noise(generators: Sequence[torch.Generator], size: int, device: torch.device) -> Tensor:
    """``(B, size)`` standard Gumbel noise; row i comes from generator i alone, on the generator's device.

    Adding it to logits and taking the argmax draws from their softmax, and a row does not depend on its batch.
    """
    rows = [torch.rand(size, generator=g, device=g.device, dtype=torch.float64) for g in generators]
    uniform = torch.stack([row.to(device) for row in rows]).clamp_min(torch.finfo(torch.float64).tiny)
    return (-(-uniform.log()).log()).float()
