"""Which adapters of a model are active, and with what weight: enable, disable, weigh, delete, fuse."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from unified.lora.modality_gate import forget_gates
from unified.model.modeling import UnifiedForCausalLM
from unified_tokenizers.fields import is_finite

_COMBINED = "unified_combined"  # temporary entry of a table that is no single adapter's copy


@dataclass
class AdapterState:
    """What peft does not keep about the adapters of a model.

    Attributes:
        weights: the active adapters with their weights; 1 is as trained.
        unfused: while fused, the model's weights and the adapters' weights from before.
        original: the model as it was, if the adapter has changed its order; such an adapter is whole alone.
        objectives: names of what each adapter was trained for, as far as it is known.
    """

    weights: dict[str, float]
    unfused: tuple[list[tuple[nn.Parameter, Tensor]], dict[str, float]] | None = None
    original: UnifiedForCausalLM | None = None
    objectives: dict[str, list[str]] = field(default_factory=dict)


def adapter_state(model: PeftModel) -> AdapterState:
    """The state of a model's adapters, which the functions below change."""
    state = model.__dict__.get("adapter_state")
    if state is None:
        state = AdapterState(dict.fromkeys(model.active_adapters, 1.0))
        model.__dict__["adapter_state"] = state
    return cast(AdapterState, state)


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters; empty for a model without any."""
    return list(adapter_state(model).weights) if isinstance(model, PeftModel) else []


def apply_weights(model: PeftModel, weights: dict[str, float], trainable: bool = False) -> None:
    """Make these adapters active and no others; without ``trainable`` all of them are frozen."""
    # An adapter of weight 0 is left out, because a DoRA scaled to 0 is not the base.
    active = [name for name, weight in weights.items() if weight]
    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            for name in active:
                module.set_scale(name, weights[name])  # type: ignore[operator]
            module.set_adapter(active, inference_mode=not trainable)  # type: ignore[operator]
        elif isinstance(module, ModulesToSaveWrapper):
            _set_table(module, {name: weights[name] for name in active}, trainable)
    cast(LoraModel, model.base_model).active_adapter = active
    model.active_adapter = (active or list(model.peft_config))[0]
    adapter_state(model).weights = weights


def _set_table(wrapper: ModulesToSaveWrapper, weights: dict[str, float], trainable: bool) -> None:
    """One adapter of weight 1 puts its copy of a table in place; else the changes of all are summed like updates."""
    wrapper.set_adapter([])
    if _COMBINED in wrapper.modules_to_save:
        del wrapper.modules_to_save[_COMBINED]
        wrapper._adapters.discard(_COMBINED)
    weights = {name: weight for name, weight in weights.items() if name in wrapper.modules_to_save}
    if list(weights.values()) == [1.0]:
        wrapper.set_adapter(list(weights), inference_mode=not trainable)
    elif weights:
        original = wrapper.original_module
        combined = copy.deepcopy(original)
        with torch.no_grad():
            for name, weight in weights.items():
                parts = zip(
                    combined.parameters(),
                    wrapper.modules_to_save[name].parameters(),
                    original.parameters(),
                    strict=True,
                )
                for own, theirs, before in parts:
                    own += weight * (theirs - before)
        wrapper.modules_to_save[_COMBINED] = combined
        wrapper._adapters.add(_COMBINED)
        wrapper.set_adapter([_COMBINED], inference_mode=True)


def active_table(module: nn.Module) -> nn.Module:
    """The module that computes in place of ``module``: the active adapter's copy of a table where it has one."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def set_adapters(model: PeftModel, names: Sequence[str], weights: Sequence[float]) -> None:
    """Activate adapters together, each scaled by its weight (1 is as trained), for inference.

    Image tables that adapters bring change by the weighted sum of the adapters' changes.

    Raises:
        ValueError: if a name is unknown or given twice, the lengths differ, a weight is not finite, or adapters are fused.
    """
    _check_loaded(model, names)
    check_not_fused(model, "set_adapters")
    if len(set(names)) != len(names):
        raise ValueError(f"adapter_names: {list(names)} names an adapter twice; give it one weight.")
    if len(names) != len(weights) or not names:
        raise ValueError(f"weights: {len(weights)} weights for {len(names)} adapters; give one weight per adapter.")
    if not all(map(is_finite, weights)):
        raise ValueError(f"weights: {list(weights)} must be finite numbers.")
    if list(weights) != [1]:
        check_order_kept(model, "set_adapters")
    switch(model, True)
    apply_weights(model, dict(zip(names, weights, strict=True)))


