"""Published models, converted into :class:`unified.UnifiedForCausalLM`: one file for each family."""

from unified.convert.joint_table import split_joint_table
from unified.convert.llamagen import llamagen_from_weights

__all__ = ["llamagen_from_weights", "split_joint_table"]
