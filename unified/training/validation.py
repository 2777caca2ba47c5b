"""Losses on held-out rows, always in next-token mode."""

from collections.abc import Iterable

import torch
from accelerate.utils import send_to_device
from torch import nn

from unified.config import Vocabulary
from unified.data.batches import CaptionedBatches
from unified.training.step import learned_slots


@torch.no_grad()
def image_loss(model: nn.Module, batches: CaptionedBatches, device: torch.device) -> float:
    """Mean image loss over all codes of ``batches`` in next-token mode, in nats a code."""
    return mean_loss(model, batches.once(), batches.vocabulary, device, "image_loss")


@torch.no_grad()
def caption_loss(model: nn.Module, batches: CaptionedBatches, device: torch.device) -> float:
    """Mean loss over all tokens of the captions of ``batches`` after their images, in nats a text token."""
    return mean_loss(model, batches.once(captioned=True), batches.vocabulary, device, "text_loss")


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    vocabulary: Vocabulary,
    device: torch.device,
    name: str,
) -> float:
    """Mean of a loss of the model's output over all learned positions that it counts, in nats.

    ``name`` is ``image_loss``, ``text_loss``, or ``loss`` for both together.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0.0
    for batch in batches:
        texts, images = learned_slots(batch, 1, vocabulary)
        positions = {"image_loss": images, "text_loss": texts, "loss": texts + images}[name]
        total += float(getattr(model(**send_to_device(batch, device)), name)) * positions
        count += positions
    model.train(training)
    return total / count
