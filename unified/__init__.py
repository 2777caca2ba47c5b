"""One language model that reads and writes text and pictures, trained with next-patch prediction."""

from unified.config import TokenLayout, UnifiedConfig
from unified.model import UnifiedForCausalLM, UnifiedOutput
from unified.npp import PatchSchedule, group_embeddings, group_targets, patch_cross_entropy
from unified.pipeline import UnifiedPipeline, UnifiedPipelineOutput

__version__ = "0.1.0"

__all__ = [
    "PatchSchedule",
    "TokenLayout",
    "UnifiedConfig",
    "UnifiedForCausalLM",
    "UnifiedOutput",
    "UnifiedPipeline",
    "UnifiedPipelineOutput",
    "group_embeddings",
    "group_targets",
    "patch_cross_entropy",
]
