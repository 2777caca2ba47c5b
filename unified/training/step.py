"""One optimizer step over micro-batches and processes."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from unified.config import UnifiedConfig
from unified.npp import slot_counts
from unified.sequence import IGNORE
from unified.training.checkpoint import save_failed_batch
from unified.training.config import TrainConfig
from unified.training.tracking import LossMeter


def learned_weight(batch: dict[str, Tensor], patch_size: int, config: UnifiedConfig) -> float:
    """What a batch weighs in the mean loss: its learned slots, each with the weight of its kind.

    ``loss * learned_weight`` is a plain sum over slots, so means of parts can be put together exactly.
    """
    labels = batch["labels"][:, 1:]  # nothing predicts the first token
    images = int((labels >= config.layout.text_vocab_size).sum())
    texts = int((labels != IGNORE).sum()) - images
    slots = images if config.loss_normalization == "token" else images / patch_size**2
    return config.text_loss_weight * texts + config.image_loss_weight * slots


def count_slots(batch: dict[str, Tensor], patch_size: int) -> int:
    """Slots that a batch takes in the backbone, without padding."""
    text = int(batch["attention_mask"].sum()) - int(batch["image_grids"].prod(dim=1).sum())
    return text + slot_counts(batch["image_grids"], patch_size)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    layout: UnifiedConfig,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[dict[str, Tensor]],
    patch_size: int,
    learning_rate: float,
    step: int,
    config: TrainConfig,
    meter: LossMeter,
) -> int:
    """Learn from ``batches`` of all processes as if they were one batch; the gradient is that of its mean loss.

    Returns:
        Backbone slots that all processes went through, padding not counted.

    Raises:
        FloatingPointError: if gradients are not finite or too large; the weights are still those of before the step.
    """
    weights = [learned_weight(batch, patch_size, layout) for batch in batches]
    slots = sum(count_slots(batch, patch_size) for batch in batches)
    counts = torch.tensor([sum(weights), slots], dtype=torch.float64)
    total, all_slots = accelerator.reduce(counts.to(accelerator.device), "sum").tolist()
    parts = len(batches) * accelerator.num_processes  # Accelerate and DDP divide by this
    for batch, weight in zip(batches, weights, strict=True):
        with accelerator.accumulate(model):
            output = model(**batch, patch_size=patch_size)
            accelerator.backward(output.loss * (weight / total * parts))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
                check_gradients(accelerator, norm, batch, step, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
                optimizer.zero_grad()
        meter.add(image_loss=output.image_loss, text_loss=output.text_loss)
    return int(all_slots)


def check_gradients(
    accelerator: Accelerator, norm: Tensor | float | None, batch: dict[str, Tensor], step: int, config: TrainConfig
) -> None:
    """Stop before the weights are spoilt, and keep the (last) batch.

    Raises:
        FloatingPointError: if the gradients' norm is not finite or beyond ``optimizer.gradient_limit``.
    """
    if accelerator.mixed_precision == "fp16" or norm is None:
        return  # the loss scaler skips steps with infinite gradients by itself; DeepSpeed clips out of sight
    value, limit = float(norm), config.optimizer.gradient_limit
    if not math.isfinite(value) or (limit is not None and value > limit):
        path = save_failed_batch(batch, Path(config.output_dir), step, accelerator.process_index)
        raise FloatingPointError(
            f"gradients: their norm is {value} at step {step}; the batch is kept in {str(path)!r}. Lower "
            "optimizer.learning_rate, or look for what is special about the batch."
        )
