"""TorchScript files, such as NVIDIA's ``encoder.jit``: their tensors by name, while no code in them runs.

``torch.jit.load`` compiles the code of a file, and ``torch.load(weights_only=True)`` refuses such files. But the tensors lie in
the same archive as in any other file of torch: a pickle of the modules, which only names them, and one entry of bytes for
each storage. Here every class of the pickle becomes a plain holder of attributes, and every other name is refused.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")


def is_torchscript(file: Path) -> bool:
    """Whether a file is an archive of TorchScript."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """Parameters and buffers of the module in a TorchScript file, named as in its ``state_dict()``.

    Raises:
        ValueError: if the file is damaged, or holds more than modules, tensors and plain values.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            top = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            with archive.open(f"{top}data.pkl") as content:
                module = _Reader(content, archive, top).load()
        if not isinstance(module, _Module):
            raise ValueError(f"a {type(module).__name__} in place of a module")
        return dict(_tensors(module, ""))
    except Exception as error:  # whatever a broken or hostile archive raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"weights: {str(file)!r} is no TorchScript file of plain modules ({reason}); get it again."
        ) from error


class _Module:
    """Holds the attributes that the pickle gives it, as any object does; its class runs nothing."""


def _tensors(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")


class _Reader(pickle.Unpickler):
    """Builds holders and tensors, and refuses every other name in a pickle."""

    def __init__(self, content: Any, archive: zipfile.ZipFile, top: str):
        super().__init__(content)
        self.archive, self.top = archive, top
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle" and name in _LISTS:
            return list
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        """The bytes of a storage, as a flat tensor."""
        _, dtype, key, _, count = pid
        if key not in self.storages:
            entry = self.archive.getinfo(f"{self.top}data/{key}")
            if entry.file_size != count * dtype.itemsize:
                raise pickle.UnpicklingError(
                    f"storage {key} has {entry.file_size} bytes for {count} numbers of {dtype}"
                )
            content = bytearray(self.archive.read(entry))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A tensor in a storage; torch refuses one that reaches beyond it."""
    return storage.as_strided(size, stride, offset)
