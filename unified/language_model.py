"""A pretrained decoder language model from a checkpoint of transformers, also out of a model that reads pictures."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


def load_language_model(path: str, dtype: torch.dtype, attn_implementation: str | None) -> Any:
    """Load a checkpoint as ``AutoModelForCausalLM``; of a composite one (Gemma 3, LLaVA), the language part alone.

    Raises:
        ValueError: if transformers has no causal language model for the language part of a composite checkpoint.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    config = AutoConfig.from_pretrained(path)
    text = config.get_text_config()
    if text is config:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"backbone: {path!r} is a {config.model_type!r} model, and transformers has no causal language model of the type "
            f"of its language part ({text.model_type!r}); choose a checkpoint of a language model alone."
        )
    whole: Any = AutoModelForImageTextToText.from_pretrained(path, **options)
    text, head = whole.config.get_text_config(), whole.get_output_embeddings()
    text.tie_word_embeddings = head.weight is whole.get_input_embeddings().weight
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    setattr(model, model.base_model_prefix, whole.get_decoder())
    model.set_output_embeddings(head)
    model.generation_config = whole.generation_config
    return model
