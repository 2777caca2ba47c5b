"""Emu3 (arXiv 2409.18869) for transformers (-hf): one joint table, sizes of images in words, a token behind every row of codes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Emu3TextConfig

from unified.convert.parts import build_model, read_model, renamed
from unified.pipeline.pipeline import UnifiedPipeline
from unified.prediction.merge import Grid
from unified_tokenizers import AutoImageTokenizer, load_text_tokenizer
from unified_tokenizers.weights import shape_of

BOI, EOI, IMAGE, ROW_END, IMAGE_END = (
    "<|image start|>", "<|image end|>", "<|image token|>", "<|extra_200|>", "<|extra_201|>"
)  # fmt: skip
CODE = "<|visual token {:06d}|>"
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, low quality, "
    "normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
_SAMPLING = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 2048, "top_p": 1.0, "negative_prompt": NEGATIVE}
_AREA = 720 * 720  # pixels
_RATIOS = ((1, 1), (3, 4), (4, 3), (9, 16), (16, 9))  # height to width
_LANGUAGE = {
    "model.text_model.": "backbone.model.",
    "text_model.model.": "backbone.model.",
    "text_model.lm_head.": "backbone.lm_head.",
    "lm_head.": "backbone.lm_head.",
}


def emu3_pipeline(path: str | Path, grids: Sequence[Grid] | None = None) -> UnifiedPipeline:
    """A pipeline of an Emu3-Gen checkpoint; its image logits and its images are equal.

    The rows of the codes are copied to image tables; the text tables keep all of theirs.

    Args:
        path: model folder or Hub name, in the layout of transformers (``-hf``).
        grids: code grids of the images that are sampled; by default those of the published area in five ratios.

    Raises:
        ValueError: if the layout is another one, a token or a tensor is missing, or a tensor not expected or of another shape.
    """
    folder, config, state = read_model(path)
    if config.get("model_type") != "emu3":
        raise ValueError(f"checkpoint: {str(path)!r} is a {config.get('model_type')!r} model, not an Emu3 one.")
    tokenizer, images = load_text_tokenizer(folder, BOI, EOI), AutoImageTokenizer.from_pretrained(folder)
    ids = {**tokenizer.special_tokens, **(config.get("vocabulary_map") or {})}
    names = [CODE.format(code) for code in range(images.codebook_size)]
    missing = [name for name in (IMAGE, ROW_END, IMAGE_END, *names) if name not in ids]
    if missing:
        raise ValueError(
            f"checkpoint: the tokenizer of {str(path)!r} lacks {missing[0]!r} and {len(missing) - 1} others."
        )
    parts, codes = renamed(state, _LANGUAGE), torch.tensor([ids[name] for name in names])
    for name, table in (("embed", "backbone.model.embed_tokens.weight"), ("head", "backbone.lm_head.weight")):
        shape_of(parts, table, str(path))
        parts[f"image_{name}.weight"] = parts[table][codes]
    fields: dict[str, Any] = Emu3TextConfig(**config.get("text_config") or {}).to_dict()  # with its own defaults
    grids = [_grid(ratio, images.downsample) for ratio in _RATIOS] if grids is None else list(grids)
    before = {f"{h}x{w}": [*tokenizer.encode(f"{h}*{w}"), ids[IMAGE]] for h, w in grids}
    model = build_model(
        {**fields, "model_type": "llama", "attention_dropout": 0.0}, tokenizer, parts, str(path),
        codebook_size=len(codes), image_grids=[list(grid) for grid in grids],
        image_frame={"before": before, "row_end": ids[ROW_END], "after": [ids[IMAGE_END]]},
        image_tokenizer_fingerprint=images.fingerprint,
    )  # fmt: skip
    return UnifiedPipeline(model, images, tokenizer, _SAMPLING)


def _grid(ratio: tuple[int, int], stride: int) -> Grid:
    """The code grid of the published area with a ratio of height to width."""
    unit = (_AREA / (ratio[0] * ratio[1])) ** 0.5 / stride
    return round(ratio[0] * unit), round(ratio[1] * unit)
