"""Prompts into the cache: every distinct prompt once, padded on the left so that all end in the same column."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unified.decoding.decoder import Decoder
from unified.decoding.kv_cache import KeyValueCache
from unified.decoding.passes import image_columns
from unified.model.masks import step_mask
from unified.model.modeling import UnifiedForCausalLM
from unified.model.vision import enter_features
from unified.prediction.arrange import Row, arrange, read_positions
from unified.prediction.merge import Grid
from unified.sequence import IGNORE, FeatureSegment, TokenSequence


@dataclass(frozen=True)
class Prompt:
    """Ids of a row, image codes as ``V_text + c``, and the grids of its images in order.

    For a class-conditional model the row is ``<boi>`` alone, and ``condition`` the class that takes its place. ``features`` are
    those of :class:`unified.sequence.TokenSequence`.
    """

    ids: tuple[int, ...]
    grids: tuple[Grid, ...] = ()
    condition: int | None = None
    features: tuple[tuple[int, FeatureSegment], ...] = ()


@dataclass
class Prefilled:
    """Rows that are ready to be continued.

    Attributes:
        cache: holds every prompt, with room for what follows.
        hidden: ``(B, D)`` final state of the last token.
        position: ``(B,)`` coordinate of the next token.
        bias: ``(B, 1, 1, length)`` that hides the padding, or None without any.
        lengths: columns of each row that are no padding.
    """

    cache: KeyValueCache
    hidden: Tensor
    position: Tensor
    bias: Tensor | None
    lengths: list[int]


def check_conditions(model: UnifiedForCausalLM, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError if prompts hold text for a model that samples after a condition, or a class for any other."""
    classes, boi = model.config.classes, model.config.boi_token_id
    if classes is None and (model.condition is not None or model.config.positions == "llamagen"):
        raise ValueError("model: samples after features, not after a prompt; use generate_conditioned.")
    for prompt in prompts:
        if classes is None and prompt.condition is not None:
            raise ValueError(f"condition: class {prompt.condition} given, but the model takes prompts of text.")
        if classes is not None and (prompt.condition is None or prompt.ids != (boi,)):
            raise ValueError(f"model: samples after a class, not after a prompt; give Prompt(({boi},), condition=...).")
        if classes is not None and prompt.condition is not None and not 0 <= prompt.condition <= classes:
            raise ValueError(
                f"condition: {prompt.condition} is not in [0, {classes}]; the last one is the unconditional class."
            )


def prompt_columns(model: UnifiedForCausalLM, prompt: Prompt) -> int:
    """Columns of the cache that a prompt fills: one for a text token, and those of its images."""
    codes = sum(height * width for height, width in prompt.grids)
    return len(prompt.ids) - codes + sum(image_columns(model, grid) - 2 for grid in prompt.grids)


def prefill(decoder: Decoder, prompts: Sequence[Prompt], room: int) -> Prefilled:
    """Run one or more prompts of at least one id through the model, equal ones once; ``room`` columns stay free behind them.

    Raises:
        ValueError: if the images of a prompt are no valid spans, or :func:`check_conditions` refuses it.
    """
    distinct = list(dict.fromkeys(prompts))
    model = decoder.model
    check_conditions(model, distinct)
    config, prediction, device = model.config, model.prediction, model.device
    rows = [
        _without_queries(arrange(_sequence(prompt), config.vocabulary, config.coordinates, prediction))
        for prompt in distinct
    ]
    length, columns = max(map(len, rows)), max(row.input_ids.shape[1] for row in rows)
    ids = torch.full((len(rows), length, columns), IGNORE)
    ids[..., 0] = config.vocabulary.pad_token_id
    coordinates, is_image = torch.zeros(len(rows), length, 2), torch.zeros(len(rows), length, dtype=torch.bool)
    visible, is_read = torch.zeros(len(rows), length, length, dtype=torch.bool), torch.zeros_like(is_image)
    for number, row in enumerate(rows):  # padding stands on the left
        start = length - len(row)
        ids[number, start:, : row.input_ids.shape[1]] = row.input_ids
        coordinates[number, start:], is_image[number, start:] = row.positions, row.is_image
        visible[number, start:, start:] = _visible(row)
        is_read[number, start:] = read_positions(row)
    real = torch.arange(length) >= length - torch.tensor([len(row) for row in rows])[:, None]
    image_inputs = is_image.flatten().nonzero().flatten()
    place = {prompt: i for i, prompt in enumerate(distinct)}
    owners = torch.tensor([place[prompt] for prompt in prompts])
    ids, image_inputs, coordinates, visible, real, is_image, owners = (
        each.to(device) for each in (ids, image_inputs, coordinates, visible, real, is_image, owners)
    )
    embeds = model.embed(ids if columns > 1 else ids[..., 0], image_inputs, merge=prediction.merge.kind)
    features = [row.features.to(device) for row in rows if row.features is not None]
    if features:
        read_at = is_read.flatten().nonzero().flatten().to(device)
        embeds = enter_features(model.vision_projector, embeds, torch.cat(features), read_at)
    if model.condition is not None:
        labels = torch.tensor([prompt.condition for prompt in distinct], device=device)
        embeds = model.condition(labels).to(embeds.dtype)
    return read(decoder, embeds, coordinates, real, is_image, owners, room, visible)


