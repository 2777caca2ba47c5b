"""Partial LoRA (arXiv 2401.16420): adapters whose update acts on positions of one modality only, text or image."""

from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from unified.model.backbone import decoder_layers

MODALITIES = ("all", "text", "image")


class ModalityGate:
    """Multiplies the updates of partial adapters by 0 on positions of the other modality.

    Which positions are images travels to every attention module as the keyword ``image_positions (B, T)``. That module
    takes it for its whole layer, so that a layer that is computed again for its gradients finds those of its batch.

    Args:
        layers: the layers of the backbone, each with a ``self_attn``.

    Attributes:
        kinds: the modality of every partial adapter, ``text`` or ``image``, by its name.
    """

    def __init__(self, layers: nn.ModuleList):
        self.kinds: dict[str, str] = {}
        self._image: Tensor | None = None
        self._layers = layers
        self._handles = [
            layer.self_attn.register_forward_pre_hook(self._take_positions, with_kwargs=True)  # type: ignore[operator, union-attr]
            for layer in layers
        ]

    def add(self, name: str, kind: str) -> None:
        """Gate an adapter that has been added to the layers."""
        self.kinds[name] = kind
        for module in self._layers.modules():
            if isinstance(module, LoraLayer) and name in module.lora_A:
                module.lora_A[name].register_forward_hook(partial(self._keep, kind))

    def remove(self) -> None:
        """Take the hooks off the layers; those of the adapters go with them."""
        for handle in self._handles:
            handle.remove()

    def _take_positions(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._image = kwargs.pop("image_positions", None)
        if self._image is None:
            raise ValueError(
                f"modality: {type(module).__name__} does not get image_positions; load the adapters {sorted(self.kinds)} into "
                "another backbone, or train them with modality 'all'."
            )
        return args, kwargs

    def _keep(self, kind: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self._image is not None  # the attention module before has set it
        acts = self._image if kind == "image" else ~self._image
        return output * acts[..., None]


def check_modality(modality: str, use_dora: bool) -> None:
    """Raises ValueError for an unknown modality, or one that a variant of LoRA has no meaning for."""
    if modality not in MODALITIES:
        raise ValueError(f"modality: {modality!r} is unknown; use one of {MODALITIES}.")
    if modality != "all" and use_dora:
        raise ValueError(
            f"modality: {modality!r} is not possible with use_dora, which rescales whole weights; leave out one of the two."
        )


def gate_adapter(model: Any, name: str, modality: str) -> None:
    """Let an adapter of a unified model act on positions of one modality only.

    Raises:
        ValueError: if it adapts modules outside of the decoder's layers, or those have no attention module.
    """
    if modality == "all":
        return
    layers = decoder_layers(model.backbone)
    inside = set(layers.modules())
    outside = [
        where
        for where, module in model.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A and module not in inside
    ]
    if outside or not all(hasattr(layer, "self_attn") for layer in layers):
        raise ValueError(
            f"modality: {modality!r} works inside decoder layers with self_attn only, not for "
            f"{outside or type(model.backbone).__name__}; choose other target_modules, or modality 'all'."
        )
    if model.modality_gate is None:
        model.modality_gate = ModalityGate(layers)
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
