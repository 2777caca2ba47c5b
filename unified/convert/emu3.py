"""Emu3 (arXiv 2409.18869) in its transformers class: images as rows of codes with end-of-line tokens."""

from typing import Any

import torch
from torch import Tensor
from transformers import Emu3ForConditionalGeneration

from unified.convert.output import GenerationOutput, check_pictures


def emu3_generation(
    model: Emu3ForConditionalGeneration, prompt_ids: Tensor, codes: Tensor, attention_mask: Tensor | None = None
) -> GenerationOutput:
    """Score images after prompts, over Emu3's one vocabulary of text and codes.

    Args:
        model: an Emu3 model.
        prompt_ids: ``(B, T)`` ids up to and with the token that announces codes (begin of image, size, image token),
            padded on the left.
        codes: ``(B, h, w)`` int64 of the model's own image tokenizer.
        attention_mask: ``(B, T)``, 0 on the padding of the prompts.

    Returns:
        The mean loss over codes and end-of-line tokens, and the logits of the codes alone, ``(B, h*w, K)`` in the order of
        the codebook.

    Raises:
        ValueError: if shapes do not belong together, a code is outside the codebook, or the vocabulary lacks codes.
    """
    vq_config: Any = model.config.vq_config
    height, width = check_pictures(prompt_ids, codes, vq_config.codebook_size)
    mapping = model.vocabulary_mapping
    known = len(mapping.image_tokens)
    if known != vq_config.codebook_size or mapping.eol_token_id is None:
        raise ValueError(
            f"vocabulary_map: {known} visual tokens for {vq_config.codebook_size} codes, end of line "
            f"{mapping.eol_token_id}; load the model with the configuration it was published with."
        )
    of_code = mapping.img2bpe_mapping_tensor.to(codes.device).long()
    lines = torch.nn.functional.pad(of_code[codes], (0, 1), value=mapping.eol_token_id).flatten(1)
    ids = torch.cat([prompt_ids, lines], dim=1)
    mask, positions = None, None
    if attention_mask is not None:
        mask = torch.cat([attention_mask, torch.ones_like(lines)], dim=1)
        positions = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=lines.shape[1] + 1, use_cache=False
    ).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), lines.flatten())
    of_codes = logits.reshape(len(codes), height, width + 1, -1)[:, :, :width].flatten(1, 2)
    return GenerationOutput(loss, of_codes[..., of_code])