def delete_adapters(model: PeftModel, names: Sequence[str]) -> None:
    """Remove some of the loaded adapters; the others keep their weights. At least one has to stay.

    Raises:
        ValueError: if a name is unknown, or adapters are fused.
    """
    _check_loaded(model, names)
    check_not_fused(model, "delete_adapters")
    weights = adapter_state(model).weights
    apply_weights(model, {})
    for name in names:
        cast(LoraModel, model.base_model).delete_adapter(name)
    apply_weights(model, {name: weight for name, weight in weights.items() if name not in names})
    forget_gates(model.get_base_model(), list(names))


def _check_loaded(model: PeftModel, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in model.peft_config]
    if unknown:
        raise ValueError(f"adapter_names: {unknown} are not loaded; loaded are {sorted(model.peft_config)}.")


def switch(model: PeftModel, enabled: bool) -> None:
    """Run with the active adapters, for inference, or with the base model alone.

    Raises:
        ValueError: if adapters are fused, or one is disabled that changed the order of the model.
    """
    check_not_fused(model, "enable_lora" if enabled else "disable_lora")
    if not enabled:
        check_order_kept(model, "disable_lora")
    tuner = cast(LoraModel, model.base_model)
    if enabled:
        tuner.enable_adapter_layers()
        apply_weights(model, adapter_state(model).weights)  # peft makes what it enables trainable
    else:
        tuner.disable_adapter_layers()


@contextmanager
def adapters_kept(model: PeftModel) -> Iterator[None]:
    """The same adapters are active afterwards as before, whatever is set in between, for inference."""
    disabled, active = is_disabled(model), dict(adapter_state(model).weights)
    try:
        yield
    finally:
        switch(model, True)
        apply_weights(model, active)
        if disabled:
            switch(model, False)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model alone for a while, as the reference of a training: what requires gradients goes on to do so.

    Args:
        model: with one or more adapters, wrapped in whatever way.

    Raises:
        ValueError: if there is no adapter, or adapters are fused.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer | ModulesToSaveWrapper)]
    if not layers:
        raise ValueError("adapters_off: the model has no adapter, and nothing to be compared with; attach one (lora).")
    if any(layer.merged_adapters for layer in layers):
        raise ValueError("adapters_off: adapters are fused; call unfuse_lora first.")
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def is_disabled(model: PeftModel) -> bool:
    """Whether the base model is used alone."""
    return any(isinstance(module, LoraLayer) and bool(module.disable_adapters) for module in model.modules())


def check_not_fused(model: PeftModel, what: str) -> None:
    """Raises ValueError if adapters are fused, which ``what`` cannot be done to."""
    if adapter_state(model).unfused is not None:
        raise ValueError(f"{what}: adapters are fused; call unfuse_lora first.")


def check_order_kept(model: PeftModel, what: str) -> None:
    """Raises ValueError if the adapter changed the order of the model, without which ``what`` makes no sense."""
    if adapter_state(model).original is not None:
        order = cast(UnifiedForCausalLM, model.get_base_model()).prediction.order
        raise ValueError(
            f"{what}: the adapter has changed the order of the model to {order!r} and is needed as it is; unload_lora_weights "
            "gives the model back, fuse_lora and save_pretrained make a pipeline of both."
        )


