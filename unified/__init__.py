"""One language model that reads and writes text and images, trained with next-patch prediction."""

from unified.config import UnifiedConfig, Vocabulary
from unified.model.modeling import UnifiedForCausalLM, UnifiedOutput
from unified.pipeline.pipeline import UnifiedPipeline, UnifiedPipelineOutput
from unified.prediction.npp import group_embeddings, group_targets, patch_cross_entropy
from unified.prediction.schedule import PatchSchedule

__version__ = "0.1.0"

__all__ = [
    "PatchSchedule",
    "UnifiedConfig",
    "UnifiedForCausalLM",
    "UnifiedOutput",
    "UnifiedPipeline",
    "UnifiedPipelineOutput",
    "Vocabulary",
    "group_embeddings",
    "group_targets",
    "patch_cross_entropy",
]
