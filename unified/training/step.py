"""One optimizer step over micro-batches and processes."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from safetensors.torch import save_file
from torch import Tensor, nn

from unified.prediction.arrange import Batch
from unified.training.config import TrainConfig
from unified.training.tracking import LossMeter, sum_over_processes

MAX_SKIPPED = 20


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    learning_rate: float,
    config: TrainConfig,
    meter: LossMeter,
) -> int:
    """One optimizer step on ``batches`` of all processes as if they were one batch, whose mean loss it follows.

    Returns:
        Backbone positions that all processes went through, padding not counted.

    Raises:
        FloatingPointError: if gradients are not finite or too large; the weights are still those of before the step.
            DeepSpeed updates them before its norm can be read: there, they are so if it was the loss that was not finite.
    """
    for optimizer in optimizers:  # first of all, because DeepSpeed steps inside of backward
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    weight, positions = (sum(getattr(batch.counts, name) for batch in batches) for name in ("weight", "positions"))
    weight, positions = sum_over_processes(accelerator, [weight, positions])
    if not weight:
        raise ValueError("data: nothing is supervised in a whole step; label at least one token (-100 means not).")
    items = weight / (len(batches) * accelerator.num_processes)  # Accelerate and DDP divide by these
    for batch in batches:
        with accelerator.accumulate(model):
            output = model(**send_to_device(batch.inputs, accelerator.device), num_items_in_batch=items)
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                check_loss(accelerator, output.loss)
            accelerator.backward(output.loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
                check_gradients(accelerator, norm, config.optimizer.gradient_limit)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        counts = batch.counts
        meter.add(
            image_loss=(output.image_loss, counts.image_targets), text_loss=(output.text_loss, counts.text_targets)
        )
    return int(positions)


@contextmanager
def kept_on_failure(
    accelerator: Accelerator, batches: Sequence[Batch], folder: Path, step: int, **numbers: float
) -> Iterator[None]:
    """Keep what failed: all micro-batches, tensors of the i-th as ``i.name``, with the numbers in the metadata."""
    try:
        yield
    except FloatingPointError as error:
        path = folder / f"failed-step-{step:08d}-process-{accelerator.process_index}.safetensors"
        tensors = {
            f"{i}.{name}": t.contiguous()
            for i, batch in enumerate(batches)
            for name, t in batch.inputs.items()
            if isinstance(t, Tensor)
        }
        save_file(tensors, path, {name: str(number) for name, number in {"step": step, **numbers}.items()})
        raise FloatingPointError(
            f"{error} at step {step}; the batches are kept in {str(path)!r}. Lower optimizer.learning_rate, or "
            "look for what is special about them."
        ) from error


def check_loss(accelerator: Accelerator, loss: Tensor) -> None:
    """Stop on all processes. Raises FloatingPointError if the loss of any of them is not finite."""
    (bad,) = sum_over_processes(accelerator, [float(not loss.isfinite())])
    if bad:
        raise FloatingPointError(f"loss: not finite on {bad:.0f} process(es), {loss.item()} on this one,")


def check_gradients(accelerator: Accelerator, norm: Tensor | float | None, limit: float | None) -> None:
    """Stop before the weights are spoilt.

    Raises:
        FloatingPointError: if the gradients' norm is not finite or beyond ``limit``.
    """
    if norm is None:
        return
    value = float(norm)
    if accelerator.mixed_precision == "fp16" and not math.isfinite(value):
        return  # the loss scaler skips the step by itself
    if not math.isfinite(value) or (limit is not None and value > limit):
        raise FloatingPointError(f"gradients: their norm is {value}")


def check_skipped(skipped: int) -> None:
    """Raises FloatingPointError if the loss scaler of fp16 has skipped too many steps in a row: it found no scale."""
    if skipped >= MAX_SKIPPED:
        raise FloatingPointError(
            f"gradients: not finite in {skipped} steps in a row, all skipped (mixed_precision=bf16 has a larger range),"
        )
