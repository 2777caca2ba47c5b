"""The pipeline's methods for LoRA adapters."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from peft import LoraModel, PeftModel

from unified.decoding.backbone import Decoder
from unified.lora import load_lora, merge_lora, set_adapters, unload_lora
from unified.model import UnifiedForCausalLM


class LoraMethods:
    """Load, switch, weigh, fuse and unload adapters of a pipeline's model."""

    model: UnifiedForCausalLM | PeftModel
    _kept: Decoder | None  # holds weights, so it goes when they change

    def load_lora_weights(self, pretrained_model_name_or_path: str | Path, adapter_name: str = "default") -> None:
        """Add a LoRA adapter and make it the active one. Raises ValueError if it belongs to another model."""
        self.model = load_lora(self.model, pretrained_model_name_or_path, adapter_name).eval()
        self._kept = None

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Activate one adapter or several together, with weights. Raises ValueError for unknown names."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = [adapter_weights] * len(names) if isinstance(adapter_weights, int | float) else list(adapter_weights)
        if not isinstance(self.model, PeftModel):
            raise ValueError("adapter_names: no adapter is loaded; call load_lora_weights first.")
        set_adapters(self.model, names, weights)
        self._kept = None

    def unload_lora_weights(self) -> None:
        """Drop all adapters; the base model is as it was before."""
        if isinstance(self.model, PeftModel):
            self.model = unload_lora(self.model)
            self._kept = None

    def disable_lora(self) -> None:
        """Draw with the base model until :meth:`enable_lora`; the adapters stay loaded."""
        self._switch(False)

    def enable_lora(self) -> None:
        """Let the active adapters count again."""
        self._switch(True)

    def _switch(self, enabled: bool) -> None:
        if not isinstance(self.model, PeftModel):
            raise ValueError("lora: no adapter is loaded; call load_lora_weights first.")
        tuner = cast(LoraModel, self.model.base_model)
        (tuner.enable_adapter_layers if enabled else tuner.disable_adapter_layers)()
        self._kept = None

    def fuse_lora(self) -> None:
        """Add the active adapters to the weights for good, so that the pipeline can be saved; not needed for speed."""
        if not isinstance(self.model, PeftModel):
            raise ValueError("fuse_lora: no adapter is loaded; call load_lora_weights first.")
        self.model = merge_lora(self.model)
        self._kept = None
