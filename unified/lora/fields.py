"""The fields of an adapter's config: which have an effect here, and what they may be."""

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from peft import LoraConfig
from torch import nn

from unified.config import head_dim
from unified.model.backbone import decoder_layers
from unified.model.modeling import UnifiedForCausalLM

IMAGE_MODULES = (
    "image_embed", "image_head", "image_projection", "image_query", "image_merge", "image_split", "image_chain", "image_join",
    "vision_projector",
)  # fmt: skip
_INITS = (True, False, "gaussian", "orthogonal")  # the others of peft change the base, or need data


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


def is_names(value: Any) -> bool:
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
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number from 1 to 65536", _is_size),
    "lora_alpha": ("a number above 0", _is_scale),
    "lora_dropout": ("a number in [0, 1)", lambda v: type(v) in (int, float) and 0 <= v < 1),
    "target_modules": ("a list of names of modules", lambda v: is_names(v) and len(v) > 0),
    "exclude_modules": ("a list of names of modules", lambda v: v is None or is_names(v)),
    "modules_to_save": (f"null or a list of {IMAGE_MODULES}", lambda v: v is None or (is_names(v) and {*v} <= {*IMAGE_MODULES})),
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


def lora_config(fields: Mapping[str, Any], model: UnifiedForCausalLM) -> LoraConfig:
    """The config of an adapter from its fields, checked before peft sees any of them.

    Raises:
        ValueError: for a field that is not supported, a value out of range, or names that match no module.
    """
    defaults = LoraConfig().to_dict()
    for name, value in fields.items():
        if name in FIELDS:
            wanted, fits = FIELDS[name]
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
    taken = FIELDS.keys() - {"peft_type", "task_type"}
    return LoraConfig(**{name: value for name, value in fields.items() if name in taken})
