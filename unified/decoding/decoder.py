"""One forward pass over new positions with a cache: the general way, through any backbone of transformers."""

from typing import Protocol

import torch
from torch import Tensor

from unified.decoding.kv_cache import KeyValueCache
from unified.model.modeling import UnifiedForCausalLM


class Decoder(Protocol):
    """What the decoding loops need of a model."""

    model: UnifiedForCausalLM
    groups: dict[int, Tensor]  # by size, the codes nearest to each code; kept for :mod:`unified.decoding.speculative`

    def positions(self, coordinates: Tensor) -> Tensor:
        """Rows and columns ``(B, T, 2)`` to whatever the forward pass takes, indexed ``[B, T]`` alike."""

    def __call__(
        self, embeds: Tensor, positions: Tensor, cache: KeyValueCache, bias: Tensor | None, image_positions: Tensor
    ) -> Tensor:
        """Run T new positions ``(B, T, D)`` and write them to the cache; returns final hidden states ``(B, T, D)``.

        ``bias`` ``(B or 1, 1, T or 1, end)`` is added to the attention scores, -inf hides a column; None shows all columns
        up to the end, those of all new positions included. ``image_positions``, True on codes, broadcasts to ``(B, T)``.
        """

    def image_logits(self, hidden: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., K)``, of what :meth:`image_states` makes of final states."""

    def image_states(self, hidden: Tensor, missing: Tensor | None, merge: str) -> Tensor:
        """See :meth:`UnifiedForCausalLM.image_states`."""
        return self.model.image_states(hidden, missing, merge)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., V_text)``."""
        return self.model.text_logits(hidden)

    def embed(self, codes: Tensor) -> Tensor:
        """Image codes ``(...)`` to ``(..., D)``."""
        return self.model.image_embed(codes)


class BackboneDecoder(Decoder):
    """A :class:`Decoder` for every backbone that a unified model can have.

    Raises:
        ValueError: if the backbone's attention does not take an additive mask.
    """

    def __init__(self, model: UnifiedForCausalLM):
        self.model = model
        self.groups = {}
        config = model.backbone.base_model.config
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation: decoding works with 'sdpa' and 'eager', not {config._attn_implementation!r}; "
                "call model.set_attn_implementation('sdpa')."
            )
        kinds = getattr(config, "layer_types", None) or []
        self._window: int | None = getattr(config, "sliding_window", None)
        self._by_layer = "sliding_attention" in kinds
        if kinds and not self._by_layer:
            self._window = None

    def positions(self, coordinates: Tensor) -> Tensor:
        """The coordinates themselves; the backbone's rotary embedding reads them."""
        return coordinates

    def __call__(
        self, embeds: Tensor, positions: Tensor, cache: KeyValueCache, bias: Tensor | None, image_positions: Tensor
    ) -> Tensor:
        """See :class:`Decoder`."""
        cache.open(embeds.shape[1])
        embeds = embeds.to(self.model.backbone.dtype)  # an adapter's tables are in float32 on any base
        if embeds.shape[1] > 1:  # a backbone would be causal without, or with one row for all
            shown = embeds.new_zeros(1, 1, embeds.shape[1], cache.end)
            bias = shown if bias is None else bias + shown if bias.shape[2] == 1 else bias
        mask: Tensor | dict[str, Tensor | None] | None = bias
        if self._window is not None:
            sliding = self._sliding(embeds, cache, bias)
            mask = {"full_attention": bias, "sliding_attention": sliding} if self._by_layer else sliding
        output = self.model.run_backbone(
            embeds,
            positions,
            image_positions,
            attention_mask=mask,
            position_ids=positions[..., 0].long(),
            cache=cache,
            use_cache=True,
        )
        cache.column += embeds.shape[1]
        return output.last_hidden_state

    def image_logits(self, hidden: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        return self.model.image_head(hidden)

    def _sliding(self, embeds: Tensor, cache: KeyValueCache, bias: Tensor | None) -> Tensor:
        """The bias with columns outside the window hidden."""
        assert self._window is not None
        queries = torch.arange(cache.column, cache.column + embeds.shape[1], device=embeds.device)
        age = queries[:, None] - torch.arange(cache.end, device=embeds.device)
        far = torch.zeros(age.shape, dtype=embeds.dtype, device=embeds.device).masked_fill(
            age >= self._window, float("-inf")
        )
        return far.expand(len(embeds), 1, -1, -1) if bias is None else bias + far
