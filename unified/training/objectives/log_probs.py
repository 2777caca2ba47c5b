"""Log-probabilities of the image codes of given sequences, under the model that is trained and under its reference.

The forward pass is that of training: one pass over a batch of :func:`unified.data.batches.make_batch`, in any order and with any
merge. Codes that are predicted together are independent given what is before, so their log-probabilities add up to that of
their image. Each of the codes of a patch is scored by the one distribution of the patch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from unified.lora.switching import adapters_off
from unified.prediction.arrange import Batch
from unified.sequence import IGNORE


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


def per_sequence(values: Tensor, batch: Batch, inputs: dict[str, Any], sequences: int) -> Tensor:
    """Sums ``(sequences,)`` of values ``(N, P)`` over the images of each sequence of a batch, however they are packed."""
    if not batch.counts.images:
        return values.new_zeros(sequences) + values.sum()
    sums = per_image(values, inputs, batch.counts.images)
    return sums.new_zeros(sequences).index_add(0, batch.owners.to(sums.device), sums)


def supervised_codes(inputs: dict[str, Any]) -> Tensor:
    """``(N, P)`` float: 1 for every code of the image targets that is in the loss, 0 in unused columns and padding."""
    labels = inputs["labels"]
    flat = labels.reshape(labels.shape[0] * labels.shape[1], -1)
    flat = torch.cat([flat, flat.new_full((1, flat.shape[1]), IGNORE)])
    return (flat[inputs["image_targets"]] != IGNORE).float()
