"""Losses on held-out rows, always in next-token mode."""

from collections.abc import Iterable

import torch
from accelerate.utils import send_to_device
from torch import nn

from unified.training.batches import CaptionedBatches


@torch.no_grad()
def image_loss(model: nn.Module, batches: CaptionedBatches, device: torch.device) -> float:
    """Mean image loss over all rows of ``batches`` in next-token mode, in nats a code."""
    return mean_loss(model, batches.once(), device, "image_loss")


@torch.no_grad()
def caption_loss(model: nn.Module, batches: CaptionedBatches, device: torch.device) -> float:
    """Mean loss of the captions of all rows after their pictures, in nats a text token, averaged over rows."""
    return mean_loss(model, batches.once(captioned=True), device, "text_loss")


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], device: torch.device, name: str) -> float:
    """Mean over rows of a loss of the model's output, in nats: ``image_loss``, ``text_loss``, or ``loss`` of both."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        rows = len(batch["input_ids"])
        total += float(getattr(model(**send_to_device(batch, device)), name)) * rows
        count += rows
    model.train(training)
    return total / count
