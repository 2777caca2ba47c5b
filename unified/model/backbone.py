"""Pretrained decoder language models of transformers: load one, whole and without running its code, and check its family."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.peft_utils import find_adapter_config_file


def load_language_model(path: str | Path, dtype: torch.dtype, attn_implementation: str | None = None) -> Any:
    """Load a checkpoint as ``AutoModelForCausalLM``; of a composite one (Gemma 3, LLaVA), the language part alone.

    A warning names the parts of a composite checkpoint that are left out.

    Raises:
        ValueError: if the tensors of the checkpoint are not those of the model, the folder holds an adapter, or transformers
            has no causal language model for the language part of a composite checkpoint.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    text = config.get_text_config()
    if text is config:
        return load_whole(AutoModelForCausalLM.from_pretrained, path, **options)[0]
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"backbone: {str(path)!r} is a {config.model_type!r} model, and transformers has no causal language model of the "
            f"type of its language part ({text.model_type!r}); choose a checkpoint of a language model alone."
        )
    whole, _ = load_whole(AutoModelForImageTextToText.from_pretrained, path, **options)
    text, decoder, head = whole.config.get_text_config(), whole.get_decoder(), whole.get_output_embeddings()
    kept = {id(weight) for part in (decoder, head) for weight in part.parameters()}
    others = {".".join(name.split(".")[:2]) for name, weight in whole.named_parameters() if id(weight) not in kept}
    warnings.warn(
        f"backbone: {str(path)!r} is a {config.model_type!r} model; only its language part is used, without {sorted(others)}.",
        stacklevel=2,
    )
    text.tie_word_embeddings = head.weight is whole.get_input_embeddings().weight
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text, trust_remote_code=False)
    setattr(model, model.base_model_prefix, decoder)
    model.set_output_embeddings(head)
    model.generation_config = whole.generation_config
    return model


