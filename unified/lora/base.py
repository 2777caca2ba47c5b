"""The model that an adapter belongs to, and what the adapter's folder says of it."""

import reprlib
from pathlib import Path
from typing import Any, cast

from peft import PeftModel

from unified.files import read_json
from unified.model.modeling import UnifiedForCausalLM
from unified.model.retrofit import describe_prediction

BASE_FILE = "unified_base.json"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_SHAPES = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def base_of(model: UnifiedForCausalLM | PeftModel) -> UnifiedForCausalLM:
    """The unified model inside a possibly wrapped one."""
    return cast(UnifiedForCausalLM, model.get_base_model()) if isinstance(model, PeftModel) else model


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


def check_base(model: UnifiedForCausalLM | PeftModel, path: str | Path, weight_name: str | None = None) -> None:
    """Refuse an adapter made for another model or tokenizer; fields that older folders do not have are not compared.

    A plain folder of peft says nothing of its base, which passes: its tensors have to fit when it is loaded.

    Raises:
        ValueError: naming every field that differs, or the file that is missing.
    """
    for name in (CONFIG_FILE, weights_name(weight_name)):
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


def weights_name(given: str | None) -> str:
    """The name of an adapter's file of weights. Raises ValueError for a path, or what is no safetensors file."""
    if given is not None and (Path(given).name != given or not given.endswith(".safetensors")):
        raise ValueError(f"weight_name: {given!r} is not the name of a .safetensors file in the adapter's folder.")
    return given or WEIGHTS_FILE
