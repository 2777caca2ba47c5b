"""Weights files of other projects: tensors are read, code never runs."""

import json
import math
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unified_tokenizers.hub import expanded, on_the_hub
from unified_tokenizers.torchscript import is_torchscript, read_torchscript

WRAPPERS = ("model", "module", "state_dict")  # LlamaGen under DDP, DeepSpeed, Lightning
HUB = "hf-hub:"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
WHOLE = ("model.safetensors", "pytorch_model.bin")


def read_weights(path: str | Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Read named tensors from a file or a model folder.

    Args:
        path: a safetensors file, a pickled one (``.pt``, ``.pth``, ``.ckpt``, ``.bin``; opened with ``weights_only=True``)
            with the tensors at its top or under ``model``, ``module`` or ``state_dict``, one of TorchScript (its code does
            not run), or a folder with one of them or with shards and their index; or a file on the Hub as
            ``hf-hub:owner/name/file``.
        prefixes: read only names that start with one of these, and cut it off.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ValueError: if there is no such file, it holds anything but tensors, or no name starts with a prefix.
    """
    path = local_file(path)
    state: dict[str, Tensor] = {}
    for file in _files(path):
        if file.suffix == ".safetensors":
            state |= _read_safetensors(file, prefixes)
        elif is_torchscript(file):
            tensors = read_torchscript(file)
            state |= {short: tensors[name] for short, name in cut_prefix(tensors, prefixes).items()}
        else:
            state |= _read_pickle(file, prefixes)
    if not state:
        raise ValueError(f"weights: no tensor of {str(path)!r} has a name that starts with {' or '.join(prefixes)}.")
    return state


def local_file(path: str | Path) -> Path:
    """The path itself, or the download of a file named ``hf-hub:owner/name/file``.

    Raises:
        ValueError: if the name is not of that form, or the Hub has no such file.
    """
    name = str(path)
    if not name.startswith(HUB):
        return expanded(path)
    parts = name.removeprefix(HUB).split("/", 2)
    if len(parts) < 3:
        raise ValueError(f"weights: {name!r} is not of the form {HUB}owner/name/file.")
    from huggingface_hub import hf_hub_download

    with on_the_hub(name, "weights"):
        return Path(hf_hub_download("/".join(parts[:2]), parts[2]))


def cut_prefix(names: Iterable[str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """The names that start with one of ``prefixes``, by what follows it."""
    starts = [(name, next((p for p in prefixes if name.startswith(p)), None)) for name in names]
    return {name[len(prefix) :]: name for name, prefix in starts if prefix is not None}


def load_exactly(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy ``state`` into ``module``.

    Raises:
        ValueError: naming every tensor that is missing, not expected or of another shape.
    """
    own = module.state_dict()
    wrong = [f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}" for name, value in state.items()
             if name in own and value.shape != own[name].shape]  # fmt: skip
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "not expected": sorted(state.keys() - own.keys()),
        "of another shape": wrong,
    }
    found = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
    if found:
        raise ValueError(f"weights: {source!r} does not fit {type(module).__name__} ({found}).")
    module.load_state_dict(state)


def shape_of(state: dict[str, Tensor], name: str, source: str) -> torch.Size:
    """Shape of a tensor; raises ValueError if it is missing."""
    if name not in state:
        raise ValueError(f"weights: {source!r} has no {name!r}; it holds {_some(sorted(state))}.")
    return state[name].shape


class Stored(NamedTuple):
    """What weights files hold: how many tensors, how many weights in them, and how many bytes."""

    tensors: int
    weights: int
    bytes: int


def stored_in(files: Iterable[Path]) -> Stored:
    """What files hold, by their headers.

    Raises:
        ValueError: if a file cannot be read.
    """
    shapes: list[Sequence[int]] = []
    size = 0
    for file in files:
        size += file.stat().st_size
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as tensors:
                    shapes += [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(
                    f"weights: a file of {str(file)!r} is cut short or no safetensors file ({error})."
                ) from error
        else:
            shapes += [value.shape for value in _read_pickle(file, ("",)).values()]
    return Stored(len(shapes), sum(map(math.prod, shapes)), size)


def shards_of(index: Path) -> list[str]:
    """Names of the files that an index of shards lists. Raises ValueError if it is none."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"weights: {str(index)!r} is no index of shards ({error!r}); get it again.") from error


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"weights: {str(path)!r} does not exist; give a weights file or a folder with one.")
    for name in WHOLE:
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = shards_of(index)
            missing = [shard for shard in shards if not (path / shard).is_file()]
            if missing:
                raise ValueError(f"weights: {str(path)!r} lacks the shards {_some(missing)}; download them all.")
            return [path / shard for shard in shards]
        if (path / name).is_file():
            return [path / name]
    found = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *PICKLES))
    if len(found) != 1:
        names = [file.name for file in found]
        raise ValueError(f"weights: {str(path)!r} holds {len(found)} weights files {names}; name the one to read.")
    return found


def _read_safetensors(file: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            wanted = cut_prefix(tensors.keys(), prefixes)
            return {short: tensors.get_tensor(name) for short, name in wanted.items()}
    except SafetensorError as error:
        raise ValueError(f"weights: {str(file)!r} is not a safetensors file ({error}).") from error


def _read_pickle(file: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    zipped = zipfile.is_zipfile(file)  # what torch has written since 1.6; only that can stay on disk while it is read
    try:
        payload: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever a broken or hostile pickle raises
        foreign = _foreign(file) if zipped else []
        reason = f"it holds {_some(foreign)}" if foreign else (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"weights: {str(file)!r} is not a file of plain tensors ({reason}) and is not opened; where you trust it, save "
            "its tensors alone with safetensors.torch.save_file."
        ) from error
    for name in WRAPPERS:
        if isinstance(payload, dict) and isinstance(payload.get(name), dict):
            payload = payload[name]
            break
    if not isinstance(payload, dict) or not payload:
        raise ValueError(f"weights: {str(file)!r} holds a {type(payload).__name__}; need tensors by name.")
    others = sorted(str(n) for n, value in payload.items() if not isinstance(value, Tensor) or not isinstance(n, str))
    if others:
        raise ValueError(
            f"weights: {str(file)!r} holds more than tensors ({_some(others)}), and nothing under {', '.join(WRAPPERS)}."
        )
    for wrapper in ("module.", "_orig_mod."):  # left by DistributedDataParallel and torch.compile
        if all(name.startswith(wrapper) for name in payload):
            payload = {name[len(wrapper) :]: value for name, value in payload.items()}
    return {short: payload[name] for short, name in cut_prefix(payload, prefixes).items()}


def _foreign(file: Path) -> list[str]:
    """Names in a pickle that are none of torch's; none if it is no file of torch."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # whatever a broken file raises; its own error says more
        return []
