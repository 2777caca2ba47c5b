"""LoRA adapters of a pipeline, under the names that diffusers gives to the methods."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from peft import PeftModel

from unified.decoding.steering import gives_rewards
from unified.hub import local_folder
from unified.lora.adapters import load_lora, unload_lora
from unified.lora.saving import save_adapter
from unified.lora.switching import (
    active_adapters,
    adapter_state,
    apply_weights,
    delete_adapters,
    fuse_lora,
    is_disabled,
    set_adapters,
    switch,
    unfuse_lora,
)
from unified.model_card import read_card
from unified.pipeline.base import BasePipeline, one_at_a_time
from unified.pipeline.folder import adapter_sampling


class AdapterMixin(BasePipeline):
    """The methods of a pipeline that load, save, combine and switch adapters."""

    @one_at_a_time
    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        **hub: Any,
    ) -> None:
        """Add a LoRA adapter and make it the active one; plain folders of peft are taken, see
        :func:`unified.lora.adapters.load_lora`. While it is active, its defaults of sampling come before the pipeline's.

        One that was trained to steer (``objectives: [{name: genarm}]``) is loaded only, for ``steer`` of a call.

        Args:
            pretrained_model_name_or_path: a local folder, or a repository on the Hub.
            adapter_name: its name; without one ``default``, then ``default_1`` and so on.
            weight_name: name of its safetensors file; default ``adapter_model.safetensors``.
            hub: as in :meth:`from_pretrained`.

        Raises:
            ValueError: if it belongs to another model, or the name is taken.
        """
        taken = self.model.peft_config if isinstance(self.model, PeftModel) else {}
        numbered = ("default" if i == 0 else f"default_{i}" for i in count())
        name = next(free for free in numbered if free not in taken) if adapter_name is None else adapter_name
        folder = local_folder(pretrained_model_name_or_path, "lora", **hub)
        sampling = adapter_sampling(folder)
        disabled = isinstance(self.model, PeftModel) and is_disabled(self.model)
        active = dict(adapter_state(self.model).weights) if isinstance(self.model, PeftModel) else {}
        self.model = load_lora(self.model, folder, name, weight_name=weight_name).eval()
        if gives_rewards(self.model, name):
            apply_weights(self.model, active)
            if disabled:
                switch(self.model, False)
        self._adapter_cards[name], self._adapter_sampling[name] = read_card(folder), sampling

    @one_at_a_time
    def save_lora_weights(self, save_directory: str | Path, adapter_name: str | None = None) -> None:
        """Write one adapter, as it was trained, to a folder that :meth:`load_lora_weights` takes.

        Args:
            save_directory: folder to write.
            adapter_name: which one; it may be left out if only one is loaded.

        Raises:
            ValueError: if there is no such adapter, or several and none is named.
        """
        names = list(self._adapted("adapter_name").peft_config)
        name = names[0] if adapter_name is None and len(names) == 1 else adapter_name
        if name not in names:
            raise ValueError(f"adapter_name: {name!r} is none of those that are loaded; name one of {names}.")
        card, sampling = self._adapter_cards.get(name), self._adapter_sampling.get(name)
        save_adapter(self._adapted("adapter_name"), save_directory, name, card, sampling)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all loaded adapters, active or not, by the part that they belong to: ``{"model": [...]}``."""
        return {"model": list(self.model.peft_config)} if isinstance(self.model, PeftModel) else {}

    @one_at_a_time
    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[float | None] | None = None,
    ) -> None:
        """Activate one adapter or several together, with weights; None stands for 1, as trained.

        Raises:
            ValueError: for unknown names, or weights that are no finite numbers.
        """
        names = as_names(adapter_names)
        several = isinstance(adapter_weights, Sequence) and not isinstance(adapter_weights, str)
        weights: list[Any] = list(adapter_weights) if several else [adapter_weights] * len(names)  # type: ignore[arg-type]
        set_adapters(self._adapted("adapter_names"), names, [1.0 if weight is None else weight for weight in weights])

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters; empty if none is loaded."""
        return active_adapters(self.model)

    @one_at_a_time
    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters; the others stay as they are. Raises ValueError for unknown names."""
        model = self._adapted("adapter_names")
        names = set(as_names(adapter_names))
        if names == set(model.peft_config):
            self.unload_lora_weights()
        else:
            delete_adapters(model, sorted(names))

    @one_at_a_time
    def unload_lora_weights(self) -> None:
        """Drop all adapters, fused or not; the base model is as it was before, bit for bit."""
        if isinstance(self.model, PeftModel):
            self.model = unload_lora(self.model)

    @one_at_a_time
    def disable_lora(self) -> None:
        """Use the base model alone until :meth:`enable_lora`, :meth:`set_adapters` or the next load."""
        switch(self._adapted("lora"), False)

    @one_at_a_time
    def enable_lora(self) -> None:
        """Use the active adapters again."""
        switch(self._adapted("lora"), True)

    @one_at_a_time
    def fuse_lora(self, *, lora_scale: float = 1.0) -> None:
        """Add the active adapters to the weights, their weights times ``lora_scale``; not needed for speed.

        ``save_pretrained`` then writes a plain model. Raises ValueError if adapters are disabled or fused already.
        """
        fuse_lora(self._adapted("fuse_lora"), lora_scale)

    @one_at_a_time
    def unfuse_lora(self) -> None:
        """Take the fused adapters out of the weights again, bit for bit. Raises ValueError if nothing is fused."""
        unfuse_lora(self._adapted("unfuse_lora"))

    def _adapted(self, what: str) -> PeftModel:
        if not isinstance(self.model, PeftModel):
            raise ValueError(f"{what}: no adapter is loaded; call load_lora_weights first.")
        return self.model


def as_names(adapter_names: Any) -> list[str]:
    """One name or several as a list. Raises ValueError for anything else."""
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapter_names: {adapter_names!r} is not a name or a list of names.")
    return list(names)
