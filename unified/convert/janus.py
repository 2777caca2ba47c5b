"""Janus-Pro (arXiv 2501.17811): image tables behind small networks, beside a Llama. Its understanding of images is left out.

The network behind the image embedding has a row for each code and nothing else as its input, so its outputs are the table.
That in front of the image head stays, as :class:`unified.model.image_head.ImageProjection`.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unified.convert.parts import build_model, read_model, renamed
from unified.pipeline.pipeline import UnifiedPipeline
from unified_tokenizers import AutoImageTokenizer, load_text_tokenizer
from unified_tokenizers.weights import shape_of

BOI, EOI, PAD = "<begin_of_image>", "<end_of_image>", "<｜▁pad▁｜>"
TEMPLATE = "<|User|>: {prompt}\n\n<|Assistant|>:"
_SAMPLING = {"guidance_scale": 5.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
_SIDE = 24  # codes a side, of all that were published
# Names of DeepSeek's layout and of that of transformers (-hf), and the names here.
_LANGUAGE = {
    "language_model.model.": "backbone.model.",
    "language_model.lm_head.": "backbone.lm_head.",
    "model.language_model.": "backbone.model.",
    "lm_head.": "backbone.lm_head.",
}
_IMAGE = {
    "gen_embed.": "embed.", "gen_aligner.layers.0.": "first.", "gen_aligner.layers.2.": "second.",
    "gen_head.output_mlp_projector.": "projection.", "gen_head.vision_head.": "head.",
    "model.generation_embeddings.": "embed.", "model.generation_aligner.fc1.": "first.",
    "model.generation_aligner.hidden_layers.0.": "second.",
    "model.generation_head.proj_out.": "projection.", "model.generation_head.vision_head.": "head.",
}  # fmt: skip


def janus_pipeline(path: str | Path) -> UnifiedPipeline:
    """A pipeline of a Janus-Pro checkpoint; its image logits and its images are equal.

    Args:
        path: model folder or Hub name, in DeepSeek's layout or in that of transformers (``-hf``).

    Raises:
        ValueError: if the layout is another one, or a tensor is missing, not expected or of another shape.
    """
    folder, config, state = read_model(path)
    kind = config.get("model_type")
    if kind not in ("janus", "multi_modality"):
        raise ValueError(f"checkpoint: {str(path)!r} is a {kind!r} model, not a Janus-Pro one.")
    tokenizer = load_text_tokenizer(folder, BOI, EOI)
    if PAD not in tokenizer.special_tokens:
        raise ValueError(f"checkpoint: the tokenizer of {str(path)!r} has no {PAD!r}, which stands for no caption.")
    image_tokenizer = AutoImageTokenizer.from_pretrained(folder)
    tensors, side = _image_tensors(state, str(path)), _SIDE
    if kind == "janus":
        vision: dict[str, Any] = config.get("vision_config") or {}
        side = vision.get("image_size", 384) // vision.get("patch_size", 16)
    model = build_model(
        {"model_type": "llama", **(config.get("text_config") or config.get("language_config") or {})},
        tokenizer, renamed(state, _LANGUAGE) | tensors, str(path),
        codebook_size=len(tensors["image_embed.weight"]),
        image_projection=len(tensors["image_projection.linear.weight"]),
        image_grids=[[side, side]],
        image_tokenizer_fingerprint=image_tokenizer.fingerprint,
        prompt_template=TEMPLATE, null_prompt=PAD, null_prompt_repeats=True,
    )  # fmt: skip
    return UnifiedPipeline(model, image_tokenizer, tokenizer, _SAMPLING)


def _image_tensors(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The image tables and the projection, by the names of a unified model."""
    parts = renamed(state, _IMAGE)
    for name in ("embed.weight", *(f"{part}.{kind}" for part in ("first", "second", "projection", "head")
                                   for kind in ("weight", "bias"))):  # fmt: skip
        shape_of(parts, name, source)
    dtype = parts["head.weight"].dtype
    rows = F.linear(parts["embed.weight"].float(), parts["first.weight"].float(), parts["first.bias"].float())
    table = F.linear(F.gelu(rows), parts["second.weight"].float(), parts["second.bias"].float())
    return {
        "image_embed.weight": table.to(dtype),
        "image_projection.linear.weight": parts["projection.weight"],
        "image_projection.linear.bias": parts["projection.bias"],
        "image_head.weight": torch.cat([parts["head.weight"], parts["head.bias"][:, None]], dim=1),
    }
