"""Partial LoRA (arXiv 2401.16420): adapters whose update acts on positions of one modality only, text or image."""

from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

MODALITIES = ("all", "text", "image")


class ModalityGate:
    """Multiplies the updates of partial adapters by 0 on positions of the other modality.

    The kinds of a batch's positions travel to every attention module as the keyword ``image_positions (B, T)``. That module takes
    them for its whole layer, so that a layer that is computed again for its gradients finds those of its own batch.

    Args:
        decoder: the backbone's decoder, with ``layers`` that hold a ``self_attn`` each.

    Attributes:
        kinds: the partial adapters, ``text`` or ``image`` by name.
    """

    def __init__(self, decoder: Any):
        self.kinds: dict[str, str] = {}
        self._image: Tensor | None = None
        self._decoder = decoder
        self._handles = [
            layer.self_attn.register_forward_pre_hook(self._take_positions, with_kwargs=True)
            for layer in decoder.layers
        ]

    def add(self, name: str, kind: str) -> None:
        """Gate an adapter that has been added to the decoder."""
        self.kinds[name] = kind
        for module in self._decoder.modules():
            if isinstance(module, LoraLayer) and name in module.lora_A:
                module.lora_A[name].register_forward_hook(partial(self._keep, kind))

    def remove(self) -> None:
        """Take the hooks off the decoder; those of the adapters go with them."""
        for handle in self._handles:
            handle.remove()

    def _take_positions(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._image = kwargs.pop("image_slots", None)
        if self._image is None:
            raise ValueError(
                f"modality: {type(module).__name__} is not told which positions are images; load the adapters "
                f"{sorted(self.kinds)} into another backbone, or train them with modality 'all'."
            )
        return args, kwargs

    def _keep(self, kind: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self._image is not None  # the attention module before has set it
        acts = self._image if kind == "image" else ~self._image
        return output * acts[..., None]


def check_modality(modality: str, use_dora: bool) -> None:
    """Raises ValueError for an unknown kind, or one that a variant of LoRA has no meaning for."""
    if modality not in MODALITIES:
        raise ValueError(f"modality: {modality!r} is unknown; use one of {MODALITIES}.")
    if modality != "all" and use_dora:
        raise ValueError(
            f"modality: {modality!r} is not possible with use_dora, which rescales whole weights; leave one of the two out."
        )


def gate_adapter(model: Any, name: str, modality: str) -> None:
    """Let an adapter of a unified model act on positions of one modality only.

    Raises:
        ValueError: if it adapts modules outside of the decoder's layers, or those have no attention module.
    """
    if modality == "all":
        return
    decoder = model.backbone.base_model
    inside = {module for layer in decoder.layers for module in layer.modules()}
    outside = [
        where
        for where, module in model.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A and module not in inside
    ]
    if outside or not all(hasattr(layer, "self_attn") for layer in decoder.layers):
        raise ValueError(
            f"modality: {modality!r} works inside decoder layers with attention only, not for "
            f"{outside or type(decoder).__name__}; choose other target_modules, or modality 'all'."
        )
    if model.modality_gate is None:
        model.modality_gate = ModalityGate(decoder)
    model.modality_gate.add(name, modality)


def forget_gates(model: Any, names: list[str]) -> None:
    """Undo :func:`gate_adapter` for adapters that are gone."""
    if model.modality_gate is None:
        return
    for name in names:
        model.modality_gate.kinds.pop(name, None)
    if not model.modality_gate.kinds:
        model.modality_gate.remove()
        model.modality_gate = None
