"""Decoding: samplers, decoders and the cached loops."""

from unified.decoding.conditioned import generate_conditioned
from unified.decoding.decode import generate_codes, iterate_codes
from unified.decoding.fused_llama import make_decoder
from unified.decoding.prefill import Prompt
from unified.decoding.sampling import Sampling

__all__ = ["Prompt", "Sampling", "generate_codes", "generate_conditioned", "iterate_codes", "make_decoder"]
