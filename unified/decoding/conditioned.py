"""Decoding pictures after a class or features instead of a text prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from unified.decoding.sampler import Sampling, filter_logits, guide, gumbel_noise
from unified.model import UnifiedForCausalLM
from unified.npp import Grid
from unified.rope import span_offsets


@torch.inference_mode()
def generate_conditioned(
    model: UnifiedForCausalLM,
    condition: Tensor,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    condition_mask: Tensor | None = None,
) -> Tensor:
    """Draw one picture for each condition of a model converted from LlamaGen.

    Args:
        model: a model with a condition module and its own ``llamagen`` positions.
        condition: ``(B,)`` classes or ``(B, P, F)`` features.
        grid: code grid ``(h, w)``.
        sampling: guidance and filters.
        generators: one per picture.
        condition_mask: ``(B, P)``, 0 on padded features.

    Returns:
        Codes ``(B, h, w)``.

    Raises:
        ValueError: if the model takes no condition, or the number of generators is another.
    """
    if model.condition is None or model.config.positions != "llamagen":
        raise ValueError(
            "model: takes no condition; use generate_codes with a prompt, or convert a LlamaGen checkpoint."
        )
    if len(generators) != len(condition):
        raise ValueError(f"generators: {len(generators)} given for {len(condition)} conditions; give one each.")
    guided, count = sampling.guidance_scale > 1, len(condition)
    prefix = model.condition(condition)
    if guided:
        prefix = torch.cat([prefix, model.condition(model.condition.unconditional(count))])
    length, device = prefix.shape[1], model.device
    mask = torch.ones(len(prefix), length, dtype=torch.int64, device=device)
    if condition_mask is not None:
        mask = condition_mask.to(device).repeat(len(prefix) // count, 1)
    offsets, _ = span_offsets(grid, 1, "2d", "unit", 0.0)
    cache = DynamicCache(config=model.config.text_config)
    embeds = prefix
    coordinates = torch.full((len(prefix), length, 2), -1.0, device=device)
    codes = torch.empty(count, grid[0] * grid[1], dtype=torch.int64, device=device)
    for step in range(codes.shape[1]):
        hidden = model.run_backbone(
            embeds, coordinates, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = model.image_head(hidden)
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, sampling.guidance_scale)
        noise = gumbel_noise(generators, model.config.codebook_size, device)
        codes[:, step] = (filter_logits(logits, sampling) + noise).argmax(dim=-1)
        embeds = model.image_embed(codes[:, step].repeat(len(prefix) // count))[:, None]
        coordinates = offsets[step].to(device).expand(len(prefix), 1, 2)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return codes.reshape(count, *grid)
