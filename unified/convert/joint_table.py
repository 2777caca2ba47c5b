"""Language models with one table for text and image codes, as Liquid (arXiv 2412.04332) trains them."""

from pathlib import Path
from typing import Any

import torch

from unified.model.backbone import load_language_model
from unified.model.modeling import LOGIT_SCALES, UnifiedForCausalLM
from unified_tokenizers import ImageTokenizer, TextTokenizer


def split_joint_table(
    pretrained_model_name_or_path: str, codebook_size: int, boi_token_id: int, eoi_token_id: int, **config: Any
) -> UnifiedForCausalLM:
    """Turn the last ``codebook_size`` rows of both tables into image tables; text ids keep their numbers.

    Logits are equal row by row. Probabilities differ: a unified model scores text and codes apart.

    Args:
        pretrained_model_name_or_path: folder or Hub name of any ``AutoModelForCausalLM``.
        codebook_size: number of image codes; code c is row ``vocab_size - codebook_size + c``.
        boi_token_id, eoi_token_id: text ids that frame an image.
        config: further fields of :class:`unified.UnifiedConfig`; ``positions`` is ``1d`` unless given.

    Raises:
        ValueError: if the codebook does not fit into the table, the head has a bias, a scale or a cap that would be lost, or
            as :func:`unified.model.backbone.load_language_model`.
    """
    backbone = load_language_model(pretrained_model_name_or_path, torch.float32)
    vocabulary = backbone.config.vocab_size
    first = vocabulary - codebook_size
    if not 0 < codebook_size < vocabulary:
        raise ValueError(
            f"codebook_size: {codebook_size} codes leave no text in the {vocabulary} rows of {pretrained_model_name_or_path!r}."
        )
    head = backbone.get_output_embeddings()
    scaled = any(getattr(backbone.config, name, None) not in (None, 1) for name in LOGIT_SCALES)
    if head.bias is not None or scaled:
        raise ValueError(
            f"pretrained_model_name_or_path: the head of {pretrained_model_name_or_path!r} has a bias, or a scale or a cap on its "
            "logits, which image heads do not have; convert another checkpoint."
        )
    with torch.no_grad():
        # Through the module, because some families (Gemma) scale what they look up.
        vectors = backbone.get_input_embeddings()(torch.arange(first, vocabulary))
        scores = head.weight[first:].clone()
    backbone.resize_token_embeddings(first, mean_resizing=False)
    model = UnifiedForCausalLM.around(
        backbone,
        codebook_size=codebook_size,
        boi_token_id=boi_token_id,
        eoi_token_id=eoi_token_id,
        **{"positions": "1d", "coarse_positions": "unit", **config},
    )
    with torch.no_grad():
        model.image_embed.weight.copy_(vectors)
        model.image_head.weight.copy_(scores)
    return model.eval()


def split_at_codes(
    folder: Path, source: str, images: ImageTokenizer, tokenizer: TextTokenizer, pixels: int, **config: Any
) -> UnifiedForCausalLM:
    """:func:`split_joint_table` for a checkpoint that comes with both of its tokenizers.

    Args:
        folder: of the language model.
        source: what the user named, for errors.
        images, tokenizer: its tokenizers; the codes of the first follow the ids of the second.
        pixels: side of the images that the checkpoint makes.
        config: further fields of :class:`unified.UnifiedConfig`.

    Raises:
        ValueError: as :func:`split_joint_table`, or if the rows before the codes are not the tokenizer's ids.
    """
    side = pixels // images.downsample
    model = split_joint_table(
        str(folder), images.codebook_size, tokenizer.boi_token_id, tokenizer.eoi_token_id, image_grids=[[side, side]],
        image_tokenizer_fingerprint=images.fingerprint, **config,
    )  # fmt: skip
    rows = model.config.text_config.vocab_size
    if rows != tokenizer.vocab_size:
        raise ValueError(
            f"checkpoint: {source!r} has {rows} rows before the last {images.codebook_size}, its tokenizer "
            f"{tokenizer.vocab_size} ids; codes follow them, so give the image tokenizer of this checkpoint."
        )
    return model
