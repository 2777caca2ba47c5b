"""Published models, converted into :class:`unified.UnifiedForCausalLM` or whole pipelines: one file for each family."""

from unified.convert.chameleon import chameleon_pipeline
from unified.convert.emu3 import emu3_pipeline
from unified.convert.emu35 import emu35_pipeline
from unified.convert.janus import janus_pipeline
from unified.convert.joint_table import split_joint_table
from unified.convert.liquid import liquid_pipeline
from unified.convert.llamagen import llamagen_from_weights
from unified.convert.lumina import lumina_pipeline
from unified.convert.simplear import simplear_pipeline
from unified.convert.wallaroo import wallaroo_pipeline

__all__ = [
    "chameleon_pipeline",
    "emu3_pipeline",
    "emu35_pipeline",
    "janus_pipeline",
    "liquid_pipeline",
    "llamagen_from_weights",
    "lumina_pipeline",
    "simplear_pipeline",
    "split_joint_table",
    "wallaroo_pipeline",
]
