"""Classifier-free guidance for exported unified models in vLLM. Imports nothing of `unified`, whose versions vLLM excludes."""

ARCHITECTURE = "UnifiedGuidedForCausalLM"


def register() -> None:
    """Make the guided model known to vLLM; the entry point that it calls in each of its processes."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "unified_vllm.model:UnifiedGuidedForCausalLM")
