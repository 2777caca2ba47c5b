"""Attention masks of training batches, ready for any backbone, without a look at the values on the device."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def document_mask(document_ids: Tensor) -> Tensor:
    """``(B, 1, S, S)``, True where a position attends: to itself and to what is before it in its document."""
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return ((document_ids[:, :, None] == document_ids[:, None]) & causal)[:, None]


def by_layer(config: PreTrainedConfig, visible: Tensor, age: Tensor) -> Tensor | dict[str, Tensor]:
    """A mask for each kind of layer that a backbone has: sliding layers hide what is ``sliding_window`` or more positions old.

    Args:
        config: of the backbone.
        visible: True where a position attends.
        age: how far back a key lies, broadcasts to ``visible``.
    """
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or []
    if window is None or (kinds and "sliding_attention" not in kinds):
        return visible
    sliding = visible & (age < window)
    return {"full_attention": visible, "sliding_attention": sliding} if kinds else sliding


def packed_arguments(config: PreTrainedConfig, document_ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a backbone that keep the documents of packed rows apart.

    Its ``sdpa`` and ``eager`` attention take a mask; other kinds read position ids that restart with every document.

    Raises:
        ValueError: for flash attention over several rows, which would mix them.
    """
    attention, length = str(config._attn_implementation), document_ids.shape[1]
    index = torch.arange(length, device=document_ids.device)
    if attention in ("sdpa", "eager"):
        mask = by_layer(config, document_mask(document_ids), index[:, None] - index)
        if attention == "eager":
            mask = (
                {k: _additive(m, dtype) for k, m in mask.items()} if isinstance(mask, dict) else _additive(mask, dtype)
            )
        return {"attention_mask": mask}
    if attention.startswith("flash") and len(document_ids) > 1:
        raise ValueError(f"document_ids: {attention} keeps documents apart in a batch of one row only; use sdpa.")
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
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
