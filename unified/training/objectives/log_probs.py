"""Log-probabilities of the image codes of given sequences, under the model that is trained and under its reference.

The forward pass is that of training: one pass over a batch of :func:`unified.data.batches.make_batch`, in any order and with any
merge. Codes that are predicted together are independent given what is before, so their log-probabilities add up to that of
their image. Each of the codes of a patch is scored by the one distribution of the patch.
"""

from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from unified.lora.switching import adapters_off
from unified.prediction.arrange import Batch
from unified.sequence import IGNORE
from unified.training.objectives.base import MicroBatch


def log_probs_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """``(N, P)``, of the codes of each of the N ``image_targets``; 0 where there is none. Differentiable.

    Args:
        model: a unified model, perhaps wrapped.
        inputs: of a batch, on its device.
    """
    text = {"text_targets": inputs["text_targets"][:0]}  # text is not scored
    return model(**{**inputs, **text}, num_items_in_batch=1.0, return_log_probs=True).log_probs


@torch.no_grad()
def reference_log_probs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The same under the model with its adapters switched off, without dropout and without gradients.

    Raises:
        ValueError: if the model has no adapter.
    """
    training = model.training
    with adapters_off(model):
        model.eval()
        try:
            return log_probs_of(model, inputs)
        finally:
            model.train(training)


def image_of_targets(inputs: dict[str, Any]) -> Tensor:
    """``(N,)``: the number of the image that each of ``image_targets`` is of, images counted by their positions.

    Padded targets get whatever number; their log-probabilities are 0. Every image follows a ``<boi>``, so images are the runs of
    positions that codes or queries enter.
    """
    ids = inputs["input_ids"]
    inside = torch.zeros(ids.shape[0] * ids.shape[1] + 2, dtype=torch.int64, device=ids.device)
    for name in ("image_inputs", "query_inputs"):
        if name in inputs:
            inside = inside.index_fill(0, inputs[name] + 1, 1)
    inside[-1] = 0  # what stands for none
    number = (inside.diff() == 1).cumsum(0) - 1
    return number[inputs["image_targets"]].clamp_min(0)


def per_image(values: Tensor, inputs: dict[str, Any], images: int) -> Tensor:
    """Sums ``(images,)`` of values ``(N, P)`` of the codes of each target."""
    return values.new_zeros(images).index_add(0, image_of_targets(inputs).clamp_max(images - 1), values.sum(dim=1))


def per_sequence(values: Tensor, batch: Batch, inputs: dict[str, Any]) -> Tensor:
    """Sums over the images of each sequence of a batch, however they are packed: ``(n,)`` up to the last one with an image.

    Args:
        values: ``(N, P)``, of the codes of each target.
        batch: what :func:`unified.data.batches.make_batch` made of the sequences.
        inputs: its inputs, on the device of ``values``.
    """
    if not len(batch.owners):
        return values.new_zeros(0) + values.sum()
    sums = per_image(values, inputs, batch.counts.images)
    sequences = int(batch.owners.max()) + 1
    return sums.new_zeros(sequences).index_add(0, batch.owners.to(sums.device), sums)


def target_labels(inputs: dict[str, Any]) -> Tensor:
    """``(N, P)``: the labels of ``image_targets``, as ids; -100 in unused columns and padding."""
    labels = inputs["labels"]
    flat = labels.reshape(labels.shape[0] * labels.shape[1], -1)
    return torch.cat([flat, flat.new_full((1, flat.shape[1]), IGNORE)])[inputs["image_targets"]]


class Ratios(NamedTuple):
    """``log p - log p_ref`` of the images of each sequence ``(n,)``, of its further sequence, and 1 where both make a pair."""

    own: Tensor
    other: Tensor
    pairs: Tensor


def log_ratios(given: MicroBatch, name: str) -> Ratios:
    """Ratios of model and reference for a micro-batch whose forward pass has ``log_probs``, and for ``further[name]``."""
    assert given.output is not None and given.output.log_probs is not None
    further = given.batch.further[name]
    inputs = send_to_device(further.inputs, given.inputs["labels"].device)
    own = given.output.log_probs - reference_log_probs(given.model, given.inputs)
    other = log_probs_of(given.model, inputs) - reference_log_probs(given.model, inputs)
    return Ratios(
        per_sequence(own, given.batch, given.inputs), per_sequence(other, further, inputs), pairs_of(further, inputs)
    )


def pairs_of(further: Batch, inputs: dict[str, Any]) -> Tensor:
    """``(n,)``: 1 where a further sequence has an image in the loss, so that it makes a pair."""
    return (per_sequence((target_labels(inputs) != IGNORE).float(), further, inputs) > 0).float()
