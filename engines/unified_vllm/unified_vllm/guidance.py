"""Mixes the scores with and without the caption by the scale of each request."""

import math
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

SCALE = "guidance_scale"  # in a request's vllm_xargs, or SamplingParams.extra_args
MOST = 1e4


def scale_of(params: SamplingParams) -> float:
    """Guidance scale of a request. Raises ValueError if it has none, or one out of range."""
    scale: Any = (params.extra_args or {}).get(SCALE)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale <= MOST or math.isnan(scale):
        raise ValueError(
            f"{SCALE}: {scale!r} in vllm_xargs must be a number from 1 to {MOST:g}; this server is guided."
        )
    return float(scale)


class Guidance(LogitsProcessor):
    """``u + s * (c - u)`` for each row, ``s`` being its request's scale; only codes are left."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError if the scale is missing, or ids are restricted, which would hide half of the scores."""
        scale_of(sampling_params)
        if sampling_params.allowed_token_ids is not None:
            raise ValueError("allowed_token_ids: a guided server samples codes alone; leave it out.")

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        about = vllm_config.model_config.hf_config.unified
        self.first, self.size, self.device = about["first_code"], about["codebook_size"], device
        self.scales: dict[int, float] = {}  # by row; never 0

    def is_argmax_invariant(self) -> bool:
        """The likeliest code depends on the scale."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests from row to row."""
        process_dict_updates(self.scales, batch_update, lambda params, prompt, output: scale_of(params))

    def apply(self, logits: Tensor) -> Tensor:
        """Mixed scores in the columns of the codes, -inf elsewhere."""
        scales = torch.tensor([self.scales.get(row, 1.0) for row in range(len(logits))], device=logits.device)[:, None]
        conditional, unconditional = logits[:, self.first :].split(self.size, dim=-1)
        conditional.copy_(unconditional + scales * (conditional - unconditional))
        unconditional.fill_(float("-inf"))
        return logits
