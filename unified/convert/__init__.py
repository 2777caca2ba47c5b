"""Published models, converted into :class:`unified.UnifiedForCausalLM` or whole pipelines: one file for each family."""

from unified.convert.joint_table import split_joint_table
from unified.convert.llamagen import llamagen_from_weights
from unified.convert.simplear import simplear_pipeline

__all__ = ["llamagen_from_weights", "simplear_pipeline", "split_joint_table"]
