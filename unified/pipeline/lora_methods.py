"""The pipeline's methods for LoRA adapters."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from peft import PeftModel

from unified.decoding.decoder import Decoder
from unified.hub import local_folder
from unified.lora.adapters import load_lora, unload_lora
from unified.lora.switching import adapter_state, delete_adapters, fuse_lora, set_adapters, switch, unfuse_lora
from unified.model.modeling import UnifiedForCausalLM
from unified.model_card import read_card


class LoraMethods:
    """Load, switch, weigh, fuse and unload adapters of a pipeline's model; the names are those of diffusers."""

    model: UnifiedForCausalLM | PeftModel
    _kept: Decoder | None  # holds weights, so it goes when they change
    _adapter_cards: dict[str, str | None]

    def load_lora_weights(self, pretrained_model_name_or_path: str | Path, adapter_name: str | None = None) -> None:
        """Add a LoRA adapter and make it the active one.

        Args:
            pretrained_model_name_or_path: a local folder, or a repository on the Hub.
            adapter_name: its name; without one ``default``, then ``default_1`` and so on.

        Raises:
            ValueError: if it belongs to another model, or the name is taken.
        """
        taken = self.model.peft_config if isinstance(self.model, PeftModel) else {}
        numbered = ("default" if i == 0 else f"default_{i}" for i in count())
        name = next(free for free in numbered if free not in taken) if adapter_name is None else adapter_name
        folder = local_folder(pretrained_model_name_or_path)
        self.model = load_lora(self.model, folder, name).eval()
        self._adapter_cards[name] = read_card(folder)
        self._kept = None

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[float | None] | None = None,
    ) -> None:
        """Activate one adapter or several together, with weights; None stands for 1, as trained.

        Raises:
            ValueError: for unknown names, or weights that are no finite numbers.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        several = isinstance(adapter_weights, Sequence) and not isinstance(adapter_weights, str)
        weights: list[Any] = list(adapter_weights) if several else [adapter_weights] * len(names)  # type: ignore[arg-type]
        given = [1.0 if weight is None else weight for weight in weights]
        set_adapters(self._adapted("adapter_names"), names, given)
        self._kept = None

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters; empty if none is loaded."""
        return list(adapter_state(self.model).weights) if isinstance(self.model, PeftModel) else []

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters; the others stay as they are. Raises ValueError for unknown names."""
        model = self._adapted("adapter_names")
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        if names == set(model.peft_config):
            self.unload_lora_weights()
        else:
            delete_adapters(model, sorted(names))
            self._kept = None

    def unload_lora_weights(self) -> None:
        """Drop all adapters, fused or not; the base model is as it was before, bit for bit."""
        if isinstance(self.model, PeftModel):
            self.model = unload_lora(self.model)
            self._kept = None

    def disable_lora(self) -> None:
        """Draw with the base model until :meth:`enable_lora`, :meth:`set_adapters` or the next load."""
        switch(self._adapted("lora"), False)
        self._kept = None

    def enable_lora(self) -> None:
        """Let the active adapters count again."""
        switch(self._adapted("lora"), True)
        self._kept = None

    def fuse_lora(self, *, lora_scale: float = 1.0) -> None:
        """Add the active adapters to the weights, their weights times ``lora_scale``; not needed for speed.

        ``save_pretrained`` then writes a plain model. Raises ValueError if adapters are disabled or fused already.
        """
        fuse_lora(self._adapted("fuse_lora"), lora_scale)
        self._kept = None

    def unfuse_lora(self) -> None:
        """Take the fused adapters out of the weights again, bit for bit. Raises ValueError if nothing is fused."""
        unfuse_lora(self._adapted("unfuse_lora"))
        self._kept = None

    def _adapted(self, what: str) -> PeftModel:
        if not isinstance(self.model, PeftModel):
            raise ValueError(f"{what}: no adapter is loaded; call load_lora_weights first.")
        return self.model
