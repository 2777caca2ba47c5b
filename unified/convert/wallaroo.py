"""Wallaroo (arXiv 2603.04980): the language model of a Qwen2.5-VL with LlamaGen's codes behind small networks.

It reads an image's code as its codebook vector through a network, whose outputs are the rows of a table here; the network in front
of its scores stays, as :class:`unified.model.image_head.ImageProjection`. Text and generated codes have the same position on
Qwen2.5-VL's three axes, so its positions are plain. Its understanding and editing of images is left out.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig

from unified.convert.parts import build_model, renamed
from unified.hub import check_config, local_folder
from unified.pipeline.pipeline import UnifiedPipeline
from unified_tokenizers import AutoImageTokenizer, TransformersTokenizer, read_weights
from unified_tokenizers.weights import shape_of

BOI, EOI, LINE_END = "<|generate_start|>", "<|generate_end|>", "<|end_of_line>|"
# Height and width in pixels of the images that it was trained on.
SIZES = (
    (512, 512), (352, 704), (352, 672), (384, 672), (384, 640), (416, 608), (416, 576), (448, 576), (448, 544), (480, 544),
    (480, 512), (544, 480), (544, 448), (576, 448), (576, 416), (608, 416), (640, 384), (672, 384), (704, 352),
)  # fmt: skip
# Tokens that it adds to those of Qwen2.5-VL, in this order.
ADDED = (
    BOI, EOI, "<|pixel_start|>", "<|pixel_end|>", LINE_END, "<|generate_image_pad|>",
    *(f"<indicator:{side}>" for side in (352, 640, 384, 672, 704, 416, 608, 576, 448, 480, 544, 512)),
)  # fmt: skip
# As its evaluation writes it, with the size behind the user's turn; its training data have the size inside.
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    'Generate an image with resolution {width}x{height} based on the prompt: "{prompt}"<|im_end|>\n'
    " <indicator:{height}><indicator:{width}><|im_start|>assistant\n"
)
NULL = TEMPLATE.replace("{prompt}", "")
_SAMPLING = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 1000, "top_p": 1.0}
_LANGUAGE = {"wallaroo.model.": "backbone.model.", "wallaroo.lm_head.": "backbone.lm_head."}
_IMAGE = {
    "gen_input_adpater.0.": "first.", "gen_input_adpater.2.": "second.",
    "gen_image_head.0.": "projection.", "gen_image_head.2.": "head.",
}  # fmt: skip
_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps",
)  # fmt: skip


def wallaroo_pipeline(path: str | Path, image_tokenizer: str | Path, backbone: str | Path) -> UnifiedPipeline:
    """A pipeline of a Wallaroo checkpoint; its image logits are equal.

    Args:
        path: its weights file, such as ``checkpoint.ckpt``, or a folder with it.
        image_tokenizer: LlamaGen's ``vq_ds16_t2i.pt``, or a folder with it.
        backbone: folder or Hub name of the model that it was trained from, ``Qwen/Qwen2.5-VL-7B-Instruct``: its settings and its
            text tokenizer are read, not its weights.

    Raises:
        ValueError: if the layout is another one, the backbone is no Qwen2.5-VL, or a tensor is missing, not expected or of another
            shape.
    """
    images, state = AutoImageTokenizer.from_pretrained(image_tokenizer), read_weights(path)
    folder = local_folder(backbone, "backbone", ("*.json", "*.txt", "*.jinja"))
    check_config(folder, "backbone")
    config = PreTrainedConfig.get_config_dict(folder)[0]
    if config.get("model_type") != "qwen2_5_vl":
        raise ValueError(f"backbone: {str(backbone)!r} is a {config.get('model_type')!r} model, not a Qwen2.5-VL one.")
    known: dict[str, Any] = {**config, **(config.get("text_config") or {})}
    theta = known.get("rope_theta") or (known.get("rope_parameters") or {}).get("rope_theta", 1000000.0)
    words = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    words.add_tokens(list(ADDED), special_tokens=True)
    tokenizer, source = TransformersTokenizer(words, BOI, EOI), str(path)
    parts = renamed(state, _LANGUAGE)
    rows = shape_of(parts, "backbone.model.embed_tokens.weight", source)[0]
    vectors = images.codebook_vectors()
    assert vectors is not None
    stride, ids = images.downsample, tokenizer.special_tokens
    grids = [[height // stride, width // stride] for height, width in SIZES]
    tensors = _image_tensors(state, vectors, source)
    model = build_model(
        {**{name: known[name] for name in _FIELDS if name in known}, "model_type": "qwen2", "vocab_size": rows,
         "rope_parameters": {"rope_type": "default", "rope_theta": theta}},
        tokenizer, parts | tensors, source,
        codebook_size=len(vectors), image_projection=len(tensors["image_projection.linear.weight"]), image_grids=grids,
        image_frame={"between_rows": ids[LINE_END]}, image_tokenizer_fingerprint=images.fingerprint,
        prompt_template=TEMPLATE, null_prompt=NULL, code_pixels=stride,
    )  # fmt: skip
    return UnifiedPipeline(model, images, tokenizer, _SAMPLING)


def _image_tensors(state: dict[str, Tensor], vectors: Tensor, source: str) -> dict[str, Tensor]:
    """The image tables and the projection, by the names of a unified model."""
    parts = renamed(state, _IMAGE)
    for name in (
        *(f"{part}.{kind}" for part in ("first", "second", "projection") for kind in ("weight", "bias")),
        "head.weight",
    ):
        shape_of(parts, name, source)
    dtype, codes, width = parts["head.weight"].dtype, len(parts["head.weight"]), parts["first.weight"].shape[1]
    if tuple(vectors.shape) != (codes, width):
        raise ValueError(
            f"image_tokenizer: {len(vectors)} codes of {vectors.shape[1]} numbers, the model reads {codes} of {width}; it was "
            "trained with another."
        )
    rows = F.linear(vectors.float(), parts["first.weight"].float(), parts["first.bias"].float())
    table = F.linear(F.gelu(rows), parts["second.weight"].float(), parts["second.bias"].float())
    return {
        "image_embed.weight": table.to(dtype),
        "image_projection.linear.weight": parts["projection.weight"],
        "image_projection.linear.bias": parts["projection.bias"],
        "image_head.weight": torch.cat([parts["head.weight"], parts["head.weight"].new_zeros(codes, 1)], dim=1),
    }
