"""LoRA adapters on a unified model: attach, save with the layout they belong to, load, switch, unload."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from unified.lora.modality_gate import check_modality, forget_gates, gate_adapter
from unified.lora.switching import adapter_state, apply_weights, check_not_fused, switch, unfuse_lora
from unified.model.modeling import UnifiedForCausalLM

BASE_FILE = "unified_base.json"
ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SHAPES = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
IMAGE_TABLES = ("image_embed", "image_head")


def attach_lora(
    model: UnifiedForCausalLM,
    rank: int = 16,
    alpha: int | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ATTENTION_AND_MLP,
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
        target_modules: names of the linear layers that get an update.
        train_image_tables: train and save full copies of both image tables with the adapter; None: exactly if they are
            new, as after ``from_backbone``, because an adapter alone cannot teach a model codes that it has never seen.
        modality: ``text`` or ``image`` lets the update act on positions of that modality only (Partial LoRA, arXiv 2401.16420): an
            ``image`` adapter leaves rows of text as they are, bit for bit.
        options: further fields of ``peft.LoraConfig`` (``use_rslora``, ``use_dora``, ...).

    Raises:
        ValueError: if ``modality`` is unknown, or not possible with other options.
    """
    check_modality(modality, bool(options.get("use_dora")))
    if train_image_tables is None:
        train_image_tables = model.config.new_image_tables
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        modules_to_save=list(IMAGE_TABLES) if train_image_tables else None,
        **options,
    )
    adapted = get_peft_model(model, config)
    gate_adapter(model, "default", modality)
    return adapted


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
) -> None:
    """Write the adapter (safetensors and JSON) and the layout that it belongs to.

    Adapters that are not called ``default`` go to subfolders of their names. ``state_dict`` replaces the model's own
    weights, for models whose weights are cut over processes; ``card`` is the text of the ``README.md``, in place of peft's
    empty template.
    """
    # Nothing but the adapter: whether tables were resized would be looked up on the Hub.
    model.save_pretrained(str(save_directory), state_dict=state_dict, save_embedding_layers=False)  # type: ignore[arg-type]
    base = base_of(model)
    kinds = {} if base.modality_gate is None else base.modality_gate.kinds
    for name in model.peft_config:
        folder = Path(save_directory) / ("" if name == "default" else name)
        description = {**base_description(base), "modality": kinds.get(name, "all")}
        (folder / BASE_FILE).write_text(json.dumps(description, indent=2))
    if card is not None:
        (Path(save_directory) / "README.md").write_text(card, encoding="utf-8")


def check_base(model: UnifiedForCausalLM | PeftModel, path: str | Path) -> None:
    """Refuse an adapter made for another model or tokenizer; fields that older folders do not have are not compared.

    Raises:
        ValueError: naming every field that differs, or the file that is missing.
    """
    for name in (BASE_FILE, "adapter_config.json", "adapter_model.safetensors"):
        if not (Path(path) / name).is_file():
            raise ValueError(f"lora: {str(path)!r} holds no {name}; give a folder written by save_lora.")
    wanted, actual = json.loads((Path(path) / BASE_FILE).read_text()), base_description(base_of(model))
    different = [
        f"{name}: adapter {wanted[name]!r}, model {value!r}"
        for name, value in actual.items()
        if name in wanted and wanted[name] != value
    ]
    if different:
        raise ValueError(
            f"lora: {str(path)!r} was made for another model ({'; '.join(different)}); load it into its own base."
        )


def load_lora(
    model: UnifiedForCausalLM | PeftModel, path: str | Path, adapter_name: str, trainable: bool = False
) -> PeftModel:
    """Add an adapter from a folder under a name and make it the active one; disabled adapters are enabled.

    Raises:
        ValueError: if the adapter belongs to another model, the name is taken, or adapters are fused.
    """
    check_base(model, path)
    if isinstance(model, PeftModel):
        check_not_fused(model, "load_lora")
        if adapter_name in model.peft_config:
            raise ValueError(
                f"adapter_name: {adapter_name!r} is loaded already; choose another name or delete it first."
            )
        switch(model, True)
        apply_weights(model, {next(iter(model.peft_config)): 1.0})  # peft adds an adapter beside a single one only
        model.load_adapter(str(path), adapter_name, is_trainable=trainable)
    else:
        model = PeftModel.from_pretrained(model, str(path), adapter_name=adapter_name, is_trainable=trainable)
    apply_weights(model, {adapter_name: 1.0}, trainable)
    modality = json.loads((Path(path) / BASE_FILE).read_text()).get("modality", "all")
    gate_adapter(model.get_base_model(), adapter_name, modality)
    return model


def unload_lora(model: PeftModel) -> UnifiedForCausalLM:
    """Remove all adapters; every weight of the returned base model is what it was before the first one."""
    if adapter_state(model).unfused is not None:
        unfuse_lora(model)
    base = base_of(model)
    forget_gates(base, list(model.peft_config))
    # peft leaves the active adapter's copies of the image tables in place of the originals.
    originals = {n: m.original_module for n, m in base.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    unloaded = cast(UnifiedForCausalLM, model.unload())
    for name, module in originals.items():
        unloaded.set_submodule(name, module)
    return unloaded
