"""The losses of the unified model: every target is scored from its sources, over the vocabulary that it belongs to."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unified.model.image_head import code_log_probs, patch_losses
from unified.model.output import UnifiedOutput
from unified.model.text_loss import text_cross_entropy
from unified.sequence import IGNORE


def score_targets(
    model: Any,
    hidden: Tensor,
    labels: Tensor,
    text_targets: Tensor | None,
    image_targets: Tensor | None,
    image_sources: Tensor | None,
    query_inputs: Tensor | None,
    merge: str,
    num_items: float | Tensor | None,
    return_log_probs: bool,
) -> UnifiedOutput:
    """Losses of a :class:`unified.UnifiedForCausalLM` for states ``hidden (B, S - 1, D)``.

    Text is scored from the position before it, codes from their sources. Arguments and errors as in ``forward``.
    """
    config, length = model.config, labels.shape[1]
    ids, states = labels.reshape(labels.shape[0] * length, -1), hidden.flatten(0, 1)
    if text_targets is None:
        text_targets = torch.arange(len(ids), device=ids.device).view(-1, length)[:, 1:].flatten()
    image_targets = text_targets[:0] if image_targets is None else image_targets
    if not len(text_targets) and not len(image_targets) and num_items is None:
        raise ValueError("labels: no position of the batch is supervised; label at least one token (-100 means not).")
    text_ids = F.pad(ids[:, 0], (0, 1), value=IGNORE)[text_targets]  # one more, for the indices that stand for none
    codes = target_codes(labels, image_targets, config.text_config.vocab_size)
    text_states = states[text_targets - 1 - text_targets // length]
    text = text_cross_entropy(model.text_logits, text_states, text_ids, config.text_config.vocab_size)
    image, weights = text.new_zeros(()), (codes != IGNORE).sum(dim=1)
    log_probs = text.new_zeros(codes.shape) if return_log_probs else None
    if config.loss_normalization == "position":
        weights = weights.clamp_max(1)
    if len(image_targets):
        scored = target_states(model, hidden, length, image_targets, image_sources, merge, codes)
        if return_log_probs:
            log_probs = _log_probs(model.image_head, scored, codes)
            image = -(log_probs.sum(dim=1) * weights / (codes != IGNORE).sum(dim=1).clamp_min(1)).sum()
        else:
            image = _image_loss(model.image_head, scored, codes, weights)
    if model.training:
        unused = _unused(model, states[:0], len(image_targets) > 0, query_inputs is not None, merge)
        image, log_probs = image + unused, None if log_probs is None else log_probs + unused
    texts, images = (text_ids != IGNORE).sum(), weights.sum()
    if num_items is None:
        num_items = config.text_loss_weight * texts + config.image_loss_weight * images
    return UnifiedOutput(
        loss=(config.text_loss_weight * text + config.image_loss_weight * image) / num_items,
        text_loss=text / texts if len(text_targets) else None,
        image_loss=image / images if len(image_targets) else None,
        log_probs=log_probs,
    )


def target_codes(labels: Tensor, targets: Tensor, text_vocab_size: int) -> Tensor:
    """Codes ``(N, P)`` of each target, -100 where there is none, of labels ``(B, S)`` or ``(B, S, P)``."""
    ids = labels.reshape(labels.shape[0] * labels.shape[1], -1)
    found = F.pad(ids, (0, 0, 0, 1), value=IGNORE)[targets]  # one row more, for the indices that stand for none
    return torch.where(found == IGNORE, IGNORE, found - text_vocab_size)


def target_states(
    model: Any, hidden: Tensor, length: int, targets: Tensor, sources: Tensor | None, merge: str, codes: Tensor
) -> Tensor:
    """What the image head scores for each target ``(N, P or 1, D)``, of states ``(B, S - 1, D)`` for S = ``length``.

    ``codes (N, P)`` are the targets, which see those before them where they are chained.
    """
    states, missing = hidden.flatten(0, 1), None
    if sources is None:
        sources = (targets - 1)[:, None]
    else:
        missing = sources == len(hidden) * length
    found = states[(sources - sources // length).clamp_max(len(states) - 1)]
    found = model.image_states(found, missing, merge)
    return model.chained_states(found, codes) if model.image_chain is not None and merge == "channel" else found


def _image_loss(head: nn.Module, states: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the losses of N cells: ``states (N, P or 1, D)``, ``codes (N, P)``, ``weights (N,)``."""
    if states.shape[1] > 1:  # a distribution for each code
        weights = (weights[:, None] / codes.shape[1]).expand_as(codes).flatten()
        codes = codes.reshape(-1, 1)
    return patch_losses(head, states.flatten(0, 1), codes, weights)


def _log_probs(head: nn.Module, states: Tensor, codes: Tensor) -> Tensor:
    """Log-probabilities ``(N, P)`` of the codes of N cells: ``states (N, P or 1, D)``, ``codes (N, P)``."""
    if states.shape[1] == 1:
        return code_log_probs(head, states[:, 0], codes)
    return code_log_probs(head, states.flatten(0, 1), codes.reshape(-1, 1)).view_as(codes)


def _unused(model: Any, nothing: Tensor, images: bool, queries: bool, merge: str) -> Tensor:
    """Zero, with a gradient of zeros for the image modules that a batch does not use: DDP waits for all of them.

    ``nothing`` is ``(0, D)``; ``images`` and ``queries`` say whether the batch has any.
    """
    no_ids = torch.empty(0, dtype=torch.long, device=nothing.device)
    total, config = nothing.sum(), model.config
    if not images:
        scored = nothing.shape[-1] if config.image_projection is None else config.image_projection + 1
        wide = nothing.new_empty(0, scored)
        total = total + patch_losses(model.image_head, wide, no_ids[:, None], no_ids) + model.image_embed(no_ids).sum()
        if model.image_join is not None:
            sources = nothing.new_empty(0, model.prediction.way.most_sources, nothing.shape[-1])
            total = total + model.image_join(sources, sources[..., 0] > 0).sum()
        if model.image_projection is not None:
            total = total + model.image_projection(nothing).sum()
    if model.image_query is not None and not (images and queries):
        total = total + model.image_query(no_ids).sum()
    if model.image_merge is not None and model.image_split is not None and not (images and merge == "channel"):
        windows = nothing.new_empty(0, model.image_split.codes, nothing.shape[-1])
        total = total + model.image_merge(windows).sum() + model.image_split(nothing).sum()
        if model.image_chain is not None:
            total = total + model.image_chain(windows, windows).sum()
    if model.vision_projector is not None:
        total = total + model.vision_projector(nothing.new_empty(0, config.vision["width"])).sum()
    return total