def load_whole(
    load: Callable[..., Any], path: str | Path | None, *args: Any, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Call ``load``, a ``from_pretrained`` of transformers, which alone would fill absent tensors with random numbers.

    Returns:
        The model, and the loading information of transformers.

    Raises:
        ValueError: naming the tensors that only the checkpoint or only the model has, and those of different shapes; or if
            the file is cut short, or an adapter lies beside it. Tied weights and derived buffers need not be stored.
    """
    adapter = (options.get("adapter_kwargs") or {}).get("_adapter_model_path")  # what an Auto class has found
    if adapter or (path is not None and find_adapter_config_file(os.fspath(path)) is not None):
        raise ValueError(
            f"model: {str(path)!r} holds an adapter (adapter_config.json), which would change the model without a word; move it "
            "to a folder of its own and load it with load_lora."
        )
    options |= {"trust_remote_code": False, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = load(path, *args, **options)
    except SafetensorError as error:
        raise ValueError(f"weights: a file of {str(path)!r} is cut short or no safetensors file ({error}).") from error
    problem = f"weights: the tensors of {str(path)!r} are not those of {type(model).__name__}; get or save them again"
    check_names(problem, info["unexpected_keys"], info["missing_keys"], info["mismatched_keys"])
    return model, info


def check_names(problem: str, only_stored: set[str], only_model: set[str], shapes: set[tuple[str, Any, Any]]) -> None:
    """Raises ValueError unless all three are empty.

    Args:
        problem: start of the error: what was read, and what to do.
        only_stored: names of tensors that were read and have no place in the model.
        only_model: names of tensors of the model that were not read.
        shapes: name, stored shape and the model's shape of tensors that differ.
    """
    differences = {
        "only in the checkpoint": sorted(only_stored),
        "only in the model": sorted(only_model),
        "of another shape": [f"{name} {tuple(stored)} instead of {tuple(own)}" for name, stored, own in sorted(shapes)],
    }
    found = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in differences.items() if names)
    if found:
        raise ValueError(f"{problem} ({found}).")


def _shortened(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def decoder_layers(backbone: Any) -> nn.ModuleList:
    """The layers of a language model. Raises ValueError if its decoder keeps them elsewhere than in one list."""
    decoder = backbone.base_model
    for part in decoder.children():
        if isinstance(part, nn.ModuleList) and len(part) == decoder.config.num_hidden_layers:
            return part
    raise ValueError(f"backbone: {type(decoder).__name__} has no list of layers; choose another family.")


class _KeysAndValues(Cache):
    """All that the decoding of this library carries from one position to the next."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == len(self.kept):
            self.kept.append((key_states, value_states))
        else:
            key, value = self.kept[layer_idx]
            self.kept[layer_idx] = torch.cat([key, key_states], dim=2), torch.cat([value, value_states], dim=2)
        return self.kept[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kept[layer_idx][0].shape[2] if self.kept else 0


def check_family(backbone: Any, text_logits: Callable[[Tensor], Tensor], positions: str) -> None:
    """Run four tokens through a backbone and check what the unified model relies on.

    Args:
        backbone: the language model, its rotary embedding inside a :class:`unified.model.rotary.GridRotary`.
        text_logits: what the unified model makes of hidden states.
        positions: as in :class:`unified.UnifiedConfig`.

    Raises:
        ValueError: if the text logits differ, decoding with a cache of keys and values alone is not a full pass (state-space
            and convolution layers carry more along), or :class:`GridRotary` cannot take the rotary embedding apart.
    """
    decoder, family, angles = backbone.base_model, type(backbone).__name__, []
    with _evaluation(backbone) as ids:
        hook = decoder.rotary_emb.rotary.register_forward_hook(lambda module, given, found: angles.append(found))
        try:
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            logits = backbone(input_ids=ids, use_cache=False).logits
        except Exception as error:  # whatever a decoder says that asks more of its rotary embedding
            reason = f"does not run in a unified model ({error!r})"
            raise ValueError(f"backbone: {family} {reason}; choose another family.") from error
        finally:
            hook.remove()
        if not torch.equal(text_logits(hidden), logits):
            raise ValueError(
                f"backbone: {family} computes its text logits in a custom way; choose another family, such as Llama, Qwen, "
                "Mistral, Gemma or Granite."
            )
        pairs = all(isinstance(found, tuple) and len(found) == 2 for found in angles)
        if not pairs or (positions != "1d" and not all(torch.equal(*cos.chunk(2, dim=-1)) for cos, _ in angles)):
            raise ValueError(
                f"positions: {positions!r} needs a rotary embedding in two halves, and that of {family} is "
                f"{'interleaved; use positions=1d or another family' if pairs else 'complex; choose another family'}."
            )
        try:
            distance: Any = _distance(_token_by_token(decoder, ids), hidden)
        except Exception as error:  # whatever a layer says that looks for another kind of state
            distance = error
        if isinstance(distance, Exception) or distance > _tolerance(hidden):
            raise ValueError(
                f"backbone: {family} cannot decode with a cache of keys and values alone ({distance!r}), because its layers "
                "carry another state along; choose a family with attention in every layer."
            )


def check_packing(backbone: Any) -> None:
    """Raises ValueError if a document sees the document before it when both are packed into one row."""
    decoder = backbone.base_model
    with _evaluation(backbone) as ids:
        rows, index = torch.cat([ids.flip(1), ids], dim=1), torch.arange(ids.shape[1], device=ids.device)
        packed = decoder(input_ids=rows, position_ids=index.repeat(2)[None], use_cache=False).last_hidden_state
        alone = decoder(input_ids=ids, use_cache=False).last_hidden_state
        if _distance(packed[:, ids.shape[1] :], alone) > _tolerance(alone):
            raise ValueError(
                f"data.pack: {type(backbone).__name__} does not keep packed documents apart; leave data.pack out, or choose "
                "another family."
            )


@contextmanager
def _evaluation(backbone: Any) -> Iterator[Tensor]:
    """No gradients and no dropout; gives ids ``(1, 4)`` to run."""
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            yield torch.arange(4, device=backbone.device)[None] % backbone.config.vocab_size
    finally:
        backbone.train(training)


def _token_by_token(decoder: Any, ids: Tensor) -> Tensor:
    """Hidden states ``(B, T, D)``, one token after another; each is placed by explicit coordinates, as in decoding."""
    cache, states = _KeysAndValues(), []
    try:
        for step in range(ids.shape[1]):
            position = torch.full((1, 1), step, device=ids.device)
            decoder.rotary_emb.coordinates = position[..., None].expand(-1, -1, 2).float()
            output = decoder(input_ids=ids[:, step : step + 1], position_ids=position, cache=cache, use_cache=True)
            states.append(output.last_hidden_state)
    finally:
        decoder.rotary_emb.coordinates = None
    return torch.cat(states, dim=1)


def _distance(states: Tensor, wanted: Tensor) -> float:
    return float((states.float() - wanted.float()).norm() / wanted.float().norm())


def _tolerance(states: Tensor) -> float:
    return 1e-3 if states.dtype == torch.float32 else 0.1
