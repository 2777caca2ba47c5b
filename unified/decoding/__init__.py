"""Decoding: samplers, decoders and the cached loops. The names below are imported on first use."""

from typing import TYPE_CHECKING

from unified.lazy import on_first_use

if TYPE_CHECKING:
    from unified.decoding.config import DECODING_MODES, Sampling
    from unified.decoding.decode import generate_codes, generate_conditioned, iterate_codes
    from unified.decoding.fused_llama import make_decoder
    from unified.decoding.prefill import Prompt

_MODULE_OF = {
    "DECODING_MODES": "config",
    "Prompt": "prefill",
    "Sampling": "config",
    "generate_codes": "decode",
    "generate_conditioned": "decode",
    "iterate_codes": "decode",
    "make_decoder": "fused_llama",
}

__all__ = [
    "DECODING_MODES",
    "Prompt",
    "Sampling",
    "generate_codes",
    "generate_conditioned",
    "iterate_codes",
    "make_decoder",
]

__getattr__ = on_first_use(__name__, _MODULE_OF)
