"""A pretrained decoder language model from a checkpoint of transformers, also out of a model that reads images."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

if TYPE_CHECKING:
    from unified.model.modeling import UnifiedForCausalLM


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


@torch.no_grad()
def check_family(model: "UnifiedForCausalLM") -> None:
    """Raises ValueError if the backbone's text logits are not what the model makes of its hidden states, or its rotary
    embedding is laid out in another way than :class:`unified.model.rotary.GridRotary` takes apart.
    """
    backbone, decoder = model.backbone, model.backbone.base_model
    ids, turned = torch.tensor([[0, 1]], device=backbone.device), []
    hook = decoder.rotary_emb.rotary.register_forward_hook(lambda module, given, found: turned.append(found))
    hidden = decoder(input_ids=ids).last_hidden_state
    hook.remove()
    family = type(backbone).__name__
    if not torch.equal(model.text_logits(hidden), backbone(input_ids=ids).logits):
        raise ValueError(
            f"backbone: {family} makes its text logits in a way of its own; choose another family, such as Llama, Qwen, "
            "Mistral, Gemma or Granite."
        )
    in_halves = all(torch.equal(*cos.chunk(2, dim=-1)) for cos, _ in turned)
    if model.config.positions != "1d" and not in_halves:
        raise ValueError(
            f"positions: {model.config.positions!r} needs a rotary embedding in two halves, and that of {family} is "
            "interleaved; use positions='1d' or another family."
        )
