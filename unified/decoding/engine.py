"""Decoding image spans code by code with a key-value cache."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import StaticCache

from unified.decoding.sampler import Sampling, filter_logits, guide, gumbel_noise
from unified.model import UnifiedForCausalLM
from unified.npp import Grid
from unified.rope import span_offsets


@torch.inference_mode()
def generate_codes(
    model: UnifiedForCausalLM,
    prompts: Sequence[Sequence[int]],
    negative_prompts: Sequence[Sequence[int]] | None,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    on_code: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Decode one image span after every prompt.

    Only image codes can be drawn: the text head is never evaluated inside a span. Conditional and unconditional rows
    run in one batch, left-padded to one length.

    Args:
        prompts: ids of each row, ending with ``<boi>``.
        negative_prompts: as many rows for the unconditional side; needed if ``sampling.guidance_scale`` is above 1.
        grid: code grid ``(h, w)``.
        sampling: guidance and filters.
        generators: one per row.
        on_code: called after every code with its index and the codes so far ``(B, h*w)``.

    Returns:
        Codes ``(B, h, w)``.
    """
    if model.condition is not None or model.config.positions == "llamagen":
        raise ValueError("model: draws after a class or features, not after a prompt; use generate_conditioned.")
    guided = sampling.guidance_scale > 1
    if guided and (negative_prompts is None or len(negative_prompts) != len(prompts)):
        raise ValueError(f"negative_prompts: guidance needs one row per prompt ({len(prompts)}).")
    rows = [*prompts, *negative_prompts] if guided and negative_prompts is not None else list(prompts)
    layout, device = model.config.layout, model.device
    length, steps = max(map(len, rows)), grid[0] * grid[1]

    padding = torch.tensor([length - len(row) for row in rows], device=device)
    ids = torch.tensor([[layout.pad_token_id] * (length - len(row)) + list(row) for row in rows], device=device)
    # The cache spans prompt and picture; its mask hides the left padding for good, causality hides the rest.
    mask = (torch.arange(length + steps, device=device) >= padding[:, None]).long()
    position = (torch.arange(length, device=device) - padding[:, None]).clamp_min(0)
    offsets, _ = span_offsets(
        grid, 1, model.config.positions, model.config.coarse_positions, model.config.normalized_range
    )
    coordinates = (length - padding)[:, None, None] + offsets.to(device)

    cache = StaticCache(config=model.config.text_config, max_cache_len=length + steps)
    embeds = model.get_input_embeddings()(ids)
    output = model.run_backbone(
        embeds,
        position[..., None].float().expand(-1, -1, 2),
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
    )
    codes = torch.empty(len(prompts), steps, dtype=torch.int64, device=device)
    for step in range(steps):
        logits = model.image_head(output.last_hidden_state[:, -1])
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, sampling.guidance_scale)
        noise = gumbel_noise(generators, layout.codebook_size, device)
        codes[:, step] = (filter_logits(logits, sampling) + noise).argmax(dim=-1)
        if on_code is not None:
            on_code(step, codes[:, : step + 1])
        if step + 1 == steps:
            break
        drawn = codes[:, step].repeat(2) if guided else codes[:, step]
        output = model.run_backbone(
            model.image_embed(drawn)[:, None],
            coordinates[:, step : step + 1],
            attention_mask=mask,
            position_ids=(length - padding + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
    return codes.reshape(-1, *grid)
