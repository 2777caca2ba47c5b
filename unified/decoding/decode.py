"""Decoding image spans code by code with a key-value cache."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from unified.decoding.config import Sampling
from unified.decoding.decoder import Decoder
from unified.decoding.fused_llama import make_decoder
from unified.decoding.prefill import Prefilled, Prompt, causal_bias, prefill, read
from unified.decoding.sampling import PositionNoise, guide, sample_codes
from unified.model.modeling import UnifiedForCausalLM
from unified.prediction.coordinates import span_offsets
from unified.prediction.merge import Grid


def generate_codes(
    model: UnifiedForCausalLM | Decoder,
    prompts: Sequence[Sequence[int] | Prompt],
    negative_prompts: Sequence[Sequence[int] | Prompt] | None,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    on_code: Callable[[int, Tensor], None] | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Decode one image span after every prompt; see :func:`iterate_codes`.

    Args:
        on_code: called after every code with its index and the codes so far ``(B, h*w)``.

    Returns:
        Codes ``(B, h, w)``.
    """
    decoder = make_decoder(model) if isinstance(model, UnifiedForCausalLM) else model
    for step, codes in enumerate(iterate_codes(decoder, prompts, negative_prompts, grid, sampling, generators, known)):
        if on_code is not None:
            on_code(step, codes)
    return codes.reshape(-1, *grid)


@torch.inference_mode()
def iterate_codes(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | Prompt],
    negative_prompts: Sequence[Sequence[int] | Prompt] | None,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    known: Tensor | None = None,
) -> Iterator[Tensor]:
    """Decode one image span after every prompt, all rows together, one code at a time.

    Only image codes can be sampled: the text head is never evaluated inside a span. Conditional and unconditional rows
    run in one batch; equal prompts are read once.

    Args:
        decoder: from :func:`unified.decoding.make_decoder`.
        prompts: ids of each row, ending with ``<boi>``; a :class:`Prompt` if they hold images.
        negative_prompts: as many rows for the unconditional side; needed if ``sampling.guided``.
        grid: code grid ``(h, w)``.
        sampling: guidance and filters.
        generators: one per row.
        known: ``(B, h, w)`` codes that are forced, -1 where the model samples.

    Yields:
        The codes so far, ``(B, 1)`` to ``(B, h*w)``, row by row through the grid.

    Raises:
        ValueError: if the model takes a condition instead of a prompt, or a list has another length.
    """
    rows = paired_prompts(decoder.model, prompts, negative_prompts, sampling, generators)
    forced = forced_codes(known, len(prompts), grid, decoder.model)
    state = prefill(decoder, rows, grid[0] * grid[1])
    coordinates = span_coordinates(decoder.model, state.position, grid)
    yield from continue_span(decoder, state, coordinates, sampling, generators, forced)


@torch.inference_mode()
def generate_conditioned(
    model: UnifiedForCausalLM | Decoder,
    condition: Tensor,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    condition_mask: Tensor | None = None,
) -> Tensor:
    """Decode one image span after a class or features instead of a prompt, with a model converted from LlamaGen.

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
        ValueError: if the model takes no condition, or there is another number of generators.
    """
    decoder = make_decoder(model) if isinstance(model, UnifiedForCausalLM) else model
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
    forced = forced_codes(None, count, grid, model)
    *_, codes = continue_span(decoder, state, coordinates, sampling, generators, forced)
    return codes.reshape(count, *grid)


