"""What a run has to remember, as files: safetensors for tensors, numbers for JSON. Nothing is pickled.

Of everything that the accelerator holds: weights, optimizers, averages of the weights, schedulers, loss scale; and the random
streams of every process. Tensors that FSDP2 cuts over processes are written by all of them, as pieces that another number of
processes can read too. DeepSpeed alone writes and reads its own files, which are pickles: resume with it only from
checkpoints that you trust.
"""

import copy
import json
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unified.training.tensor_parallel import batch_sharers

Numbers = dict[str, Any]


@dataclass
class State:
    """What a run has to remember after a step.

    Attributes:
        tensors: by the name of their file and their own; the run's, until they are copied. None are there for DeepSpeed.
        random: streams of this process, and what stands in their file's header.
        numbers: what JSON holds.
    """

    tensors: dict[str, dict[str, Tensor]]
    random: tuple[dict[str, Tensor], dict[str, str]]
    numbers: Numbers


def take_state(accelerator: Accelerator) -> State:
    """What there is to write now."""
    numbers: Numbers = {"num_processes": accelerator.num_processes, "device": accelerator.device.type, "optimizers": []}
    tensors: dict[str, dict[str, Tensor]] = {}
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        tensors = {name: _tensors(module) for name, module in _modules(accelerator).items()}
        for i, optimizer in enumerate(accelerator._optimizers):
            state = tensors[_numbered("optimizer", i)] = _flat_state(optimizer.state_dict()["state"])
            shapes = {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in state.items()}
            numbers["optimizers"].append({"state": shapes, "groups": _groups(optimizer)})
    numbers["schedulers"] = [scheduler.state_dict() for scheduler in _schedulers(accelerator)]
    numbers["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    return State(tensors, _random_streams(accelerator.device), copy.deepcopy(numbers))


def write_state(accelerator: Accelerator, folder: Path, state: State, group: dist.ProcessGroup | None = None) -> None:
    """Write tensors and random streams into ``folder``, on all processes, which speak in ``group``; numbers are the caller's."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        for i, engine in enumerate(accelerator._models):
            engine.save_checkpoint(str(folder), _numbered("deepspeed", i))
    for name, tensors in state.tensors.items():
        _write(accelerator, folder / name, tensors, group)
    streams, header = state.random
    save_file(streams, folder / f"random-{accelerator.process_index}.safetensors", header)


def read_state(accelerator: Accelerator, folder: Path, numbers: Numbers) -> None:
    """Put back what :func:`write_state` wrote, on all processes.

    Learning rates and the like are those of the checkpoint only where a scheduler moves them; otherwise settings say them.

    Raises:
        ValueError: if names or shapes are not those of the objects that the accelerator holds, or a random stream is missing.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        for i, engine in enumerate(accelerator._models):
            engine.load_checkpoint(str(folder), _numbered("deepspeed", i))
    else:
        for name, module in _modules(accelerator).items():
            _read(folder / name, _tensors(module))
        if len(numbers["optimizers"]) != len(accelerator._optimizers):
            raise ValueError(
                f"resume: {str(folder)!r} has the state of {len(numbers['optimizers'])} optimizers, this run has "
                f"{len(accelerator._optimizers)}."
            )
        for i, (optimizer, kept) in enumerate(zip(accelerator._optimizers, numbers["optimizers"], strict=True)):
            groups = optimizer.state_dict()["param_groups"]
            if len(groups) != len(kept["groups"]):
                raise ValueError(
                    f"resume: {str(folder)!r} has {len(kept['groups'])} groups of tensors in an optimizer, this run {len(groups)}; "
                    "tensor parallel runs go on with tensor parallel ones."
                )
            state = _empty_state(optimizer, kept["state"])
            _read(folder / _numbered("optimizer", i), state)
            if _schedulers(accelerator):
                groups = [group | _like(group, saved) for group, saved in zip(groups, kept["groups"], strict=True)]
            optimizer.load_state_dict({"state": _nested(state), "param_groups": groups})
    for scheduler, state in zip(_schedulers(accelerator), numbers["schedulers"], strict=True):
        scheduler.load_state_dict(state)
    if accelerator.scaler is not None and numbers["scaler"]:
        accelerator.scaler.load_state_dict(numbers["scaler"])
    stream = accelerator.process_index - accelerator.process_index % batch_sharers(accelerator)  # one for a batch
    if stream < numbers["num_processes"]:
        same_device = accelerator.device.type == numbers["device"]
        _read_random(folder / f"random-{stream}.safetensors", accelerator.device, same_device)
    else:
        warnings.warn(
            f"resume: {str(folder)!r} has the random streams of {numbers['num_processes']} processes; process "
            f"{accelerator.process_index} starts one from the seed.",
            stacklevel=2,
        )


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


def _modules(accelerator: Accelerator) -> dict[str, nn.Module]:
    """Models and registered averages by the name of their file. A run with an adapter brings its frozen base along."""
    models = [accelerator.unwrap_model(model, keep_torch_compile=False) for model in accelerator._models]
    averages = [each for each in accelerator._custom_objects if isinstance(each, nn.Module)]
    named = {_numbered("trainable" if isinstance(m, PeftModel) else "model", i): m for i, m in enumerate(models)}
    return named | {_numbered("average", i): average for i, average in enumerate(averages)}


def _schedulers(accelerator: Accelerator) -> list[Any]:
    return [
        *accelerator._schedulers,
        *(each for each in accelerator._custom_objects if not isinstance(each, nn.Module)),
    ]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors by name, each once; with an adapter, those that are trained."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.requires_grad or not isinstance(module, PeftModel):
            found.setdefault(id(tensor), (name, tensor.detach()))
    return dict(found.values())


def _flat_state(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{index}.{name}": tensor for index, values in state.items() for name, tensor in values.items()}


def _nested(state: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    nested: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        index, name = key.split(".", 1)
        nested.setdefault(int(index), {})[name] = tensor
    return nested


def _empty_state(optimizer: torch.optim.Optimizer, shapes: dict[str, list[Any]]) -> dict[str, Tensor]:
    """Zeros to read an optimizer's state into, laid out and cut over processes as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for key, (dtype, *shape) in shapes.items():
        index, kind = key.split(".", 1)[0], getattr(torch, str(dtype), None)
        if not index.isdecimal() or int(index) >= len(parameters) or not isinstance(kind, torch.dtype):
            raise ValueError(
                f"resume: the optimizer's {key!r} of type {dtype} is not of this run's {len(parameters)} tensors."
            )
        parameter = parameters[int(index)]
        state[key] = (
            torch.zeros_like(parameter, dtype=kind)
            if shape == list(parameter.shape)
            else torch.zeros(shape, dtype=kind)
        )
    return state


def _groups(optimizer: torch.optim.Optimizer) -> list[Numbers]:
    groups = optimizer.state_dict()["param_groups"]
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def _like(group: Numbers, saved: Numbers) -> Numbers:
    """JSON has lists for tuples."""
    return {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()}


def _write(accelerator: Accelerator, path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    if _are_cut(tensors):
        writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    elif accelerator.is_main_process:
        save_file({name: t.contiguous() for name, t in tensors.items()}, _file(path))


@torch.no_grad()
def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` in place."""
    if _are_cut(tensors):
        dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(path)))
        return
    if not _file(path).is_file():
        raise ValueError(f"resume: {str(_file(path))!r} is missing; the checkpoint is of another kind of run.")
    with _opened(_file(path)) as file:
        names = set(file.keys())
        if names != tensors.keys():
            raise ValueError(
                f"resume: the tensors of {str(path)!r} are not those of this run: only in the checkpoint "
                f"{sorted(names - tensors.keys())[:4]}, only here {sorted(tensors.keys() - names)[:4]}."
            )
        for name, tensor in tensors.items():
            kept = file.get_tensor(name)
            if kept.shape != tensor.shape:
                raise ValueError(
                    f"resume: {name!r} is {tuple(kept.shape)} in {str(path)!r} and {tuple(tensor.shape)} in this run."
                )
            tensor.copy_(kept)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises ValueError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"resume: {str(path)!r} cannot be read ({error}); resume from another checkpoint.") from error


def _are_cut(tensors: dict[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def _file(path: Path) -> Path:
    return path.with_name(f"{path.name}.safetensors")


def _random_streams(device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    tensors = {
        "python": torch.tensor(words),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        tensors[device.type] = torch.get_device_module(device).get_rng_state()
    return tensors, {"python": json.dumps([version, gauss]), "numpy": json.dumps([kind, *rest])}


def _read_random(path: Path, device: torch.device, same_device: bool) -> None:
    if not path.is_file():
        raise ValueError(f"resume: the random stream {str(path)!r} is missing; resume from another checkpoint.")
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        (version, gauss), (kind, *rest) = (json.loads(file.metadata()[name]) for name in ("python", "numpy"))
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["torch"])
    if device.type in tensors:
        torch.get_device_module(device).set_rng_state(tensors[device.type])
    elif device.type != "cpu":
        if same_device:
            raise ValueError(f"resume: {str(path)!r} lacks the random stream of {device.type}; use another checkpoint.")
        warnings.warn(
            f"resume: {str(path)!r} has no random stream of {device.type}; it starts from the seed.", stacklevel=3
        )
