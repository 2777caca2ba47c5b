"""LoRA adapters of a unified model: attach a new one; save, load and unload it, completely or not at all."""

import copy
import json
import math
import re
import reprlib
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from unified.config import head_dim
from unified.files import read_json
from unified.lora.modality_gate import check_modality, forget_gates, gate_adapter
from unified.lora.switching import adapter_state, apply_weights, check_not_fused, switch, unfuse_lora, wrapped_tables
from unified.model.backbone import decoder_layers
from unified.model.modeling import UnifiedForCausalLM
from unified.model.retrofit import as_setting, change_prediction, describe_prediction, new_modules
from unified_tokenizers import read_weights
from unified_tokenizers.checkpoint import check_names
from unified_tokenizers.fields import is_whole

BASE_FILE = "unified_base.json"
IMAGE_MODULES = (
    "image_embed", "image_head", "image_projection", "image_query", "image_merge", "image_split", "image_chain", "image_join",
    "vision_projector",
)  # fmt: skip
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_SHAPES = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_INITS = (True, False, "gaussian", "orthogonal")  # the others of peft change the base, or need data


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
            :func:`linear_layers`.
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
    unknown = sorted(options.keys() - _FIELDS.keys())
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
    config = _lora_config(fields, model)
    _try_out(model, config, "default", modality)
    adapted = _add(model, config, "default", modality)
    for parameter in adapted.parameters():
        if (
            parameter.requires_grad
        ):  # copies of the tables of a base in bfloat16, too: small steps would be rounded away
            parameter.data = parameter.data.float()
    return adapted


def linear_layers(model: UnifiedForCausalLM) -> list[str]:
    """Names of the linear layers of attention and MLP, by what the decoder's layers hold; seven for Llama, Qwen or Gemma.

    Layers narrower than an attention head are routers and gates of heads, and left out. So are experts that are no linear
    layers but one tensor for all.
    """
    config = model.config.text_config
    narrow = head_dim(config)
    found: dict[str, None] = {}  # in order of appearance
    for layer in decoder_layers(model.backbone):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and module.out_features >= narrow and ".lora_" not in name:
                found[name.removesuffix(".base_layer").rpartition(".")[2]] = None
    return list(found)


def base_description(model: UnifiedForCausalLM) -> dict[str, Any]:
    """What an adapter has to agree on with the model that it is loaded into, as far as it is known."""
    config, text = model.config, model.config.text_config
    optional = {name: getattr(text, name, None) for name in _SHAPES}
    optional["text_tokenizer_fingerprint"] = config.text_tokenizer_fingerprint
    return {
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "text_vocab_size": text.vocab_size,
        "codebook_size": config.codebook_size,
        "image_tokenizer_fingerprint": config.image_tokenizer_fingerprint,
        "boi_token_id": config.boi_token_id,
        "eoi_token_id": config.eoi_token_id,
        "positions": config.positions,
        "coarse_positions": config.coarse_positions,
        "prediction": describe_prediction(model.prediction),
        **({} if model.retrofitted_from is None else {"retrofitted_from": model.retrofitted_from}),
        **({} if config.image_factors is None else {"image_factors": list(config.image_factors)}),
        **({} if config.image_frame is None else {"image_frame": config.image_frame}),
        **({} if config.classes is None else {"classes": config.classes}),
        **({} if config.vision is None else {"vision_fingerprint": config.vision.get("fingerprint")}),
        **{name: value for name, value in optional.items() if value is not None},
    }


def base_of(model: UnifiedForCausalLM | PeftModel) -> UnifiedForCausalLM:
    """The unified model inside a possibly wrapped one."""
    return cast(UnifiedForCausalLM, model.get_base_model()) if isinstance(model, PeftModel) else model


