"""Prompts into the cache: every distinct prompt once, padded on the left so that all end in the same column."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified.decoding.decoder import Decoder
from unified.decoding.kv_cache import KeyValueCache
from unified.prediction.npp import Grid
from unified.prediction.slots import plan_slots, running_index


@dataclass(frozen=True)
class Prompt:
    """Ids of a row, image codes as ``V_text + c``, and the grids of its images in order."""

    ids: tuple[int, ...]
    grids: tuple[Grid, ...] = ()


@dataclass
class Prefilled:
    """Rows that are ready to be continued.

    Attributes:
        cache: holds every prompt, with room for what follows.
        hidden: ``(B, D)`` final state of the last token.
        position: ``(B,)`` coordinate of the next token.
        bias: ``(B, 1, 1, length)`` that hides the padding, or None without any.
    """

    cache: KeyValueCache
    hidden: Tensor
    position: Tensor
    bias: Tensor | None


def prefill(decoder: Decoder, prompts: Sequence[Prompt], room: int) -> Prefilled:
    """Run prompts through the model, equal ones once, and leave ``room`` columns behind them.

    Raises:
        ValueError: if a prompt is empty or its images are no valid spans.
    """
    if not prompts or not all(prompt.ids for prompt in prompts):
        raise ValueError("prompts: need one or more rows of at least one id.")
    distinct = list(dict.fromkeys(prompts))
    config, device = decoder.model.config, decoder.model.device
    length = max(len(prompt.ids) for prompt in distinct)
    padding = torch.tensor([length - len(prompt.ids) for prompt in distinct], device=device)
    fill = [config.vocabulary.pad_token_id]
    ids = torch.tensor([fill * (length - len(p.ids)) + list(p.ids) for p in distinct], device=device)
    real = torch.arange(length, device=device) >= padding[:, None]
    grids = [grid for prompt in distinct for grid in prompt.grids]
    plan = plan_slots(ids, torch.tensor(grids).reshape(-1, 2), real, None, 1, config)
    embeds = decoder.model.embed(ids, plan, 1)
    coordinates = plan.coordinates
    if coordinates is None:
        index = running_index(plan)
        index = torch.arange(length, device=device).expand(len(ids), -1) if index is None else index
        coordinates = index[..., None].expand(-1, -1, 2).float()

    place = {prompt: i for i, prompt in enumerate(distinct)}
    rows = torch.tensor([place[prompt] for prompt in prompts], device=device)
    return read(decoder, embeds, coordinates, real, plan.image_positions(), rows, room)


def read(
    decoder: Decoder,
    embeds: Tensor,
    coordinates: Tensor,
    real: Tensor,
    image_positions: Tensor,
    rows: Tensor,
    room: int,
) -> Prefilled:
    """Run embedded starts ``(U, L, D)`` at ``(U, L, 2)`` through the model; row i of the result continues ``rows[i]``.

    ``real (U, L)`` is False on padding, which is on the left; ``image_positions (U, L)`` is True on image codes.
    """
    length, device = embeds.shape[1], embeds.device
    # Padding may look at itself alone: a row without any column would turn into NaN.
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril() & real[:, None]
    visible |= torch.eye(length, dtype=torch.bool, device=device)
    cache = KeyValueCache(length)
    causal = as_bias(visible[:, None], embeds.dtype)
    hidden = decoder(embeds, decoder.positions(coordinates), cache, causal, image_positions)
    bias = None
    if not bool(real.all()):
        shown = torch.nn.functional.pad(real, (0, room), value=True)[rows]
        bias = as_bias(shown[:, None, None], embeds.dtype)
    return Prefilled(cache.expanded(rows, length + room), hidden[rows, -1], coordinates[rows, -1, 0] + 1, bias)


def causal_bias(state: Prefilled, width: int) -> Tensor:
    """``(B or 1, 1, width, end)`` for the next ``width`` positions: each sees the columns up to its own, but no padding."""
    start, end, device = state.cache.column, state.cache.column + width, state.hidden.device
    shown = torch.arange(end, device=device) <= torch.arange(start, end, device=device)[:, None]
    bias = as_bias(shown[None, None], state.hidden.dtype)
    return bias if state.bias is None else bias + state.bias[..., :end]


def as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a column is visible, -inf where not."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
