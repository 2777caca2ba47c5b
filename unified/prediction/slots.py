"""From tokens to slots: where every token of a batch goes when image spans are grouped into patches.

A slot is one position of the backbone: a text token, or a patch of p x p image codes. At p = 1 tokens and slots
coincide. The plan holds indices only, so that embeddings and targets are moved with plain indexing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from unified.config import UnifiedConfig
from unified.model.rotary import span_offsets
from unified.prediction.npp import Grid, patch_grid


@dataclass
class SpanGroup:
    """All image spans of one grid: flat indices of their tokens ``(N, h*w)`` and of their slots ``(N, h*w/p^2)``."""

    grid: Grid
    tokens: Tensor
    slots: Tensor


@dataclass
class SlotPlan:
    """Slots of a batch, ``(B, S)``.

    Attributes:
        text_tokens, text_slots: flat indices of the text tokens in ``(B, T)`` and of their slots in ``(B, S)``.
        spans: image spans by grid.
        attention_mask: ``(B, S)``, 1 on real slots, or None if all are real.
        documents: ``(B, S)`` document of every slot, -1 on padding, or None.
        coordinates: ``(B, S, 2)`` row and column for the rotary embedding, or None for the running index.
    """

    batch_size: int
    length: int
    text_tokens: Tensor
    text_positions: Tensor
    spans: list[SpanGroup]
    attention_mask: Tensor | None
    documents: Tensor | None
    coordinates: Tensor | None = None

    def image_positions(self) -> Tensor:
        """``(B, S)``, True on slots that hold a patch of an image."""
        is_image = torch.zeros(self.batch_size * self.length, dtype=torch.bool, device=self.text_positions.device)
        for group in self.spans:
            is_image[group.slots] = True
        return is_image.reshape(self.batch_size, self.length)

    def predicted(self) -> Tensor:
        """``(B, S)``, True on slots that the slot before them predicts: all but the first of a row or document."""
        inside = torch.ones(self.batch_size, self.length, dtype=torch.bool, device=self.text_positions.device)
        inside[:, 0] = False
        if self.documents is not None:
            inside[:, 1:] = self.documents[:, 1:] == self.documents[:, :-1]
        return inside


def find_spans(input_ids: Tensor, image_grids: Tensor | None, config: UnifiedConfig) -> list[tuple[int, int, Grid]]:
    """Rows, first columns and grids of the image spans in ``input_ids (B, T)``, in order of appearance.

    Raises:
        ValueError: if the runs of image codes do not match ``image_grids`` one to one, a span has no ``<boi>`` before it,
            or an id lies beyond the codebook.
    """
    vocabulary = config.vocabulary
    is_image = input_ids >= vocabulary.text_vocab_size
    total = vocabulary.text_vocab_size + vocabulary.codebook_size
    if input_ids.numel() and int(input_ids.max()) >= total:
        raise ValueError(f"input_ids: {int(input_ids.max())} is beyond text vocabulary and codebook ({total} ids).")
    before = torch.nn.functional.pad(is_image[:, :-1], (1, 0))
    after = torch.nn.functional.pad(is_image[:, 1:], (0, 1))
    starts = (is_image & ~before).nonzero().tolist()
    ends = (is_image & ~after).nonzero().tolist()
    grids = [] if image_grids is None else [(int(h), int(w)) for h, w in torch.as_tensor(image_grids).tolist()]
    if len(starts) != len(grids):
        raise ValueError(f"image_grids: {len(grids)} grids for {len(starts)} image spans; give one (h, w) per span.")
    for (row, start), (_, end), (height, width) in zip(starts, ends, grids, strict=True):
        if end - start + 1 != height * width:
            raise ValueError(
                f"image_grids: the span in row {row} at {start} has {end - start + 1} codes, its grid {height}x{width} "
                f"needs {height * width}."
            )
        if start == 0 or int(input_ids[row, start - 1]) != vocabulary.boi_token_id:
            raise ValueError(f"input_ids: the image span in row {row} at {start} is not preceded by <boi>.")
    return [(row, start, grid) for (row, start), grid in zip(starts, grids, strict=True)]


def plan_slots(
    input_ids: Tensor,
    image_grids: Tensor | None,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    patch_size: int,
    config: UnifiedConfig,
) -> SlotPlan:
    """Plan the slots of a batch ``(B, T)``. Padding is kept where it is at p = 1 and moved to the right at p > 1."""
    batch_size, length = input_ids.shape
    device = input_ids.device
    spans = find_spans(input_ids, image_grids, config)
    is_image = input_ids >= config.vocabulary.text_vocab_size
    real = torch.ones_like(is_image) if attention_mask is None else attention_mask.bool()

    by_grid: dict[Grid, list[int]] = {}
    for row, start, grid in spans:
        by_grid.setdefault(grid, []).append(row * length + start)

    # A token opens a slot if it is text, or one of the first h*w/p^2 tokens of its span.
    opens = (~is_image if patch_size == 1 else ~is_image & real).reshape(-1)
    firsts = {}
    for grid, starts in by_grid.items():
        firsts[grid] = torch.tensor(starts, device=device)[:, None]
        rows, columns = patch_grid(grid, patch_size)
        opens[firsts[grid] + torch.arange(rows * columns, device=device)] = True
    slot_in_row = opens.reshape(batch_size, length).cumsum(dim=1) - 1
    slots = length if patch_size == 1 else int(slot_in_row[:, -1].max()) + 1
    flat_slot = (slot_in_row + torch.arange(batch_size, device=device)[:, None] * slots).reshape(-1)

    text_tokens = (opens & ~is_image.reshape(-1)).nonzero().squeeze(1)
    groups = []
    for grid, first in firsts.items():
        rows, columns = patch_grid(grid, patch_size)
        tokens = first + torch.arange(grid[0] * grid[1], device=device)
        groups.append(SpanGroup(grid, tokens, flat_slot[first] + torch.arange(rows * columns, device=device)))

    opened = flat_slot[opens]
    slot_mask = torch.zeros(batch_size * slots, dtype=torch.bool, device=device)
    slot_mask[opened] = real.reshape(-1)[opens]
    slot_mask = slot_mask.reshape(batch_size, slots)
    documents = None
    if document_ids is not None:
        documents = torch.full((batch_size * slots,), -1, dtype=torch.int64, device=device)
        documents[opened] = document_ids.reshape(-1)[opens]
        documents = documents.reshape(batch_size, slots)
    mask = None if bool(slot_mask.all()) else slot_mask
    plan = SlotPlan(batch_size, slots, text_tokens, flat_slot[text_tokens], groups, mask, documents)
    plan.coordinates = _coordinates(plan, patch_size, config)
    return plan


def _coordinates(plan: SlotPlan, patch_size: int, config: UnifiedConfig) -> Tensor | None:
    """Row and column of every slot; None where the running index says the same."""
    if config.positions == "llamagen":
        return _grid_coordinates(plan, patch_size, config)
    running = config.positions == "1d" and (patch_size == 1 or config.coarse_positions == "unit")
    if running or not plan.spans:
        return None
    device = plan.text_positions.device
    advance = torch.zeros(plan.batch_size * plan.length, device=device)
    advance[plan.text_positions] = 1.0
    offsets = torch.zeros(plan.batch_size * plan.length, 2, device=device)
    for group in plan.spans:
        offset, span_advance = span_offsets(
            group.grid, patch_size, config.positions, config.coarse_positions, config.normalized_range
        )
        offsets[group.slots] = offset.to(device)
        advance[group.slots[:, -1]] = span_advance
    advance = advance.reshape(plan.batch_size, plan.length)
    if plan.attention_mask is not None:
        advance = advance * plan.attention_mask
    base = advance.cumsum(dim=1) - advance
    if plan.documents is not None:
        base = base - _document_start(base, plan.documents)
    return base[..., None] + offsets.reshape(plan.batch_size, plan.length, 2)


def _grid_coordinates(plan: SlotPlan, patch_size: int, config: UnifiedConfig) -> Tensor:
    """Row and column of every slot of an image, counted from its corner; -1 elsewhere."""
    coordinates = torch.full((plan.batch_size * plan.length, 2), -1.0, device=plan.text_positions.device)
    for group in plan.spans:
        offset, _ = span_offsets(group.grid, patch_size, "2d", config.coarse_positions, config.normalized_range)
        coordinates[group.slots] = offset.to(coordinates.device)
    return coordinates.reshape(plan.batch_size, plan.length, 2)


def _document_start(values: Tensor, documents: Tensor) -> Tensor:
    """The entry of non-decreasing ``values (B, S)`` at the first slot of every slot's document."""
    new = torch.ones_like(documents, dtype=torch.bool)
    new[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(new, values, torch.zeros_like(values)).cummax(dim=1).values


def running_index(plan: SlotPlan) -> Tensor | None:
    """Position ids ``(B, S)`` of packed or padded rows, restarting with every document; None for plain rows."""
    if plan.documents is None and plan.attention_mask is None:
        return None
    if plan.documents is not None:
        index = torch.arange(plan.length, device=plan.documents.device).expand(plan.batch_size, -1)
        return index - _document_start(index, plan.documents)
    assert plan.attention_mask is not None  # for the type checker; the first branch left it set
    return (plan.attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)
