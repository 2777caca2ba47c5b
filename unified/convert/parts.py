"""What converters share: a model folder's config and tensors, and a unified model of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from unified.config import language_config
from unified.hub import check_config, local_folder
from unified.model.modeling import UnifiedForCausalLM
from unified_tokenizers import TextTokenizer
from unified_tokenizers.weights import cut_prefix, load_exactly, read_weights, shape_of

_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")
_OF_A_RUN = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path")


def read_model(path: str | Path, field: str = "checkpoint") -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The folder of a model (of a Hub name: its download), its ``config.json``, and its tensors by name.

    Raises:
        ValueError: if it is no model's folder.
    """
    folder = local_folder(path, field, _FILES)
    check_config(folder, field)
    return folder, PreTrainedConfig.get_config_dict(folder)[0], read_weights(folder)


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors whose names start with a key of ``names``, its value in place of that; without the others."""
    found: dict[str, Tensor] = {}
    for old, new in names.items():
        found |= {new + rest: state[name] for rest, name in cut_prefix(state, (old,)).items()}
    return found


def cut_codes(parts: dict[str, Tensor], first: int, codes: int, source: str) -> None:
    """Add image tables to the tensors of a unified model: the rows of ``codes`` ids from ``first`` on in its joint text tables.

    Raises:
        ValueError: if a table is missing or has too few rows.
    """
    for name, table in (("embed", "backbone.model.embed_tokens.weight"), ("head", "backbone.lm_head.weight")):
        rows = shape_of(parts, table, source)[0]
        if rows < first + codes:
            raise ValueError(
                f"image_tokenizer: {codes} codes from id {first} on need more than the {rows} rows of {table} in {source!r}; give "
                "the one that the model was trained with."
            )
        parts[f"image_{name}.weight"] = parts[table][first : first + codes]


def build_model(
    text_config: Mapping[str, Any], tokenizer: TextTokenizer, state: dict[str, Tensor], source: str, **config: Any
) -> UnifiedForCausalLM:
    """A unified model of ``state``, in the dtype of its image head.

    Args:
        text_config: fields of the language model's configuration; the ids of ``<bos>``, ``<eos>`` and padding are the
            tokenizer's.
        tokenizer: of its text.
        state: all of its tensors, by the names of a unified model; without a text head, that is tied.
        source: where they are from, for errors.
        config: further fields of :class:`unified.UnifiedConfig`.

    Raises:
        ValueError: if a tensor is missing, not expected or of another shape, or the family does not work here.
    """
    head, table = "backbone.lm_head.weight", "backbone.model.embed_tokens.weight"
    fields = {name: value for name, value in text_config.items() if name not in _OF_A_RUN and "attn_impl" not in name}
    fields |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields["tie_word_embeddings"] = head not in state
    if head not in state and table in state:
        state = {**state, head: state[table]}
    dtype = state["image_head.weight"].dtype
    backbone = AutoModelForCausalLM.from_config(
        language_config(fields, "text_config"), dtype=dtype, trust_remote_code=False
    )
    model = UnifiedForCausalLM.around(
        backbone,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        **{"positions": "1d", "coarse_positions": "unit", **config},
    )
    load_exactly(model, {name: value.to(dtype) for name, value in state.items()}, source)
    return model.eval()
