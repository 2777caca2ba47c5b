"""Liquid (arXiv 2412.04332): a Gemma whose last rows are the codes of Chameleon's image tokenizer."""

from pathlib import Path

from unified.convert.joint_table import split_at_codes
from unified.hub import local_folder
from unified.pipeline.pipeline import UnifiedPipeline
from unified_tokenizers import AutoImageTokenizer, load_text_tokenizer

BOI, EOI, NULL = "<boi>", "<eoi>", "<unconditional>"
TEMPLATE = "{prompt} Generate an image based on this description."
_SAMPLING = {"guidance_scale": 7.0, "temperature": 0.99, "top_k": 4096, "top_p": 0.96}
_PIXELS = 512  # a side


def liquid_pipeline(path: str | Path, image_tokenizer: str | Path) -> UnifiedPipeline:
    """A pipeline of a Liquid checkpoint; its image logits are equal, row by row of the joint table.

    Args:
        path: model folder or Hub name.
        image_tokenizer: Chameleon's ``vqgan.ckpt``, or a folder with it.

    Raises:
        ValueError: if the tables do not end with as many rows as the image tokenizer has codes, or a token is missing.
    """
    images, folder = AutoImageTokenizer.from_pretrained(image_tokenizer), local_folder(path, "checkpoint")
    tokenizer = load_text_tokenizer(folder, BOI, EOI)
    if NULL not in tokenizer.special_tokens:
        raise ValueError(f"checkpoint: the tokenizer of {str(path)!r} has no {NULL!r}, which stands for no caption.")
    model = split_at_codes(folder, str(path), images, tokenizer, _PIXELS, prompt_template=TEMPLATE, null_prompt=NULL)
    return UnifiedPipeline(model, images, tokenizer, _SAMPLING)
