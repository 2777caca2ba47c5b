"""Whole models of others: converted into :class:`unified.UnifiedForCausalLM`, or run in their transformers classes."""

from unified.convert.emu3 import emu3_generation
from unified.convert.janus import janus_generation
from unified.convert.joint_table import split_joint_table
from unified.convert.llamagen import llamagen_from_weights
from unified.convert.output import GenerationOutput

__all__ = [
    "GenerationOutput",
    "emu3_generation",
    "janus_generation",
    "llamagen_from_weights",
    "split_joint_table",
]
