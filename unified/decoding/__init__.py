"""Decoding: samplers and the cached loop."""

from unified.decoding.conditioned import generate_conditioned
from unified.decoding.engine import generate_codes
from unified.decoding.sampler import Sampling

__all__ = ["Sampling", "generate_codes", "generate_conditioned"]
