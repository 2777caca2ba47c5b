"""Sampling steered by adapters that score codes as they come (GenARM, arXiv 2410.08193).

Each code is sampled from the model's logits plus ``alpha`` times the log-probabilities of a reward adapter. The adapter says of
every code how much better it is, as training on preferences makes it (its log-probability of a whole image is its reward), and
the model stays what it is. Several adapters steer at once, each with its own weight, which every call may set; below 0 it
steers away. Each adapter costs a forward pass more.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from unified.decoding.config import check_steer
from unified.decoding.decoder import Decoder
from unified.decoding.fused_llama import LeanDecoder, make_decoder
from unified.decoding.kv_cache import KeyValueCache
from unified.lora.base import base_of
from unified.lora.switching import adapter_state, adapters_kept, apply_weights, check_not_fused, set_adapters

REWARDS = "genarm"  # the objective that trains adapters to steer


class SteeredDecoder(Decoder):
    """A decoder and others that steer it; see :func:`steer`.

    Final states of all stand side by side, so that guidance, several sources of a cell and the running batch treat them as one.
    With guidance each side of the sum is guided.
    """

    def __init__(self, decoder: Decoder, guides: Mapping[str, tuple[Decoder, float]]):
        self.model, self.groups = decoder.model, {}
        self._decoders = [decoder, *(guide for guide, _ in guides.values())]
        self._weights = [1.0, *(weight for _, weight in guides.values())]
        self._names, self._layers = list(guides), len(self.model.backbone.base_model.layers)

    def weighted(self, weights: Mapping[str, float]) -> "SteeredDecoder":
        """The same with other weights of the same adapters."""
        decoder, *guides = self._decoders
        return SteeredDecoder(
            decoder, {name: (guide, weights[name]) for name, guide in zip(self._names, guides, strict=True)}
        )

    def positions(self, coordinates: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        return self._decoders[0].positions(coordinates)

    def __call__(
        self, embeds: Tensor, positions: Tensor, cache: KeyValueCache, bias: Tensor | None, image_positions: Tensor
    ) -> Tensor:
        """Final states ``(B, T, (1 + n) * D)`` of the model and of n guides, whose layers lie in the cache behind the model's."""
        cache.open(embeds.shape[1])
        states = [
            decoder(embeds, positions, _Layers(cache, number * self._layers), bias, image_positions)
            for number, decoder in enumerate(self._decoders)
        ]
        cache.column += embeds.shape[1]
        return torch.cat(states, dim=-1)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the model plus the weighted log-probabilities of its guides, up to a constant that no sample depends on."""
        scored = zip(self._decoders, hidden.chunk(len(self._decoders), dim=-1), self._weights, strict=True)
        return torch.stack([weight * decoder.image_logits(part).float() for decoder, part, weight in scored]).sum(dim=0)

    def image_states(self, hidden: Tensor, missing: Tensor | None, merge: str) -> Tensor:
        """Those of the model and of its guides side by side; all have the modules of the model between them and the head."""
        parts = hidden.chunk(len(self._decoders), dim=-1)
        return torch.cat([self.model.image_states(part, missing, merge) for part in parts], dim=-1)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Of the model alone: images are steered."""
        return self._decoders[0].text_logits(hidden[..., : hidden.shape[-1] // len(self._decoders)])

    def embed(self, codes: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        return self._decoders[0].embed(codes)


class _Layers(KeyValueCache):
    """The layers of a cache from one on, for one of the decoders that share it."""

    def __init__(self, whole: KeyValueCache, first: int):
        super().__init__(whole.length)
        self.column, self.end, self._whole, self._first = whole.column, whole.end, whole, first

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See :class:`KeyValueCache`."""
        return self._whole.update(key_states, value_states, self._first + layer_idx)


def check_steering(model: Any, steer: Mapping[str, float]) -> None:
    """Refuse to steer by adapters that are not there, or that give no rewards.

    Args:
        model: with the adapters loaded, or without any.
        steer: weights by the names of adapters.

    Raises:
        ValueError: for an unknown adapter, a weight that is not finite, or an adapter that is known to have been trained for
            something else.
    """
    check_steer(steer)
    loaded = list(model.peft_config) if isinstance(model, PeftModel) else []
    for name in steer:
        if name not in loaded:
            raise ValueError(f"steer: adapter {name!r} is not loaded; loaded are {loaded}, load_lora_weights loads it.")
        objectives = adapter_state(model).objectives.get(name, [REWARDS])
        if REWARDS not in objectives:
            raise ValueError(
                f"steer: adapter {name!r} was trained for {', '.join(objectives)} and gives no rewards; name one trained with "
                f"objectives: [{{name: {REWARDS}}}], or use set_adapters."
            )


def gives_rewards(model: PeftModel, name: str) -> bool:
    """Whether an adapter is known to have been trained to steer others, and not to act itself."""
    return REWARDS in adapter_state(model).objectives.get(name, [])


def steer(model: PeftModel, weights: Mapping[str, float], **options: bool) -> SteeredDecoder:
    """A decoder of a model as its adapters are set now, without those that steer it.

    Args:
        model: with the adapters loaded; which are active is as before afterwards.
        weights: alpha by the name of the adapter. With weights that add up to A, a temperature of 1 / (1 + A) or less is as sharp
            as the model alone; GenARM divides by 1 + A.
        options: ``int8`` of :func:`unified.decoding.make_decoder`.

    Raises:
        ValueError: as :func:`check_steering`; for no weight at all, an adapter with its own embedding of codes, fused adapters,
            a merge of codes, adapters that train a join of sources, ``compile``, or a backbone whose decoder keeps no copy of
            the weights.
    """
    base, state = base_of(model), adapter_state(model)
    for name in ("image_join", "image_projection"):
        if isinstance(getattr(base, name), ModulesToSaveWrapper):
            raise ValueError(
                f"steer: an adapter trains {name}, which all share here; train it with train_image_tables=False."
            )
    if not weights:
        raise ValueError("steer: no adapter is named; give one or more with their weights.")
    check_steering(model, weights)
    check_not_fused(model, "steer")
    if options.get("compile"):
        raise ValueError("steer: not with a compiled decoder; call disable_fast_decoding first.")
    if base.prediction.merge.side > 1:
        raise ValueError(
            f"steer: not for the merge {base.prediction.merge.kind!r}; only for codes that enter one by one."
        )
    guides, codes = dict[str, tuple[Decoder, float]](), torch.arange(base.config.codebook_size, device=base.device)
    with adapters_kept(model):
        apply_weights(model, {name: weight for name, weight in state.weights.items() if name not in weights})
        decoder = make_decoder(base, **options)
        if not isinstance(decoder, LeanDecoder):
            kind = type(base.backbone.base_model).__name__
            raise ValueError(
                f"steer: {kind} has no decoder with a copy of its weights, which an adapter beside the model needs."
            )
        for name, weight in weights.items():
            set_adapters(model, [name], [1.0])
            guide = make_decoder(base, **options)
            if not torch.equal(guide.embed(codes), decoder.embed(codes)):
                raise ValueError(
                    f"steer: adapter {name!r} has its own embedding of codes; train it with train_image_tables=False."
                )
            guides[name] = (guide, weight)
    return SteeredDecoder(decoder, guides)