def fuse_lora(model: PeftModel, lora_scale: float = 1.0) -> None:
    """Add the active adapters, their weights times ``lora_scale``, to the base weights, until :func:`unfuse_lora`.

    The base weights are kept as well, so the adapted layers take twice their memory.

    Raises:
        ValueError: if adapters are fused, disabled or act on one modality only, the base is quantized, or the scale or the
            sum is not finite.
    """
    check_not_fused(model, "fuse_lora")
    gate = cast(UnifiedForCausalLM, model.get_base_model()).modality_gate
    for name in adapter_state(model).weights:
        if gate is not None and name in gate.kinds:
            raise ValueError(
                f"fuse_lora: adapter {name!r} acts on {gate.kinds[name]} positions only, which a weight cannot; leave it out "
                "with set_adapters."
            )
    if getattr(model.get_base_model(), "is_quantized", False):
        raise ValueError(
            "fuse_lora: the base is in 4 or 8 bits and would be rounded again; load it in bfloat16 to fuse."
        )
    if is_disabled(model):
        raise ValueError("fuse_lora: adapters are disabled; call enable_lora first.")
    if not is_finite(lora_scale):
        raise ValueError(f"lora_scale: {lora_scale!r} must be a finite number.")
    if lora_scale != 1:
        check_order_kept(model, "lora_scale")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    kept = [(weight, weight.data) for layer in layers for weight in layer.get_base_layer().parameters()]
    state = adapter_state(model)
    before = state.weights
    apply_weights(model, {name: weight * lora_scale for name, weight in before.items()})
    state.unfused = (kept, before)
    try:
        cast(LoraModel, model.base_model).merge_adapter(safe_merge=True)  # into new tensors
    except ValueError:
        unfuse_lora(model)
        raise


def unfuse_lora(model: PeftModel) -> None:
    """Put the weights from before :func:`fuse_lora` back, bit for bit; the same adapters are active as then.

    Raises:
        ValueError: if nothing is fused.
    """
    state = adapter_state(model)
    if state.unfused is None:
        raise ValueError("unfuse_lora: nothing is fused; call fuse_lora first.")
    kept, weights = state.unfused
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merged_adapters.clear()
    for parameter, data in kept:
        parameter.data = data.to(parameter.device, parameter.dtype)
    state.unfused = None
    apply_weights(model, weights)


def wrapped_tables(base: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """The image tables that adapters bring copies of, by name."""
    return {name: module for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def plain_state(model: PeftModel) -> dict[str, Tensor]:
    """Weights of a fused model under the names of a model without adapters."""
    base = cast(UnifiedForCausalLM, model.get_base_model())
    tables = wrapped_tables(base)
    wrapped = tuple(f"{name}." for name in tables)
    state = {
        name.replace(".base_layer.", "."): value
        for name, value in base.state_dict().items()
        if ".lora_" not in name and not name.startswith(wrapped)
    }
    for name, wrapper in tables.items():
        state |= {f"{name}.{key}": value for key, value in active_table(wrapper).state_dict().items()}
    return state


def save_fused(model: PeftModel, folder: Path, **options: Any) -> None:
    """Write a fused model as one without adapters; ``options`` are those of ``save_pretrained``.

    Raises:
        ValueError: if nothing is fused.
    """
    if adapter_state(model).unfused is None:
        raise ValueError(
            "save_pretrained: adapters are loaded; call unload_lora_weights() for the base, fuse_lora() for the sum, "
            "or save an adapter alone with save_lora_weights."
        )
    base = cast(UnifiedForCausalLM, model.get_base_model())
    base.save_pretrained(folder, state_dict=plain_state(model), **options)
    if isinstance(base.image_head, ModulesToSaveWrapper) and base.image_head.active_adapters:
        config = copy.deepcopy(base.config)
        config.new_image_tables = False  # the adapter's are written, which are trained
        config.save_pretrained(folder)
