"""Adapters as folders: weights, config, and a description of the base."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from torch import Tensor

from unified.lora.base import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE, base_description, base_of
from unified.lora.switching import adapter_state


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
        for name in (CONFIG_FILE, WEIGHTS_FILE):
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
