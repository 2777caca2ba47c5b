"""SimpleAR (arXiv 2504.11455): a Qwen2 whose last rows are the 64,000 codes of a Cosmos tokenizer."""

from pathlib import Path

from unified.convert.joint_table import split_at_codes
from unified.hub import local_folder
from unified.pipeline.pipeline import UnifiedPipeline
from unified_tokenizers import AutoImageTokenizer, TransformersTokenizer, load_text_tokenizer

START, BOI = "<|t2i|>", "<|soi|>"
EOI = "<|vtokens|>"  # stands for codes while SimpleAR's data are prepared, and is never read: nothing closes an image there
TEMPLATE = START + "A highly realistic image of {prompt}"
NULL = (
    START
    + "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, bad "
    "eyes, bad limbs, distortion"
)
_SAMPLING = {"guidance_scale": 6.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
_PIXELS = 1024  # a side


def simplear_pipeline(path: str | Path, image_tokenizer: str | Path, pixels: int = _PIXELS) -> UnifiedPipeline:
    """A pipeline of a SimpleAR checkpoint; its image logits are equal, row by row of the joint table.

    Without a negative prompt it is steered away from the text that SimpleAR's scripts steer away from.

    Args:
        path: model folder or Hub name.
        image_tokenizer: NVIDIA's ``Cosmos-1.0-Tokenizer-DV8x16x16``, a folder with its TorchScript files.
        pixels: side of the images that the checkpoint makes.

    Raises:
        ValueError: if the tables do not end with as many rows as the image tokenizer has codes, a token is missing, or the
            size is no multiple of the tokenizer's stride.
    """
    images, folder = AutoImageTokenizer.from_pretrained(image_tokenizer), local_folder(path, "checkpoint")
    tokenizer = load_text_tokenizer(folder, BOI, EOI)
    if not isinstance(tokenizer, TransformersTokenizer) or START not in tokenizer.tokenizer.get_vocab():
        raise ValueError(f"checkpoint: the tokenizer of {str(path)!r} has no {START!r}, which its prompts start with.")
    if pixels % images.downsample:
        raise ValueError(f"pixels: {pixels} is no multiple of the image tokenizer's stride {images.downsample}.")
    model = split_at_codes(folder, str(path), images, tokenizer, pixels, prompt_template=TEMPLATE, null_prompt=NULL)
    # Qwen's configuration names a <bos> that its tokenizer does not put in front of a text.
    text = model.config.text_config
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return UnifiedPipeline(model, images, tokenizer, _SAMPLING)
