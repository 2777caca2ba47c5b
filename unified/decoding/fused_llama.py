"""One forward pass over new positions with a cache: the lean way, for Llama-shaped backbones.

A small model spends most of a decoding step outside its matrix products. Here query, key and value are one product,
gate and up another, residuals are added by the product that makes them, and the rotary embedding is one complex
multiplication with a table made for the whole image.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from unified.decoding.attention import attend
from unified.decoding.cpu_kernels import Dense, Int8, Packed
from unified.decoding.decoder import BackboneDecoder, Decoder
from unified.decoding.kv_cache import KeyValueCache
from unified.lora.switching import active_table
from unified.model.image_head import ImageHead
from unified.model.modeling import UnifiedForCausalLM

FAMILIES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # their angles depend on the position alone


@dataclass
class _Layer:
    attention_norm: Tensor
    qkv: Dense | Packed | Int8
    head_norms: Tensor | None  # (query heads + key heads, head_dim)
    output: Dense | Packed | Int8
    mlp_norm: Tensor
    gate_up: Dense | Packed | Int8
    down: Dense | Packed | Int8


def make_decoder(model: UnifiedForCausalLM, compile: bool = False, int8: bool = False) -> Decoder:
    """The fastest decoder that a model's backbone allows, with the weights as they are now.

    Adapters act as they are set: attached, weighted, merged or disabled.

    Args:
        model: the model, inside an adapter's wrapper or not.
        compile: compile the step with ``torch.compile``. On an x86 CPU it gains nothing over :class:`Packed` weights, which
            a compiler cannot use.
        int8: weights in 8 bits, one scale per output channel, inputs one per row, so that an image
            does not depend on its batch. Not exact; about twice as fast on a CPU.

    Raises:
        ValueError: if ``compile`` or ``int8`` is asked of a backbone outside :data:`FAMILIES`, or both at once.
    """
    if compile and int8:
        raise ValueError("compile, int8: the compiler does not see into 8-bit layers; choose one of the two.")
    reason = _unsupported(model)
    if reason is None:
        return LeanDecoder(model, compile, int8)
    for name, wanted in (("compile", compile), ("int8", int8)):
        if wanted:
            raise ValueError(f"{name}: not for this backbone, {reason}.")
    return BackboneDecoder(model)


def _unsupported(model: UnifiedForCausalLM) -> str | None:
    """Why a model cannot take the lean way, or None."""
    decoder = model.backbone.base_model
    config = decoder.config
    if type(decoder).__name__ not in FAMILIES:
        return f"{type(decoder).__name__} is none of {', '.join(FAMILIES)}"
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is not None and sliding and window < config.max_position_embeddings:
        return f"it has a sliding window of {window}"
    rope = config.rope_parameters["rope_type"]
    if rope not in _ROPE_TYPES:
        return f"its {rope!r} rotary embedding depends on the length"
    if model.modality_gate is not None:
        return f"adapters that act on one modality are loaded ({', '.join(sorted(model.modality_gate.kinds))})"
    attention, mlp = decoder.layers[0].self_attn, decoder.layers[0].mlp
    parts = [getattr(attention, f"{n}_proj") for n in "qkvo"] + [
        getattr(mlp, f"{n}_proj") for n in ("gate", "up", "down")
    ]
    for part in (*parts, model.image_head, model.get_output_embeddings()):
        inner = part.get_base_layer() if isinstance(part, BaseTunerLayer) else active_table(part)
        if type(inner) not in (nn.Linear, ImageHead):
            return f"it holds a {type(inner).__name__}"
    return None


class LeanDecoder(Decoder):
    """A :class:`Decoder` over fused copies of a model's weights; build it with :func:`make_decoder`."""

    def __init__(self, model: UnifiedForCausalLM, compile: bool, int8: bool):
        self.model = model
        self.groups: dict[int, Tensor] = {}
        decoder = model.backbone.base_model
        config = decoder.config
        self._rotary = decoder.rotary_emb
        self._head_dim = decoder.layers[0].self_attn.head_dim
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._activation = decoder.layers[0].mlp.act_fn
        self._norm, self._epsilon = decoder.norm.weight.detach(), config.rms_norm_eps
        weight = _weights(model.image_head)[0].to(self._norm.dtype)  # an adapter's tables are in float32 on any base
        dense = Packed if Packed.takes(weight) and not compile else Dense
        self._kind: type[Dense | Packed | Int8] = Int8 if int8 else dense
        with torch.no_grad():
            self._layers = [self._fuse(layer, self._kind) for layer in decoder.layers]
            self._head = self._kind(weight)
            self._table = _weights(model.image_embed)[0].detach()
        self._compiled = torch.compile(self._step, dynamic=True) if compile else None

    def _fuse(self, layer: Any, kind: type[Dense | Packed | Int8]) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        query, key = (self._paired(*_weights(module)) for module in (attention.q_proj, attention.k_proj))
        norms = None
        if hasattr(attention, "q_norm"):
            order = self._pairing(attention.q_norm.weight.device)
            norms = torch.cat([
                attention.q_norm.weight.detach()[order].expand(self._heads, -1),
                attention.k_norm.weight.detach()[order].expand(self._kv_heads, -1),
            ])  # fmt: skip
        return _Layer(
            layer.input_layernorm.weight.detach(),
            kind(*_joined(query, key, _weights(attention.v_proj))),
            norms,
            kind(*_weights(attention.o_proj)),
            layer.post_attention_layernorm.weight.detach(),
            kind(*_joined(_weights(mlp.gate_proj), _weights(mlp.up_proj))),
            kind(*_weights(mlp.down_proj)),
        )

    def _pairing(self, device: torch.device) -> Tensor:
        """Order of a head's dimensions that puts the two of a rotated pair, half a head apart, side by side."""
        return torch.arange(self._head_dim, device=device).reshape(2, -1).T.reshape(-1)

    def _paired(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        order = self._pairing(weight.device)
        weight = weight.reshape(-1, self._head_dim, weight.shape[-1])[:, order].flatten(0, 1)
        return weight, None if bias is None else bias.reshape(-1, self._head_dim)[:, order].flatten()

    def positions(self, coordinates: Tensor) -> Tensor:
        """Rotations ``(B, T, 1, head_dim / 2)``, complex; for a compiler as cosine and sine in a last dimension of 2."""
        self._rotary.coordinates = coordinates
        try:
            cos, sin = self._rotary(coordinates, coordinates[..., 0])  # in float32, whatever the weights are in
        finally:
            self._rotary.coordinates = None
        half = self._head_dim // 2
        pairs = torch.stack([cos[..., :half], sin[..., :half]], dim=-1)[:, :, None]
        return torch.view_as_complex(pairs) if self._compiled is None else pairs

    def __call__(
        self, embeds: Tensor, positions: Tensor, cache: KeyValueCache, bias: Tensor | None, image_positions: Tensor
    ) -> Tensor:
        """See :class:`Decoder`."""
        cache.open(embeds.shape[1])
        embeds = embeds.to(self._norm.dtype)
        if self._compiled is not None and cache.keys:
            hidden = self._compiled(embeds, positions, bias, cache.keys, cache.values, cache.column, cache.end)
        else:
            hidden = self._forward(embeds, positions, bias, cache.update)
        cache.column += embeds.shape[1]
        return hidden

    def image_logits(self, hidden: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        return self._head(hidden.to(self._norm.dtype))

    def text_logits(self, hidden: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        return self._text_head(hidden)

    @cached_property
    def _text_head(self) -> Dense | Packed | Int8:
        """The text head, often the largest matrix, copied once text is written."""
        with torch.no_grad():
            return self._kind(*_weights(self.model.get_output_embeddings()))

    def embed(self, codes: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        return F.embedding(codes, self._table)

    def _step(
        self,
        embeds: Tensor,
        rotation: Tensor,
        bias: Tensor | None,
        keys: list[Tensor],
        values: list[Tensor],
        column: int,
        end: int,
    ) -> Tensor:
        """A pass whose cache is spelled out in tensors and numbers, which a compiler can follow."""
        stop = column + embeds.shape[1]

        def update(key: Tensor, value: Tensor, index: int) -> tuple[Tensor, Tensor]:
            keys[index][:, :, column:stop] = key
            values[index][:, :, column:stop] = value
            return keys[index][:, :, :end], values[index][:, :, :end]

        return self._forward(embeds, rotation, bias, update)

    def _forward(
        self,
        embeds: Tensor,
        rotation: Tensor,
        bias: Tensor | None,
        update: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    ) -> Tensor:
        batch, width, dim = embeds.shape
        heads, kv_heads = self._heads, self._kv_heads
        x = embeds.reshape(batch * width, dim)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(F.rms_norm(x, (dim,), layer.attention_norm, self._epsilon))
            qk, value = qkv.view(batch, width, -1, self._head_dim).split([heads + kv_heads, kv_heads], dim=2)
            if layer.head_norms is not None:
                qk = F.rms_norm(qk, (self._head_dim,), eps=self._epsilon) * layer.head_norms
            query, key = _rotate(qk, rotation).split([heads, kv_heads], dim=2)
            keys, values = update(key.transpose(1, 2), value.transpose(1, 2), index)
            attended = attend(query.transpose(1, 2), keys, values, bias)
            x = layer.output.add_to(x, attended.reshape(batch * width, -1))
            gate, up = layer.gate_up(F.rms_norm(x, (dim,), layer.mlp_norm, self._epsilon)).chunk(2, dim=-1)
            x = layer.down.add_to(x, self._activation(gate) * up)
        return F.rms_norm(x, (dim,), self._norm, self._epsilon).view(batch, width, dim)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs of ``(B, T, heads, head_dim)`` by what :meth:`LeanDecoder.positions` gives."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if rotation.is_complex():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rotation)
    else:  # the compiler fuses real numbers and has nothing for complex ones
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _weights(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer or an embedding as it computes now, adapters included."""
    if isinstance(module, BaseTunerLayer) and not isinstance(module, ModulesToSaveWrapper):
        if bool(module.merged) == bool(module.disable_adapters):
            module = copy.deepcopy(module)
            (module.unmerge if module.merged else module.merge)()
        module = module.get_base_layer()
    module = active_table(module)
    return module.weight, getattr(module, "bias", None)


def _joined(*parts: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """One layer that computes all parts side by side."""
    weights, biases = zip(*parts, strict=True)
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)
