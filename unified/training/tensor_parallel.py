"""A decoder's matrices cut over processes that share their batches (Megatron-LM, arXiv 1909.08053)."""

from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def is_tensor_parallel(accelerator: Accelerator) -> bool:
    """Whether all processes share their batches."""
    parallel = accelerator.parallelism_config
    return parallel is not None and parallel.tp_size > 1


def data_rank(accelerator: Accelerator) -> tuple[int, int]:
    """Which batches are this process's, and how many processes have batches of their own."""
    return (0, 1) if is_tensor_parallel(accelerator) else (accelerator.process_index, accelerator.num_processes)


def cut_decoder(model: Any, accelerator: Accelerator) -> None:
    """Cut the layers of a unified model over all processes by the plan that transformers has for its family, in place.

    Both vocabularies' tables and the norms stay whole; their gradients are the same in every process.

    Raises:
        ValueError: if the family has no such plan, or heads cannot be shared out evenly.
    """
    decoder, count = model.backbone.base_model, accelerator.num_processes
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
    parallelize_module(decoder, mesh, {name: STYLES[style]() for name, style in plan.items()})
    model._tp_size = count  # where Accelerate looks


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the pieces of all processes, which call together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def pieces_apart(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters as one group, or as two if only some are cut: one kernel does not update both."""
    cut: list[nn.Parameter] = [p for p in parameters if isinstance(p, DTensor)]
    rest = [p for p in parameters if not isinstance(p, DTensor)]
    return [rest, cut] if rest and cut else [parameters]
