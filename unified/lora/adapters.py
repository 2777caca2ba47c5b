"""LoRA adapters of a unified model: attach a new one, load and unload it, completely or not at all."""

import copy
import re
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from unified.files import read_json
from unified.lora.base import BASE_FILE, CONFIG_FILE, base_of, check_base, weights_name
from unified.lora.fields import FIELDS, is_names, linear_layers, lora_config
from unified.lora.modality_gate import check_modality, forget_gates, gate_adapter
from unified.lora.switching import adapter_state, apply_weights, check_not_fused, switch, unfuse_lora, wrapped_tables
from unified.model.modeling import UnifiedForCausalLM
from unified.model.retrofit import as_setting, change_prediction, describe_prediction, new_modules
from unified_tokenizers import read_weights
from unified_tokenizers.checkpoint import check_names
from unified_tokenizers.fields import sizes

_, _are_whole = sizes()


def attach_lora(
    model: UnifiedForCausalLM,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    train_image_tables: bool | None = None,
    modality: str = "all",
    **options: Any,
) -> PeftModel:
    """Wrap a model for LoRA training (arXiv 2106.09685); only the adapter stays trainable.

    Args:
        model: the base model.
        rank: rank r of the update.
        alpha: scale of the update is ``alpha / rank``; the default is ``rank``.
        dropout: dropout on the adapter's input.
        target_modules: names of the linear layers that get an update; None: those of attention and MLP, see
            :func:`unified.lora.fields.linear_layers`.
        train_image_tables: train and save full copies of both image tables with the adapter; None: exactly if they are
            new, as after ``from_backbone``, because an adapter alone cannot teach a model codes that it has never seen. Modules
            that :func:`unified.model.retrofit.change_prediction` has added are trained and saved in any case.
        modality: ``text`` or ``image`` lets the update act on positions of that modality only (Partial LoRA, arXiv 2401.16420):
            an ``image`` adapter leaves rows of text as they are, bit for bit.
        options: further fields of ``peft.LoraConfig``: ``use_rslora``, ``use_dora``, ``init_lora_weights``, ``exclude_modules``,
            ``layers_to_transform``, ``rank_pattern``, ``alpha_pattern``.

    Raises:
        ValueError: if a field is not supported or out of range, a name matches no module, or ``modality`` is not possible.
            The model is as before then.
    """
    check_modality(modality, bool(options.get("use_dora")))
    unknown = sorted(options.keys() - FIELDS.keys())
    if unknown:
        raise ValueError(f"lora: {unknown} are not supported; leave them out.")
    if not isinstance(train_image_tables, bool | None):
        raise ValueError(
            f"lora: train_image_tables {train_image_tables!r} is not possible; it must be true, false or null."
        )
    if train_image_tables is None:
        train_image_tables = model.config.new_image_tables
    fields = {
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "lora_dropout": dropout,
        "target_modules": linear_layers(model) if target_modules is None else target_modules,
        "modules_to_save": (list(model.image_modules()) if train_image_tables else new_modules(model)) or None,
        **options,
    }
    config = lora_config(fields, model)
    _try_out(model, config, "default", modality)
    adapted = _add(model, config, "default", modality)
    for parameter in adapted.parameters():
        if (
            parameter.requires_grad
        ):  # copies of the tables of a base in bfloat16, too: small steps would be rounded away
            parameter.data = parameter.data.float()
    return adapted


