"""Lumina-mGPT 2.0 (arXiv 2507.17801): a Chameleon trained from scratch, on Qwen's text tokenizer and MoVQGAN's codes.

Two tokens in front of an image say how many grids of 32 pixels it has, and one ends every row of codes.
"""

from pathlib import Path
from typing import Any

from unified.convert.chameleon import BOI, END_OF_TURN, EOI, FIELDS, LANGUAGE
from unified.convert.parts import build_model, cut_codes, read_model, renamed
from unified.model.chameleon import ChameleonTextConfig
from unified.pipeline.pipeline import UnifiedPipeline
from unified.prediction.merge import Grid
from unified_tokenizers import AutoImageTokenizer, TransformersTokenizer, load_text_tokenizer

ROW_END = "<reserved08799>"
TEMPLATE = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}" + END_OF_TURN
_SAMPLING = {"guidance_scale": 4.0, "temperature": 1.0, "top_k": 4096, "top_p": 1.0}
_FIRST_CODE = 155000  # its id; the published tokenizer has no names for codes
_GRID_PIXELS, _LONGEST = 32, 4  # of a grid that a size is counted in, and the greatest ratio of the sides


def grids_token(count: int) -> str:
    """The token that says how many grids a side has."""
    return f"<reserved{8800 + count:05d}>"


def lumina_pipeline(
    path: str | Path, image_tokenizer: str | Path, pixels: int = 768, first_code: int = _FIRST_CODE
) -> UnifiedPipeline:
    """A pipeline of a Lumina-mGPT 2.0 checkpoint that makes images of text; its image logits are equal.

    The rows of the codes are copied to image tables; the text tables keep all of theirs.

    Args:
        path: model folder or Hub name, ``Alpha-VLLM/Lumina-mGPT-2.0``.
        image_tokenizer: MoVQGAN's ``movqgan_270M.ckpt``, or a folder with it.
        pixels: side of a square image of the area that the model was trained on.
        first_code: id of code 0; the others follow.

    Raises:
        ValueError: if the layout is another one, a token or a tensor is missing, or a tensor not expected or of another shape.
    """
    images, (folder, config, state) = AutoImageTokenizer.from_pretrained(image_tokenizer), read_model(path)
    if config.get("model_type") != "chameleon":
        raise ValueError(f"checkpoint: {str(path)!r} is a {config.get('model_type')!r} model, not a Chameleon one.")
    tokenizer = load_text_tokenizer(folder, BOI, EOI)
    assert isinstance(tokenizer, TransformersTokenizer)
    ids, sizes = tokenizer.special_tokens, _sizes(pixels)
    # A text starts with its <bos>, or where the tokenizer has none with <eos>; what guidance steers away from starts with none.
    start = str(tokenizer.tokenizer.bos_token or tokenizer.tokenizer.eos_token)
    needed = [start, END_OF_TURN, ROW_END, *{grids_token(side): None for size in sizes for side in size}]
    missing = [name for name in needed if name not in ids]
    if missing:
        raise ValueError(
            f"checkpoint: the tokenizer of {str(path)!r} lacks {missing[0]!r}, as a Lumina-mGPT 2.0 has it."
        )
    parts, codes = renamed(state, {**LANGUAGE, "lm_head.": "backbone.lm_head."}), images.codebook_size
    cut_codes(parts, first_code, codes, str(path))
    scale = _GRID_PIXELS // images.downsample
    grids: list[Grid] = [(scale * high, scale * wide) for high, wide in sizes]
    before = {f"{h}x{w}": [ids[grids_token(side)] for side in size] for (h, w), size in zip(grids, sizes, strict=True)}
    fields: dict[str, Any] = {name: config[name] for name in FIELDS if name in config}
    model = build_model(
        {"model_type": ChameleonTextConfig.model_type, **fields}, tokenizer, parts, str(path),
        codebook_size=codes, image_grids=[list(grid) for grid in grids],
        image_frame={"before": before, "row_end": ids[ROW_END]}, image_tokenizer_fingerprint=images.fingerprint,
        prompt_template=start + TEMPLATE, code_pixels=images.downsample,
    )  # fmt: skip
    model.config.text_config.bos_token_id = None
    return UnifiedPipeline(model, images, tokenizer, _SAMPLING)


def _sizes(pixels: int) -> list[tuple[int, int]]:
    """Heights and widths in grids of the images that it was trained on, the square first: for every width the heights that
    fill the area, down to those that fill it with one column more.
    """
    side = pixels // _GRID_PIXELS
    if side < 1 or pixels % _GRID_PIXELS:
        raise ValueError(f"pixels: {pixels} is no multiple of {_GRID_PIXELS}; give 768 as published.")
    area, found = side**2, []
    for width in range(1, area + 1):
        for height in range(max(1, area // (width + 1)), area // width + 1):
            if max(width, height) <= _LONGEST * min(width, height):
                found.append((height, width))
    return sorted(found, key=lambda size: size != (side, side))