def _sequence(prompt: Prompt) -> TokenSequence:
    ids = torch.tensor(prompt.ids)
    return TokenSequence(ids, ids, list(prompt.grids), features=list(prompt.features))


def _without_queries(row: Row) -> Row:
    """A row whose images are given: nothing asks for their codes."""
    kept = ~row.is_image | (row.input_ids[:, 0] != IGNORE)
    if bool(kept.all()):
        return row
    assert row.steps is not None
    return replace(
        row,
        input_ids=row.input_ids[kept],
        labels=row.labels[kept],
        positions=row.positions[kept],
        is_image=row.is_image[kept],
        sources=None,
        steps=row.steps[kept],
        is_read=read_positions(row)[kept],
    )


def _visible(row: Row) -> Tensor:
    """``(S, S)``, which positions a position sees."""
    if row.steps is None:
        return torch.ones(len(row), len(row), dtype=torch.bool).tril()
    return step_mask(row.steps[None])[0, 0]


def read(
    decoder: Decoder,
    embeds: Tensor,
    coordinates: Tensor,
    real: Tensor,
    image_positions: Tensor,
    rows: Tensor,
    room: int,
    visible: Tensor | None = None,
) -> Prefilled:
    """Run embedded starts ``(U, L, D)`` at ``(U, L, 2)`` through the model; row i of the result continues ``rows[i]``.

    ``real (U, L)`` is False on padding, which is on the left; ``image_positions (U, L)`` is True on image codes;
    ``visible (U, L, L)`` says what a position sees, by default all before it.
    """
    length, device = embeds.shape[1], embeds.device
    # Padding may look at itself alone: a row without any column would turn into NaN.
    if visible is None:
        visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    visible = visible & real[:, None]
    visible |= torch.eye(length, dtype=torch.bool, device=device)
    cache = KeyValueCache(length)
    causal = as_bias(visible[:, None], embeds.dtype)
    hidden = decoder(embeds, decoder.positions(coordinates), cache, causal, image_positions)
    bias = None
    if not bool(real.all()):
        shown = torch.nn.functional.pad(real, (0, room), value=True)[rows]
        bias = as_bias(shown[:, None, None], embeds.dtype)
    lengths = real.sum(dim=1)[rows].tolist()
    return Prefilled(cache.expanded(rows, length + room), hidden[rows, -1], coordinates[rows, -1, 0] + 1, bias, lengths)


def causal_bias(state: Prefilled, width: int) -> Tensor:
    """``(B or 1, 1, width, end)`` for the next ``width`` positions: each sees the columns up to its own, but no padding."""
    return bias_among(state, torch.ones(width, width, dtype=torch.bool, device=state.hidden.device).tril())


def bias_among(state: Prefilled, visible: Tensor) -> Tensor:
    """``(B or 1, 1, T, end)`` for the next T positions: of the last n columns, their own included, they see those where
    ``visible (T, n)``; before these all, but no padding.
    """
    before = state.cache.column + len(visible) - visible.shape[1]
    shown = torch.nn.functional.pad(visible, (before, 0), value=True)
    bias = as_bias(shown[None, None], state.hidden.dtype)
    return bias if state.bias is None else bias + state.bias[..., : shown.shape[1]]


def as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a column is visible, -inf where not."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