def load_lora(
    model: UnifiedForCausalLM | PeftModel,
    path: str | Path,
    adapter_name: str,
    trainable: bool = False,
    weight_name: str | None = None,
) -> PeftModel:
    """Add an adapter from a folder under a name and make it the active one; disabled adapters are enabled.

    An adapter that was trained after a change of the order (``prediction`` beside ``lora`` in the settings of a run) changes the
    order of the model that it is loaded into, until it is unloaded: it is whole alone, with a weight of 1.

    A plain folder of peft, without a ``unified_base.json``, is taken if its tensors are exactly those that its config
    describes in this model, by name and shape; a warning says that nothing else is known of its base. So is an adapter that
    was trained on the bare backbone, whose names lack the part of a unified model's that leads to it.

    Args:
        model: the model, perhaps with adapters.
        path: the folder.
        adapter_name: name for it.
        trainable: whether it is to be trained further.
        weight_name: name of its safetensors file; default ``adapter_model.safetensors``.

    Raises:
        ValueError: if the adapter belongs to another model, is not whole, asks for what is not supported, the name is not
            possible or taken, or adapters are fused. The model and its adapters are as before then.
    """
    folder, original = Path(path), None
    if (prediction := _other_prediction(model, folder, trainable)) is not None:
        original, model = base_of(model), change_prediction(base_of(model), prediction)
    check_base(model, folder, weight_name)
    _check_name(model, adapter_name)
    described = (folder / BASE_FILE).is_file()
    description = read_json(folder / BASE_FILE, "lora") if described else {}
    modality, objectives = description.get("modality", "all"), description.get("objectives")
    if objectives is not None and not is_names(objectives):
        raise ValueError(
            f"lora: objectives {reprlib.repr(objectives)} in {BASE_FILE} of {str(path)!r} are no list of names."
        )
    patch_sizes = description.get("patch_sizes", [])
    if not _are_whole(patch_sizes):
        raise ValueError(
            f"lora: patch_sizes {reprlib.repr(patch_sizes)} in {BASE_FILE} of {str(path)!r} are no list of whole numbers."
        )
    fields = read_json(folder / CONFIG_FILE, "lora")
    config = lora_config(fields, base_of(model))
    config.inference_mode = not trainable
    check_modality(modality, config.use_dora)
    state = read_weights(folder / weights_name(weight_name))
    wanted = _try_out(model, config, adapter_name, modality)
    if not described:
        state = _as_in_model(state, wanted, base_of(model))
    problem = (
        f"lora: the tensors of {str(path)!r} are not those that its {CONFIG_FILE} describes; get or save them again"
    )
    shapes = {(n, state[n].shape, wanted[n].shape) for n in wanted.keys() & state if state[n].shape != wanted[n].shape}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(
                f"lora: {name!r} of {str(path)!r} holds {tensor.dtype} values that are not all finite numbers."
            )
    check_names(problem, state.keys() - wanted.keys(), wanted.keys() - state.keys(), shapes)
    if not described:
        warnings.warn(
            f"lora: {str(path)!r} has no {BASE_FILE} and does not say which model it is for; its tensors fit this one, so it "
            "is taken. save_lora_weights writes a folder that says it.",
            stacklevel=2,
        )

    adapted = _add(model, config, adapter_name, modality)  # the first change, and nothing is left to go wrong
    set_peft_model_state_dict(adapted, state, adapter_name)
    apply_weights(adapted, {adapter_name: 1.0}, trainable)
    base_of(adapted).config.add_patch_sizes(patch_sizes)
    adapter_state(adapted).original = original
    adapter_state(adapted).objectives.pop(adapter_name, None)
    if objectives is not None:
        adapter_state(adapted).objectives[adapter_name] = list(objectives)
    return adapted if trainable else adapted.eval()


def _other_prediction(model: UnifiedForCausalLM | PeftModel, folder: Path, trainable: bool) -> dict[str, Any] | None:
    """What the order of a model has to change to for an adapter of a folder; None if it stays.

    Raises:
        ValueError: if it cannot change now, because other adapters are loaded or it is to be trained further.
    """
    if isinstance(model, PeftModel) and adapter_state(model).original is not None:
        raise ValueError(f"lora: {list(model.peft_config)} has changed the order of the model; unload it first.")
    if not (folder / BASE_FILE).is_file():
        return None
    description, own = read_json(folder / BASE_FILE, "lora"), describe_prediction(base_of(model).prediction)
    wanted = description.get("prediction")
    if wanted == own or description.get("retrofitted_from") != own or not isinstance(wanted, Mapping):
        return None
    if isinstance(model, PeftModel) or trainable:
        others = (
            "a run that trains it further"
            if trainable
            else f"the adapters {list(model.peft_config)}, unload them first"
        )
        raise ValueError(
            f"lora: {str(folder)!r} changes the order of the model to {wanted.get('order')!r}, not for {others}."
        )
    try:
        return as_setting(wanted)
    except ValueError as error:
        raise ValueError(f"lora: {str(folder / BASE_FILE)!r}: {error}") from error


