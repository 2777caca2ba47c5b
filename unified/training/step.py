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

from unified.config import UnifiedConfig, Vocabulary
from unified.prediction.npp import slot_counts
from unified.sequence import IGNORE
from unified.training.config import TrainConfig
from unified.training.tracking import LossMeter, sum_over_processes

MAX_SKIPPED = 20


def learned_slots(batch: dict[str, Tensor], patch_size: int, vocabulary: Vocabulary) -> tuple[int, float]:
    """Positions of a batch that are learned: those whose target is text, and those whose target is a patch."""
    labels = batch["labels"][:, 1:]  # nothing predicts the first token, nor a document's first one
    if "document_ids" in batch:
        documents = batch["document_ids"]
        labels = labels.masked_fill(documents[:, 1:] != documents[:, :-1], IGNORE)
    images = int((labels >= vocabulary.text_vocab_size).sum())
    return int((labels != IGNORE).sum()) - images, images / patch_size**2


def learned_weight(batch: dict[str, Tensor], patch_size: int, config: UnifiedConfig) -> float:
    """What a batch weighs in the mean loss: its learned positions, each with the weight of its kind.

    ``loss * learned_weight`` is a plain sum over positions, so means of parts can be put together exactly.
    """
    texts, images = learned_slots(batch, patch_size, config.vocabulary)
    per_patch = patch_size**2 if config.loss_normalization == "token" else 1
    return config.text_loss_weight * texts + config.image_loss_weight * images * per_patch


def count_slots(batch: dict[str, Tensor], patch_size: int) -> int:
    """Positions that a batch takes in the backbone, without padding."""
    text = int(batch["attention_mask"].sum()) - int(batch["image_grids"].prod(dim=1).sum())
    return text + slot_counts(batch["image_grids"], patch_size)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    vocabulary: UnifiedConfig,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[dict[str, Tensor]],
    patch_size: int,
    learning_rate: float,
    config: TrainConfig,
    meter: LossMeter,
) -> int:
    """Learn from ``batches`` of all processes as if they were one batch; the gradient is that of its mean loss.

    Returns:
        Backbone positions that all processes went through, padding not counted.

    Raises:
        FloatingPointError: if gradients are not finite or too large; the weights are still those of before the step.
            DeepSpeed updates them before its norm can be read: there, they are so if it was the loss that was not finite.
    """
    for optimizer in optimizers:  # first of all, because DeepSpeed steps inside of backward
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    weights = [learned_weight(batch, patch_size, vocabulary) for batch in batches]
    positions = sum(count_slots(batch, patch_size) for batch in batches)
    total, all_slots = sum_over_processes(accelerator, [sum(weights), positions])
    parts = len(batches) * accelerator.num_processes  # Accelerate and DDP divide by this
    for batch, weight in zip(batches, weights, strict=True):
        with accelerator.accumulate(model):
            output = model(**send_to_device(batch, accelerator.device), patch_size=patch_size)
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                check_loss(accelerator, output.loss)
            accelerator.backward(output.loss * (weight / total * parts))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
                check_gradients(accelerator, norm, config.optimizer.gradient_limit)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        texts, images = learned_slots(batch, patch_size, vocabulary.vocabulary)
        meter.add(image_loss=(output.image_loss, images), text_loss=(output.text_loss, texts))
    return int(all_slots)


@contextmanager
def kept_on_failure(
    accelerator: Accelerator, batches: Sequence[dict[str, Tensor]], folder: Path, step: int, **numbers: float
) -> Iterator[None]:
    """Keep what failed: all micro-batches, tensors of the i-th as ``i.name``, with the numbers in the metadata."""
    try:
        yield
    except FloatingPointError as error:
        path = folder / f"failed-step-{step:08d}-process-{accelerator.process_index}.safetensors"
        tensors = {f"{i}.{name}": t.contiguous() for i, batch in enumerate(batches) for name, t in batch.items()}
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