def save_lora(
    model: PeftModel,
    save_directory: str | Path,
    state_dict: dict[str, Tensor] | None = None,
    card: str | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapters (safetensors and JSON) and a description of the model that they belong to.

    Adapters that are not called ``default`` go to subfolders of their names. ``state_dict`` replaces the model's own
    weights, for models whose weights are cut over processes; ``card`` is the text of the ``README.md``, in place of peft's
    empty template; ``sampling`` are the defaults of sampling that a pipeline takes from it.
    """
    # Nothing but the adapter: whether tables were resized would be looked up on the Hub.
    model.save_pretrained(str(save_directory), state_dict=state_dict, save_embedding_layers=False)  # type: ignore[arg-type]
    for name in model.peft_config:
        _describe(model, name, Path(save_directory) / ("" if name == "default" else name), sampling)
    if card is not None:
        (Path(save_directory) / "README.md").write_text(card, encoding="utf-8")


def save_adapter(
    model: PeftModel,
    save_directory: str | Path,
    adapter_name: str,
    card: str | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write one adapter as it was trained, whatever its name and weight, into ``save_directory`` itself.

    ``card`` is the text of the ``README.md``, None writes none; ``sampling`` are its defaults of sampling.
    """
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as beside:  # peft writes to a subfolder of the adapter's name
        model.save_pretrained(beside, selected_adapters=[adapter_name], save_embedding_layers=False)  # type: ignore[arg-type]
        written = Path(beside) / ("" if adapter_name == "default" else adapter_name)
        for name in (_CONFIG_FILE, _WEIGHTS_FILE):
            shutil.copyfile(written / name, folder / name)
    _describe(model, adapter_name, folder, sampling)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def _describe(model: PeftModel, name: str, folder: Path, sampling: Mapping[str, Any] | None) -> None:
    """Write what an adapter's folder says of its base."""
    base = base_of(model)
    kinds = {} if base.modality_gate is None else base.modality_gate.kinds
    description = {**base_description(base), "modality": kinds.get(name, "all")}
    description |= {"sampling": dict(sampling)} if sampling else {}
    objectives = adapter_state(model).objectives.get(name)
    description |= {} if objectives is None else {"objectives": objectives}
    description |= {} if base.config.patch_sizes is None else {"patch_sizes": base.config.patch_sizes}
    (folder / BASE_FILE).write_text(json.dumps(description, indent=2))


def check_base(model: UnifiedForCausalLM | PeftModel, path: str | Path, weight_name: str | None = None) -> None:
    """Refuse an adapter made for another model or tokenizer; fields that older folders do not have are not compared.

    A plain folder of peft says nothing of its base, which passes: its tensors have to fit when it is loaded.

    Raises:
        ValueError: naming every field that differs, or the file that is missing.
    """
    for name in (_CONFIG_FILE, _weights_name(weight_name)):
        if not (Path(path) / name).is_file():
            raise ValueError(
                f"lora: {str(path)!r} holds no {name}; give a folder of save_lora (with {BASE_FILE}) or of peft."
            )
    if not (Path(path) / BASE_FILE).is_file():
        return
    wanted, actual = read_json(Path(path) / BASE_FILE, "lora"), base_description(base_of(model))
    different = [
        f"{name}: adapter {reprlib.repr(wanted[name])}, model {value!r}"
        for name, value in actual.items()
        if name in wanted and wanted[name] != value
    ]
    if different:
        raise ValueError(
            f"lora: {str(path)!r} was made for another model ({'; '.join(different)}); load it into its own base."
        )


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
    if objectives is not None and not _is_names(objectives):
        raise ValueError(
            f"lora: objectives {reprlib.repr(objectives)} in {BASE_FILE} of {str(path)!r} are no list of names."
        )
    patch_sizes = description.get("patch_sizes", [])
    if not isinstance(patch_sizes, list) or not all(map(is_whole, patch_sizes)):
        raise ValueError(
            f"lora: patch_sizes {reprlib.repr(patch_sizes)} in {BASE_FILE} of {str(path)!r} are no list of whole numbers."
        )
    fields = read_json(folder / _CONFIG_FILE, "lora")
    config = _lora_config(fields, base_of(model))
    config.inference_mode = not trainable
    check_modality(modality, config.use_dora)
    state = read_weights(folder / _weights_name(weight_name))
    wanted = _try_out(model, config, adapter_name, modality)
    if not described:
        state = _as_in_model(state, wanted, base_of(model))
    problem = (
        f"lora: the tensors of {str(path)!r} are not those that its {_CONFIG_FILE} describes; get or save them again"
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


def _weights_name(given: str | None) -> str:
    """The name of an adapter's file of weights. Raises ValueError for a path, or what is no safetensors file."""
    if given is not None and (Path(given).name != given or not given.endswith(".safetensors")):
        raise ValueError(f"weight_name: {given!r} is not the name of a .safetensors file in the adapter's folder.")
    return given or _WEIGHTS_FILE


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


def _is_names(value: Any) -> bool:
    """Whether a value is a list of plain names; peft takes everything else for regular expressions."""
    return isinstance(value, list | tuple | set) and all(_is_name(name) for name in value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)*", value) is not None


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**16


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and value > 0 and math.isfinite(value)


def _is_pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_is_name(n) and fits(v) for n, v in value.items())


# The fields of an adapter's config that have an effect here: what they may be, and how to test that.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number from 1 to 65536", _is_size),
    "lora_alpha": ("a number above 0", _is_scale),
    "lora_dropout": ("a number in [0, 1)", lambda v: type(v) in (int, float) and 0 <= v < 1),
    "target_modules": ("a list of names of modules", lambda v: _is_names(v) and len(v) > 0),
    "exclude_modules": ("a list of names of modules", lambda v: v is None or _is_names(v)),
    "modules_to_save": (f"null or a list of {IMAGE_MODULES}", lambda v: v is None or (_is_names(v) and {*v} <= {*IMAGE_MODULES})),
    "use_rslora": ("true or false", lambda v: isinstance(v, bool)),
    "use_dora": ("true or false", lambda v: isinstance(v, bool)),
    "init_lora_weights": (f"one of {_INITS}; the others change the base", lambda v: type(v) in (bool, str) and v in _INITS),
    "layers_to_transform": ("a list of layers", lambda v: v is None or (isinstance(v, list) and all(type(i) is int for i in v))),
    "rank_pattern": ("a rank for each of some names of modules", _is_pattern(_is_size)),
    "alpha_pattern": ("a number for each of some names of modules", _is_pattern(_is_scale)),
    "base_model_name_or_path": ("a name", lambda v: v is None or isinstance(v, str)),
    "peft_type": ("LORA", lambda v: v == "LORA"),
    "task_type": ("null or CAUSAL_LM, which changes nothing; others add modules", lambda v: v in (None, "CAUSAL_LM")),
}  # fmt: skip
_NOTES = ("auto_mapping", "inference_mode", "peft_version", "revision", "runtime_config")  # in a file, and not used


