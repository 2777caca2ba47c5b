"""A decoder's matrices cut over processes that share their batches (Megatron-LM, arXiv 1909.08053), alone or beside FSDP2."""

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

_T = TypeVar("_T", bound=Tensor)
# By the names of transformers.
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": partial(ColwiseParallel, output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": partial(RowwiseParallel, input_layouts=Replicate()),
}


def batch_sharers(accelerator: Accelerator) -> int:
    """How many processes, neighbours by their number, share each batch; 1 without tensor parallelism."""
    parallel = accelerator.parallelism_config
    return 1 if parallel is None else parallel.tp_size


def is_tensor_parallel(accelerator: Accelerator) -> bool:
    """Whether processes share batches."""
    return batch_sharers(accelerator) > 1


def data_rank(accelerator: Accelerator) -> tuple[int, int]:
    """Which batches are this process's, and how many there are at a time."""
    sharers = batch_sharers(accelerator)
    return accelerator.process_index // sharers, accelerator.num_processes // sharers


def cut_decoder(model: Any, accelerator: Accelerator) -> None:
    """Cut the layers of a unified model, without its adapter, by the plan that transformers has for its family, in place.

    Both vocabularies' tables and the norms stay whole; their gradients are the same in every process. Of an adapter's two
    matrices the one is cut that stands beside the cut.

    Raises:
        ValueError: if the family has no such plan, or heads cannot be shared out evenly.
    """
    decoder, count = model.backbone.base_model, batch_sharers(accelerator)
    plan, family = decoder.config.base_model_tp_plan or {}, type(decoder).__name__
    unknown = sorted(set(plan.values()) - STYLES.keys())
    if unknown or not plan:
        reason = f"needs {unknown}, which is not built" if unknown else "has no plan"
        raise ValueError(f"tp_size: {family} {reason}; cut the model with recipes/accelerate/fsdp2.yaml.")
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(decoder.config, name, count)
        if heads % count:
            raise ValueError(f"tp_size: {count} does not divide {name} {heads} of {family}; choose a divisor.")
    mesh = accelerator.torch_device_mesh["tp"]
    modules = dict(decoder.named_modules())
    for pattern, style in plan.items():
        for name in fnmatch.filter(modules, pattern):
            for part in _parts(modules[name], style):
                parallelize_module(part, mesh, STYLES[style]())
    model._tp_size = count  # where Accelerate looks


def _parts(module: nn.Module, style: str) -> Iterable[nn.Module]:
    """What of a module is cut."""
    if isinstance(module, LoraLayer):
        return [module.get_base_layer(), *(module.lora_A if "rowwise" in style else module.lora_B).values()]
    return [module]


@contextmanager
def already_cut(accelerator: Accelerator) -> Iterator[None]:
    """Inside, Accelerate prepares a model that has been cut for FSDP2, as one without tensor parallelism.

    Its own preparation imports ``ReplicateParallel`` (version 1.15), which transformers no longer has (version 5.24).
    """
    parallel = accelerator.parallelism_config
    if parallel is None or not accelerator.is_fsdp2:
        yield
        return
    size, parallel.tp_size = parallel.tp_size, 1
    try:
        yield
    finally:
        parallel.tp_size = size


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the pieces of all processes, which call together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def alike(tensors: Iterable[_T]) -> list[list[_T]]:
    """Tensors in groups that are cut over the same processes: one kernel does not update others together."""
    groups: dict[Any, list[_T]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())
