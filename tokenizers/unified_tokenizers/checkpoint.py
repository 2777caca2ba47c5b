"""Checkpoints of transformers: loaded whole and of the size that their files hold, without adapters and foreign code."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from unified_tokenizers.hub import check_config, local_path, on_the_hub
from unified_tokenizers.weights import WHOLE, Stored, shards_of, stored_in

_HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
_COUNTS = re.compile(r"(^|_)(layers?|blocks?|depth)$")  # fields that say how many modules are built one after the other


class WholeModel(PreTrainedModel):
    """A model of transformers whose ``from_pretrained`` is :func:`load_whole`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, but never with random numbers in place of absent tensors.

        Raises:
            ValueError: as :func:`load_whole`, or if there is no such folder.
        """
        path, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        if path is not None:
            path = local_path(path, "model") or path

        def build() -> nn.Module:
            given, kind = kwargs.get("config"), cls.config_class
            assert kind is not None  # of every model here
            return cls(given if isinstance(given, PreTrainedConfig) else kind.from_pretrained(path, **_on_hub(kwargs)))

        with on_the_hub(path or "", "model"):
            model, info = load_whole(super().from_pretrained, build, path, *args, **kwargs)
        return (model, info) if wants_info else model


def load_whole(
    load: Callable[..., Any], build: Callable[[], nn.Module], path: str | Path | None, *args: Any, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Call ``load``, a ``from_pretrained`` of transformers, which alone would fill absent tensors with random numbers.

    Args:
        load: called with ``path``, ``args`` and ``options``.
        build: makes the model that the folder's configuration describes; called without memory for weights.
        path: folder or Hub name; None for weights that are given as ``state_dict``.

    Returns:
        The model, and the loading information of transformers.

    Raises:
        ValueError: naming the tensors that only the checkpoint or only the model has, and those of different shapes; or if
            the configuration describes a far larger model than the files hold, a file is cut short, or an adapter lies
            beside it. Tied weights and derived buffers need not be stored.
    """
    check_no_adapter(path, (options.get("adapter_kwargs") or {}).get("_adapter_model_path"), **_on_hub(options))
    if path is not None and not {"config", "subfolder"} & options.keys():
        check_config(path, "model")
    options |= {"trust_remote_code": False, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        if path is not None and not any(options.get(name) for name in ("gguf_file", "state_dict", "variant")):
            _check_size(build, path, options)
        model, info = load(path, *args, **options)
    except (SafetensorError, KeyError) as error:  # the second: an index of shards without a part
        raise ValueError(f"weights: a file of {str(path)!r} is cut short or no safetensors file ({error}).") from error
    problem = f"weights: the tensors of {str(path)!r} are not those of {type(model).__name__}; get or save them again"
    check_names(problem, info["unexpected_keys"], info["missing_keys"], info["mismatched_keys"])
    return model, info


def check_no_adapter(path: str | Path | None, found: str | None = None, **hub: Any) -> None:
    """Raises ValueError if a folder holds an adapter, or an Auto class has ``found`` one on its way to this folder."""
    if found or (path is not None and find_adapter_config_file(os.fspath(path), **hub) is not None):
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


def check_counts(config: Mapping[str, Any], stored: Stored, source: str | Path) -> None:
    """Refuse a configuration with more layers or blocks than the files hold tensors, before any of them is built.

    Args:
        config: content of a ``config.json``, with the parts in it.
        stored: what the files hold.
        source: where both are from, for the error.

    Raises:
        ValueError: naming the field.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_counts(value, stored, source)
        elif _COUNTS.search(str(name)) and not str(name).startswith("max_"):
            most = max(
                [count for count in (value if isinstance(value, list) else [value]) if type(count) is int], default=0
            )
            if most > stored.tensors:
                raise ValueError(
                    f"config: {name} {most} of {str(source)!r} is more than the {stored.tensors} tensors in its files; "
                    "correct it, or get the folder again."
                )


def check_weights(build: Callable[[], nn.Module], stored: Stored, source: str | Path, packed: bool = False) -> None:
    """Refuse a configuration that describes a far larger model than the files hold, before memory is taken for it.

    Args:
        build: makes the model; called on the meta device.
        stored: what the files hold.
        source: where both are from, for the error.
        packed: whether the files hold several weights in a number, each of one bit or more.

    Raises:
        ValueError: also if the model cannot be built.
    """
    try:
        with torch.device("meta"):
            tensors = build().state_dict(keep_vars=True).values()
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:  # any error of torch or of a class on a senseless configuration
        reason = " ".join(str(error).split())
        raise ValueError(f"config: {str(source)!r} describes a model that cannot be built ({reason}).") from error
    weights = sum({id(tensor): tensor.numel() for tensor in tensors}.values())
    # Absent tensors are named when the model is loaded; twice of what there is leaves room for that.
    if weights > (8 * stored.bytes if packed else 2 * stored.weights):
        raise ValueError(
            f"config: {str(source)!r} describes a model of {weights:.3g} weights, and its files hold {stored.weights:.3g}; "
            "correct its sizes, or get the folder again."
        )


def check_layers(path: str | Path, **hub: Any) -> None:
    """Compare the ``config.json`` of a folder or a repository with its weights files, as :func:`check_counts`."""
    stored = _stored(path, hub)
    if stored is not None:
        check_counts(PreTrainedConfig.get_config_dict(path, **hub)[0], stored, path)


def _check_size(build: Callable[[], nn.Module], path: str | Path, options: dict[str, Any]) -> None:
    """Compare a configuration with the headers of the weights files in a folder or a repository of the Hub."""
    hub, given = _on_hub(options), options.get("config")
    stored = _stored(path, hub)
    if stored is None:
        return
    config = (
        given.to_dict() if isinstance(given, PreTrainedConfig) else PreTrainedConfig.get_config_dict(path, **hub)[0]
    )
    check_counts(config, stored, path)
    check_weights(build, stored, path, packed=config.get("quantization_config") is not None)


def _stored(path: str | Path, hub: dict[str, Any]) -> Stored | None:
    """What the weights files that transformers would load hold; None without one, for which it has an error."""

    def find(name: str) -> Path | None:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
        return None if file is None else Path(file)

    for name in WHOLE:
        if (file := find(name)) is not None:
            return stored_in([file])
        if (index := find(f"{name}.index.json")) is not None:
            shards = [find(shard) for shard in shards_of(index)]
            return None if None in shards else stored_in([shard for shard in shards if shard is not None])
    return None


def _on_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}


def _shortened(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
