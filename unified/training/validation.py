"""Losses on held-out rows, always in next-token mode."""

from collections.abc import Iterable

import torch
from accelerate.utils import send_to_device
from torch import nn

from unified.training.batches import CaptionedBatches
from unified.training.step import learned_slots


@torch.no_grad()
def image_loss(model: nn.Module, batches: CaptionedBatches, device: torch.device) -> float:
    """Mean image loss over all codes of ``batches`` in next-token mode, in nats a code."""
    return _mean_loss(model, batches, batches.once(), device, "image_loss")


@torch.no_grad()
def caption_loss(model: nn.Module, batches: CaptionedBatches, device: torch.device) -> float:
    """Mean loss over all tokens of the captions of ``batches`` after their pictures, in nats a text token."""
    return _mean_loss(model, batches, batches.once(captioned=True), device, "text_loss")


def _mean_loss(
    model: nn.Module,
    source: CaptionedBatches,
    batches: Iterable[dict[str, torch.Tensor]],
    device: torch.device,
    name: str,
) -> float:
    training = model.training
    model.eval()
    total, count = 0.0, 0.0
    for batch in batches:
        texts, images = learned_slots(batch, 1, source.layout)
        slots = images if name == "image_loss" else texts
        total += float(getattr(model(**send_to_device(batch, device)), name)) * slots
        count += slots
    model.train(training)
    return total / count
