"""Attention masks of training batches, ready for any backbone, without a look at the values on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache, PreTrainedConfig

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
Mask = TypeVar("Mask", Tensor, BlockMask)


def document_mask(document_ids: Tensor, causal: bool = True) -> Tensor:
    """``(B, 1, S, S)``, True where a position attends: inside its document; ``causal``, to itself and what is before it."""
    same = document_ids[:, :, None] == document_ids[:, None]
    if causal:
        same &= torch.ones(document_ids.shape[1:] * 2, dtype=torch.bool, device=document_ids.device).tril()
    return same[:, None]


def by_layer(config: PreTrainedConfig, mask: Callable[[int | None], Mask]) -> Mask | dict[str, Mask]:
    """A mask for each kind of layer that a backbone has: sliding layers hide what is ``sliding_window`` or more positions old.

    Args:
        config: of the backbone.
        mask: makes one for a window, or None for layers without.
    """
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or []
    if window is None or (kinds and "sliding_attention" not in kinds):
        return mask(None)
    return {"full_attention": mask(None), "sliding_attention": mask(window)} if kinds else mask(window)


def step_mask(steps: Tensor) -> Tensor:
    """``(B, 1, S, S)``, True where a position attends by its ``steps (B, S, 2)``: to itself, and to what is seen by then.

    ``steps`` are those of :class:`unified.prediction.arrange.Row`.
    """
    seen, sees = steps.unbind(dim=-1)
    itself = torch.eye(steps.shape[1], dtype=torch.bool, device=steps.device)
    return ((seen[:, None] <= sees[:, :, None]) | itself)[:, None]


def visible_mask(steps: Tensor | None, document_ids: Tensor | None, window: int | None) -> Tensor:
    """``(B, 1, S, S)``, True where a position attends; the arguments are those of :func:`block_mask`."""
    visible = None if steps is None else step_mask(steps)
    if document_ids is not None:
        of_documents = document_mask(document_ids, causal=steps is None)
        visible = of_documents if visible is None else visible & of_documents
    assert visible is not None
    if window is None:
        return visible
    index = torch.arange(visible.shape[-1], device=visible.device)
    return visible & (index[:, None] - index < window)


def block_mask(steps: Tensor | None, document_ids: Tensor | None, window: int | None) -> BlockMask:
    """The same mask for FlexAttention, which skips the blocks in which no position attends.

    Args:
        steps: ``(B, S, 2)``; None where each position sees all before it.
        document_ids: ``(B, S)`` of packed rows, or None.
        window: hide what is so many or more positions old.
    """
    given = document_ids if steps is None else steps
    assert given is not None

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query if steps is None else (steps[row, key, 0] <= steps[row, query, 1]) | (key == query)
        if document_ids is not None:
            seen = seen & (document_ids[row, key] == document_ids[row, query])
        return seen if window is None else seen & (query - key < window)

    return create_block_mask(visible, given.shape[0], None, given.shape[1], given.shape[1], device=given.device)


def masked_arguments(
    config: PreTrainedConfig, dtype: torch.dtype, steps: Tensor | None, document_ids: Tensor | None
) -> dict[str, Any]:
    """Arguments of a backbone that keep the documents of packed rows apart, and images to their order.

    ``sdpa`` and ``eager`` attention take a mask, ``flex_attention`` one of blocks; other kinds read position ids that restart
    with every document.

    Args:
        config: of the backbone.
        dtype: of the activations.
        steps: ``(B, S, 2)`` of :class:`unified.prediction.arrange.Row`; None where each position sees all before it.
        document_ids: ``(B, S)`` of packed rows, or None.

    Raises:
        ValueError: for steps under attention that takes no mask, or flash attention over several rows, which would mix them.
    """
    attention = str(config._attn_implementation)
    if attention == "flex_attention":
        return {"attention_mask": by_layer(config, partial(block_mask, steps, document_ids))}
    if attention not in ("sdpa", "eager"):
        if steps is not None:
            raise ValueError(f"prediction.order: {attention} attention takes no mask; use sdpa or flex_attention.")
        assert document_ids is not None
        return _restarted_positions(attention, document_ids)
    mask = by_layer(config, partial(visible_mask, steps, document_ids))
    if attention == "eager":
        mask = {k: _additive(m, dtype) for k, m in mask.items()} if isinstance(mask, dict) else _additive(mask, dtype)
    return {"attention_mask": mask}


def check_no_window(config: PreTrainedConfig) -> None:
    """Raises ValueError if layers see a window of positions: queries stand between codes, and no code sees them."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = window is not None and "sliding_attention" in (kinds or ["sliding_attention"])
    if slides and window < config.max_position_embeddings:
        raise ValueError(
            f"prediction.order: {config.model_type} sees windows of {window} positions, which an order with queries cannot keep; "
            "use raster, rows, diagonals or regions."
        )


def _restarted_positions(attention: str, document_ids: Tensor) -> dict[str, Any]:
    if attention.startswith("flash") and len(document_ids) > 1:
        raise ValueError(f"document_ids: {attention} keeps documents apart in a batch of one row only; use sdpa.")
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    start = torch.where(first, index, 0).cummax(dim=1).values
    return {"attention_mask": None, "position_ids": index - start}


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


class NoCache(Cache):
    """Keeps nothing. With any cache, transformers takes rows for what they are instead of looking for packed ones in the
    position ids, which would wait for the device in every forward pass.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Give back what came in."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing is kept."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Queries start at the first position."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys are those of the queries."""
        return query_length, 0

    @staticmethod
    def fits(config: PreTrainedConfig) -> bool:
        """Whether all layers are attention; others keep states in a cache."""
        return set(getattr(config, "layer_types", None) or []) <= ATTENTION_LAYERS
