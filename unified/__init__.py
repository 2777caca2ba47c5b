"""One language model that reads and writes text and images, trained with next-patch prediction.

The names below are imported on first use, so that ``import unified`` and ``unified --help`` load no torch.
"""

from typing import TYPE_CHECKING

from unified.lazy import on_first_use

if TYPE_CHECKING:
    from unified.config import UnifiedConfig, Vocabulary
    from unified.decoding.config import Sampling
    from unified.lora.adapters import attach_lora
    from unified.model.modeling import UnifiedForCausalLM
    from unified.model.output import UnifiedOutput
    from unified.pipeline.metadata import read_image_metadata
    from unified.pipeline.options import GenerationOptions
    from unified.pipeline.pipeline import UnifiedPipeline, UnifiedPipelineOutput
    from unified.prediction.npp import group_embeddings, group_targets, patch_cross_entropy
    from unified.prediction.schedule import PatchSchedule
    from unified.registry import register
    from unified.sequence import ImageSegment, TextSegment

__version__ = "0.1.0"

_MODULE_OF = {
    "GenerationOptions": "pipeline.options",
    "ImageSegment": "sequence",
    "PatchSchedule": "prediction.schedule",
    "Sampling": "decoding.config",
    "TextSegment": "sequence",
    "UnifiedConfig": "config",
    "UnifiedForCausalLM": "model.modeling",
    "UnifiedOutput": "model.output",
    "UnifiedPipeline": "pipeline.pipeline",
    "UnifiedPipelineOutput": "pipeline.pipeline",
    "Vocabulary": "config",
    "attach_lora": "lora.adapters",
    "group_embeddings": "prediction.npp",
    "group_targets": "prediction.npp",
    "patch_cross_entropy": "prediction.npp",
    "read_image_metadata": "pipeline.metadata",
    "register": "registry",
}

__all__ = [
    "GenerationOptions",
    "ImageSegment",
    "PatchSchedule",
    "Sampling",
    "TextSegment",
    "UnifiedConfig",
    "UnifiedForCausalLM",
    "UnifiedOutput",
    "UnifiedPipeline",
    "UnifiedPipelineOutput",
    "Vocabulary",
    "attach_lora",
    "group_embeddings",
    "group_targets",
    "patch_cross_entropy",
    "read_image_metadata",
    "register",
]

__getattr__ = on_first_use(__name__, _MODULE_OF)
