"""One language model that reads and writes text and pictures, trained with next-patch prediction."""

from unified.config import TokenLayout, UnifiedConfig
from unified.model.modeling import UnifiedForCausalLM, UnifiedOutput
from unified.pipeline.pipeline import UnifiedPipeline, UnifiedPipelineOutput
from unified.prediction.npp import PatchSchedule, group_embeddings, group_targets, patch_cross_entropy

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
