"""Decoding images after a class or features instead of a text prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unified.decoding.decode import continue_span
from unified.decoding.decoder import Decoder
from unified.decoding.fused_llama import make_decoder
from unified.decoding.prefill import read
from unified.decoding.sampling import Sampling
from unified.model.modeling import UnifiedForCausalLM
from unified.prediction.coordinates import span_offsets
from unified.prediction.merge import Grid


@torch.inference_mode()
def generate_conditioned(
    model: UnifiedForCausalLM | Decoder,
    condition: Tensor,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    condition_mask: Tensor | None = None,
) -> Tensor:
    """Draw one image for each condition of a model converted from LlamaGen.

    Args:
        model: a model with a condition module and its own ``llamagen`` positions, or a decoder of one.
        condition: ``(B,)`` classes or ``(B, P, F)`` features.
        grid: code grid ``(h, w)``.
        sampling: guidance and filters.
        generators: one per image.
        condition_mask: ``(B, P)``, 0 on padded features.

    Returns:
        Codes ``(B, h, w)``.

    Raises:
        ValueError: if the model takes no condition, or the number of generators is another.
    """
    decoder = model if not isinstance(model, UnifiedForCausalLM) else make_decoder(model)
    model = decoder.model
    if model.condition is None or model.config.positions != "llamagen":
        raise ValueError(
            "model: takes no condition; use generate_codes with a prompt, or convert a LlamaGen checkpoint."
        )
    if len(generators) != len(condition):
        raise ValueError(f"generators: {len(generators)} given for {len(condition)} conditions; give one each.")
    count = len(condition)
    prefix = model.condition(condition)
    if sampling.guided:
        prefix = torch.cat([prefix, model.condition(model.condition.unconditional(count))])
    rows, length = prefix.shape[:2]
    real = torch.ones(rows, length, dtype=torch.bool, device=model.device)
    if condition_mask is not None:
        real = condition_mask.to(model.device).bool().repeat(rows // count, 1)
    nowhere = torch.full((rows, length, 2), -1.0, device=model.device)
    each, no_images = torch.arange(rows, device=model.device), torch.zeros_like(real)
    state = read(decoder, prefix, nowhere, real, no_images, each, grid[0] * grid[1])
    offsets, _ = span_offsets(grid, 1, "2d", "unit", 0.0)
    coordinates = offsets.to(model.device).expand(rows, -1, -1)
    *_, codes = continue_span(decoder, state, coordinates, sampling, generators)
    return codes.reshape(count, *grid)