def _lora_config(fields: Mapping[str, Any], model: UnifiedForCausalLM) -> LoraConfig:
    """The config of an adapter from its fields, checked before peft sees any of them.

    Raises:
        ValueError: for a field that is not supported, a value out of range, or names that match no module.
    """
    defaults = LoraConfig().to_dict()
    for name, value in fields.items():
        if name in _FIELDS:
            wanted, fits = _FIELDS[name]
            if not fits(value):
                raise ValueError(f"lora: {name} {reprlib.repr(value)} is not possible; it must be {wanted}.")
        elif name not in _NOTES and value and value != defaults.get(name):
            raise ValueError(f"lora: {name} {reprlib.repr(value)} is not supported; leave it out.")
    depth, layers = model.config.text_config.num_hidden_layers, fields.get("layers_to_transform") or ()
    if len(layers) > depth or any(not 0 <= layer < depth for layer in layers):
        raise ValueError(
            f"lora: layers_to_transform {reprlib.repr(layers)} is outside the {depth} layers of the model."
        )
    modules = [name.split(".") for name, _ in model.named_modules()]
    known = {".".join(parts[start:]) for parts in modules for start in range(len(parts))}
    for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        unknown = sorted(set(fields.get(field) or ()) - known)
        if unknown:
            raise ValueError(
                f"lora: {field} {reprlib.repr(unknown)} are no modules of {type(model.backbone).__name__}; its linear layers are "
                f"{linear_layers(model)}."
            )
    taken = _FIELDS.keys() - {"peft_type", "task_type"}
    return LoraConfig(**{name: value for name, value in fields.items() if name in taken})
