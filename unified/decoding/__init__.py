"""Decoding: samplers, decoders and the cached loops. The names below are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'unified.decoding' has no attribute {name!r}")
    return getattr(import_module(f"unified.decoding.{_MODULE_OF[name]}"), name)
