"""A pretrained decoder language model of transformers: loaded whole, and without running code of its checkpoint."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from unified.hub import check_config, local_path, on_the_hub
from unified_tokenizers.checkpoint import check_layers, check_no_adapter, load_whole


def load_language_model(path: str | Path, dtype: torch.dtype, attn_implementation: str | None = None) -> Any:
    """Load a checkpoint as ``AutoModelForCausalLM``; of a composite one (Gemma 3, LLaVA), the language part alone.

    A warning names the parts of a composite checkpoint that are left out.

    Raises:
        ValueError: if the tensors of the checkpoint are not those of the model, the folder holds an adapter, or transformers
            has no causal language model for the language part of a composite checkpoint.
    """
    path = local_path(path, "backbone") or path
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    with on_the_hub(path, "backbone"):
        check_no_adapter(path)
        check_config(path, "backbone")
        check_layers(path)
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (
            StrictDataclassError,
            ArithmeticError,
            AttributeError,
            KeyError,
            TypeError,
        ) as error:  # each has its own
            raise ValueError(f"backbone: config.json of {str(path)!r}: {' '.join(str(error).split())}") from error
    text = config.get_text_config()
    if text is config:
        return _load(AutoModelForCausalLM, config, path, **options)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"backbone: {str(path)!r} is a {config.model_type!r} model, and transformers has no causal language model of the "
            f"type of its language part ({text.model_type!r}); choose a checkpoint of a language model alone."
        )
    whole = _load(AutoModelForImageTextToText, config, path, **options)
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


def _load(kind: Any, config: Any, path: str | Path, **options: Any) -> Any:
    return load_whole(kind.from_pretrained, partial(kind.from_config, config), path, **options)[0]


def decoder_layers(backbone: Any) -> nn.ModuleList:
    """The layers of a language model. Raises ValueError if its decoder keeps them elsewhere than in one list."""
    decoder = backbone.base_model
    for part in decoder.children():
        if isinstance(part, nn.ModuleList) and len(part) == decoder.config.num_hidden_layers:
            return part
    raise ValueError(f"backbone: {type(decoder).__name__} has no list of layers; choose another family.")