def unload_lora(model: PeftModel) -> UnifiedForCausalLM:
    """Remove all adapters; every weight of the returned base model is what it was before the first one, and so is its order."""
    if adapter_state(model).unfused is not None:
        unfuse_lora(model)
    base, original = base_of(model), adapter_state(model).original
    forget_gates(base, list(model.peft_config))
    # peft leaves the active adapter's copies of the image tables in place of the originals.
    originals = {name: wrapper.original_module for name, wrapper in wrapped_tables(base).items()}
    unloaded = cast(UnifiedForCausalLM, model.unload())
    for name, module in originals.items():
        unloaded.set_submodule(name, module)
    if original is None:
        return unloaded
    nn.Module.to(original, unloaded.device)  # what the two do not share
    return original


def _add(model: UnifiedForCausalLM | PeftModel, config: LoraConfig, name: str, modality: str) -> PeftModel:
    """The model with the modules of a new adapter."""
    if isinstance(model, PeftModel):
        switch(model, True)
        apply_weights(model, {next(iter(model.peft_config)): 1.0})  # peft adds an adapter beside a single one only
        model.add_adapter(name, config)
    else:
        model = PeftModel(model, config, name)
    gate_adapter(base_of(model), name, modality)
    return model


def _as_in_model(state: dict[str, Tensor], wanted: dict[str, Tensor], base: UnifiedForCausalLM) -> dict[str, Tensor]:
    """The tensors of a plain folder of peft by the names that they have in a unified model.

    Its model may have been this one, its language model or the decoder in that: the names lack nothing, ``backbone.`` or
    ``backbone.model.``. The place under which all names match is taken; where none does, the names stay for the error.
    """
    root = "base_model.model."
    for place in ("", "backbone.", f"backbone.{base.backbone.base_model_prefix}."):
        renamed = {
            name.replace(root, root + place, 1) if name.startswith(root) else name: t for name, t in state.items()
        }
        if renamed.keys() == wanted.keys():
            return renamed
    return state


def _try_out(model: UnifiedForCausalLM | PeftModel, config: LoraConfig, name: str, modality: str) -> dict[str, Tensor]:
    """Add the adapter to a copy of the model without memory for weights; returns its tensors by the names of a saved file.

    Raises:
        ValueError: whatever goes wrong.
    """
    meta = {
        id(tensor): nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        for tensor in chain(model.parameters(), model.buffers())
        for empty in [torch.empty_like(tensor, device="meta")]
    }
    for tensor in chain(
        model.parameters(), model.buffers()
    ):  # how a weight of 4 bits is packed is written on the tensor
        for name, value in vars(tensor).items():
            if isinstance(value, bool | int | str):
                setattr(meta[id(tensor)], name, value)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again with the model itself
            outline = _add(copy.deepcopy(model, meta), copy.deepcopy(config), name, modality)  # type: ignore[arg-type]
            return get_peft_model_state_dict(outline, adapter_name=name, save_embedding_layers=False)
    except ValueError:
        raise
    except Exception as error:  # any error of peft on a config that the checks did not foresee
        raise ValueError(f"lora: the adapter {name!r} does not fit the model ({error!r}).") from error


def _check_name(model: UnifiedForCausalLM | PeftModel, name: str) -> None:
    """Raises ValueError for a name that is taken or that cannot name modules and folders; or if adapters are fused."""
    if isinstance(model, PeftModel):
        check_not_fused(model, "load_lora")
        if name in model.peft_config:
            raise ValueError(f"adapter_name: {name!r} is loaded already; choose another name or delete it first.")
    parts = {part for key in base_of(model).state_dict() for part in key.split(".")}
    if not isinstance(name, str) or not re.fullmatch(r"[\w -]+", name) or name in parts or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name: {name!r} is not possible; use letters, digits, '_' and '-', and no name of a module of the model."
        )
