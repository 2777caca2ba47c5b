"""Losses on held-out rows, always with a position for every code."""

from collections.abc import Iterable

import torch
from accelerate.utils import send_to_device
from torch import nn

from unified.data.batches import Batch


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device, name: str) -> float:
    """Mean over all supervised positions of a loss of the model's output, in nats.

    ``name`` is ``image_loss``, ``text_loss``, or ``loss`` for both together.
    """
    training = model.training
    model.eval()
    total, targets = 0.0, 0
    for batch in batches:
        images, texts = batch.counts.image_targets, batch.counts.text_targets
        targets_here = {"image_loss": images, "text_loss": texts, "loss": texts + images}[name]
        total += float(getattr(model(**send_to_device(batch.inputs, device)), name)) * targets_here
        targets += targets_here
    model.train(training)
    return total / targets
