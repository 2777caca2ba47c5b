"""A pretrained decoder language model of transformers: loaded whole, and without running code of its checkpoint."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.peft_utils import find_adapter_config_file

from unified.hub import check_config, local_path, on_the_hub


def load_language_model(path: str | Path, dtype: torch.dtype, attn_implementation: str | None = None) -> Any:
    """Load a checkpoint as ``AutoModelForCausalLM``; of a composite one (Gemma 3, LLaVA), the language part alone.

    A warning names the parts of a composite checkpoint that are left out.

    Raises:
        ValueError: if the tensors of the checkpoint are not those of the model, the folder holds an adapter, or transformers
            has no causal language model for the language part of a composite checkpoint.
    """
    path = local_path(path, "backbone") or path
    _check_no_adapter(path)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    check_config(path, "backbone")
    with on_the_hub(path, "backbone"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    text = config.get_text_config()
    if text is config:
        return load_whole(AutoModelForCausalLM.from_pretrained, path, **options)[0]
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"backbone: {str(path)!r} is a {config.model_type!r} model, and transformers has no causal language model of the "
            f"type of its language part ({text.model_type!r}); choose a checkpoint of a language model alone."
        )
    whole, _ = load_whole(AutoModelForImageTextToText.from_pretrained, path, **options)
    text, decoder, head = whole.config.get_text_config(), whole.get_decoder(), whole.get_output_embeddings()
    kept = {id(weight) for part in (decoder, head) for weight in part.parameters()}
    others = {".".join(name.split(".")[:2]) for name, weight in whole.named_parameters() if id(weight) not in kept}
    warnings.warn(
        f"backbone: {str(path)!r} is a {config.model_type!r} model; only its language part is used, without {sorted(others)}.",
        stacklevel=2,
    )
    text.tie_word_embeddings = head.weight is whole.get_input_embeddings().weight
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text, trust_remote_code=False)
    setattr(model, model.base_model_prefix, decoder)
    model.set_output_embeddings(head)
    model.generation_config = whole.generation_config
    return model


def load_whole(
    load: Callable[..., Any], path: str | Path | None, *args: Any, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Call ``load``, a ``from_pretrained`` of transformers, which alone would fill absent tensors with random numbers.

    Returns:
        The model, and the loading information of transformers.

    Raises:
        ValueError: naming the tensors that only the checkpoint or only the model has, and those of different shapes; or if
            the file is cut short, or an adapter lies beside it. Tied weights and derived buffers need not be stored.
    """
    _check_no_adapter(path, (options.get("adapter_kwargs") or {}).get("_adapter_model_path"))
    if path is not None and not {"config", "subfolder"} & options.keys():
        check_config(path, "model")
    options |= {"trust_remote_code": False, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = load(path, *args, **options)
    except SafetensorError as error:
        raise ValueError(f"weights: a file of {str(path)!r} is cut short or no safetensors file ({error}).") from error
    problem = f"weights: the tensors of {str(path)!r} are not those of {type(model).__name__}; get or save them again"
    check_names(problem, info["unexpected_keys"], info["missing_keys"], info["mismatched_keys"])
    return model, info


def _check_no_adapter(path: str | Path | None, found: str | None = None) -> None:
    """Raises ValueError if a folder holds an adapter, or an Auto class has ``found`` one on its way to this folder."""
    if found or (path is not None and find_adapter_config_file(os.fspath(path)) is not None):
        raise ValueError(
            f"model: {str(found or path)!r} holds an adapter (adapter_config.json), which would change the model without a "
            "word; keep it in another folder and load it with load_lora."
        )


def check_names(problem: str, only_stored: set[str], only_model: set[str], shapes: set[tuple[str, Any, Any]]) -> None:
    """Raises ValueError unless all three are empty.

    Args:
        problem: start of the error: what was read, and what to do.
        only_stored: names of tensors that were read and have no place in the model.
        only_model: names of tensors of the model that were not read.
        shapes: name, stored shape and the model's shape of tensors that differ.
    """
    differences = {
        "only in the checkpoint": sorted(only_stored),
        "only in the model": sorted(only_model),
        "of another shape": [f"{name} {tuple(stored)} instead of {tuple(own)}" for name, stored, own in sorted(shapes)],
    }
    found = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in differences.items() if names)
    if found:
        raise ValueError(f"{problem} ({found}).")


def _shortened(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def decoder_layers(backbone: Any) -> nn.ModuleList:
    """The layers of a language model. Raises ValueError if its decoder keeps them elsewhere than in one list."""
    decoder = backbone.base_model
    for part in decoder.children():
        if isinstance(part, nn.ModuleList) and len(part) == decoder.config.num_hidden_layers:
            return part
    raise ValueError(f"backbone: {type(decoder).__name__} has no list of layers; choose another family.")