def continue_span(
    decoder: Decoder,
    state: Prefilled,
    coordinates: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    known: Tensor,
) -> Iterator[Tensor]:
    """The loop itself: codes at ``coordinates (B, n, 2)`` after what ``state`` has read, ``known (B, n)`` forced.

    Codes that are known in every row follow in the forward pass of the code before them.
    """
    steps, device = coordinates.shape[1], coordinates.device
    cache, hidden, scales = state.cache, state.hidden, sampling.scales(steps)
    positions = decoder.positions(coordinates)
    noise = PositionNoise(generators, decoder.model.config.codebook_size, device)
    codes = known.clone()
    fixed = (codes >= 0).all(dim=0).tolist()
    everywhere = torch.ones(1, 1, dtype=torch.bool, device=device)
    step = 0
    while True:
        if not fixed[step]:
            sampled = sample_next(decoder, hidden, sampling, scales[step], noise.at(step)[:, 0])
            codes[:, step] = torch.where(codes[:, step] < 0, sampled, codes[:, step])
        first, step = step, step + 1
        yield codes[:, :step]
        while step < steps and fixed[step]:
            step += 1
            yield codes[:, :step]
        if step == steps:
            return
        embeds = decoder.embed(codes[:, first:step])
        if sampling.guided:
            embeds = embeds.repeat(2, 1, 1)
        bias = causal_bias(state, step - first) if step - first > 1 else state.bias
        if bias is not None:
            bias = bias[..., : cache.column + step - first]
        hidden = decoder(embeds, positions[:, first:step], cache, bias, everywhere)[:, -1]


def sample_next(decoder: Decoder, hidden: Tensor, sampling: Sampling, scale: float | Tensor, noise: Tensor) -> Tensor:
    """Codes ``(B,)`` that follow final hidden states: guide, image logits, filter, sample with ``noise (B, K)``.

    ``hidden`` and ``scale`` are those of :func:`guided_logits`.
    """
    return sample_codes(guided_logits(decoder, hidden, sampling, scale), sampling, noise)


def guided_logits(decoder: Decoder, hidden: Tensor, sampling: Sampling, scale: float | Tensor) -> Tensor:
    """Image logits ``(B, ..., K)`` of final hidden states ``(B, ..., D)``, not yet filtered.

    With guidance, ``hidden`` has the B unconditional rows behind the conditional ones, and ``scale`` broadcasts to
    ``(B, ..., 1)``.
    """
    if sampling.guided:
        conditional, unconditional = hidden.chunk(2)
        hidden = guide(conditional, unconditional, scale)
    return decoder.image_logits(hidden)


def paired_prompts(
    model: UnifiedForCausalLM,
    prompts: Sequence[Sequence[int] | Prompt],
    negatives: Sequence[Sequence[int] | Prompt] | None,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> list[Prompt]:
    """All rows of a batch: the prompts, then their negatives if guidance needs them.

    Raises:
        ValueError: if the model takes a condition instead of a prompt, or a list has another length.
    """
    if model.condition is not None or model.config.positions == "llamagen":
        raise ValueError("model: samples after a class or features, not after a prompt; use generate_conditioned.")
    rows = list(prompts)
    if len(generators) != len(rows):
        raise ValueError(f"generators: {len(generators)} given for {len(rows)} prompts; give one each.")
    if sampling.guided:
        if negatives is None or len(negatives) != len(prompts):
            raise ValueError(f"negative_prompts: guidance needs one row per prompt ({len(prompts)}).")
        rows += negatives
    return [row if isinstance(row, Prompt) else Prompt(tuple(row)) for row in rows]


def span_coordinates(model: UnifiedForCausalLM, position: Tensor, grid: Grid) -> Tensor:
    """``(B, h*w, 2)`` rows and columns of a span whose first code sits at ``position (B,)``."""
    offsets, _ = span_offsets(grid, 1, *model.config.coordinates)
    return position[:, None, None] + offsets.to(position.device)


def forced_codes(known: Tensor | None, count: int, grid: Grid, model: UnifiedForCausalLM) -> Tensor:
    """Known codes ``(B, h, w)`` as ``(B, h*w)`` on the model's device; -1 everywhere for None.

    Raises:
        ValueError: on another shape or codes outside the codebook.
    """
    if known is None:
        return torch.full((count, grid[0] * grid[1]), -1, device=model.device)
    if tuple(known.shape) != (count, *grid):
        raise ValueError(f"known: shape {tuple(known.shape)}, need {(count, *grid)}: one grid of codes per image.")
    size = model.config.codebook_size
    if known.numel() and (int(known.min()) < -1 or int(known.max()) >= size):
        raise ValueError(f"known: values {int(known.min())}..{int(known.max())} leave the codebook [0, {size}).")
    return known.reshape(count, -1).to(model.device)
