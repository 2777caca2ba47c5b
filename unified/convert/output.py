"""What the generation losses return."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unified.prediction.merge import Grid


@dataclass
class GenerationOutput:
    """Loss in nats, and the logits of the codes ``(B, positions, K)`` (``positions`` is h*w at patch size 1)."""

    loss: Tensor
    image_logits: Tensor


def check_pictures(prompt_ids: Tensor, codes: Tensor, codebook_size: int) -> Grid:
    """Grid ``(h, w)`` of ``codes``; raises ValueError unless prompts ``(B, T)`` and codes ``(B, h, w)`` belong together."""
    if prompt_ids.ndim != 2 or prompt_ids.shape[1] == 0 or codes.ndim != 3 or len(prompt_ids) != len(codes):
        raise ValueError(
            f"prompt_ids, codes: need (B, T) and (B, h, w), got {tuple(prompt_ids.shape)} and {tuple(codes.shape)}."
        )
    if codes.dtype != torch.int64 or codes.min() < 0 or codes.max() >= codebook_size:
        raise ValueError(f"codes: need int64 in [0, {codebook_size}), got {codes.dtype}; made by another tokenizer?")
    return codes.shape[1], codes.shape[2]
