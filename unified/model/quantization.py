"""A frozen base in 4 or 8 bits, by the ``quantization_config`` of transformers; needs bitsandbytes."""

import importlib.util
from typing import Any

import torch

BITS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8bit": {"load_in_8bit": True},
}
# The image tables stay: they are small, and copies of them are trained. So does the text head, which is often tied.
_KEPT = (
    "image_embed", "image_head", "image_projection", "image_query", "image_merge", "image_split", "image_chain", "image_join",
    "vision_projector", "condition", "lm_head",
)  # fmt: skip


def quantization(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The ``quantization_config`` for a unified model, whose layers are to be frozen.

    Args:
        kind: ``4bit`` (NF4, arXiv 2305.14314) or ``8bit``.
        dtype: what 4-bit weights are computed in.

    Raises:
        ValueError: for another kind, or without bitsandbytes.
    """
    if kind not in BITS:
        raise ValueError(f"quantization: {kind!r} is unknown; use one of {', '.join(BITS)}.")
    check_quantization("quantization")
    from transformers import BitsAndBytesConfig

    compute = {"bnb_4bit_compute_dtype": dtype} if kind == "4bit" else {}
    return BitsAndBytesConfig(**BITS[kind], **compute, llm_int8_skip_modules=list(_KEPT))


def check_quantization(field: str) -> None:
    """Raises ValueError, which names the ``field``, if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{field}: bitsandbytes is not installed; pip install bitsandbytes, or leave it out.")
