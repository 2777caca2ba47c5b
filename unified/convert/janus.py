"""Janus and Janus-Pro (arXiv 2501.17811) in their transformers class: the loss of the generation head."""

from typing import Any

import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration

from unified.convert.output import GenerationOutput, check_pictures
from unified.prediction.npp import group_embeddings, group_targets, patch_cross_entropy


def janus_generation(
    model: JanusForConditionalGeneration,
    prompt_ids: Tensor,
    codes: Tensor,
    attention_mask: Tensor | None = None,
    patch_size: int = 1,
) -> GenerationOutput:
    """Score images after prompts; transformers computes no loss for this head.

    Codes enter through Janus's own generation embeddings and aligner, and its generation head predicts them. Positions
    are the running index. With ``patch_size`` above 1, patches are the positions, as in next-patch prediction.

    Args:
        model: a Janus model; gradients flow into all of it that is used.
        prompt_ids: ``(B, T)`` ids that end with the model's begin-of-image token, padded on the left.
        codes: ``(B, h, w)`` int64 of the model's own image tokenizer.
        attention_mask: ``(B, T)``, 0 on the padding of the prompts.
        patch_size: side p of the patches.

    Raises:
        ValueError: if shapes do not belong together, a code is outside the codebook, or p does not divide the grid.
    """
    vq_config: Any = model.config.vq_config
    grid = check_pictures(prompt_ids, codes, vq_config.num_embeddings)
    flat = codes.flatten(1)
    patches = group_embeddings(model.prepare_embeddings_for_image_generation(flat), grid, patch_size)
    text = model.get_input_embeddings()(prompt_ids)
    embeds = torch.cat([text, patches[:, :-1].to(text.dtype)], dim=1)
    mask, positions = None, None
    if attention_mask is not None:
        mask = torch.cat([attention_mask, attention_mask.new_ones(patches[:, :-1].shape[:2])], dim=1)
        positions = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    logits = model.model.generation_head(hidden[:, prompt_ids.shape[1] - 1 :])
    return GenerationOutput(patch_cross_entropy(logits, group_targets(flat, grid, patch_size)).mean(), logits)
