"""Losses on held-out rows, always with a position for every code."""

from collections.abc import Callable, Iterable
from functools import partial

import datasets
import torch
from accelerate.utils import send_to_device
from torch import nn

from unified.config import UnifiedConfig
from unified.data.batches import Source, in_order
from unified.data.captioned import captioned_sequence
from unified.data.labelled import labelled_sequence
from unified.prediction.arrange import Batch
from unified.prompts import PromptFormat
from unified.sequence import TokenSequence
from unified_tokenizers import TextTokenizer


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


def image_loss(
    model: nn.Module,
    rows: datasets.Dataset,
    text_tokenizer: TextTokenizer | None,
    config: UnifiedConfig,
    batch_size: int,
    device: torch.device,
) -> float:
    """Mean image loss over the rows of a codes cache after their captions, or classes without a tokenizer, in nats a code."""
    sequence: Callable[..., TokenSequence]
    if text_tokenizer is None:
        assert config.classes is not None
        sequence = partial(labelled_sequence, vocabulary=config.vocabulary, classes=config.classes)
    else:
        prompts = PromptFormat.of(config)
        sequence = partial(
            captioned_sequence, text_tokenizer=text_tokenizer, vocabulary=config.vocabulary, prompts=prompts
        )
    return mean_loss(model, in_order(Source("rows", rows, sequence), config, batch_size), device, "image_loss")
