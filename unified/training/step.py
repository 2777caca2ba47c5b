"""One optimizer step over micro-batches and processes."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from safetensors.torch import save_file
from torch import Tensor, nn

from unified.prediction.arrange import Batch
from unified.training.config import TrainConfig
from unified.training.objectives.base import MicroBatch, Objective, Term
from unified.training.objectives.likelihood import Likelihood
from unified.training.tensor_parallel import data_rank
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
    objectives: Sequence[Objective] | None = None,
    number: int = 0,
) -> int:
    """One optimizer step on ``batches`` of all processes as if they were one batch, whose mean loss it follows.

    Args:
        accelerator, model, optimizers, batches, learning_rate, config, meter: of the run.
        objectives: losses that are summed; default: likelihood alone.
        number: of the first of ``batches`` among all of this process.

    Returns:
        Backbone positions that all processes went through with gradients, padding not counted.

    Raises:
        FloatingPointError: if gradients are not finite or too large; the weights are still those of before the step.
            DeepSpeed updates them before its norm can be read: there, they are so if it was the loss that was not finite.
    """
    for optimizer in optimizers:  # first of all, because DeepSpeed steps inside of backward
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    objectives = objectives or [Likelihood()]
    counts = [[objective.count(batch) for objective in objectives] for batch in batches]
    positions = [each.counts.positions for batch in batches for each in (batch, *batch.further.values())]
    *totals, all_positions = sum_over_processes(accelerator, [*map(sum, zip(*counts, strict=True)), sum(positions)])
    if not any(totals):
        raise ValueError("data: nothing is supervised in a whole step; label at least one token (-100 means not).")
    # Accelerate and DDP divide by these. An objective that counts nothing in this step has a sum of 0.
    items = [total / (len(batches) * accelerator.num_processes) or 1.0 for total in totals]
    asked = [objective.asks for objective in objectives if objective.asks is not None]
    options = {name: value for each in asked for name, value in each.items()}
    modules = [objective.module for objective in objectives if objective.module is not None]
    parameters = [parameter for module in (model, *modules) for parameter in module.parameters()]
    for i, batch in enumerate(batches):
        with accelerator.accumulate(model, *modules):
            inputs, output = send_to_device(batch.inputs, accelerator.device, non_blocking=True), None
            if asked:
                weight = likelihood_items(objectives, items)
                output = model(**inputs, num_items_in_batch=weight, **options)
            given = MicroBatch(model, batch, inputs, output, number + i)
            terms = [objective.loss(given, count) for objective, count in zip(objectives, items, strict=True)]
            loss = weighted_sum(objectives, terms)
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                check_loss(accelerator, loss)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(parameters, config.optimizer.gradient_clip)
                check_gradients(accelerator, norm, config.optimizer.gradient_limit)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if output is not None:
            meter.add(
                image_loss=(output.image_loss, batch.counts.image_targets),
                text_loss=(output.text_loss, batch.counts.text_targets),
            )
        for objective, term, count, own in zip(objectives, terms, items, counts[i], strict=True):
            if isinstance(objective, Likelihood):
                continue  # logged by its parts
            sums = {"loss": term.loss * count, **term.metrics}
            meter.add(**{f"{objective.name}_{name}": (value / max(own, 1e-9), own) for name, value in sums.items()})
    return int(all_positions) * data_rank(accelerator)[1] // accelerator.num_processes


def likelihood_items(objectives: Sequence[Objective], items: Sequence[float]) -> float:
    """What the model divides its own loss by: the items of likelihood, or 1 where that is no objective."""
    for objective, count in zip(objectives, items, strict=True):
        if isinstance(objective, Likelihood):
            return count
    return 1.0


def weighted_sum(objectives: Sequence[Objective], terms: Sequence[Term]) -> Tensor:
    """The losses, each times the weight of its objective; a single one of weight 1 as it is, bit for bit."""
    losses = [
        term.loss if objective.weight == 1 else objective.weight * term.loss
        for objective, term in zip(objectives, terms, strict=True)
    ]
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total


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
            for name, t in [*batch.inputs.items(), *_further_inputs(batch)]
            if isinstance(t, Tensor)
        }
        save_file(tensors, path, {name: str(number) for name, number in {"step": step, **numbers}.items()})
        raise FloatingPointError(
            f"{error} at step {step}; the batches are kept in {str(path)!r}. Lower optimizer.learning_rate, or "
            "look for what is special about them."
        ) from error


def _further_inputs(batch: Batch) -> Iterator[tuple[str, Any]]:
    for name, further in batch.further.items():
        yield from ((f"{name}.{key}", value) for key, value in further.inputs.items())


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
